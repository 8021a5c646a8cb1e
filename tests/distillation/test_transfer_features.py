"""Features of attention transfer made in one kernel, against those made in torch."""

import pytest
import torch

from flexdistill.distillation import transfer_operators
from flexdistill.distillation.tiled_transfer import _torch_features, tiled_rows
from flexdistill.distillation.transfer_features import are_fused, features_op, fused_features
from flexdistill.runtime.flexformer_maps import HyperbolicFeatureMap
from tests.runtime.kernels import KV_HEADS, SCALING, kernel, query_key_value, relative_error

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LENGTH = 37
every_variant = pytest.mark.parametrize("variant", ["stationary", "nonstationary", "nonstationary+decay"])
every_map = pytest.mark.parametrize(
    "settings",
    [dict(key_heads="query"), dict(key_heads="kv", window=5), dict(key_heads="kv", tied=True)],
    ids=["query", "kv-window", "tied"],
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(transfer_operators, "DECAY_BLOCK", 16)


def hyperbolic(variant, **settings):
    # head size and frequencies are no powers of two
    return kernel(variant, "hyperbolic", head_dim=12, num_frequencies=11, **settings).to(DEVICE)


def tokens(dtype=torch.float32, length=LENGTH):
    """Queries and keys (2, H, T, 12) and (2, K, T, 12) stored with heads after tokens; log-weights span 120."""
    generator = torch.Generator().manual_seed(1)
    norms = torch.linspace(0, 40, length)[:, None, None]
    query, key = (torch.randn(2, length, heads, 12, generator=generator) for heads in (2 * KV_HEADS, KV_HEADS))
    return [(x / x.norm(dim=-1, keepdim=True) * norms).to(DEVICE, dtype).transpose(1, 2) for x in (query, key)]


def both(feature_map, query, key, dtype=torch.float32, visible=None):
    arguments = (feature_map, query, key, 0.4, feature_map.spec.window, dtype, visible)
    return fused_features(*arguments), _torch_features(*arguments)


def relative_to(features, log_scales, expected):
    """Features with the expected ones' logarithms factored out."""
    return (log_scales - expected.detach()).exp()[..., None] * features


@every_variant
@every_map
def test_features_and_gradients(variant, settings):
    feature_map = hyperbolic(variant, **settings)
    with torch.no_grad():
        feature_map.norm_factor.copy_(torch.linspace(-1, 1, len(feature_map.norm_factor)))
    actual, expected = both(feature_map, *tokens())
    assert expected.key_log_weight.amax() > 60 and expected.key_log_weight.amin() < -60
    parameters = {name: x for name, x in feature_map.named_parameters() if name not in ("decay", "window_gate")}
    losses = [0.0, 0.0]
    for side, scales in (("query", "query_log_scale"), ("key", "key_log_weight")):
        reference, log_scale = getattr(expected, side), getattr(expected, scales)
        ours = getattr(actual, scales)
        # factored out but for the bracket, which is between a half and one
        assert (ours - log_scale >= -1e-4).all() and (ours - log_scale <= 0.7).all()
        both_sides = [relative_to(getattr(x, side), getattr(x, scales), log_scale) for x in (actual, expected)]
        assert both_sides[0].dtype == torch.float32 and both_sides[0].is_contiguous()
        torch.testing.assert_close(*both_sides, rtol=2e-4, atol=1e-7)
        weights = torch.randn(reference.shape, generator=torch.Generator().manual_seed(3)).to(DEVICE)
        losses = [loss + (weights * x).sum() for loss, x in zip(losses, both_sides, strict=True)]
    gradients = [torch.autograd.grad(loss, list(parameters.values())) for loss in losses]
    for name, ours, theirs in zip(parameters, *gradients, strict=True):
        assert relative_error(ours, theirs) <= 1e-4, name


@torch.no_grad()
def test_padding_and_half_precision():
    feature_map = hyperbolic("nonstationary+decay", window=3)
    visible = torch.ones(2, LENGTH, dtype=torch.bool, device=DEVICE)
    visible[0, -9:] = False
    actual, expected = both(feature_map, *tokens(torch.bfloat16), torch.bfloat16, visible)
    assert actual.query.dtype == actual.key.dtype == torch.bfloat16
    assert torch.equal(actual.key_log_weight.isneginf(), ~visible[:, None].expand(expected.key_log_weight.shape))
    ours = relative_to(actual.query.float(), actual.query_log_scale, expected.query_log_scale)
    # phases of long queries carry the rounding of frequencies on a GPU
    tolerance = 0.1 if DEVICE == "cuda" else 0.02
    torch.testing.assert_close(ours, expected.query.float(), rtol=tolerance, atol=tolerance * float(ours.max()))


@pytest.mark.parametrize("length", [1, 32, 300])
def test_lengths(length):
    actual, expected = both(hyperbolic("stationary"), *tokens(length=length))
    ours = relative_to(actual.key, actual.key_log_weight, expected.key_log_weight)
    torch.testing.assert_close(ours, expected.key, rtol=2e-4, atol=1e-7)


def test_which_maps_are_fused():
    assert are_fused(hyperbolic("nonstationary"), torch.float32)
    assert not are_fused(kernel("nonstationary", "trigonometric"), torch.float32)
    assert not are_fused(kernel("hedgehog", None), torch.float32)
    large = kernel("stationary", "hyperbolic", num_frequencies=100)
    assert not are_fused(large, torch.float32) and are_fused(large, torch.bfloat16)


def test_rows_and_gradients_when_compiled(monkeypatch):
    def refused(*_):
        raise AssertionError("made in torch")

    monkeypatch.setattr(HyperbolicFeatureMap, "query_features", refused)
    torch._dynamo.reset()
    feature_map = kernel("nonstationary+decay", "hyperbolic", window=3, key_heads="kv").to(DEVICE)
    query, key, value = (x.detach().to(DEVICE) for x in query_key_value(20))

    def loss():
        rows = tiled_rows(feature_map, query, key, value, scaling=SCALING)
        return rows.cross_entropy.sum() + rows.student.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    parameters = list(feature_map.parameters())
    for ours, theirs in zip(*(torch.autograd.grad(f(), parameters) for f in (compiled, loss)), strict=True):
        assert relative_error(ours, theirs) <= 1e-6


@every_variant
def test_operator_is_well_formed(variant):
    spectrum = hyperbolic(variant, key_heads="kv").spectrum()
    maps = [x if x is None else x.detach().requires_grad_() for x in spectrum.key]
    decay = None if spectrum.decay is None else spectrum.decay.detach()
    arguments = (tokens(length=5)[1], *maps, decay, 0.7, True, 2, 16, torch.float32)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(features_op, arguments, test_utils=checks)
