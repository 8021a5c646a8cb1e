"""Property: parallel, recurrent and chunk-by-chunk attention agree with the quadratic form, whatever the shapes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexdistill.runtime.attention import attend, attention_weights
from flexdistill.runtime.cache import _tensors
from flexdistill.runtime.registry import feature_map_class, kernels
from flexdistill.runtime.rotary import part_of
from tests.runtime.kernels import CAUSAL_KERNELS, LEARNED_KERNELS, kernel, rotation

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
property_test = settings(max_examples=40, deadline=None, derandomize=True)


@st.composite
def attentions(draw, causal):
    """A feature map and its arguments: query, key, value, visible, scaling, rotation."""
    variant, component = draw(st.sampled_from(CAUSAL_KERNELS if causal else kernels()))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size, value_size = draw(st.sampled_from([2, 4, 8, 16])), draw(st.sampled_from([1, 4, 8]))
    batch, length = draw(st.integers(1, 3)), draw(st.integers(1, 150))
    learned, kind = (variant, component) in LEARNED_KERNELS, feature_map_class(variant, component)
    window = draw(st.integers(0, 20)) if causal else 0
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
        window=window,
        sinks=draw(st.integers(0, 6)) if window else 0,
        causal=causal,
        rotary=draw(st.sampled_from([None, "halves"])),
        rotary_pairs=draw(st.integers(0, size // 2)),
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
    turns = rotation(length, size=size, start=draw(st.integers(0, 1000)))
    return feature_map, query, key, value, visible, draw(st.sampled_from([1.0, size**-0.5])), turns


def quadratic(feature_map, query, key, value, visible, scaling, turns):
    weights = attention_weights(feature_map, query, key, scaling=scaling, visible=visible, rotation=turns)
    return weights @ value.float().repeat_interleave(weights.shape[1] // value.shape[1], dim=1)


def in_parts(case, sizes):
    """The output of attention over one part of the sequence after the other, and the memory after each."""
    feature_map, query, key, value, visible, scaling, turns = case
    length, start, outputs, memories = query.shape[-2], 0, [], [None]
    for size in [*sizes, length]:
        part = slice(start, min(start + size, length))
        if part.start == part.stop:
            break
        seen = None if visible is None else visible[:, part]
        tensors = (x[:, :, part] for x in (query, key, value))
        arguments = dict(scaling=scaling, visible=seen, rotation=part_of(turns, 0, part))
        output, memory = attend(feature_map, *tensors, memory=memories[-1], **arguments)
        outputs.append(output)
        memories.append(memory)
        start = part.stop
    return torch.cat(outputs, dim=2), memories[1:]


def assert_quadratic(case, output):
    _, query, *_ = case
    expected = quadratic(*case)
    assert output.dtype == query.dtype and output.isfinite().all()
    assert (output.float() - expected).abs().max() <= TOLERANCE[query.dtype] * expected.abs().max().clamp_min(1)


@property_test
@given(attentions(causal=True))
@torch.no_grad()
def test_parallel_form_is_quadratic(case):
    output, _ = in_parts(case, [])
    assert_quadratic(case, output)


@property_test
@given(attentions(causal=False))
@torch.no_grad()
def test_bidirectional_form_is_quadratic(case):
    output, memories = in_parts(case, [])
    assert memories == [None]
    assert_quadratic(case, output)


@property_test
@given(attentions(causal=True), st.lists(st.integers(1, 40), max_size=12))
@torch.no_grad()
def test_any_split_is_quadratic(case, sizes):
    output, memories = in_parts(case, sizes)
    assert_quadratic(case, output)
    sizes_seen = {sum(x.numel() for x in _tensors(memory)) for memory in memories}
    assert len(sizes_seen) == 1  # the memory does not grow


@property_test
@given(attentions(causal=True).filter(lambda case: case[1].shape[-2] <= 40))
@torch.no_grad()
def test_token_by_token_is_quadratic(case):
    output, _ = in_parts(case, [1] * case[1].shape[-2])
    assert_quadratic(case, output)
