import math

import pytest
import torch

from flexdistill.runtime.attention import attend
from flexdistill.runtime.baselines import HedgehogFeatureMap
from flexdistill.runtime.feature_maps import log_cosh
from flexdistill.runtime.registry import FEATURE_MAPS, build_feature_map, feature_map_class
from tests.runtime.kernels import (
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LEARNED_KERNELS,
    every_kernel,
    every_key_heads,
    kernel,
    kernel_spec,
    query_key_value,
)

FLEXFORMER_COMPONENTS = list(FEATURE_MAPS["stationary"])
every_tying = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def tensors_of(features):
    return {name: x for name, x in vars(features).items() if torch.is_tensor(x)}


@every_kernel
@every_key_heads
def test_shapes_and_float32_whatever_the_input(variant, component, key_heads):
    feature_map = kernel(variant, component, key_heads=key_heads, num_frequencies=5)
    query, key, _ = query_key_value(3, dtype=torch.bfloat16)
    features = feature_map(query, key)
    state_heads = {"query": HEADS, "kv": KV_HEADS}[key_heads]
    count = feature_map.num_features
    if feature_map.takes_frequencies:
        assert count == 10
    assert features.query.shape == (2, HEADS, 3, count)
    assert features.query_log_scale.shape == (2, HEADS, 3)
    assert features.key.shape == (2, state_heads, 3, count)
    assert features.key_log_weight.shape == (2, state_heads, 3)
    assert {x.dtype for x in tensors_of(features).values()} == {torch.float32}
    exact = feature_map(query.float(), key.float())
    torch.testing.assert_close(tensors_of(features), tensors_of(exact), rtol=0, atol=0)


@every_kernel
def test_key_heads_are_repeated_for_their_group(variant, component):
    feature_map = kernel(variant, component)
    query, key, _ = query_key_value(3)
    features = feature_map(query, key)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        changed = key.detach().clone()
        changed[:, group] += 1
        moved = feature_map(query, changed)
        differs = (moved.key != features.key).any(-1).any(-1).any(0)
        assert differs.tolist() == [h // (HEADS // KV_HEADS) == group for h in range(HEADS)]


@every_kernel
@every_key_heads
@every_tying
@pytest.mark.parametrize("window", [0, 4])
def test_every_parameter_has_a_gradient(variant, component, key_heads, tied, window):
    if window and not feature_map_class(variant, component).causal_safe:
        pytest.skip("a window is for causal layers")
    feature_map = kernel(variant, component, key_heads=key_heads, tied=tied, window=window)
    query, key, value = query_key_value(12)
    output, _ = attend(feature_map, query, key, value, scaling=HEAD_DIM**-0.5)
    (output * torch.randn_like(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in feature_map.named_parameters()}
    assert bool(gradients) == ((variant, component) in LEARNED_KERNELS or window > 0)
    assert all(gradient is not None for gradient in gradients.values())
    for name, gradient in gradients.items():
        per_head = gradient.flatten(1).norm(dim=1) if gradient.ndim > 1 else gradient.abs()
        assert (per_head > 0).all(), f"{name} has a head without a gradient"


@every_kernel
@every_key_heads
@every_tying
def test_reset_fills_every_parameter(variant, component, key_heads, tied):
    spec = kernel_spec(variant, component, key_heads=key_heads, tied=tied, window=3)
    fills = []
    for garbage in (math.nan, 1e30):
        feature_map = build_feature_map(spec)
        with torch.no_grad():
            for tensor in feature_map.state_dict().values():
                tensor.fill_(garbage if tensor.is_floating_point() else -1)
        torch.manual_seed(7)
        feature_map.reset_parameters()
        fills.append({name: tensor.clone() for name, tensor in feature_map.state_dict().items()})
    for name, values in fills[0].items():
        assert values.isfinite().all() and values.abs().max() < 100, name
        torch.testing.assert_close(values, fills[1][name], rtol=0, atol=0)


@every_kernel
@every_key_heads
def test_query_and_key_maps_start_alike(variant, component, key_heads):
    untied = build_feature_map(kernel_spec(variant, component, key_heads=key_heads))
    untied.reset_parameters()
    assert untied.key_parameters.keys() == untied.query_parameters.keys()
    stride = 1 if key_heads == "query" else HEADS // KV_HEADS
    for name, parameter in untied.key_parameters.items():
        torch.testing.assert_close(parameter, untied.query_parameters[name][::stride], rtol=0, atol=0)
    tied = build_feature_map(kernel_spec(variant, component, key_heads=key_heads, tied=True))
    assert not tied.key_parameters


@every_kernel
def test_unsigned_kernels_are_not_negative(variant, component):
    feature_map = kernel(variant, component, noise=0.5)
    query, key, _ = query_key_value(200)
    features = feature_map(query, key)
    if feature_map.signed:
        assert features.query.min() < 0 and features.key.min() < 0
    else:
        assert features.query.min() >= 0 and features.key.min() >= 0
        assert features.query.max() > 0 and features.key.max() > 0
        if feature_map.calibrated:  # a maximum is factored out
            assert features.query.max() <= 1 and features.key.max() <= 1


@every_kernel
@every_key_heads
def test_extreme_norms_stay_finite(variant, component, key_heads):
    feature_map = kernel(variant, component, key_heads=key_heads)
    with torch.no_grad():
        if hasattr(feature_map, "norm_factor"):
            feature_map.norm_factor.copy_(torch.linspace(-1, 1, len(feature_map.norm_factor)))
        if hasattr(feature_map, "tau"):
            feature_map.tau.fill_(math.log(10))
    query, key, _ = query_key_value(40)
    lengths = torch.linspace(0, 24.5, 40)[:, None]  # 0.1 |k|^2 up to 60
    query, key = (x / x.norm(dim=-1, keepdim=True) * lengths for x in (query, key))
    features = feature_map(query.detach().requires_grad_(), key.detach().requires_grad_())
    for name, tensor in tensors_of(features).items():
        assert tensor.isfinite().all(), name
    if hasattr(feature_map, "norm_factor") or hasattr(feature_map, "tau"):
        assert features.key_log_weight.abs().max() > 40
    sum(tensor.sum() for tensor in tensors_of(features).values()).backward()
    for name, parameter in feature_map.named_parameters():
        assert parameter.grad.isfinite().all(), name


@every_key_heads
@pytest.mark.parametrize("component", FLEXFORMER_COMPONENTS)
def test_nonstationary_without_second_frequencies_is_stationary(component, key_heads):
    stationary = kernel("stationary", component, key_heads=key_heads, noise=0.3)
    nonstationary = kernel("nonstationary", component, key_heads=key_heads, noise=0.3, seed=5)
    report = nonstationary.load_state_dict(stationary.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert report.missing_keys == ["query_parameters.w2", "key_parameters.w2"]
    with torch.no_grad():
        for name in report.missing_keys:
            nonstationary.get_parameter(name).zero_()
    query, key, _ = query_key_value(9)
    for expected, actual in zip(
        vars(stationary(query, key)).values(), vars(nonstationary(query, key)).values(), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_trigonometric_approximates_the_gaussian_kernel():
    frequencies, s = 20_000, HEAD_DIM**-0.5
    feature_map = kernel("stationary", "trigonometric", num_frequencies=frequencies, tied=True, noise=0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        w1 = feature_map.query_parameters["w1"]
        w1.copy_(s**0.5 * torch.randn(w1.shape, generator=generator))
    query, key, _ = query_key_value(6)
    features = feature_map(query, key)
    actual = features.query @ features.key.transpose(-1, -2)
    key = key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    expected = (-s / 2 * (query[..., :, None, :] - key[..., None, :, :]).square().sum(-1)).exp()
    # the mean of n cosines has a standard deviation of at most sqrt(1 / 2 n) = 0.005
    assert (actual - expected).abs().max() < 5 * (2 * frequencies) ** -0.5
    assert expected.max() > 0.3


def test_trigonometric_norm_factor_matches_softmax_at_its_own_tau():
    feature_map = kernel("stationary", "trigonometric", num_frequencies=20_000, tied=True, noise=0)
    s = HEAD_DIM**-0.5
    with torch.no_grad():
        w1 = feature_map.query_parameters["w1"]
        w1.copy_(s**0.5 * torch.randn(w1.shape, generator=torch.Generator().manual_seed(3)))
        feature_map.tau.fill_(math.log(2 / s))
    query, key, _ = query_key_value(6, scale=0.5)
    features = feature_map(query, key)
    log_scales = features.query_log_scale[..., None] + features.key_log_weight[..., None, :]
    actual = log_scales.exp() * (features.query @ features.key.transpose(-1, -2))
    expected = (s * query @ key.repeat_interleave(HEADS // KV_HEADS, dim=1).transpose(-1, -2)).exp()
    torch.testing.assert_close(actual / log_scales.exp(), expected / log_scales.exp(), rtol=0, atol=0.025)


@pytest.mark.parametrize("variant", ["stationary", "nonstationary"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_hyperbolic_is_its_formula(variant, tied):
    feature_map = kernel(variant, "hyperbolic", tied=tied, noise=0.3)
    query, key, _ = query_key_value(7)
    features = feature_map(query, key)

    def phi(x, parameters):
        p = {name: value.double() for name, value in parameters.items()}
        phase = torch.einsum("bhtd,hdn->bhtn", x.double(), p["w1"])
        envelope = torch.ones_like(phase)
        if variant == "nonstationary":
            envelope = torch.cosh(torch.einsum("bhtd,hdn->bhtn", x.double(), p["w2"]))
        amplitude = p["log_amplitude"].exp()[:, None]
        features = torch.cat([envelope * phase.exp(), envelope * (-phase).exp()], -1) * amplitude
        return features / math.sqrt(2 * HEAD_DIM)

    query = query * feature_map.query_unit[:, None, None]
    keys = key.repeat_interleave(HEADS // KV_HEADS, dim=1) * feature_map.key_unit[:, None, None]
    norm_factor = 0.1 * feature_map.norm_factor.double()[:, None] * keys.double().square().sum(-1)
    expected_query = phi(query, feature_map.query_parameters)
    expected_key = phi(keys, feature_map.query_parameters if tied else feature_map.key_parameters)
    actual_query = features.query.double() * features.query_log_scale.double().exp()[..., None]
    actual_key = features.key.double() * features.key_log_weight.double().exp()[..., None]
    torch.testing.assert_close(actual_query, expected_query, rtol=1e-5, atol=0)
    torch.testing.assert_close(actual_key, expected_key * norm_factor.exp()[..., None], rtol=1e-5, atol=0)


@pytest.mark.parametrize("component", FLEXFORMER_COMPONENTS)
def test_nonstationary_envelope_differs_from_stationary(component):
    feature_map = kernel("nonstationary", component, noise=0.3)
    query, key, _ = query_key_value(5)
    before = feature_map(query, key)
    with torch.no_grad():
        feature_map.query_parameters["w2"].zero_()
    assert not torch.allclose(feature_map(query, key).query, before.query)
    torch.testing.assert_close(feature_map(query, key).key, before.key, rtol=0, atol=0)


def test_hedgehog_is_softmax_of_both_signs():
    feature_map = kernel("hedgehog", None, noise=0.3)
    query, key, _ = query_key_value(7)
    features = feature_map(query, key)
    for x, name, actual in (
        (query, "query_parameters", features.query),
        (key.repeat_interleave(HEADS // KV_HEADS, dim=1), "key_parameters", features.key),
    ):
        weight = getattr(feature_map, name)["w"]
        projected = torch.einsum("bhtd,hdn->bhtn", x, weight).exp()
        expected = torch.cat([projected, 1 / projected], -1)
        expected = expected / torch.cat(
            [
                projected.sum(-1, keepdim=True).expand_as(projected),
                (1 / projected).sum(-1, keepdim=True).expand_as(projected),
            ],
            -1,
        )
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)
    assert features.query_log_scale.abs().max() == 0 and features.key_log_weight.abs().max() == 0


def test_hedgehog_starts_at_the_identity():
    feature_map = kernel("hedgehog", None, noise=0)
    query, key, _ = query_key_value(3)
    expected = torch.cat([query.softmax(-1), (-query).softmax(-1)], -1)
    torch.testing.assert_close(feature_map(query, key).query, expected)


def test_log_cosh():
    x = torch.tensor([-1e4, -3.0, -1e-3, 0.0, 0.5, 20.0, 1e4])
    expected = torch.log(torch.cosh(x[1:-1].double()))
    torch.testing.assert_close(log_cosh(x)[1:-1].double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(log_cosh(x)[[0, -1]], torch.full((2,), 1e4 - math.log(2)))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=f"Unknown variant 'linear'; choose one of: {', '.join(FEATURE_MAPS)}"):
        feature_map_class("linear", None)
    with pytest.raises(ValueError, match="no component 'cubic'; choose one of: hyperbolic, trigonometric"):
        feature_map_class("stationary", "cubic")
    with pytest.raises(ValueError, match="no component 'hyperbolic'; leave the component out"):
        feature_map_class("hedgehog", "hyperbolic")
    assert feature_map_class("hedgehog", None) is HedgehogFeatureMap
