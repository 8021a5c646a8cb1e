"""Random features against what they estimate: their mean is the softmax kernel, their error the papers' variance."""

import math

import pytest
import torch

from flexdistill.runtime.attention import attend
from flexdistill.runtime.random_matrices import MATRICES
from flexdistill.runtime.registry import FEATURE_MAPS, build_feature_map, feature_map_class
from tests.runtime.kernels import HEAD_DIM, HEADS, KV_HEADS, SCALING, kernel, kernel_spec, query_key_value

COMPONENTS = list(FEATURE_MAPS["spectraformer"])
DRAWS = 4000
# their columns are exactly Gaussian one by one
UNBIASED = ["gaussian", "orf", "scrf"]


def pair(scale=0.5, seed=3):
    """One query and one key, as the map gets them, and x and y, which it makes of them."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (scale * torch.randn(HEAD_DIM, generator=generator) for _ in range(2))
    return x * HEAD_DIM**0.25, y * HEAD_DIM**0.25, x.double(), y.double()


def estimates(variant, component, x, y, *, draws=DRAWS, frequencies=8, prepare=None, **settings):
    """Kernel values (draws,) of one query and key, each from frequencies of its own: one head per draw."""
    torch.manual_seed(11)
    spec = kernel_spec(
        variant,
        component,
        **dict(num_heads=draws, num_key_value_heads=draws, num_frequencies=frequencies, tied=True) | settings,
    )
    feature_map = build_feature_map(spec)
    feature_map.reset_parameters()
    if prepare:
        with torch.no_grad():
            prepare(feature_map)
    query, key = (x.expand(1, draws, 1, -1) for x in (x, y))
    with torch.no_grad():
        features = feature_map(query, key)
    scales = (features.query_log_scale + features.key_log_weight).double()
    return ((features.query.double() * features.key.double()).sum(-1) * scales.exp()).flatten()


def assert_mean(values, expected):
    error = values.mean() - expected
    assert error.abs() < 4 * values.std() / len(values) ** 0.5, f"{values.mean()} is not {expected}"
    assert values.std() > 0


def set_log_rho(value):
    return lambda feature_map: feature_map.query_parameters["log_rho"].fill_(value)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("matrix", UNBIASED)
def test_components_are_unbiased(component, matrix):
    query, key, x, y = pair()
    prepare = set_log_rho(-0.4) if component in ("gerf", "saderf") else None
    values = estimates("spectraformer", component, query, key, matrix=matrix, prepare=prepare)
    assert_mean(values, (x @ y).exp())


@pytest.mark.parametrize("matrix", [name for name in MATRICES if name not in UNBIASED])
def test_other_matrices_are_nearly_unbiased(matrix):
    query, key, x, y = pair()
    values = estimates("spectraformer", "posrf", query, key, matrix=matrix, frequencies=16, draws=1000)
    # values differ by 3 % of exp(x.y) where columns are Gaussian in their first two moments only
    assert values.mean() == pytest.approx(float((x @ y).exp()), rel=0.05)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_errors_fall_as_the_papers_variance(count):
    """Lemma 2 of arXiv:2009.14794: mean squared errors of m independent vectors."""
    query, key, x, y = pair(scale=0.35)
    kernel_value, plus, minus = (x @ y).exp(), (x + y).square().sum(), (x - y).square().sum()
    positive = plus.exp() * kernel_value**2 * (1 - (-plus).exp()) / (2 * count)
    trigonometric = plus.exp() * kernel_value**-2 * (1 - (-minus).exp()) ** 2 / (2 * count)
    for component, expected in (("posrf", positive), ("trigrf", trigonometric)):
        values = estimates("spectraformer", component, query, key, matrix="gaussian", frequencies=count)
        assert float((values - kernel_value).square().mean()) == pytest.approx(float(expected), rel=0.2)


@pytest.mark.parametrize(("matrix", "most"), [("orf", 0.92), ("sorf", 0.7), ("rom", 0.85), ("qmc", 0.4), ("mm", 0.1)])
def test_better_matrices_have_less_error(matrix, most):
    query, key, x, y = pair(scale=0.35)

    def error(name):
        values = estimates("spectraformer", "posrf", query, key, matrix=name, draws=3000)
        return (values - (x @ y).exp()).square().mean()

    assert error(matrix) < most * error("gaussian")


def second_moment(factor, z, size=HEAD_DIM):
    """E[(f(w, x) f(w, y))^2] e^(|x|^2 + |y|^2) of features at A with z = |x + y|^2: a Gaussian integral."""
    scale = 1 - 4 * factor
    return scale**size * (1 - 8 * factor) ** (-size / 2) * math.exp(2 * scale * z / (1 - 8 * factor))


@pytest.mark.parametrize("z", [0.1, 1.0, 6.0, 40.0])
def test_oprf_has_the_least_variance(z):
    feature_map = kernel("spectraformer", "oprf")
    with torch.no_grad():
        feature_map.statistic.fill_(z)
    factor = float((1 - feature_map.inverse_rho(None)[0]) / 8)
    best = min((second_moment(-a / 1000, z) for a in range(1, 4000)), default=None)
    assert second_moment(factor, z) <= best * (1 + 1e-5)
    assert factor < 0 and second_moment(factor, z) < second_moment(0.0, z)


def test_oprf_measures_the_mean_over_all_pairs():
    query, key, _ = query_key_value(7)
    scale = HEAD_DIM**-0.25
    for key_heads, group in (("query", 1), ("kv", HEADS // KV_HEADS)):
        feature_map = kernel("spectraformer", "oprf", key_heads=key_heads)
        measured = feature_map.measure(query, key)
        x = query.unflatten(1, (-1, group))
        y = key.repeat_interleave(x.shape[1] // KV_HEADS, dim=1)
        for head in range(x.shape[1]):
            tokens_x, tokens_y = scale * x[:, head].reshape(-1, HEAD_DIM), scale * y[:, head].reshape(-1, HEAD_DIM)
            pairs = (tokens_x[:, None] + tokens_y[None]).square().sum(-1)
            torch.testing.assert_close(measured[head], pairs.mean())


def test_oprf_beats_posrf_on_large_norms():
    query, key, x, y = pair(scale=1.0)
    errors = {}
    for component in ("oprf", "posrf"):
        values = estimates("spectraformer", component, query, key, matrix="gaussian")
        errors[component] = (values - (x @ y).exp()).square().mean()
    assert errors["oprf"] < 0.5 * errors["posrf"]


@pytest.mark.parametrize("component", ["posrf", "gerf", "trigrf"])
def test_components_are_their_formulas(component):
    feature_map = kernel("spectraformer", component, matrix="orf", noise=0.3)
    query, key, _ = query_key_value(5)
    features = feature_map(query, key)
    keys = key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    size = feature_map.num_features
    for tokens, log_scale, actual, name in (
        (query, features.query_log_scale, features.query, "query_parameters"),
        (keys, features.key_log_weight, features.key, "key_parameters"),
    ):
        x = tokens.double() / HEAD_DIM**0.25
        w = feature_map.frequencies.double()
        phase, norm = torch.einsum("bhtd,hdn->bhtn", x, w), x.square().sum(-1, keepdim=True)
        if component == "trigrf":
            expected = (norm / 2).exp() * torch.cat([phase.cos(), phase.sin()], -1) * (2 / size) ** 0.5
        else:
            a = torch.zeros(HEADS, dtype=torch.float64)
            if component == "gerf":
                a = (1 - 1 / getattr(feature_map, name)["log_rho"].double().exp()) / 8
            a = a[:, None, None]
            expected = (1 - 4 * a) ** (HEAD_DIM / 4) * torch.exp(
                a * w.square().sum(1)[:, None] + (1 - 4 * a).sqrt() * phase - norm / 2
            )
            expected = expected * size**-0.5
        actual = actual.double() * log_scale.double().exp()[..., None]
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("key_heads", ["query", "kv"])
def test_saderf_balances_queries_and_keys(key_heads):
    """Psi makes both sides' second moments equal, over the visible tokens only, and leaves the kernel as it is."""
    feature_map = kernel("spectraformer", "saderf", key_heads=key_heads)
    query, key, _ = query_key_value(30)
    visible = torch.ones(2, 30, dtype=torch.bool)
    visible[0, 20:] = False
    keys = key if key_heads == "kv" else key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    psi = feature_map._psi(query, keys, visible)
    for batch, length in ((0, 20), (1, 30)):
        for head in range(keys.shape[1]):
            group = HEADS // keys.shape[1]
            x = query[batch, head * group : (head + 1) * group, :length].square().mean((0, 1))
            y = keys[batch, head, :length].square().mean(0)
            torch.testing.assert_close(psi[batch, head, 0], (y / x) ** 0.25)
            torch.testing.assert_close(x * psi[batch, head, 0] ** 2, y / psi[batch, head, 0] ** 2)
    nothing = torch.zeros(2, 30, dtype=torch.bool)
    assert torch.equal(feature_map._psi(query, keys, nothing), torch.ones_like(psi))


def test_saderf_has_less_error_on_unequal_scales():
    query, key, x, y = pair(scale=1.0)
    query, key, x, y = query * 4, key / 4, 4 * x, y / 4
    errors = {}
    for component in ("saderf", "gerf"):
        values = estimates("spectraformer", component, query, key, matrix="gaussian")
        errors[component] = (values - (x @ y).exp()).square().median()
    assert errors["saderf"] < 0.1 * errors["gerf"]


def test_saderf_is_refused_in_causal_layers():
    with pytest.raises(ValueError, match="Component 'saderf' looks at the whole sequence, .* causal attention"):
        build_feature_map(kernel_spec("spectraformer", "saderf", causal=True))


def test_performer_is_posrf_over_orthogonal_frequencies():
    performer = kernel("performer", None, tied=True, noise=0)
    posrf = kernel("spectraformer", "posrf", matrix="orf", tied=True, noise=0)
    query, key, _ = query_key_value(4)
    for name, value in vars(posrf(query, key)).items():
        torch.testing.assert_close(getattr(performer(query, key), name), value, rtol=0, atol=0)


def test_darkformer_starts_as_performer_and_learns_a_covariance():
    performer, darkformer = (kernel(name, None, tied=True, noise=0) for name in ("performer", "darkformer"))
    query, key, _ = query_key_value(4)
    torch.testing.assert_close(darkformer(query, key).key, performer(query, key).key)
    query, key, x, y = pair()
    matrix = torch.randn(HEAD_DIM, HEAD_DIM, generator=torch.Generator().manual_seed(5)) * 0.35
    values = estimates(
        "darkformer", None, query, key, prepare=lambda m: m.query_parameters["m"].copy_(matrix.expand(DRAWS, -1, -1))
    )
    # x M is the map's row-vector form of M x
    assert_mean(values, ((x @ matrix.double()) @ (y @ matrix.double())).exp())


def test_rfa_estimates_the_gaussian_kernel_of_unit_vectors():
    query, key, x, y = pair(scale=2.0)
    sigma = torch.linspace(0.3, 1.5, HEAD_DIM)
    values = estimates("rfa", None, query, key, prepare=lambda m: m.query_parameters["log_sigma"].copy_(sigma.log()))
    difference = sigma * (x / x.norm() - y / y.norm())
    assert_mean(values, (-difference.square().sum() / 2).exp())


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_every_pair_of_the_grid_attends(component, matrix):
    """Fixed frequencies are saved and not trained, learnable ones are parameters; attention is finite and trains."""
    # moment matching needs more vectors than dimensions
    frequencies = 12 if matrix == "mm" else 5
    torch.manual_seed(2)
    spec = kernel_spec("spectraformer", component, matrix=matrix, num_frequencies=frequencies, tied=True)
    feature_map = build_feature_map(spec)
    feature_map.reset_parameters()
    learned, saved = dict(feature_map.named_parameters()), feature_map.state_dict()
    if matrix == "fastfood_learnable":
        assert {f"query_parameters.{name}" for name in "bgs"} <= learned.keys()
    else:
        assert {name.rpartition(".")[2] for name in learned} <= {"log_rho"}
        assert ("frequencies" in saved) != {"b", "g", "s", "permutation"}.issubset(saved)
    query, key, value = query_key_value(9)
    output, _ = attend(feature_map, query, key, value, scaling=SCALING)
    output.square().sum().backward()
    for name, parameter in learned.items():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    copy = build_feature_map(spec)
    copy.load_state_dict(saved)
    assert torch.equal(attend(copy, query, key, value, scaling=SCALING)[0], output)


def test_heads_and_layers_draw_their_own():
    torch.manual_seed(0)
    first, second = (build_feature_map(kernel_spec("performer", None)) for _ in range(2))
    for feature_map in (first, second):
        feature_map.reset_parameters()
    drawn = [*first.frequencies, *second.frequencies]
    assert all(not torch.equal(a, b) for i, a in enumerate(drawn) for b in drawn[:i])


def test_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"no covariance to match with 8 vectors of size 8; ask for more features"):
        build_feature_map(kernel_spec("spectraformer", "trigrf", matrix="mm"))
    with pytest.raises(ValueError, match=f"no matrix 'or'; choose one of: {', '.join(MATRICES)}"):
        build_feature_map(kernel_spec("spectraformer", "oprf", matrix="or"))
    with pytest.raises(ValueError, match="Variant 'performer' has no matrix 'orf'; leave the matrix out"):
        build_feature_map(kernel_spec("performer", None, matrix="orf"))


def test_signed_components_are_marked():
    signed = [name for name in COMPONENTS if feature_map_class("spectraformer", name).signed]
    assert signed == ["trigrf"] and feature_map_class("rfa", None).signed
    assert [n for n in COMPONENTS if not feature_map_class("spectraformer", n).causal_safe] == ["saderf"]
