"""Property: parallel, recurrent and chunk-by-chunk attention agree with the quadratic form, whatever the shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdistill.runtime.attention import attend, attention_weights
from flexdistill.runtime.registry import feature_map_class, kernels
from tests.runtime.kernels import CAUSAL_KERNELS, LEARNED_KERNELS, kernel

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
property_test = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def attentions(draw, causal):
    """A feature map and its arguments: query, key, value, visible, scaling."""
    variant, component = draw(st.sampled_from(CAUSAL_KERNELS if causal else kernels()))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, value_size = draw(st.sampled_from([2, 4, 8, 16])), draw(st.sampled_from([1, 4, 8]))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    learned, kind = (variant, component) in LEARNED_KERNELS, feature_map_class(variant, component)
    feature_map = kernel(
        variant,
        component,
        seed=draw(st.integers(0, 2**16)),
        num_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=size,
        num_frequencies=draw(st.integers(1, 12)) if learned and kind.takes_frequencies and not kind.matrices else size,
        tied=draw(st.booleans()) if learned else True,
        key_heads=draw(st.sampled_from(["query", "kv"])),
        window=draw(st.integers(0, 20)) if causal else 0,
        causal=causal,
    )
    spec = feature_map.spec
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    query = torch.randn(batch, spec.num_heads, length, size).to(dtype)
    key, value = (torch.randn(batch, kv_heads, length, n).to(dtype) for n in (size, value_size))
    visible = None
    if draw(st.booleans()):
        left, right = draw(st.integers(0, length - 1)), draw(st.integers(0, length - 1))
        visible = torch.ones(batch, length, dtype=torch.bool)
        visible[0, :left] = False
        visible[-1, length - right :] = False
    return feature_map, query, key, value, visible, draw(st.sampled_from([1.0, size**-0.5]))


def quadratic(feature_map, query, key, value, visible, scaling):
    weights = attention_weights(feature_map, query, key, scaling=scaling, visible=visible)
    return weights @ value.float().repeat_interleave(weights.shape[1] // value.shape[1], dim=1)


def assert_agree(actual, expected, dtype):
    assert actual.dtype == dtype and actual.isfinite().all()
    assert (actual.float() - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp_min(1)


@property_test
@given(attentions(causal=True))
@torch.no_grad()
def test_parallel_form_is_quadratic(case):
    feature_map, query, key, value, visible, scaling = case
    output, _ = attend(feature_map, query, key, value, scaling=scaling, visible=visible)
    assert_agree(output, quadratic(*case), query.dtype)


@property_test
@given(attentions(causal=False))
@torch.no_grad()
def test_bidirectional_form_is_quadratic(case):
    feature_map, query, key, value, visible, scaling = case
    output, memory = attend(feature_map, query, key, value, scaling=scaling, visible=visible)
    assert memory is None
    assert_agree(output, quadratic(*case), query.dtype)


@property_test
@given(attentions(causal=True), st.lists(st.integers(1, 40), max_size=12))
@torch.no_grad()
def test_any_split_is_quadratic(case, sizes):
    feature_map, query, key, value, visible, scaling = case
    length, start, memory, outputs, sizes_seen = query.shape[-2], 0, None, [], set()
    for size in [*sizes, length]:
        part = slice(start, min(start + size, length))
        if part.start == part.stop:
            break
        seen = None if visible is None else visible[:, part]
        tensors = (x[:, :, part] for x in (query, key, value))
        output, memory = attend(feature_map, *tensors, scaling=scaling, visible=seen, memory=memory)
        outputs.append(output)
        sizes_seen.add(sum(x.numel() for x in (memory.key, memory.value, memory.visible, memory.state.values)))
        start = part.stop
    assert_agree(torch.cat(outputs, dim=2), quadratic(*case), query.dtype)
    assert len(sizes_seen) == 1  # the memory does not grow


@property_test
@given(attentions(causal=True).filter(lambda case: case[1].shape[-2] <= 40))
@torch.no_grad()
def test_token_by_token_is_quadratic(case):
    feature_map, query, key, value, visible, scaling = case
    memory, outputs = None, []
    for t in range(query.shape[-2]):
        seen = None if visible is None else visible[:, t, None]
        tensors = (x[:, :, t, None] for x in (query, key, value))
        output, memory = attend(feature_map, *tensors, scaling=scaling, visible=seen, memory=memory)
        outputs.append(output)
    assert_agree(torch.cat(outputs, dim=2), quadratic(*case), query.dtype)
