"""Feature maps of other papers, fixed or learned but not random, under the same contract, to compare with."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_flexformer import KernelSpec
from .feature_maps import NORM_UNIT, WHOLE_SEQUENCE, FeatureMap, Features, init_identity, per_head, project


class PlainFeatureMap(FeatureMap):
    """What these maps share: features of each token alone, of moderate size, so nothing is kept as a logarithm."""

    calibrated = False

    def _features(self, x: torch.Tensor, parameters: nn.ParameterDict) -> torch.Tensor:
        """float32 (B, H, T, d) -> (B, H, T, F)."""
        raise NotImplementedError

    def query_features(self, query):
        features = self._features(query, self._maps()[0])
        return features, features.new_zeros(features.shape[:-1])

    def key_features(self, key):
        features = self._features(key, self._maps()[1])
        return features, features.new_zeros(features.shape[:-1])


class HedgehogFeatureMap(PlainFeatureMap):
    """phi(x) = [softmax(W x), softmax(-W x)], W learned per head and started at the identity (arXiv:2402.04347)."""

    paper = "Hedgehog, arXiv:2402.04347"

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(w=(spec.head_dim, spec.num_frequencies))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        init_identity(self.query_parameters["w"])
        self._start_alike()

    def _features(self, x, parameters):
        projected = project(x, parameters["w"])
        return torch.cat([projected.softmax(-1), (-projected).softmax(-1)], -1)


class T2RFeatureMap(PlainFeatureMap):
    """phi(x) = relu(W x + b), W and b learned per head, one map for queries and keys (arXiv:2103.13076, section 2)."""

    paper = "T2R, arXiv:2103.13076"
    tied_by_default = True

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(w=(spec.head_dim, self.num_features), bias=(self.num_features,))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.normal_(self.query_parameters["w"], std=self.spec.head_dim**-0.5)
        init.zeros_(self.query_parameters["bias"])
        self._start_alike()

    def _features(self, x, parameters):
        return (project(x, parameters["w"]) + per_head(parameters["bias"], x)[:, None]).relu()


class EluFeatureMap(PlainFeatureMap):
    """phi(x) = elu(x) + 1, the linear transformer's (arXiv:2006.16236, eq. 7); nothing is learned."""

    paper = "Linear transformer, arXiv:2006.16236"
    tied_by_default = True
    takes_frequencies = False

    @property
    def num_features(self) -> int:
        return self.spec.head_dim

    def _features(self, x, parameters):
        return torch.nn.functional.elu(x) + 1


class CosformerFeatureMap(FeatureMap):
    """phi(x_i) = [relu(x) cos(pi i / 2M), relu(x) sin(pi i / 2M)] at position i (arXiv:2202.08791, section 3).

    So the kernel is relu(q).relu(k) cos(pi (i - j) / 2M). The paper's M is the length of the sequence; a state cannot
    know it, so the spec's horizon is M. Nothing is learned.

    Raises:
        IndexError: from `features`, at a position after the horizon, from where distances would weigh negative.
    """

    paper = "cosFormer, arXiv:2202.08791"
    calibrated = False
    tied_by_default = True
    takes_frequencies = False
    has_horizon = True

    @property
    def num_features(self) -> int:
        return 2 * self.spec.head_dim

    def features(self, query, key, context=WHOLE_SEQUENCE):
        query, key = query.float(), self._repeated(key.float())
        end, horizon = context.query_start + query.shape[2], self.spec.horizon
        if end > horizon:
            raise IndexError(
                f"cosFormer's kernel ends at its horizon of {horizon} tokens and position {end} lies after it; shorten "
                "the sequence, or convert with a larger kernel.horizon."
            )
        query, key = self._at(context.query_start, query), self._at(context.key_start, key)
        return Features(query, query.new_zeros(query.shape[:-1]), key, key.new_zeros(key.shape[:-1]))

    def _at(self, start: int, x: torch.Tensor) -> torch.Tensor:
        position = torch.arange(start, start + x.shape[2], device=x.device, dtype=torch.float32)
        angle = (math.pi / 2 / self.spec.horizon * position)[:, None]
        return torch.cat([x.relu() * angle.cos(), x.relu() * angle.sin()], -1)


class PolaformerFeatureMap(PlainFeatureMap):
    """Kernel of signed pairs: u (q+.k+ + q-.k-) + v (q+.k- + q-.k+), after PolaFormer (arXiv:2501.15061, section 4).

    x+ and x- are relu(+-x / scale)^p with scale = softplus(.) and power p = 1 + 4 sigmoid(.), learned per dimension; so
    are the positive coefficients u and v of pairs with like and with unlike signs.

    The paper gives each of the two streams one half of the value channels, times a gate of the layer's input, and adds
    a convolution of the values: a feature map sees no values, so the coefficients mix the streams in one kernel.
    """

    paper = "PolaFormer, arXiv:2501.15061"
    tied_by_default = True
    takes_frequencies = False
    _MOST_ADDED_POWER = 4.0

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(scale=(spec.head_dim,), power=(spec.head_dim,))
        self.log_mix = nn.Parameter(torch.empty(spec.num_heads, 2, spec.head_dim))

    @property
    def num_features(self) -> int:
        return 2 * self.spec.head_dim

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        for parameter in self.query_parameters.values():
            init.zeros_(parameter)
        # softmax gives unlike signs little weight
        init.copy_(self.log_mix, torch.tensor([0.0, -2.0])[:, None].expand_as(self.log_mix))
        self._start_alike()

    def _features(self, x, parameters):
        scale = torch.nn.functional.softplus(per_head(parameters["scale"], x))[:, None]
        power = 1 + self._MOST_ADDED_POWER * per_head(parameters["power"], x).sigmoid()[:, None]
        return torch.cat([(x / scale).relu() ** power, (-x / scale).relu() ** power], -1)

    def query_features(self, query):
        positive, negative = self._features(query, self._maps()[0]).chunk(2, -1)
        like, unlike = self.log_mix.float().exp().unbind(1)
        like, unlike = like[:, None], unlike[:, None]
        features = torch.cat([like * positive + unlike * negative, like * negative + unlike * positive], -1)
        return features, features.new_zeros(features.shape[:-1])


class LunaFeatureMap(PlainFeatureMap):
    """phi(x) = h(x) m^-1/2 [psi_l(w_i.x + b_i)] for m projections and L = 2 channels (arXiv:2512.08061, eq. 11).

    psi is one multilayer perceptron of a scalar, relu(V relu(a u + c) + e), for all projections of a head. The paper
    leaves the envelope h open and its listing has none; here log h(x) = gamma |x|^2 with gamma learned from 0 on. The
    listing shares w and psi between heads, and its perceptron has 64 hidden units instead of 16.
    """

    paper = "LUNA, arXiv:2512.08061"
    tied_by_default = True
    _CHANNELS, _HIDDEN = 2, 16

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(
            w=(spec.head_dim, spec.num_frequencies),
            bias=(spec.num_frequencies,),
            hidden=(1, self._HIDDEN),
            hidden_bias=(self._HIDDEN,),
            channels=(self._HIDDEN, self._CHANNELS),
            channel_bias=(self._CHANNELS,),
        )
        self.norm_factor = nn.Parameter(torch.empty(spec.num_state_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        parameters = self.query_parameters
        init.normal_(parameters["w"], std=self.spec.head_dim**-0.5)
        init.zeros_(parameters["bias"])
        for name in ("hidden", "hidden_bias"):
            init.uniform_(parameters[name], -1, 1)
        init.uniform_(parameters["channels"], -(self._HIDDEN**-0.5), self._HIDDEN**-0.5)
        # the last relu starts open: a channel that is closed for all tokens would stay so
        init.ones_(parameters["channel_bias"])
        init.zeros_(self.norm_factor)
        self._start_alike()

    def _features(self, x, parameters):
        def layer(u, weight, bias):
            return (u @ per_head(weight, x)[:, None] + per_head(bias, x)[:, None, None]).relu()

        projected = project(x, parameters["w"]) + per_head(parameters["bias"], x)[:, None]
        hidden = layer(projected[..., None], parameters["hidden"], parameters["hidden_bias"])
        channels = layer(hidden, parameters["channels"], parameters["channel_bias"])
        return channels.flatten(-2) * self.spec.num_frequencies**-0.5

    def key_features(self, key):
        features, log_weight = super().key_features(key)
        return features, log_weight + NORM_UNIT * per_head(self.norm_factor, key)[:, None] * key.square().sum(-1)
