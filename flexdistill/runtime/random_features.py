"""Random features of the softmax kernel exp(q.k / sqrt(d)): a component function over a matrix of frequencies.

With x = q / d^(1/4), y = k / d^(1/4) and w ~ N(0, I), every component f has E[f(w, x) f(w, y)] = exp(x.y). Components
and matrices combine freely, as in Spectraformer (arXiv:2405.15310). Queries and keys see the same frequencies: fixed
ones are buffers, so they are saved and never trained.
"""

import math

import torch
from torch import nn
from transformers import initialization as init

from .configuration_flexformer import KernelSpec
from .feature_maps import WHOLE_SEQUENCE, FeatureMap, Features, from_log, init_identity, per_head, project
from .random_matrices import (
    FASTFOOD,
    FIXED,
    MATRICES,
    check_count,
    fastfood_factors,
    fastfood_matrix,
    fastfood_shape,
    seeded_generator,
)


class RandomFeatureMap(FeatureMap):
    """What random features share: frequencies per state head, and x.w for scaled queries and keys.

    A subclass turns projections into features in `component`; parameters of its own it fills before `super()` does.
    """

    tied_by_default = True
    own_matrix = ""  # where the spec names none
    vectors_per_frequency = 2  # positive components have one feature per random vector, cos and sin two

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        heads, head_dim = spec.num_state_heads, spec.head_dim
        self.matrix = spec.matrix or self.own_matrix
        self.num_vectors = self.vectors_per_frequency * spec.num_frequencies
        check_count(self.matrix, head_dim, self.num_vectors)
        if self.matrix in FIXED:
            self.register_buffer("frequencies", torch.empty(heads, head_dim, self.num_vectors))
            return
        shape = fastfood_shape(head_dim, self.num_vectors)
        self.register_buffer("permutation", torch.empty(heads, *shape, dtype=torch.long))
        if FASTFOOD[self.matrix]:
            self._add_maps(b=shape, g=shape, s=shape)
        else:
            for name in ("b", "g", "s"):
                self.register_buffer(name, torch.empty(heads, *shape))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.device("cpu"):
            draws = self._draw(seeded_generator())
        for name, values in draws.items():
            if name in self.query_parameters:
                parameter = self.query_parameters[name]
                init.copy_(parameter, values.repeat_interleave(len(parameter) // len(values), dim=0))
            else:
                init.copy_(getattr(self, name), values)
        self._start_alike()

    def _draw(self, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Values (S, ...) of everything that is random, by name."""
        arguments = self.spec.head_dim, self.num_vectors, generator
        heads = range(self.spec.num_state_heads)
        if self.matrix in FIXED:
            return {"frequencies": torch.stack([FIXED[self.matrix](*arguments) for _ in heads])}
        factors = [fastfood_factors(*arguments) for _ in heads]
        return {name: torch.stack([factor[name] for factor in factors]) for name in factors[0]}

    def _frequencies(self, parameters: nn.ParameterDict) -> torch.Tensor:
        """float32 (H', d, vectors)."""
        if self.matrix in FIXED:
            return self.frequencies.float()
        learned = FASTFOOD[self.matrix]
        b, g, s = (parameters[name] if learned else getattr(self, name) for name in ("b", "g", "s"))
        permutation = self.permutation.repeat_interleave(len(b) // len(self.permutation), dim=0)
        return fastfood_matrix(b.float(), g.float(), s.float(), permutation, self.spec.head_dim, self.num_vectors)

    def component(
        self, x: torch.Tensor, frequencies: torch.Tensor, parameters: nn.ParameterDict
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 x (B, H, T, d), scaled, and frequencies (H', d, vectors) -> features and log scale."""
        raise NotImplementedError

    def _features(self, x: torch.Tensor, parameters: nn.ParameterDict) -> tuple[torch.Tensor, torch.Tensor]:
        return self.component(self.spec.head_dim**-0.25 * x, self._frequencies(parameters), parameters)

    def query_features(self, query):
        return self._features(query, self._maps()[0])

    def key_features(self, key):
        return self._features(key, self._maps()[1])


class SpectraformerFeatureMap(RandomFeatureMap):
    """A component of Spectraformer's grid; the spec names the matrix."""

    paper = "Spectraformer, arXiv:2405.15310"
    matrices = MATRICES


class TrigonometricRandomFeatureMap(SpectraformerFeatureMap):
    """TrigRF: f(w, x) = exp(|x|^2 / 2) [cos w.x, sin w.x] (Rahimi and Recht, 2007; arXiv:2009.14794, section 2.3)."""

    signed = True
    vectors_per_frequency = 1

    def component(self, x, frequencies, parameters):
        phase = project(x, frequencies)
        features = torch.cat([phase.cos(), phase.sin()], -1) * self.num_vectors**-0.5
        return features, 0.5 * x.square().sum(-1)


class PositiveRandomFeatureMap(SpectraformerFeatureMap):
    """PosRF: f(w, x) = exp(w.x - |x|^2 / 2) (arXiv:2009.14794, lemma 1)."""

    def component(self, x, frequencies, parameters):
        log_features = project(x, frequencies) - 0.5 * x.square().sum(-1, keepdim=True)
        return from_log(log_features - 0.5 * math.log(self.num_vectors))


class PerformerFeatureMap(PositiveRandomFeatureMap):
    """FAVOR+: positive features over orthogonal frequencies (arXiv:2009.14794), drawn once and not redrawn."""

    paper = "Performer, arXiv:2009.14794"
    matrices = ()
    own_matrix = "orf"


class ExponentialRandomFeatureMap(SpectraformerFeatureMap):
    """f(w, x) = (1 - 4A)^(d/4) exp(A |w|^2 + sqrt(1 - 4A) w.x - |x|^2 / 2) (arXiv:2205.15317, section 3.1).

    This is the positive branch, s = 1, for the softmax kernel; s = -1 at A = 0 is TrigRF. The paper's B, C and D
    follow from A for the estimate to be unbiased. Subclasses give rho > 0 with A = (1 - 1 / rho) / 8, which stays
    below 1/8, where the variance is finite.
    """

    def inverse_rho(self, parameters: nn.ParameterDict) -> torch.Tensor:
        """1 / rho per head, (H',)."""
        raise NotImplementedError

    def component(self, x, frequencies, parameters):
        factor = per_head((1 - self.inverse_rho(parameters)) / 8, x)[:, None, None]
        scale = 1 - 4 * factor
        log_features = (
            factor * per_head(frequencies.square().sum(1), x)[:, None]
            + scale.sqrt() * project(x, frequencies)
            - 0.5 * x.square().sum(-1, keepdim=True)
            + 0.25 * self.spec.head_dim * scale.log()
        )
        return from_log(log_features - 0.5 * math.log(self.num_vectors))


class GeneralisedExponentialFeatureMap(ExponentialRandomFeatureMap):
    """GERF: log rho is learned per head, from 0 on, which is PosRF."""

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(log_rho=())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.query_parameters["log_rho"])
        super().reset_parameters()

    def inverse_rho(self, parameters):
        return (-parameters["log_rho"].float()).exp()


class OptimalPositiveFeatureMap(ExponentialRandomFeatureMap):
    """OPRF: the A of least variance for the mean of |x + y|^2, in closed form (arXiv:2205.15317, section 3.2).

    The paper takes the mean over each sequence, which looks ahead. Here it is measured once, on training data, and
    then a constant, so the features are safe for causal attention; before, it is what independent x and y of unit
    variance have.
    """

    measures = True

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self.register_buffer("statistic", torch.empty(spec.num_state_heads))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.constant_(self.statistic, 2 * self.spec.head_dim**0.5)
        super().reset_parameters()

    def measure(self, query, key):
        """The mean of |x + y|^2 over all pairs, (S,)."""
        heads, scale = self.spec.num_state_heads, self.spec.head_dim**-0.25
        x = scale * query.float().unflatten(1, (heads, -1)).movedim(1, 0).flatten(1, -2)
        y = scale * key.float().repeat_interleave(heads // key.shape[1], dim=1).movedim(1, 0).flatten(1, -2)
        squares = sum(tokens.square().sum(-1).mean(1) for tokens in (x, y))
        return squares + 2 * (x.mean(1) * y.mean(1)).sum(-1)

    def calibrate(self, measured):
        self.statistic.copy_(measured)

    def inverse_rho(self, parameters):
        z, d = self.statistic.float(), self.spec.head_dim
        # the root of the paper's quadratic equation, without its cancellation at small z
        return (((2 * z + d).square() + 8 * d * z).sqrt() + 2 * z + d) / (2 * d)


class SequenceAwareFeatureMap(GeneralisedExponentialFeatureMap):
    """SADERF: GERF of Psi x and Psi^-1 y (arXiv:2302.00787), x.y being what it is under every diagonal Psi.

    Psi_l^4 = sum_j y_jl^2 / sum_i x_il^2 gives both the same second moments. It is a statistic of the whole sequence,
    so a causal layer cannot use it. No gradient flows through it.
    """

    causal_safe = False

    def features(self, query, key, context=WHOLE_SEQUENCE):
        query, key = query.float(), self._repeated(key.float())
        with torch.no_grad():
            psi = self._psi(query, key, context.visible)
        query = query * psi.repeat_interleave(query.shape[1] // psi.shape[1], dim=1)
        return Features(*self.query_features(query), *self.key_features(key / psi))

    @staticmethod
    def _psi(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
        """(B, S, 1, d); 1 where no token is visible."""
        if visible is not None:
            query, key = (x * visible[:, None, :, None] for x in (query, key))
        queries, keys = (x.square().mean(2, keepdim=True) for x in (query, key))
        queries = queries.unflatten(1, (keys.shape[1], -1)).mean(2)
        known = (queries > 0) & (keys > 0)
        return torch.where(known, keys / torch.where(known, queries, 1.0), 1.0) ** 0.25


class DarkformerFeatureMap(PositiveRandomFeatureMap):
    """DARKFormer: PosRF of M x, whose kernel is exp(x^T Sigma y) with Sigma = M^T M learned (arXiv:2603.04127).

    M is square, per head, and starts at the identity, where the map is Performer's; the frequencies stay fixed.
    """

    paper = "DARKFormer, arXiv:2603.04127"
    matrices = ()
    own_matrix = "orf"

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(m=(spec.head_dim, spec.head_dim))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init_identity(self.query_parameters["m"])
        super().reset_parameters()

    def component(self, x, frequencies, parameters):
        return super().component(project(x, parameters["m"]), frequencies, parameters)


class RandomFeatureAttentionMap(RandomFeatureMap):
    """RFA: phi(x) = n^-1/2 [sin(w.x), cos(w.x)] of x / |x|, with w = sigma * w' and sigma learned per dimension.

    arXiv:2103.02143, section 3; w' ~ N(0, I) is drawn once instead of anew in each step. The gate that lets the state
    decay (RFA-Gate) reads the layer's input, which a feature map does not see, and is left out.
    """

    paper = "RFA, arXiv:2103.02143"
    signed = True
    calibrated = False  # unit vectors know no temperature
    own_matrix = "gaussian"
    vectors_per_frequency = 1

    def __init__(self, spec: KernelSpec):
        super().__init__(spec)
        self._add_maps(log_sigma=(spec.head_dim,))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        init.zeros_(self.query_parameters["log_sigma"])
        super().reset_parameters()

    def component(self, x, frequencies, parameters):
        sigma = per_head(parameters["log_sigma"], x).exp()[:, None]
        phase = project(sigma * torch.nn.functional.normalize(x, dim=-1), frequencies)
        features = torch.cat([phase.sin(), phase.cos()], -1) * self.num_vectors**-0.5
        return features, features.new_zeros(features.shape[:-1])
