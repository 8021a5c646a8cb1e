"""Deterministic and learned kernels of other papers against plain implementations of their formulas."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from flexdistill.runtime.attention import attend, attention_weights
from flexdistill.runtime.registry import build_feature_map
from tests.runtime.kernels import HEAD_DIM, HEADS, KV_HEADS, SCALING, kernel, kernel_spec, query_key_value


def repeated(x):
    return x.repeat_interleave(HEADS // KV_HEADS, dim=1)


def plain_weights(scores):
    """Causal rows (B, H, T, T) divided by their sums."""
    scores = scores.tril()
    return scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)


def assert_weights(feature_map, scores_of, length=23):
    query, key, _ = query_key_value(length)
    actual = attention_weights(feature_map, query, key, scaling=SCALING)
    expected = plain_weights(scores_of(query.double(), repeated(key).double()))
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


def double(parameters):
    return {name: value.double() for name, value in parameters.items()}


def test_t2r():
    feature_map = kernel("t2r", None, noise=0.3)

    def phi(x, p):
        return (torch.einsum("bhtd,hdf->bhtf", x, p["w"]) + p["bias"][:, None]).relu()

    query_map, key_map = double(feature_map.query_parameters), double(feature_map.key_parameters)
    assert query_map["w"].shape == (HEADS, HEAD_DIM, 2 * HEAD_DIM)
    assert_weights(feature_map, lambda q, k: phi(q, query_map) @ phi(k, key_map).transpose(-1, -2))


def test_elu():
    feature_map = kernel("elu", None)
    assert feature_map.num_features == HEAD_DIM and not feature_map.state_dict()
    assert_weights(feature_map, lambda q, k: (F.elu(q) + 1) @ (F.elu(k) + 1).transpose(-1, -2))


@pytest.mark.parametrize("horizon", [23, 100])
def test_cosformer(horizon):
    feature_map = kernel("cosformer", None, horizon=horizon)

    def scores(query, key):
        position = torch.arange(23)
        distance = (position[:, None] - position).double()
        return query.relu() @ key.relu().transpose(-1, -2) * (math.pi / 2 * distance / horizon).cos()

    assert_weights(feature_map, scores)


@pytest.mark.parametrize("window", [0, 6])
def test_cosformer_keeps_count_while_decoding(window):
    """The kernel is of distances, so a state must know how far it is; with a window, keys come to it later."""
    feature_map = kernel("cosformer", None, horizon=40, window=window)
    leaves = [x.detach() for x in query_key_value(40)]
    expected, _ = attend(feature_map, *leaves, scaling=SCALING)
    memory, steps = None, []
    for t in range(40):
        step, memory = attend(feature_map, *(x[:, :, t : t + 1] for x in leaves), scaling=SCALING, memory=memory)
        steps.append(step)
    torch.testing.assert_close(torch.cat(steps, dim=2), expected, rtol=1e-4, atol=1e-6)
    wrong, _ = attend(feature_map, *leaves, scaling=SCALING, memory=None)
    forgetful = dataclasses.replace(memory, seen=0)
    again = [x[:, :, :1] for x in leaves]
    remembered = kernel("cosformer", None, horizon=41, window=window)
    outputs = [attend(remembered, *again, scaling=SCALING, memory=m)[0] for m in (memory, forgetful)]
    assert torch.equal(wrong, expected) and not torch.allclose(*outputs)


def test_cosformer_ends_at_its_horizon():
    feature_map = kernel("cosformer", None, horizon=12)
    leaves = query_key_value(12)
    _, memory = attend(feature_map, *leaves, scaling=SCALING)
    message = "horizon of 12 tokens and position 13 lies after it; shorten the sequence, or convert with a larger"
    with pytest.raises(IndexError, match=message):
        attend(feature_map, *(x[:, :, :1] for x in leaves), scaling=SCALING, memory=memory)
    with pytest.raises(IndexError, match=message):
        attend(feature_map, *query_key_value(13), scaling=SCALING)


def test_horizons_are_for_cosformer():
    with pytest.raises(ValueError, match="Variant 'cosformer' needs a horizon; set kernel.horizon"):
        build_feature_map(kernel_spec("cosformer", None, horizon=None))
    with pytest.raises(ValueError, match="Variant 'elu' needs no horizon; leave kernel.horizon out"):
        build_feature_map(kernel_spec("elu", None, horizon=8))


def test_polaformer():
    feature_map = kernel("polaformer", None, noise=0.5)
    mix = feature_map.log_mix.double().exp()

    def parts(x, p):
        scale, power = F.softplus(p["scale"])[:, None], 1 + 4 * p["power"].sigmoid()[:, None]
        return (x / scale).relu() ** power, (-x / scale).relu() ** power

    def scores(query, key):
        (q_plus, q_minus), (k_plus, k_minus) = (
            parts(query, double(feature_map.query_parameters)),
            parts(key, double(feature_map.key_parameters)),
        )
        like, unlike = mix[:, 0, None], mix[:, 1, None]
        return (
            (like * q_plus) @ k_plus.transpose(-1, -2)
            + (like * q_minus) @ k_minus.transpose(-1, -2)
            + (unlike * q_plus) @ k_minus.transpose(-1, -2)
            + (unlike * q_minus) @ k_plus.transpose(-1, -2)
        )

    assert_weights(feature_map, scores)
    assert kernel("polaformer", None, noise=0).log_mix[0, :, 0].tolist() == [0.0, -2.0]


def test_luna():
    """Against a perceptron of torch's own layers, applied to every projection by itself."""
    feature_map = kernel("luna", None, noise=0.2)

    def phi(x, p):
        heads = []
        for h in range(HEADS):
            first, second = torch.nn.Linear(1, 16).double(), torch.nn.Linear(16, 2).double()
            with torch.no_grad():
                first.weight.copy_(p["hidden"][h].T), first.bias.copy_(p["hidden_bias"][h])
                second.weight.copy_(p["channels"][h].T), second.bias.copy_(p["channel_bias"][h])
            psi = torch.nn.Sequential(first, torch.nn.ReLU(), second, torch.nn.ReLU())
            channels = [psi((x[:, h] @ p["w"][h][:, i] + p["bias"][h, i])[..., None]) for i in range(HEAD_DIM)]
            heads.append(torch.cat(channels, -1) / math.sqrt(HEAD_DIM))
        return torch.stack(heads, 1)

    def scores(query, key):
        envelope = (0.1 * feature_map.norm_factor.double()[:, None] * key.square().sum(-1)).exp()
        features = phi(query, double(feature_map.query_parameters)), phi(key, double(feature_map.key_parameters))
        return features[0] @ features[1].transpose(-1, -2) * envelope[:, :, None]

    assert_weights(feature_map, scores)
