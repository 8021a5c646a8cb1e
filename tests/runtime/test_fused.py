"""The fused kernels against plain torch: on CPU through Triton's interpreter, on a GPU for real (tests/test_gpu.py)."""

import pytest
import torch

from flexdistill.runtime import backend
from flexdistill.runtime.attention import attend, attention_weights, count_guards
from flexdistill.runtime.backend import VARIABLE, BackendError, fused_operators
from flexdistill.runtime.feature_maps import constant_zeros
from flexdistill.runtime.near import kinds_and_spans
from flexdistill.runtime.registry import feature_map_class, kernels
from flexdistill.runtime.rotary import LAYOUTS, part_of, turned_back

from .kernels import HEADS, KV_HEADS, SCALING, kernel, query_key_value, relative_error, rotation

pytest.importorskip("triton")
FUSED = [pair for pair in kernels() if feature_map_class(*pair).has_spectrum]
FUSED += [("nonstationary+decay", "hyperbolic"), ("stationary+decay", "hyperbolic")]
every_fused_kernel = pytest.mark.parametrize(("variant", "component"), FUSED, ids=["-".join(pair) for pair in FUSED])
OPERATOR_CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
device = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def short_segments(monkeypatch):
    """Several segments per head at lengths that the interpreter can bear."""
    monkeypatch.setenv(VARIABLE, "triton")
    from flexdistill.runtime import launch

    monkeypatch.setattr(launch, "SHORTEST_SEGMENT", 64)


def padding(length: int, side: str) -> torch.Tensor | None:
    if side == "none":
        return None
    visible = torch.ones(2, length, dtype=torch.bool)
    if side == "left":
        visible[1, : length // 3] = False
    elif side == "right":
        visible[1, length - length // 3 :] = False
    else:
        visible[1] = False
    return visible


def both_backends(feature_map, inputs, monkeypatch, **arguments):
    """(output, gradients of inputs and parameters) by the fused kernels and by torch."""
    results = []
    leaves = [*inputs, *feature_map.parameters()]
    for name in ("triton", "torch"):
        monkeypatch.setenv(VARIABLE, name)
        output, _ = attend(feature_map, *inputs, scaling=SCALING, keep_memory=False, **arguments)
        generator = torch.Generator().manual_seed(5)
        direction = torch.randn(output.shape, generator=generator).to(output)
        gradients = torch.autograd.grad((output * direction).sum(), leaves, materialize_grads=True)
        results.append((output, gradients))
    return results


def assert_same(results, tolerance=2e-5):
    (output, gradients), (expected, expected_gradients) = results
    assert relative_error(output, expected) <= tolerance
    # one scale for all: a gradient that is exactly zero is noise beside the others
    scale = max(float(x.abs().max()) for x in expected_gradients)
    assert scale > 0
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert float((actual - wanted).abs().max()) <= tolerance * max(float(wanted.abs().max()), 2e-2 * scale)


@every_fused_kernel
@pytest.mark.parametrize(
    ("length", "window", "side", "key_heads"),
    [
        (1, 0, "none", "query"),
        (63, 0, "left", "kv"),
        (130, 0, "right", "query"),
        (150, 5, "left", "query"),
        (70, 64, "right", "kv"),
        (70, 100, "none", "query"),
    ],
)
def test_causal_attention_is_torchs(variant, component, length, window, side, key_heads, monkeypatch):
    feature_map = kernel(variant, component, window=window, key_heads=key_heads)
    inputs = query_key_value(length)
    results = both_backends(feature_map, inputs, monkeypatch, visible=padding(length, side))
    if length == 1:  # one key has weight 1 whatever the kernel says, so only values have a gradient
        results = [(output, gradients[2:3]) for output, gradients in results]
    assert_same(results)


@pytest.mark.parametrize(("length", "window", "side"), [(90, 0, "left"), (90, 5, "right"), (70, 100, "none")])
@pytest.mark.parametrize("key_heads", ["query", "kv"])
def test_attention_without_rotary_embedding_is_torchs(length, window, side, key_heads, monkeypatch):
    settings = dict(window=window, key_heads=key_heads, rotary="halves", rotary_pairs=1)
    feature_map = kernel("nonstationary+decay", "hyperbolic", **settings)
    arguments = dict(visible=padding(length, side), rotation=rotation(length))
    assert_same(both_backends(feature_map, query_key_value(length), monkeypatch, **arguments))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("length", "size", "kept"), [(1, 8, 0), (40, 8, 1), (19, 4, 1), (19, 6, 0), (5, 8, 4)])
@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_embedding_is_turned_back_as_by_torch(layout, length, size, kept, batch):
    query, _, _ = query_key_value(length)
    turns = [1.3 * x.repeat(batch, 1, 1) for x in rotation(length, size=size, start=7)]
    expected = turned_back(query, turns, layout, kept)
    fused = fused_operators(query.device)
    actual = fused.turned_back(query, turns, layout, kept)
    assert relative_error(actual, expected) <= 1e-6
    direction = torch.randn_like(query)
    wanted, found = (torch.autograd.grad((x * direction).sum(), query)[0] for x in (expected, actual))
    assert relative_error(found, wanted) <= 1e-6
    transposed = query.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(fused.turned_back(transposed, turns, layout, kept), actual)
    half = fused.turned_back(query.detach().bfloat16(), turns, layout, kept)
    assert half.dtype == torch.bfloat16 and relative_error(half.float(), expected) <= 1e-2


def test_turning_fits_torch():
    from flexdistill.runtime.fused_rotary import turn_op

    query, _, _ = query_key_value(5)
    torch.library.opcheck(turn_op, (query, *rotation(5), False, 1, 1, True), test_utils=OPERATOR_CHECKS)


@every_fused_kernel
@pytest.mark.parametrize(("length", "side"), [(63, "left"), (150, "none")])
def test_bidirectional_attention_is_torchs(variant, component, length, side, monkeypatch):
    feature_map = kernel(variant, component, causal=False)
    inputs = query_key_value(length)
    assert_same(both_backends(feature_map, inputs, monkeypatch, visible=padding(length, side)))


@pytest.mark.parametrize(("variant", "component"), [("nonstationary", "hyperbolic"), ("stationary", "trigonometric")])
@pytest.mark.parametrize("window", [0, 3])
def test_tied_maps_are_torchs(variant, component, window, monkeypatch):
    feature_map = kernel(variant, component, tied=True, window=window, key_heads="kv")
    assert_same(both_backends(feature_map, query_key_value(80), monkeypatch))


@pytest.mark.parametrize("window", [0, 4])
def test_rows_without_keys_are_zero(window, monkeypatch):
    feature_map = kernel("nonstationary", "hyperbolic", window=window)
    inputs = query_key_value(70)
    results = both_backends(feature_map, inputs, monkeypatch, visible=padding(70, "all"))
    assert_same(results)
    assert (results[0][0][1] == 0).all()


@every_fused_kernel
@pytest.mark.parametrize("window", [0, 5])
def test_packed_sequences_are_torchs(variant, component, window, monkeypatch):
    feature_map = kernel(variant, component, window=window)
    inputs = query_key_value(150, batch=1)
    results = both_backends(feature_map, inputs, monkeypatch, boundaries=[0, 3, 50, 51, 150])
    assert_same(results)
    alone, _ = attend(feature_map, *(x[:, :, 3:50] for x in inputs), scaling=SCALING, keep_memory=False)
    assert relative_error(results[0][0][:, :, 3:50], alone) <= 2e-5


@pytest.mark.parametrize("boundaries", [[0, 3], [1, 20], [0, 9, 9, 20]])
def test_wrong_boundaries_are_refused(boundaries):
    inputs = query_key_value(20, batch=1)
    with pytest.raises(ValueError, match="Boundaries must rise from 0 to the length 20"):
        attend(kernel("nonstationary", "hyperbolic"), *inputs, scaling=1.0, keep_memory=False, boundaries=boundaries)
    with pytest.raises(ValueError, match="batch of one, without a memory"):
        attend(kernel("nonstationary", "hyperbolic"), *inputs, scaling=1.0, boundaries=[0, 20])


@pytest.mark.parametrize("rising", [True, False])
@pytest.mark.parametrize("window", [0, 2])
def test_log_weights_over_120(rising, window, monkeypatch):
    """Within one chunk they rise or fall from -60 to 60, so no single scale serves all rows."""
    feature_map = kernel("nonstationary", "hyperbolic", window=window, noise=0.02)
    query, key, value = query_key_value(100)
    with torch.no_grad():
        feature_map.norm_factor.fill_(10.0)  # exp(|k|^2)
        lengths = torch.linspace(0, 120, 100).sqrt()
        if not rising:
            lengths = lengths.flip(0)
        key *= lengths[:, None] / key.norm(dim=-1, keepdim=True)
    results = both_backends(feature_map, [query, key, value], monkeypatch)
    assert_same(results, tolerance=3e-4)  # sums over |k|^2 of 120 cancel in float32


@every_fused_kernel
@pytest.mark.parametrize("window", [0, 5])
def test_state_carries_prefill_and_decoding(variant, component, window):
    feature_map = kernel(variant, component, window=window, key_heads="kv")
    query, key, value = (x.detach() for x in query_key_value(100))
    visible = padding(100, "left")
    weights = attention_weights(feature_map, query, key, scaling=SCALING, visible=visible)
    expected = (weights @ value.repeat_interleave(HEADS // KV_HEADS, dim=1)).detach()
    outputs, memory, start = [], None, 0
    with torch.no_grad():
        for size in (70, 1, 1, 1, 27):
            part = slice(start, start + size)
            tensors = (x[:, :, part] for x in (query, key, value))
            output, memory = attend(feature_map, *tensors, scaling=SCALING, visible=visible[:, part], memory=memory)
            outputs.append(output)
            start += size
    assert relative_error(torch.cat(outputs, dim=2), expected) <= 2e-5


def decoded_by_both(feature_map, batch, monkeypatch):
    """What the twelfth token gets after a prefill of eleven, by the fused kernels and by torch."""
    tensors, outputs = [x.detach() for x in query_key_value(12, batch=batch)], []
    for name in ("triton", "torch"):
        monkeypatch.setenv(VARIABLE, name)
        with torch.no_grad():
            _, memory = attend(feature_map, *(x[:, :, :11] for x in tensors), scaling=SCALING)
            outputs.append(attend(feature_map, *(x[:, :, 11:] for x in tensors), scaling=SCALING, memory=memory)[0])
    return outputs


@pytest.mark.parametrize("together", [1, 2, 16])
@pytest.mark.parametrize(
    ("variant", "component"), [("nonstationary+decay", "hyperbolic"), ("stationary", "trigonometric")]
)
def test_sequences_decoded_together(variant, component, together, monkeypatch):
    from flexdistill.runtime import fused

    monkeypatch.setattr(fused, "decoded_together", lambda *_: together)
    feature_map = kernel(variant, component, key_heads="kv")
    if feature_map.measures:  # units other than 1
        feature_map.calibrate(torch.linspace(15, 50, HEADS + KV_HEADS))
    assert relative_error(*decoded_by_both(feature_map, 5, monkeypatch)) <= 2e-5


@pytest.mark.parametrize(
    ("state_heads", "batch", "expected"), [(32, 1, 1), (32, 8, 1), (32, 16, 2), (32, 64, 8), (9, 64, 4), (32, 512, 16)]
)
def test_two_programs_per_processor_decode(state_heads, batch, expected):
    from flexdistill.runtime.launch import decoded_together

    assert decoded_together(state_heads, batch, processors=132) == expected


@pytest.mark.parametrize(
    ("variant", "component"), [("nonstationary+decay", "hyperbolic"), ("stationary", "trigonometric")]
)
def test_half_precision_maps_decode(variant, component, monkeypatch):
    feature_map = kernel(variant, component, tied=True).bfloat16()
    assert relative_error(*decoded_by_both(feature_map, 2, monkeypatch)) <= 2e-5


def test_memory_with_gradients_is_torchs():
    feature_map = kernel("nonstationary", "hyperbolic")
    query, key, value = query_key_value(20)
    half = [[x[:, :, part] for x in (query, key, value)] for part in (slice(0, 10), slice(10, 20))]
    _, memory = attend(feature_map, *half[0], scaling=SCALING)
    output, _ = attend(feature_map, *half[1], scaling=SCALING, memory=memory)
    (gradient,) = torch.autograd.grad(output.sum(), key)
    assert gradient[:, :, :10].abs().max() > 0  # flows through the memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, monkeypatch):
    feature_map = kernel("nonstationary", "hyperbolic", window=4)
    inputs = query_key_value(80, dtype=dtype)
    monkeypatch.setenv(VARIABLE, "triton")
    output, _ = attend(feature_map, *inputs, scaling=SCALING, keep_memory=False)
    weights = attention_weights(feature_map, *(x.float() for x in inputs[:2]), scaling=SCALING)
    expected = weights @ inputs[2].float().repeat_interleave(HEADS // KV_HEADS, dim=1)
    assert output.dtype == dtype
    assert (output.float() - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("length", [1, 90])
def test_guarded_rows_are_counted(length, monkeypatch):
    feature_map = kernel("nonstationary", "trigonometric", noise=2.0)
    inputs = [x.detach() for x in query_key_value(length, scale=5.0)]
    counts = []
    for name in ("triton", "torch"):
        monkeypatch.setenv(VARIABLE, name)
        with count_guards() as counter, torch.no_grad():
            attend(feature_map, *inputs, scaling=SCALING)
        counts.append((int(counter.guarded), counter.rows))
    assert counts[0] == counts[1]
    assert counts[0][0] > 0


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("component", ["hyperbolic", "trigonometric"])
def test_values_in_slices(component, causal, monkeypatch):
    """Programs that each serve some columns of the values count sums that all columns share once."""
    from flexdistill.runtime import launch

    monkeypatch.setattr(launch, "blocks_of", lambda *_: launch.Blocks(chunk=32, values=16))
    feature_map = kernel("nonstationary", component, causal=causal)
    query, key, _ = query_key_value(130, batch=1)
    value = torch.randn(1, KV_HEADS, 130, 24, generator=torch.Generator().manual_seed(2)).requires_grad_()
    assert_same(both_backends(feature_map, (query, key, value), monkeypatch))


def test_equal_inputs_give_equal_bits(monkeypatch):
    feature_map = kernel("nonstationary", "hyperbolic")
    inputs = query_key_value(150)
    first, second = (both_backends(feature_map, inputs, monkeypatch)[0] for _ in range(2))
    for one, other in zip([first[0], *first[1]], [second[0], *second[1]], strict=True):
        assert torch.equal(one, other)


def test_training_after_inference_mode():
    constant_zeros.cache_clear()
    feature_map = kernel("nonstationary", "hyperbolic")
    inputs = query_key_value(20)
    with torch.inference_mode():
        attend(feature_map, *(x.detach() for x in inputs), scaling=SCALING)
    output, _ = attend(feature_map, *inputs, scaling=SCALING, keep_memory=False)
    (gradient,) = torch.autograd.grad(output.sum(), inputs[:1])
    assert gradient.isfinite().all()


@pytest.mark.parametrize("variant", ["nonstationary", "nonstationary+decay"])
@pytest.mark.parametrize("window", [0, 4])
def test_operators_fit_torch(variant, window):
    """Schemas, fake kernels and autograd registration; a window sees queries and keys of its own, and sinks."""
    from flexdistill.runtime.fused import attention_op, decode_op

    feature_map = kernel(variant, "hyperbolic", key_heads="kv")
    query, key, value = (x[:1].detach().requires_grad_() for x in query_key_value(20))
    spectrum = feature_map.spectrum()
    gate = torch.zeros(HEADS)
    near = [x.detach().clone().requires_grad_() for x in (query, key)] if window else [None, None]
    sinks = kinds_and_spans(torch.ones(1, 20, dtype=torch.bool), 2) if window else (None, None)
    arguments = (
        query,
        key,
        value,
        *near,
        *sinks,
        *spectrum.query,
        *spectrum.key,
        spectrum.decay,
        gate,
        *(None,) * 5,
        True,
        window,
        0,
        1.0,
        0.3,
        True,
    )
    torch.library.opcheck(attention_op, arguments, test_utils=OPERATOR_CHECKS)
    *_, values, norms, maximum = attention_op(*arguments)
    token = [x[:, :, :1].detach() for x in (query, key, value)]
    maps = [x if x is None else x.detach() for x in feature_map.raw_spectrum()]
    torch.library.opcheck(decode_op, (*token, None, *maps, values, norms, maximum, 1.0), test_utils=OPERATOR_CHECKS)


@pytest.mark.parametrize("variant", ["nonstationary", "nonstationary+decay"])
def test_activation_checkpointing(variant):
    """It gives saved tensors out once, and computes the forward pass anew."""
    feature_map = kernel(variant, "hyperbolic")
    inputs = query_key_value(20)
    leaves = [*inputs, *feature_map.parameters()]

    def function(*inputs):
        return attend(feature_map, *inputs, scaling=SCALING, keep_memory=False)[0].square().sum()

    expected = torch.autograd.grad(function(*inputs), leaves)
    loss = torch.utils.checkpoint.checkpoint(function, *inputs, use_reentrant=False)
    for ours, theirs in zip(torch.autograd.grad(loss, leaves), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_compiles_without_graph_breaks():
    torch._dynamo.reset()
    feature_map = kernel("nonstationary", "hyperbolic")
    inputs = query_key_value(20)

    def function(*inputs):
        return attend(feature_map, *inputs, scaling=SCALING, keep_memory=False)[0]

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(*inputs), function(*inputs)) <= 1e-6


def test_backend_is_chosen_once_and_checked(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv(VARIABLE, "torch")
    assert fused_operators(cpu) is None
    monkeypatch.delenv(VARIABLE)
    assert fused_operators(cpu) is None
    monkeypatch.setenv(VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="choose triton or torch"):
        fused_operators(cpu)
    monkeypatch.setenv(VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    backend._fused_operators.cache_clear()
    with pytest.raises(RuntimeError, match="cannot run: the tensors are on cpu"):
        fused_operators(cpu)
    backend._fused_operators.cache_clear()


def test_unknown_kernel_is_refused_when_triton_was_asked_for():
    with pytest.raises(BackendError, match="hedgehog"):
        attend(kernel("hedgehog", None), *query_key_value(4), scaling=SCALING)
    with pytest.raises(BackendError, match="signed features do not decay there"):
        attend(kernel("nonstationary+decay", "trigonometric"), *query_key_value(4), scaling=SCALING)


@pytest.mark.parametrize(
    ("length", "window", "sinks", "side", "rotary"),
    [
        (150, 5, 3, "none", "halves"),
        (150, 5, 3, "left", None),
        (200, 40, 70, "left", None),
        (130, 5, 3, "gaps", "halves"),
        (70, 64, 1, "all", "halves"),
        (3, 2, 9, "none", None),
    ],
)
def test_sinks_are_torchs(length, window, sinks, side, rotary, monkeypatch):
    feature_map = kernel("nonstationary+decay", "hyperbolic", window=window, sinks=sinks, rotary=rotary)
    visible = padding(length, "left" if side == "gaps" else side)
    if side == "gaps":
        visible[0, : length // 2 : 2] = False
    arguments = dict(visible=visible, rotation=rotation(length) if rotary else None)
    assert_same(both_backends(feature_map, query_key_value(length), monkeypatch, **arguments))


@pytest.mark.parametrize("hidden", [0, 2])
def test_sinks_of_packed_sequences_are_torchs(hidden, monkeypatch):
    feature_map = kernel("nonstationary+decay", "hyperbolic", window=5, sinks=3)
    visible = torch.ones(1, 150, dtype=torch.bool)
    visible[:, 60 : 60 + hidden] = False
    inputs, boundaries = query_key_value(150, batch=1), [0, 2, 60, 140, 150]
    assert_same(both_backends(feature_map, inputs, monkeypatch, visible=visible, boundaries=boundaries))


@pytest.mark.parametrize(
    ("pieces", "rotary"), [([40, 1, 1, 30], "halves"), ([1] * 9, None), ([1] * 9, "halves"), ([2, 1, 90], None)]
)
@torch.no_grad()
def test_sinks_are_kept_through_prefill_and_decoding(pieces, rotary, monkeypatch):
    feature_map = kernel("nonstationary+decay", "hyperbolic", window=4, sinks=3, rotary=rotary)
    length = sum(pieces)
    inputs, visible = query_key_value(length), padding(length, "left")
    turns = rotation(length) if rotary else None
    outputs = {}
    for name in ("triton", "torch"):
        monkeypatch.setenv(VARIABLE, name)
        memory, start, outputs[name] = None, 0, []
        for size in pieces:
            part = slice(start, start + size)
            output, memory = attend(
                feature_map, *(x[:, :, part] for x in inputs), scaling=SCALING, visible=visible[:, part],
                memory=memory, rotation=part_of(turns, 0, part),
            )  # fmt: skip
            outputs[name].append(output)
            start += size
    ours, theirs = (torch.cat(parts, dim=2) for parts in outputs.values())
    assert relative_error(ours, theirs) <= 2e-5
