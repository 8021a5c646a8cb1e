"""Sinks against what they mean: exact softmax attention to the first visible tokens, beside the window."""

import pytest
import torch

from flexdistill.attention_modes import AttentionCall
from flexdistill.runtime.attention import attend

from .kernels import HEADS, KV_HEADS, SCALING, kernel, query_key_value, relative_error
from .reference import reference_attention

WINDOW, SINKS, LENGTH = 5, 3, 150


def visibility(side: str) -> torch.Tensor | None:
    if side == "none":
        return None
    visible = torch.ones(2, LENGTH, dtype=torch.bool)
    visible[0, :40] = False
    visible[1, 1 if side == "middle" else 0 :: 2] = side != "middle"
    return visible


every_side = pytest.mark.parametrize("side", ["none", "left", "middle"])


def near(visible: torch.Tensor | None) -> torch.Tensor:
    """Which keys are a query's nearest or its sequence's first visible ones: (B or 1, 1, T, T)."""
    visible = torch.ones(1, LENGTH, dtype=torch.bool) if visible is None else visible
    pairs = torch.zeros(len(visible), 1, LENGTH, LENGTH, dtype=torch.bool)
    for row, seen in enumerate(visible.tolist()):
        positions = [position for position, is_seen in enumerate(seen) if is_seen]
        for query in range(LENGTH):
            for key in positions:
                pairs[row, 0, query, key] = key <= query and (query - key < WINDOW or key in positions[:SINKS])
    return pairs


def softmax(query, key, value, allowed):
    key, value = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
    return output.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


@every_side
@pytest.mark.parametrize("pieces", [[LENGTH], [2, 1, 1, 60, 1, 85], [1] * LENGTH], ids=["whole", "pieces", "tokens"])
@torch.no_grad()
def test_without_its_kernel_it_is_softmax_over_window_and_sinks(side, pieces):
    feature_map = kernel("nonstationary", "hyperbolic", window=WINDOW, sinks=SINKS)
    feature_map.window_gate.fill_(-20.0)  # the kernel's weight is exp(-200)
    inputs, visible = query_key_value(LENGTH), visibility(side)
    memory, outputs, start = None, [], 0
    for size in pieces:
        part = slice(start, start + size)
        seen = None if visible is None else visible[:, part]
        output, memory = attend(
            feature_map, *(x[:, :, part] for x in inputs), scaling=SCALING, visible=seen, memory=memory
        )
        outputs.append(output)
        start += size
    assert relative_error(torch.cat(outputs, dim=2), softmax(*inputs, near(visible))) <= 1e-5


@every_side
@pytest.mark.parametrize("variant", ["nonstationary", "nonstationary+decay"])
@torch.no_grad()
def test_against_the_formula_in_float64(side, variant):
    feature_map = kernel(variant, "hyperbolic", window=WINDOW, sinks=SINKS)
    inputs, visible = query_key_value(LENGTH), visibility(side)
    expected = reference_attention(feature_map, dict(feature_map.named_parameters()), *inputs, SCALING, visible)
    actual, _ = attend(feature_map, *inputs, scaling=SCALING, visible=visible)
    assert relative_error(actual, expected) <= 1e-5
    without, _ = attend(kernel(variant, "hyperbolic", window=WINDOW), *inputs, scaling=SCALING, visible=visible)
    assert relative_error(without, expected) > 1e-2


@torch.no_grad()
def test_window_only_keeps_the_sinks():
    feature_map = kernel("nonstationary", "hyperbolic", window=WINDOW, sinks=SINKS)
    module = torch.nn.Module()
    module.flexformer = feature_map
    inputs = query_key_value(LENGTH)
    actual = AttentionCall(module, *inputs, None, {"scaling": SCALING}).window_only()
    assert relative_error(actual.transpose(1, 2), softmax(*inputs, near(None))) <= 1e-5


def test_packed_sequences_have_sinks_of_their_own():
    feature_map = kernel("stationary", "trigonometric", window=WINDOW, sinks=SINKS)
    inputs = [x[:1] for x in query_key_value(LENGTH)]
    packed, _ = attend(feature_map, *inputs, scaling=SCALING, keep_memory=False, boundaries=[0, 60, 62, LENGTH])
    for part in (slice(0, 60), slice(60, 62), slice(62, LENGTH)):
        alone, _ = attend(feature_map, *(x[:, :, part] for x in inputs), scaling=SCALING, keep_memory=False)
        assert torch.equal(packed[:, :, part], alone)


def test_sinks_past_the_sequence_are_softmax_alone():
    feature_map = kernel("nonstationary", "hyperbolic", window=1, sinks=LENGTH)
    inputs = query_key_value(LENGTH)
    actual, _ = attend(feature_map, *inputs, scaling=SCALING)
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    assert relative_error(actual, softmax(*inputs, causal)) <= 1e-5
