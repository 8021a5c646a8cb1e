import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexdistill.runtime import attention, linear_attention
from flexdistill.runtime.attention import SIGNED_GUARD, attend, attention_weights, count_guards
from flexdistill.runtime.feature_maps import Features
from flexdistill.runtime.linear_attention import (
    State,
    bidirectional_sums,
    chunked_sums,
    quadratic_sums,
    recurrent_sums,
)
from flexdistill.runtime.registry import build_feature_map
from tests.runtime.kernels import (
    CAUSAL_KERNELS,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    SCALING,
    every_causal_kernel,
    every_form,
    every_kernel,
    every_key_heads,
    kernel,
    kernel_spec,
    query_key_value,
    relative_error,
)

every_window = pytest.mark.parametrize("window", [0, 5, 64])
# a purely linear kernel, beside a window, and beside a window and sinks
NEAR = {"linear": {}, "window": {"window": 5}, "sinks": {"window": 5, "sinks": 3}}
every_near = pytest.mark.parametrize("near", NEAR.values(), ids=NEAR)
SUMS = {"chunked": chunked_sums, "recurrent": recurrent_sums}
PADDINGS = ["none", "left", "right", "middle"]


def padding_mask(kind, length):
    """(2, T) bool; the two rows are padded differently."""
    visible = torch.ones(2, length, dtype=torch.bool)
    share = length // 3
    if kind == "left":
        visible[0, :share] = False
        visible[1, : share // 2] = False
    elif kind == "right":
        visible[0, length - share :] = False
    elif kind == "middle":
        visible[0, share : 2 * share] = False
        visible[1, ::3] = False
    return None if kind == "none" else visible


def reference(feature_map, query, key, value, visible=None, scaling=SCALING):
    weights = attention_weights(feature_map, query, key, scaling=scaling, visible=visible)
    return weights @ value.float().repeat_interleave(HEADS // KV_HEADS, dim=1)


def gradients(output, leaves):
    """One vector of the gradients of all leaves."""
    torch.manual_seed(11)
    direction = torch.randn(output.shape)
    grads = torch.autograd.grad((output * direction).sum(), leaves, allow_unused=True)
    return torch.cat(
        [torch.zeros_like(x).flatten() if g is None else g.flatten() for x, g in zip(leaves, grads, strict=True)]
    )


def assert_same_gradients(actual, expected, leaves, tolerance):
    actual, expected = gradients(actual, leaves), gradients(expected, leaves)
    assert expected.norm() > 0
    assert (actual - expected).norm() <= tolerance * expected.norm()


@every_form
@every_key_heads
@every_window
@pytest.mark.parametrize("length", [1, 63, 500])
@pytest.mark.parametrize("padding", PADDINGS)
def test_chunked_is_the_quadratic_reference(variant, component, key_heads, window, length, padding):
    feature_map = kernel(variant, component, key_heads=key_heads, window=window)
    leaves = query_key_value(length)
    visible = padding_mask(padding, length)
    expected = reference(feature_map, *leaves, visible)
    actual, _ = attend(feature_map, *leaves, scaling=SCALING, visible=visible)
    assert expected.abs().max() > 0.1
    assert relative_error(actual, expected) <= 1e-5
    assert_same_gradients(actual, expected, [*leaves, *feature_map.parameters()], 1e-5)


@every_form
@every_key_heads
@every_near
@pytest.mark.parametrize("padding", ["none", "middle"])
def test_recurrent_is_the_quadratic_reference(variant, component, key_heads, near, padding, monkeypatch):
    monkeypatch.setattr(attention, "causal_sums", recurrent_sums)
    feature_map = kernel(variant, component, key_heads=key_heads, **near)
    leaves = query_key_value(63)
    visible = padding_mask(padding, 63)
    expected = reference(feature_map, *leaves, visible)
    actual, _ = attend(feature_map, *leaves, scaling=SCALING, visible=visible)
    assert relative_error(actual, expected) <= 1e-5
    assert_same_gradients(actual, expected, [*leaves, *feature_map.parameters()], 1e-5)


@every_causal_kernel
def test_recurrent_at_length_500(variant, component, monkeypatch):
    monkeypatch.setattr(attention, "causal_sums", recurrent_sums)
    feature_map = kernel(variant, component, window=5)
    leaves = query_key_value(500)
    with torch.no_grad():
        actual, _ = attend(feature_map, *leaves, scaling=SCALING, visible=padding_mask("middle", 500))
        assert relative_error(actual, reference(feature_map, *leaves, padding_mask("middle", 500))) <= 1e-5


@every_form
@every_key_heads
@pytest.mark.parametrize("form", SUMS)
def test_row_sums_of_wide_kernels(variant, component, key_heads, form):
    """Sums before division, where signed features cancel: relative to the Cauchy-Schwarz bound."""
    feature_map = kernel(variant, component, key_heads=key_heads, noise=1.0)
    query, key, value = query_key_value(150)
    value = value.repeat_interleave(feature_map.spec.num_state_heads // KV_HEADS, dim=1)
    with torch.no_grad():
        features = feature_map(query, key)
        features.decay, features.signed = feature_map.decay_rates(), feature_map.signed
        rows, _ = SUMS[form](features, value)
        expected = quadratic_sums(features, value, torch.ones(150, 150, dtype=torch.bool).tril())
    torch.testing.assert_close(rows.maximum, expected.maximum, rtol=0, atol=0)
    torch.testing.assert_close(rows.bound, expected.bound, rtol=1e-5, atol=0)
    assert ((rows.denominator - expected.denominator).abs() <= 1e-5 * expected.bound).all()
    assert ((rows.numerator - expected.numerator).abs() <= 1e-4 * expected.bound[..., None]).all()
    assert (expected.denominator.abs() <= expected.bound * (1 + 1e-5)).all()


@every_form
@every_key_heads
@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (5, 0), (64, 0), (5, 4)])
@pytest.mark.parametrize("parts", [[40, 90, 1, 1, 68], [1, 1, 1, 197], [64, 64, 64, 8]], ids=str)
def test_any_split_into_calls(variant, component, key_heads, window, sinks, parts):
    feature_map = kernel(variant, component, key_heads=key_heads, window=window, sinks=sinks)
    leaves = query_key_value(sum(parts))
    visible = padding_mask("middle", sum(parts))
    expected, expected_memory = attend(feature_map, *leaves, scaling=SCALING, visible=visible)
    memory, outputs, start = None, [], 0
    for part in parts:
        span = slice(start, start + part)
        pieces = [leaf[:, :, span] for leaf in leaves]
        output, memory = attend(feature_map, *pieces, scaling=SCALING, visible=visible[:, span], memory=memory)
        outputs.append(output)
        start += part
    actual = torch.cat(outputs, dim=2)
    assert relative_error(actual, expected) <= 1e-5
    assert_same_gradients(actual, expected, [*leaves, *feature_map.parameters()], 1e-5)
    for name in ("key", "value", "visible"):
        torch.testing.assert_close(getattr(memory, name), getattr(expected_memory, name), rtol=0, atol=0)
    if sinks:
        torch.testing.assert_close(vars(memory.sinks), vars(expected_memory.sinks), rtol=0, atol=0)
    for name in ("values", "norms", "maximum"):
        expected_field = getattr(expected_memory.state, name)
        assert relative_error(getattr(memory.state, name), expected_field) <= 1e-5


@every_causal_kernel
@every_near
def test_calls_are_one_call(variant, component, near):
    """For every kernel, what `test_any_split_into_calls` checks for each form."""
    feature_map = kernel(variant, component, **near)
    leaves = query_key_value(90)
    visible = padding_mask("left", 90)
    with torch.no_grad():
        expected = reference(feature_map, *leaves, visible)
        memory, outputs = None, []
        for span in (slice(0, 3), slice(3, 88), slice(88, 89), slice(89, 90)):
            pieces = [leaf[:, :, span] for leaf in leaves]
            output, memory = attend(feature_map, *pieces, scaling=SCALING, visible=visible[:, span], memory=memory)
            outputs.append(output)
    assert memory.seen == 90
    assert relative_error(torch.cat(outputs, dim=2), expected) <= 2e-5


@every_causal_kernel
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_several_blocks(variant, component, chunks, monkeypatch):
    monkeypatch.setattr(linear_attention, "CHUNKS_PER_BLOCK", chunks)
    feature_map = kernel(variant, component, key_heads="kv")
    leaves = query_key_value(500)
    actual, _ = attend(feature_map, *leaves, scaling=SCALING, visible=padding_mask("left", 500))
    expected = reference(feature_map, *leaves, padding_mask("left", 500))
    assert relative_error(actual, expected) <= 1e-5
    assert_same_gradients(actual, expected, [*leaves, *feature_map.parameters()], 1e-5)


@every_causal_kernel
@pytest.mark.parametrize("window", [0, 5])
def test_bf16_inputs(variant, component, window):
    feature_map = kernel(variant, component, window=window)
    leaves = query_key_value(150, dtype=torch.bfloat16)
    actual, memory = attend(feature_map, *leaves, scaling=SCALING)
    assert actual.dtype == torch.bfloat16 and memory.state.values.dtype == torch.float32
    expected = reference(feature_map, *[leaf.float() for leaf in leaves])
    assert relative_error(actual.float(), expected) <= 1e-2
    assert_same_gradients(actual.float(), expected, leaves, 1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        autocast, _ = attend(feature_map, *leaves, scaling=SCALING)
    torch.testing.assert_close(autocast, actual, rtol=0, atol=0)


@every_kernel
@every_key_heads
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("length", [1, 63])
def test_bidirectional(variant, component, key_heads, padding, length):
    feature_map = kernel(variant, component, key_heads=key_heads, causal=False)
    leaves = query_key_value(length)
    visible = padding_mask(padding, length)
    expected = reference(feature_map, *leaves, visible)
    actual, memory = attend(feature_map, *leaves, scaling=SCALING, visible=visible)
    assert memory is None
    assert relative_error(actual, expected) <= 1e-5
    # signed rows may cancel down to the guard
    tolerance = 5e-5 if feature_map.signed else 1e-5
    assert_same_gradients(actual, expected, [*leaves, *feature_map.parameters()], tolerance)


@every_causal_kernel
@every_near
def test_no_query_sees_later_keys(variant, component, near):
    feature_map = kernel(variant, component, **near)
    query, key, value = query_key_value(130)
    before, _ = attend(feature_map, query, key, value, scaling=SCALING)
    later = [torch.cat([x[:, :, :100], 9 * torch.randn_like(x[:, :, 100:])], dim=2) for x in (key, value)]
    after, _ = attend(feature_map, query, *later, scaling=SCALING)
    torch.testing.assert_close(after[:, :, :100], before[:, :, :100], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[:, :, 100:], before[:, :, 100:])


@every_causal_kernel
@every_key_heads
@every_near
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_padded_keys_do_not_count(variant, component, key_heads, near, causal):
    feature_map = kernel(variant, component, key_heads=key_heads, **(near if causal else {}), causal=causal)
    query, key, value = query_key_value(80)
    alone, _ = attend(feature_map, query[:, :, 30:], key[:, :, 30:], value[:, :, 30:], scaling=SCALING)
    visible = torch.ones(2, 80, dtype=torch.bool)
    visible[:, :30] = False
    with torch.no_grad():
        for leaf in (key, value):
            leaf[:, :, :30] *= 20
    padded, _ = attend(feature_map, query, key, value, scaling=SCALING, visible=visible)
    assert relative_error(padded[:, :, 30:], alone) <= 1e-5


@every_form
@every_key_heads
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("length", [1, 70])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_rows_without_keys_are_zero(variant, component, key_heads, window, length, causal):
    if window and not causal:
        window = 0
    feature_map = kernel(variant, component, key_heads=key_heads, window=window, causal=causal)
    leaves = query_key_value(length)
    visible = torch.zeros(2, length, dtype=torch.bool)
    visible[1, length // 2 :] = True
    output, memory = attend(feature_map, *leaves, scaling=SCALING, visible=visible)
    assert (output[0] == 0).all() and (output[1, :, -1] != 0).any()
    if causal:
        assert (output[1, :, : length // 2] == 0).all()
    torch.testing.assert_close(reference(feature_map, *leaves, visible)[0], torch.zeros_like(output[0]))
    vector = gradients(output, [*leaves, *feature_map.parameters()])
    assert vector.isfinite().all() and vector.norm() > 0
    if causal:  # and the state before any key is a state to go on from
        again, _ = attend(feature_map, *leaves, scaling=SCALING, memory=memory)
        alone, _ = attend(feature_map, *leaves, scaling=SCALING)
        assert relative_error(again[0], alone[0]) <= 1e-5


def random_features(length, spread, seed=0, dtype=torch.float32):
    """Positive features with log-weights that span +-spread, and values."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.rand(1, 2, length, 6, generator=generator) * 0.9 + 0.1 for _ in range(2))
    log_weight = (torch.rand(1, 2, length, generator=generator) * 2 - 1) * spread
    value = torch.randn(1, 2, length, 3, generator=generator)
    tensors = (query, torch.zeros(1, 2, length), key, log_weight)
    return Features(*(x.to(dtype) for x in tensors)), value.to(dtype)


@pytest.mark.parametrize("spread", [1, 60, 300])
@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize("order", ["random", "rising", "falling"])
def test_log_weights_that_span_many_magnitudes(spread, form, order):
    features, value = random_features(200, spread)
    if order != "random":
        features.key_log_weight = features.key_log_weight.sort(-1, descending=order == "falling").values
    features.key_log_weight.requires_grad_()
    rows, _ = SUMS[form](features, value)
    weight = (features.key_log_weight.double()[:, :, None] - spread).masked_fill(
        ~torch.ones(200, 200, dtype=torch.bool).tril(), -torch.inf
    )
    weight = (weight - weight.detach().amax(-1, keepdim=True)).exp()
    scores = features.query.double() @ features.key.double().transpose(-1, -2) * weight
    expected = scores @ value.double() / scores.sum(-1, keepdim=True)
    actual = rows.numerator / rows.denominator[..., None]
    assert relative_error(actual, expected) <= 1e-5
    (ours,) = torch.autograd.grad(actual.square().sum(), features.key_log_weight)
    (theirs,) = torch.autograd.grad(expected.square().sum(), features.key_log_weight)
    assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def brute_force(feature_map, query, key, value, scaling, visible):
    """Float64 attention of the hyperbolic nonstationary kernel, from its formula, row by row."""
    spec = feature_map.spec
    p_query = {n: p.double() for n, p in feature_map.query_parameters.items()}
    p_key = p_query if spec.tied else {n: p.double() for n, p in feature_map.key_parameters.items()}

    def log_phi(x, p, h):
        first, second = x @ p["w1"][h], x @ p["w2"][h]
        log_cosh = torch.logaddexp(second, -second) - torch.log(torch.tensor(2.0, dtype=torch.float64))
        return torch.cat([first + log_cosh, -first + log_cosh], -1) + p["log_amplitude"][h]

    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, size = query.shape
    output = torch.zeros(batch, heads, length, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = h * key.shape[1] // heads
            state = h if spec.key_heads == "query" else kv
            k = key[b, kv]
            short = k * feature_map.key_unit[state].double()
            norm_factor = 0.1 * feature_map.norm_factor[state].double()
            log_key = log_phi(short, p_key, state) + norm_factor * (short**2).sum(-1)[:, None]
            log_query = log_phi(query[b, h] * scaling * size**0.5 * feature_map.query_unit[h].double(), p_query, h)
            far = torch.logsumexp(log_query[:, None] + log_key[None], -1) - torch.log(
                torch.tensor(2.0 * spec.num_frequencies, dtype=torch.float64)
            )
            near = scaling * query[b, h] @ k.T
            for i in range(length):
                logits = []
                for j in range(length):
                    if not visible[b, j] or j > i:
                        logits.append(torch.tensor(-torch.inf, dtype=torch.float64))
                    elif i - j < spec.window:
                        logits.append(near[i, j])
                    else:
                        gate = 10 * feature_map.window_gate[h].double() if spec.window else 0.0
                        logits.append(far[i, j] + gate)
                logits = torch.stack(logits)
                if (logits > -torch.inf).any():
                    output[b, h, i] = logits.softmax(-1) @ value[b, kv]
    return output


@every_key_heads
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaling", [SCALING, 0.7])
def test_hyperbolic_against_its_formula_in_float64(key_heads, window, tied, scaling):
    tied = tied and key_heads == "query"
    feature_map = kernel("nonstationary", "hyperbolic", key_heads=key_heads, window=window, tied=tied, noise=0.3)
    leaves = query_key_value(24)
    visible = padding_mask("middle", 24)
    with torch.no_grad():
        expected = brute_force(feature_map, *leaves, scaling, visible)
        actual, _ = attend(feature_map, *leaves, scaling=scaling, visible=visible)
        weights = reference(feature_map, *leaves, visible, scaling)
    assert relative_error(actual, expected) <= 1e-5
    assert relative_error(weights, expected) <= 1e-5


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 10.0, 60.0])
def test_extreme_query_scales_against_float64(window, scale):
    feature_map = kernel("nonstationary", "hyperbolic", window=window, noise=0.2)
    with torch.no_grad():
        feature_map.norm_factor.fill_(10.0)
    query, key, value = query_key_value(24, scale=scale)
    with torch.no_grad():
        key *= torch.linspace(0.2, 3, 24)[:, None]
        features = feature_map(query, key)
        assert features.key_log_weight.max() > 60
        expected = brute_force(feature_map, query, key, value, SCALING, torch.ones(2, 24, dtype=torch.bool))
        actual, _ = attend(feature_map, query, key, value, scaling=SCALING)
    # exponents of several hundred have float32 errors of 1e-5 and more each
    assert relative_error(actual, expected) <= 1e-3
    assert gradients(attend(feature_map, query, key, value, scaling=SCALING)[0], [query, key, value]).isfinite().all()


def test_window_alone_is_softmax():
    feature_map = kernel("nonstationary", "hyperbolic", window=64)
    query, key, value = query_key_value(40)
    repeated = [x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, is_causal=True)
    actual, _ = attend(feature_map, query, key, value, scaling=SCALING)
    assert relative_error(actual, expected) <= 1e-5


@every_causal_kernel
@every_near
def test_weights_are_a_distribution(variant, component, near):
    feature_map = kernel(variant, component, **near, noise=0.5)
    query, key, _ = query_key_value(50)
    with count_guards() as guards:
        weights = attention_weights(feature_map, query, key, scaling=SCALING)
    assert weights.dtype == torch.float32 and weights.shape == (2, HEADS, 50, 50)
    assert (weights.triu(1) == 0).all()
    if not feature_map.signed:
        assert (weights >= 0).all()
        sums = weights.sum(-1)
        # a relu can leave a query and its first keys nothing in common; such rows are counted
        vanishing = sums == 0
        assert (vanishing.sum() == guards.guarded or near) and vanishing.float().mean() < 0.02
        torch.testing.assert_close(sums[~vanishing], torch.ones_like(sums[~vanishing]))


class LargestTensor(TorchDispatchMode):
    """Records the most elements that any operation's output has."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(result) if torch.is_tensor(x)]
        self.numel = max([self.numel, *sizes])
        return result


@every_causal_kernel
@pytest.mark.parametrize("near", [{}, {"window": 16, "sinks": 4}], ids=["linear", "sinks"])
def test_no_tensor_is_quadratic_in_the_length(variant, component, near):
    spec = kernel_spec(variant, component, num_heads=2, num_key_value_heads=1, **near)
    feature_map = build_feature_map(spec)
    feature_map.reset_parameters()
    largest = {}
    for length in (2048, 4096):
        query, key, value = (torch.randn(1, h, length, HEAD_DIM, requires_grad=True) for h in (2, 1, 1))
        with LargestTensor() as recorder:
            attend(feature_map, query, key, value, scaling=SCALING)[0].sum().backward()
        largest[length] = recorder.numel
    assert largest[4096] <= 4096**2 / 8
    assert largest[4096] <= 2.1 * largest[2048]


def test_the_reference_is_quadratic():
    """The check above can fail."""
    query, key, _ = query_key_value(512, batch=1)
    with LargestTensor() as recorder:
        attention_weights(kernel("stationary", "hyperbolic"), query, key, scaling=SCALING)
    assert recorder.numel >= HEADS * 512**2


@every_causal_kernel
@every_key_heads
@every_near
def test_memory_size_does_not_grow(variant, component, key_heads, near):
    feature_map = kernel(variant, component, key_heads=key_heads, **near)

    def size(length):
        with torch.no_grad():
            _, memory = attend(feature_map, *query_key_value(length, batch=1), scaling=SCALING)
        tensors = [*vars(memory.state).values(), memory.key, memory.value, memory.visible]
        tensors += vars(memory.sinks).values() if near.get("sinks") else []
        # what is held, not what is seen of it: a small view would keep a large buffer alive
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    assert size(64) == size(2048) == size(1) > 0


def cancelling_features(cosines):
    """A signed kernel on two keys at angle 0; query i is at an angle with the given cosine."""
    feature_map = kernel("stationary", "trigonometric", num_frequencies=1, head_dim=1, tied=True, noise=0)
    with torch.no_grad():
        feature_map.query_parameters["w1"].fill_(1.0)
    query = torch.tensor(cosines).acos()[None, None, :, None].expand(1, HEADS, -1, 1)
    length = len(cosines)
    return feature_map, query, torch.zeros(1, KV_HEADS, length, 1), torch.ones(1, KV_HEADS, length, 1)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_guard_raises_denominators_that_cancel(causal):
    cosines = [1.0, 0.001, -0.5, 0.5]
    feature_map, query, key, value = cancelling_features(cosines)
    feature_map.spec = dataclasses.replace(feature_map.spec, causal=causal)
    with count_guards() as counter:
        output, _ = attend(feature_map, query, key, value, scaling=1.0)
    # every key weighs the cosine, and the bound of each row is its number of keys
    expected = torch.tensor([cosine / max(cosine, SIGNED_GUARD) for cosine in cosines], dtype=torch.float32)
    torch.testing.assert_close(output[0, 0, :, 0], expected, rtol=1e-3, atol=1e-4)
    assert int(counter.guarded) == 2 * HEADS and counter.rows == 4 * HEADS
    with count_guards() as counter:
        weights = attention_weights(feature_map, query, key, scaling=1.0)
    torch.testing.assert_close((weights @ value.repeat_interleave(2, 1))[0, 0, :, 0], expected, rtol=1e-3, atol=1e-4)
    assert int(counter.guarded) == 2 * HEADS
    before = counter.rows
    attend(feature_map, query, key, value, scaling=1.0)
    assert counter.rows == before


@every_kernel
def test_padded_rows_are_not_guarded(variant, component):
    feature_map = kernel(variant, component, noise=0.05)
    visible = torch.ones(2, 30, dtype=torch.bool)
    visible[:, :20] = False
    with count_guards() as counter:
        attend(feature_map, *query_key_value(30), scaling=SCALING, visible=visible)
    assert counter.rows == 2 * HEADS * 30
    with count_guards() as alone:
        attend(feature_map, *(x[:, :, 20:] for x in query_key_value(30)), scaling=SCALING)
    assert int(counter.guarded) == int(alone.guarded)


@pytest.mark.parametrize("spread", [1, 60])
def test_bidirectional_sums_need_no_mask(spread):
    features, value = random_features(90, spread)
    rows = bidirectional_sums(features, value)
    expected = quadratic_sums(features, value, torch.ones(1, 1, dtype=torch.bool))
    for name in vars(expected):
        assert relative_error(getattr(rows, name), getattr(expected, name)) <= 1e-5


def test_empty_state_is_neutral():
    features, value = random_features(70, 5)
    for form in SUMS.values():
        fresh, state = form(features, value)
        given_empty, same_state = form(features, value, State.empty(features, value))
        for left, right in ((fresh, given_empty), (state, same_state)):
            for name, expected in vars(left).items():
                torch.testing.assert_close(getattr(right, name), expected, rtol=0, atol=0)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_forms_agree_whatever_the_shapes(data):
    draw = data.draw
    variant, component = draw(st.sampled_from(CAUSAL_KERNELS))
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    settings_ = dict(
        num_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.integers(1, 6)),
        num_frequencies=draw(st.integers(1, 7)),
        window=draw(st.integers(0, 9)),
        key_heads=draw(st.sampled_from(["query", "kv"])),
    )
    if variant == "hedgehog":
        settings_["tied"] = draw(st.booleans())
    feature_map = kernel(variant, component, noise=0.05, **settings_)
    batch, length, value_dim = draw(st.integers(1, 3)), draw(st.integers(1, 150)), draw(st.integers(1, 4))
    torch.manual_seed(draw(st.integers(0, 100)))
    size = settings_["head_dim"]
    query, key = torch.randn(batch, kv_heads * group, length, size), torch.randn(batch, kv_heads, length, size)
    value = torch.randn(batch, kv_heads, length, value_dim)
    visible = torch.rand(batch, length) > draw(st.sampled_from([0.0, 0.3, 0.9]))
    cuts = sorted(draw(st.lists(st.integers(0, length), max_size=4)))
    edges = sorted({0, length, *cuts})
    with torch.no_grad():
        weights = attention_weights(feature_map, query, key, scaling=0.4, visible=visible)
        expected = weights @ value.repeat_interleave(group, dim=1)
        memory, outputs = None, []
        for start, stop in zip(edges, edges[1:], strict=False):
            pieces = [x[:, :, start:stop] for x in (query, key, value)]
            output, memory = attend(feature_map, *pieces, scaling=0.4, visible=visible[:, start:stop], memory=memory)
            outputs.append(output)
    torch.testing.assert_close(torch.cat(outputs, dim=2), expected, rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_dtype():
    """Rotary embeddings leave queries and keys in float32 there; torch casts them for its own attention."""
    feature_map = kernel("nonstationary", "hyperbolic")
    inputs = [x.detach() for x in query_key_value(30)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = attend(feature_map, *inputs, scaling=SCALING)
    expected, _ = attend(feature_map, *(x.bfloat16() for x in inputs), scaling=SCALING)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, expected)
