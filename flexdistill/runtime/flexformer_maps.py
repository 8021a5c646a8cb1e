"""Flexformer's feature maps (arXiv:2606.27748): learned spectral features, hyperbolic or trigonometric."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_flexformer import KernelSpec
from .feature_maps import FeatureMap, Spectrum, constant_zeros, from_log, log_cosh, per_head, project


class FlexformerFeatureMap(FeatureMap):
    """Learned spectral features of Flexformer (arXiv:2606.27748); `variant` says which frequencies are learned.

    stationary learns W1 (Bochner's theorem); nonstationary learns W1 and W2 (Yaglom's) and equals stationary at W2 = 0.
    """

    paper = "Flexformer, arXiv:2606.27748"
    has_spectrum = True

    @property
    def nonstationary(self) -> bool:
        return self.spec.variant == "nonstationary"

    def _spectrum(self, query_factor: torch.Tensor, key_factor: torch.Tensor) -> Spectrum:
        def tensors(parameters: nn.ParameterDict, heads: int, factor: torch.Tensor):
            names = ("w1", "w2", "log_amplitude")
            found = (parameters[name].float() if name in parameters else None for name in names)
            return tuple(
                x if x is None or x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)
                for x in (*found, factor)
            )

        query, key = self._maps()
        return Spectrum(
            tensors(query, self.spec.num_heads, query_factor),
            tensors(key, self.spec.num_state_heads, key_factor),
            self.decay_rates(),
        )

    def _frequency_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.spec.head_dim, self.spec.num_frequencies)
        return {"w1": shape, "w2": shape} if self.nonstationary else {"w1": shape}


class HyperbolicFeatureMap(FlexformerFeatureMap):
    """The spectral kernel continued to imaginary frequencies, positive by construction.

    log phi(x) = [W1 x + log cosh(W2 x) + b, -W1 x + log cosh(W2 x) + b'] - log(2 n) / 2, with b and b' learned
    log-amplitudes, and keys weighted by exp(gamma |k|^2) with gamma learned per head.
    """

    decays_by_default = True
    longest_wavelength = 20
    measures = True
    # standard deviation of W1 x over training data beyond which kernels start as a few spikes
    _LARGEST_PHASE = 1.5
    # |k|^2 is of the order of 100, so the learned coefficient moves in tenths
    _NORM_UNIT = 0.1

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(**self._frequency_shapes(), log_amplitude=(2 * spec.num_frequencies,))
        self.norm_factor = nn.Parameter(torch.empty(spec.num_state_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        parameters = self.query_parameters
        # a quarter of the standard deviation at which exp(W x) estimates the softmax kernel: that starts flatter, and
        # learns faster, than a half or all of it
        init.normal_(parameters["w1"], std=0.25 * self.spec.head_dim**-0.25)
        if self.nonstationary:
            init.normal_(parameters["w2"], std=0.02)
        init.zeros_(parameters["log_amplitude"])
        init.zeros_(self.norm_factor)
        self._start_alike()

    def measure(self, query, key):
        """Variance of the phases W1 x, the larger of queries' and keys', for each state head (S,)."""
        query_map, key_map = self._maps()
        query, key = query.float(), self._repeated(key.float())
        spreads = [
            project(x, parameters["w1"]).var((0, 2), correction=0).mean(-1).unflatten(0, (-1, group)).amax(-1)
            for x, parameters, group in (
                (query, query_map, query.shape[1] // self.spec.num_state_heads),
                (key, key_map, 1),
            )
        ]
        return torch.maximum(*spreads)

    @torch.no_grad()
    def calibrate(self, measured):
        """Shrinks the frequencies of heads whose phases spread too far."""
        factor = (self._LARGEST_PHASE / measured.sqrt()).clamp_max(1.0)[:, None, None]
        for parameters in (self.query_parameters, self.key_parameters):
            if "w1" in parameters:
                w1 = parameters["w1"]
                w1.mul_(factor.to(w1.dtype).repeat_interleave(len(w1) // len(factor), dim=0))

    def _log_features(self, x: torch.Tensor, parameters: nn.ParameterDict) -> torch.Tensor:
        phase = project(x, parameters["w1"])
        envelope = log_cosh(project(x, parameters["w2"])) if self.nonstationary else 0.0
        log_features = (
            torch.cat([envelope + phase, envelope - phase], -1) + per_head(parameters["log_amplitude"], x)[:, None]
        )
        return log_features - 0.5 * math.log(self.num_features)

    def spectrum(self) -> Spectrum:
        norm_factor = self.norm_factor.float()
        return self._spectrum(constant_zeros(self.spec.num_heads, norm_factor.device), self._NORM_UNIT * norm_factor)

    def query_features(self, query):
        return from_log(self._log_features(query, self._maps()[0]))

    def key_features(self, key):
        features, log_weight = from_log(self._log_features(key, self._maps()[1]))
        return features, log_weight + self._NORM_UNIT * per_head(self.norm_factor, key)[:, None] * key.square().sum(-1)


class TrigonometricFeatureMap(FlexformerFeatureMap):
    """The paper's features: phi(x) = n^-1/2 [cos(W1 x) cos(W2 x), sin(W1 x) cos(W2 x)], norm factor exp(|x|^2 / e^tau).

    With W2 absent (stationary) the second cosine is 1. The features are signed, so rows use the guarded normaliser.
    """

    signed = True
    tied_by_default = True

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(**self._frequency_shapes())
        self.tau = nn.Parameter(torch.empty(spec.num_state_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        # frequencies near zero start as uniform attention: at the softmax-matched Gaussian half the kernel's mass is
        # negative, and training does not recover from it
        for parameter in self.query_parameters.values():
            init.normal_(parameter, std=0.02)
        # the softmax kernel's own value, weakened by e^6
        init.constant_(self.tau, math.log(2 * self.spec.head_dim**0.5) + 6)
        self._start_alike()

    def _features(self, x: torch.Tensor, parameters: nn.ParameterDict) -> torch.Tensor:
        phase = project(x, parameters["w1"])
        features = torch.cat([phase.cos(), phase.sin()], -1)
        if self.nonstationary:
            modulation = project(x, parameters["w2"]).cos()
            features = features * torch.cat([modulation, modulation], -1)
        return features * self.spec.num_frequencies**-0.5

    def _log_norm_factor(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(-1) * (-per_head(self.tau, x)).exp()[:, None]

    def spectrum(self) -> Spectrum:
        factor = (-self.tau.float()).exp()
        return self._spectrum(factor, factor)

    def query_features(self, query):
        return self._features(query, self._maps()[0]), self._log_norm_factor(query)

    def key_features(self, key):
        return self._features(key, self._maps()[1]), self._log_norm_factor(key)
