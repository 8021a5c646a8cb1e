"""Attention transfer tile by tile against the same from T x T maps; without a GPU, through Triton's interpreter."""

from dataclasses import fields

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from flexdistill.attention_modes import AttentionCall
from flexdistill.distillation import attention_transfer as attention_transfer_module
from flexdistill.distillation import tiled_transfer, transfer_operators
from flexdistill.distillation.attention_transfer import attention_rows, is_tiled, quadratic_rows
from flexdistill.distillation.tiled_transfer import tiled_rows, transfer_loss
from flexdistill.losses import AttentionRows, over_queries, relative_output_error
from flexdistill.runtime.backend import VARIABLE
from flexdistill.runtime.feature_maps import SIGNED_GUARD, Features
from flexdistill.runtime.linear_attention import quadratic_scores
from tests.distillation.stages import attention_transfer, sequences, student
from tests.runtime.kernels import (
    HEAD_DIM,
    HEADS,
    SCALING,
    every_key_heads,
    every_tiled_form,
    kernel,
    kernel_spec,
    query_key_value,
    relative_error,
)

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIELDS = [field.name for field in fields(AttentionRows)]
every_sight = pytest.mark.parametrize(
    "sight",
    [dict(window=0), dict(window=5), dict(window=5, sinks=3), dict(causal=False)],
    ids=["causal", "window", "sinks", "bidirectional"],
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles at small sizes."""
    if DEVICE == "cpu":
        monkeypatch.setattr(transfer_operators, "TILES", ((16, 16),))
        monkeypatch.setattr(transfer_operators, "DECAY_BLOCK", 16)


def inputs(length, **settings):
    return [x.detach().to(DEVICE) for x in query_key_value(length, **settings)]


def call(feature_map, query, key, value, visible=None) -> AttentionCall:
    module = nn.Module()
    module.flexformer, module.is_causal = feature_map, feature_map.spec.causal
    return AttentionCall(module, query, key, value, visible, {"scaling": SCALING})


def sees_a_key(length, causal, visible):
    """(B, T): the reference gives a row without any key uniform attention."""
    if visible is None:
        return torch.ones(2, length, dtype=torch.bool, device=DEVICE)
    return visible.cummax(1).values if causal else visible.any(1, keepdim=True).expand(visible.shape)


def random_loss(rows: AttentionRows, counted: torch.Tensor) -> torch.Tensor:
    """A weighted sum of everything that has a gradient, over rows that count."""
    generator = torch.Generator().manual_seed(5)
    total = 0.0
    for name in ("cross_entropy", "negative_mass", "student"):
        x = getattr(rows, name)
        x = x.movedim(1, 2)[counted]
        total = total + (x * torch.randn(x.shape, generator=generator).to(x.device)).sum()
    return total


def assert_same(feature_map, parameters, query, key, value, visible=None, tolerance=1e-5, least=0.0):
    """All rows, both outputs and the gradients of `parameters`; gradients below `least` count as zero."""
    expected = quadratic_rows(call(feature_map, query, key, value, visible))
    actual = tiled_rows(feature_map, query, key, value, scaling=SCALING, visible=visible)
    counted = sees_a_key(query.shape[-2], feature_map.spec.causal, visible)
    for name in FIELDS:
        ours, theirs = (getattr(rows, name).movedim(1, 2)[counted] for rows in (actual, expected))
        assert ours.dtype == torch.float32
        assert ours.isfinite().all(), name
        # what is near 0 is as exact as what is near 1
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max().clamp_min(1), name
    gradients = [
        torch.autograd.grad(random_loss(rows, counted), parameters, allow_unused=True) for rows in (actual, expected)
    ]
    for index, (ours, theirs) in enumerate(zip(*gradients, strict=True)):
        if theirs is None or theirs.abs().max() <= least:
            assert ours is None or ours.abs().max() <= max(least, 1e-6), index
        else:
            # signed weights that nearly cancel have gradients that magnify rounding
            assert relative_error(ours, theirs) <= (100 if feature_map.signed else 10) * tolerance, index


@every_tiled_form
@every_sight
def test_tiles_are_the_maps(variant, component, sight):
    # frequencies and the size of values are no powers of two; padding left and right
    feature_map = kernel(variant, component, num_frequencies=11, **sight).to(DEVICE)
    visible = torch.ones(2, 21, dtype=torch.bool, device=DEVICE)
    visible[0, :7], visible[1, -4:] = False, False
    assert_same(feature_map, list(feature_map.parameters()), *inputs(21, scale=3.0), visible, least=1e-4)


@pytest.mark.parametrize(("variant", "component"), [("cosformer", None), ("spectraformer", "saderf")])
def test_kernels_that_need_more_than_queries_and_keys(variant, component):
    # a window has a gate, without which cosFormer would have nothing to get a gradient
    feature_map = kernel(variant, component, window=3 if variant == "cosformer" else 0).to(DEVICE)
    visible = torch.ones(2, 21, dtype=torch.bool, device=DEVICE)
    visible[0, -5:] = False
    assert_same(feature_map, list(feature_map.parameters()), *inputs(21), visible, least=1e-4)


@every_tiled_form
@every_key_heads
def test_heads_that_share_keys(variant, component, key_heads):
    feature_map = kernel(variant, component, key_heads=key_heads, window=3).to(DEVICE)
    assert_same(feature_map, list(feature_map.parameters()), *inputs(9), least=1e-4)


@pytest.mark.parametrize(
    ("length", "window"), [(1, 0), (1, 1), (2, 1), (17, 0), (17, 16), (32, 0), (33, 1), (33, 40), (33, 16)]
)
def test_lengths(length, window, monkeypatch):
    monkeypatch.setattr(transfer_operators, "TILES", ((32, 16),))
    monkeypatch.setattr(transfer_operators, "DECAY_BLOCK", 32)
    feature_map = kernel("nonstationary", "hyperbolic", window=window).to(DEVICE)
    assert_same(feature_map, list(feature_map.parameters()), *inputs(length), least=1e-4)


class GivenFeatures:
    """A kernel of random features; all of them leaves."""

    calibrated, has_spectrum = True, False

    def __init__(self, length, *, signed, spread, **sight):
        generator = torch.Generator().manual_seed(2)
        self.signed = signed
        self.spec = kernel_spec("stationary", "hyperbolic", key_heads="kv", **sight)

        def leaf(*shape):
            return torch.randn(*shape, generator=generator).to(DEVICE)

        heads, keys = (2, HEADS, length), (2, HEADS // 2, length)
        features = [leaf(*heads, 12), spread * leaf(*heads).tanh(), leaf(*keys, 12), spread * leaf(*keys).tanh()]
        if not signed:
            features[0], features[2] = features[0].exp(), features[2].exp()
        self.parameters = [x.requires_grad_() for x in features]
        self.window_gate = torch.zeros(HEADS, device=DEVICE, requires_grad=self.spec.window > 0)

    def __call__(self, query, key, function, **arguments):
        return function(self, query, key, **arguments)

    def decay_rates(self):
        return None

    def features(self, query, key, context=None) -> Features:
        return Features(*(x.clone() for x in self.parameters))


@every_sight
@pytest.mark.parametrize("signed", [False, True])
def test_log_weights_that_span_orders_of_magnitude(signed, sight):
    feature_map = GivenFeatures(24, signed=signed, spread=60.0, **sight)
    assert_same(feature_map, feature_map.parameters, *inputs(24), least=1e-4)


@every_sight
def test_guarded_rows(sight):
    feature_map = GivenFeatures(24, signed=True, spread=0.5, **sight)
    allowed = torch.ones(24, 24, dtype=torch.bool, device=DEVICE).tril()
    scores, bound, _ = quadratic_scores(feature_map.features(None, None), allowed)
    guarded = scores.sum(-1) < SIGNED_GUARD * bound
    assert 0.2 < guarded.float().mean() < 0.8
    assert_same(feature_map, feature_map.parameters, *inputs(24), least=1e-4)


@every_sight
@pytest.mark.parametrize("component", ["hyperbolic", "trigonometric"])
def test_padded_sequences_leave_the_others_alone(component, sight):
    feature_map = kernel("nonstationary", component, **sight).to(DEVICE)
    parameters, (query, key, value) = list(feature_map.parameters()), inputs(9)
    visible = torch.ones(2, 9, dtype=torch.bool, device=DEVICE)
    visible[0] = False
    rows = tiled_rows(feature_map, query, key, value, scaling=SCALING, visible=visible)
    assert not rows.teacher[0].any() and not rows.student[0].any()
    assert all(getattr(rows, name).isfinite().all() for name in FIELDS)
    alone = tiled_rows(feature_map, query[1:], key[1:], value[1:], scaling=SCALING)
    gradients = [
        torch.autograd.grad(
            over_queries(x.cross_entropy, mask)[0] + relative_output_error(x.teacher, x.student, mask)[0], parameters
        )
        for x, mask in ((rows, visible), (alone, None))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(dtype):
    feature_map = kernel("nonstationary", "hyperbolic", window=3).to(DEVICE)
    query, key, value = inputs(9, dtype=dtype)
    assert_same(feature_map, list(feature_map.parameters()), query, key, value, tolerance=1e-2, least=1e-4)
    # autocast leaves float32 queries and keys where positions are rotated, and bf16 values
    arguments = query.float(), key.float(), value
    assert_same(feature_map, list(feature_map.parameters()), *arguments, tolerance=1e-2, least=1e-4)


class LargestTensor(TorchDispatchMode):
    """The most elements that any tensor made inside has."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


def test_memory_is_linear():
    largest = {}
    for length in (12, 24):
        feature_map = kernel("nonstationary", "trigonometric", window=3).to(DEVICE)
        arguments = inputs(length)
        with LargestTensor() as mode:
            transfer_loss(feature_map, *arguments, scaling=SCALING).backward()
        largest[length] = mode.numel
    assert largest[24] == 2 * largest[12]


@every_tiled_form
def test_loss_of_one_layer(variant, component):
    feature_map = kernel(variant, component).to(DEVICE)
    arguments = inputs(20)
    rows = quadratic_rows(call(feature_map, *arguments))
    expected = over_queries(rows.cross_entropy)[0] + relative_output_error(rows.teacher, rows.student)[0]
    torch.testing.assert_close(transfer_loss(feature_map, *arguments, scaling=SCALING), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("name", "settings"),
    [("bert", {}), ("llama", {"component": "trigonometric"}), ("llama", {"window": 4, "key_heads": "kv"})],
    ids=str,
)
def test_stage_reports_the_same_numbers(name, settings, monkeypatch):
    results = []
    for tiled in (True, False):
        monkeypatch.setattr(attention_transfer_module, "is_tiled", lambda call, tiled=tiled: tiled)
        stage = attention_transfer(student(name, **settings), negative_mass_weight=2.0)
        with stage.active():
            losses = stage.backward(sequences(1, length=12))
        results.append((losses, {key: x.grad for key, x in stage.trained().items()}))
    (ours, our_gradients), (theirs, their_gradients) = results
    assert float(ours.total) == pytest.approx(float(theirs.total), rel=1e-5)
    assert ours.count == theirs.count and ours.parts.keys() == theirs.parts.keys()
    for part in theirs.parts:
        assert float(ours.parts[part]) == pytest.approx(float(theirs.parts[part]), rel=1e-5), part
    for key, gradient in their_gradients.items():
        assert (our_gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-6, key


def test_form_is_chosen_by_backend(monkeypatch):
    feature_map = kernel("nonstationary", "hyperbolic").to(DEVICE)
    arguments = call(feature_map, *inputs(5))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert is_tiled(arguments) == (DEVICE == "cuda")
    monkeypatch.setenv(VARIABLE, "torch")
    assert not is_tiled(arguments)
    monkeypatch.setenv(VARIABLE, "triton")
    assert is_tiled(arguments)
    signed_decay = call(kernel("nonstationary+decay", "trigonometric").to(DEVICE), *inputs(5))
    assert not is_tiled(signed_decay)
    doubles = call(feature_map, *(x.double() for x in inputs(5)))
    assert not is_tiled(doubles) and attention_rows(doubles).teacher.shape == (2, HEADS, 5, HEAD_DIM - 3)
    other_mask = call(feature_map, *inputs(5))
    other_mask.module.is_causal = False
    assert not is_tiled(other_mask)


def test_tiles_shrink_until_they_fit():
    query = torch.empty(1, 1, 1, HEAD_DIM)
    assert transfer_operators.tiles(16, query.dtype, query, query) == transfer_operators.TILES[0]
    assert transfer_operators.tiles(10**5, query.dtype, query, query) is None


def test_inputs_have_no_gradient():
    query, key, value = inputs(5)
    for index in range(3):
        tensors = [x.clone().requires_grad_(i == index) for i, x in enumerate((query, key, value))]
        with pytest.raises(ValueError, match="trains kernels only"):
            tiled_rows(kernel("stationary", "hyperbolic").to(DEVICE), *tensors, scaling=SCALING)


@pytest.mark.parametrize("decays", [False, True])
def test_operator_is_well_formed(decays):
    feature_map = GivenFeatures(5, signed=True, spread=1.0, window=2)
    query, key, value = inputs(5)
    features = feature_map.features(query, key)
    decay = torch.full(features.key.shape[1::2], 0.2, device=DEVICE, requires_grad=True) if decays else None
    arguments = (
        features.query.detach().requires_grad_(), features.key.detach().requires_grad_(), decay,
        features.key_log_weight.detach().requires_grad_(), features.query_log_scale.detach().requires_grad_(),
        features.key_log_weight.detach(), features.key.detach().norm(dim=-1), query, key, value, None,
        SCALING, 2, True, not decays, True, False,
    )  # fmt: skip
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(tiled_transfer.transfer_op, arguments, test_utils=checks)
