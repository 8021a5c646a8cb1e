"""Flexformer's feature maps (arXiv:2606.27748): learned spectral features, hyperbolic or trigonometric."""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_flexformer import KernelSpec
from .feature_maps import NORM_UNIT, FeatureMap, Spectrum, constant_zeros, from_log, log_cosh, per_head, project


class FlexformerFeatureMap(FeatureMap):
    """Learned spectral features of Flexformer (arXiv:2606.27748); `variant` says which frequencies are learned.

    stationary learns W1 (Bochner's theorem); nonstationary learns W1 and W2 (Yaglom's) and equals stationary at W2 = 0.
    """

    paper = "Flexformer, arXiv:2606.27748"
    has_spectrum = True
    longest_wavelength = 20

    @property
    def nonstationary(self) -> bool:
        return self.spec.variant == "nonstationary"

    def _spectrum(
        self,
        query_factor: torch.Tensor,
        key_factor: torch.Tensor,
        query_unit: torch.Tensor | None = None,
        key_unit: torch.Tensor | None = None,
    ) -> Spectrum:
        """Everything that the fused kernels take, with the units of queries and keys moved into the frequencies."""

        def tensors(parameters: dict[str, nn.Parameter], heads: int, factor: torch.Tensor, unit: torch.Tensor | None):
            def of_heads(x: torch.Tensor) -> torch.Tensor:
                return x if x.shape[0] == heads else x.repeat_interleave(heads // x.shape[0], 0)

            found = {name: of_heads(x.float()) for name, x in parameters.items()}
            if unit is not None:
                found |= {name: found[name] * unit[:, None, None] for name in ("w1", "w2") if name in found}
            return *(found.get(name) for name in ("w1", "w2", "log_amplitude")), of_heads(factor)

        query, key = self._maps()
        return Spectrum(
            tensors(query, self.spec.num_heads, query_factor, query_unit),
            tensors(key, self.spec.num_state_heads, key_factor, key_unit),
            self.decay_rates(),
        )

    def _raw_spectrum(
        self, norm: torch.Tensor, query_unit: torch.Tensor | None = None, key_unit: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        names = ("w1", "w2", "log_amplitude")
        query, key = ([parameters.get(name) for name in names] for parameters in self._maps())
        return *query, query_unit, *key, key_unit, norm, self.decay

    def _frequency_shapes(self) -> dict[str, tuple[int, ...]]:
        shape = (self.spec.head_dim, self.spec.num_frequencies)
        return {"w1": shape, "w2": shape} if self.nonstationary else {"w1": shape}


class HyperbolicFeatureMap(FlexformerFeatureMap):
    """The spectral kernel continued to imaginary frequencies, positive by construction.

    log phi(x) = [W1 x + log cosh(W2 x) + b, -W1 x + log cosh(W2 x) + b'] - log(2 n) / 2, with b and b' learned
    log-amplitudes, and keys weighted by exp(gamma |k|^2) with gamma learned per head. A head's x is in a unit of its
    own, measured before training: where queries or keys are long, a step of training would else turn every phase.
    """

    decays_by_default = True
    measures = True
    # of the standard deviation at which exp(W x) estimates the softmax kernel: that starts flatter, and learns faster,
    # than a half or all of it; trained for long, a half ends better
    frequency_scale = 0.25
    # mean length of queries or keys from which on they are made shorter
    _LARGEST_LENGTH = 20.0

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(**self._frequency_shapes(), log_amplitude=(2 * spec.num_frequencies,))
        self.norm_factor = nn.Parameter(torch.empty(spec.num_state_heads))
        self.register_buffer("query_unit", torch.empty(spec.num_heads))
        self.register_buffer("key_unit", torch.empty(spec.num_state_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.ones_(self.query_unit)
        init.ones_(self.key_unit)
        parameters = self.query_parameters
        scale = self.spec.frequency_scale or self.frequency_scale
        init.normal_(parameters["w1"], std=scale * self.spec.head_dim**-0.25)
        if self.nonstationary:
            init.normal_(parameters["w2"], std=0.02)
        init.zeros_(parameters["log_amplitude"])
        init.zeros_(self.norm_factor)
        self._start_alike()

    def measure(self, query, key):
        """Mean lengths of each head's queries and of each state head's keys, (H + S,)."""
        return torch.cat([x.float().norm(dim=-1).mean((0, 2)) for x in (query, self._repeated(key))])

    @torch.no_grad()
    def calibrate(self, measured):
        """Makes heads shorter whose queries or keys are long."""
        units = (self._LARGEST_LENGTH / measured).clamp_max(1.0)
        query_unit, key_unit = units.split([self.spec.num_heads, self.spec.num_state_heads])
        if self.spec.tied:  # one map, so one unit
            groups = query_unit.unflatten(0, (self.spec.num_state_heads, -1))
            key_unit = torch.minimum(key_unit, groups.amin(-1))
            query_unit = key_unit.repeat_interleave(groups.shape[1])
        self.query_unit.copy_(query_unit)
        self.key_unit.copy_(key_unit)

    def _log_features(self, x: torch.Tensor, parameters: dict[str, nn.Parameter]) -> torch.Tensor:
        phase = project(x, parameters["w1"])
        envelope = log_cosh(project(x, parameters["w2"])) if self.nonstationary else 0.0
        log_features = (
            torch.cat([envelope + phase, envelope - phase], -1) + per_head(parameters["log_amplitude"], x)[:, None]
        )
        return log_features - 0.5 * math.log(self.num_features)

    def spectrum(self) -> Spectrum:
        norm_factor = NORM_UNIT * self.norm_factor.float() * self.key_unit.float().square()
        zeros = constant_zeros(self.spec.num_heads, norm_factor.device)
        return self._spectrum(zeros, norm_factor, self.query_unit, self.key_unit)

    def raw_spectrum(self):
        return self._raw_spectrum(self.norm_factor, self.query_unit, self.key_unit)

    def query_features(self, query):
        return from_log(self._log_features(query * self.query_unit[:, None, None], self._maps()[0]))

    def key_features(self, key):
        key = key * self.key_unit[:, None, None]
        features, log_weight = from_log(self._log_features(key, self._maps()[1]))
        return features, log_weight + NORM_UNIT * per_head(self.norm_factor, key)[:, None] * key.square().sum(-1)


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

    def _features(self, x: torch.Tensor, parameters: dict[str, nn.Parameter]) -> torch.Tensor:
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

    def raw_spectrum(self):
        return self._raw_spectrum(self.tau)

    def query_features(self, query):
        return self._features(query, self._maps()[0]), self._log_norm_factor(query)

    def key_features(self, key):
        return self._features(key, self._maps()[1]), self._log_norm_factor(key)
