"""Feature maps: what turns queries and keys into the features of a linear attention kernel.

Shapes: B batch, H query heads, G = H / K query heads per KV head, K KV heads, T tokens, d head size, F features.
Queries are (B, H, T, d); keys are (B, K, T, d). State heads S are H or K (`KernelSpec.key_heads`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init

from .configuration_flexformer import KernelSpec

# least denominator of a row. Signed features can cancel, and one row divided by nearly zero ruins a model: a share of
# the row's Cauchy-Schwarz bound. Positive features cannot cancel, only underflow: a number, as features and weights
# are at most 1
SIGNED_GUARD = 0.01
# with decay the bound forgets as the features do and is closer: of the sum of all norms, which grows with the text, a
# row that looks at few tokens has so little that the guard would raise it however clear it is
DECAYED_GUARD = 0.15
POSITIVE_GUARD = 1e-30
# kernel and window may differ by e^4 in mass at first, so the gate between them moves in larger steps than frequencies
GATE_UNIT = 10.0
# |k|^2 is of the order of 100, so the coefficient of positive features' norm factor moves in tenths
NORM_UNIT = 0.1
# rates of forgetting span four orders of magnitude, so their logarithms move in larger steps than frequencies
DECAY_UNIT = 5.0
# at first: tokens after which a feature has forgotten all but 1/e, spread evenly on a logarithmic scale
SHORTEST_MEMORY, LONGEST_MEMORY = 1.6, 1e4


@dataclass
class Features:
    """Features of some queries and keys; all float32, all that exponentiates kept as logarithms.

    The kernel is k(q_i, k_j) = exp(query_log_scale_i + key_log_weight_j) <query_i, key_j>. With a decay, feature f of
    that product counts exp(-decay_f (i - j)) times, for a key j that comes to be seen at position j.
    """

    query: torch.Tensor  # (B, H, Tq, F)
    query_log_scale: torch.Tensor  # (B, H, Tq); cancels in a purely linear row, counts against a softmax window
    key: torch.Tensor  # (B, S, Tk, F)
    key_log_weight: torch.Tensor  # (B, S, Tk)
    decay: torch.Tensor | None = None  # (S, F), in (0, 1): how fast each feature forgets, per token
    signed: bool = False  # features can be negative, so that rows need a bound

    def sizes(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What bounds rows: sizes (B, S, Tk, M) of keys, and how fast they are forgotten (S, M), None if they are not.

        Norms, forgotten as slowly as any feature, with M = 1; but absolute features where signed ones decay, M = F.
        """
        if self.decay is None or not self.signed:
            slowest = None if self.decay is None else self.decay.amin(-1, keepdim=True)
            return self.key.norm(dim=-1, keepdim=True), slowest
        return self.key.abs(), self.decay


@dataclass(frozen=True)
class Context:
    """What a map may need to know of tokens beside their queries and keys."""

    query_start: int = 0  # position of the first query; only differences of positions have a meaning
    key_start: int = 0
    visible: torch.Tensor | None = None  # (B, Tk) bool, False at padding


WHOLE_SEQUENCE = Context()


@dataclass
class Spectrum:
    """Parameters of the fused kernels: of the query map (one per query head) and of the key map (one per state head).

    Each map is (W1 (H, d, n), W2 (H, d, n) or None, log-amplitudes (H, 2 n), norm factor (H,)), all float32;
    log-amplitudes are None for the trigonometric component. A token's weight holds exp(norm factor |x|^2).
    """

    query: tuple[torch.Tensor | None, ...]
    key: tuple[torch.Tensor | None, ...]
    decay: torch.Tensor | None  # as in `Features`


class MapParameters(nn.ParameterDict):
    """Parameters of one map by name; called for them, so that the hooks fire that bring offloaded ones."""

    __call__ = nn.Module.__call__  # torch's own refuses to be called

    def forward(self) -> dict[str, nn.Parameter]:
        return dict(self.items())


class FeatureMap(nn.Module):
    """The contract of a kernel: construct from a `KernelSpec`, map queries and keys to `Features`.

    A subclass declares its parameters with `_add_maps`, fills them in `reset_parameters` (called for weights that a
    checkpoint lacks, so it must not rely on what memory holds), and implements `query_features` and `key_features`.
    What is drawn or measured but not trained is a buffer: saved with the parameters, and filled in the same place.

    Args:
        spec: the kernel of the module this map serves.
    """

    has_spectrum = False  # the fused kernels know the features
    signed = False  # features can be negative: rows need the guarded normaliser
    calibrated = True  # log scales approximate the softmax logits, so window and kernel weigh in on one scale
    causal_safe = True  # a token's features depend on no later token
    takes_frequencies = True  # the number of features can be chosen; else it follows from the head size
    frequency_scale: float | None = None  # of the first frequencies, where they can be chosen
    has_horizon = False  # distances have an end, which the spec names
    measures = False  # before training, `calibrate` is given what `measure` finds in training data
    matrices: tuple[str, ...] = ()  # matrices of frequencies to choose from, the default first
    paper = ""
    tied_by_default = False
    decays_by_default = False  # in causal layers
    longest_wavelength = math.inf  # tokens; of the rotary embedding that a kernel with decay sees by default

    def __init__(self, spec: KernelSpec):
        super().__init__()
        self.spec = spec
        self.query_parameters = MapParameters()
        self.key_parameters = MapParameters()
        self.window_gate = nn.Parameter(torch.empty(spec.num_heads)) if spec.window else None
        self.decay = nn.Parameter(torch.empty(spec.num_state_heads, self.num_features)) if spec.decay else None

    @property
    def num_features(self) -> int:
        """Features F per head."""
        return 2 * self.spec.num_frequencies

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, function: Callable[..., Any] | None = None, **arguments: Any
    ) -> Any:
        """`features`, or what function(self, query, key, **arguments) returns.

        Whatever needs the parameters runs inside this call, because only a module's call fires the hooks that bring
        offloaded or sharded parameters.
        """
        function = function or type(self).features
        return function(self, query, key, **arguments)

    def features(self, query: torch.Tensor, key: torch.Tensor, context: Context = WHOLE_SEQUENCE) -> Features:
        """Maps queries (B, H, Tq, d) and keys (B, K, Tk, d), of any floating dtype, to float32 features.

        Queries are scaled so that the softmax logits are q.k / sqrt(d).
        """
        query, key = query.float(), self._repeated(key.float())
        return Features(*self.query_features(query), *self.key_features(key))

    def _repeated(self, key: torch.Tensor) -> torch.Tensor:
        """(B, K, T, d) -> (B, S, T, d): a key per state head."""
        return key.repeat_interleave(self.spec.num_state_heads // self.spec.num_key_value_heads, dim=1)

    def decay_rates(self) -> torch.Tensor | None:
        """How fast each feature forgets (S, F), float32 in (0, 1), per token; None without a decay."""
        return None if self.decay is None else torch.sigmoid(DECAY_UNIT * self.decay.float())

    def measure(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """What this map wants to know of training data, from queries and keys as `features` gets them."""
        raise NotImplementedError

    def calibrate(self, measured: torch.Tensor) -> None:
        """Fits the initial values to the mean of what `measure` found."""
        raise NotImplementedError

    def spectrum(self) -> Spectrum:
        """What the fused kernels need to compute these features."""
        raise NotImplementedError

    def raw_spectrum(self) -> tuple[torch.Tensor | None, ...]:
        """What the fused decoding step makes a spectrum from by itself: parameters as they are, of any floating dtype.

        W1, W2, log-amplitudes and units of the query map, with a row for each group of query heads, and of the key map;
        the parameter of the norm factor, and that of the decay.
        """
        raise NotImplementedError

    def query_features(self, query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 queries (B, H, T, d) -> features (B, H, T, F) and log scale (B, H, T)."""
        raise NotImplementedError

    def key_features(self, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """float32 keys (B, S, T, d) -> features (B, S, T, F) and log-weight (B, S, T)."""
        raise NotImplementedError

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fills every parameter and buffer with its initial value."""
        if self.window_gate is not None:
            init.zeros_(self.window_gate)
        if self.decay is not None:
            # steps of the golden ratio: evenly spread, whatever the order of a map's features means
            shares = torch.arange(self.num_features, device=self.decay.device) * 0.6180339887 % 1
            rates = (SHORTEST_MEMORY * (LONGEST_MEMORY / SHORTEST_MEMORY) ** shares).reciprocal()
            init.copy_(self.decay, (torch.logit(rates) / DECAY_UNIT).expand_as(self.decay))

    def _add_maps(self, **shapes: tuple[int, ...]) -> None:
        """Declares parameters (heads, *shape) of the query map and, unless tied, of the key map."""
        tied = self.spec.tied
        heads = self.spec.num_state_heads if tied else self.spec.num_heads
        for name, shape in shapes.items():
            self.query_parameters[name] = nn.Parameter(torch.empty(heads, *shape))
            if not tied:
                self.key_parameters[name] = nn.Parameter(torch.empty(self.spec.num_state_heads, *shape))

    def _maps(self) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
        """Parameters of the query map and of the key map."""
        query = self.query_parameters()
        return query, query if self.spec.tied else self.key_parameters()

    def _start_alike(self) -> None:
        """Gives the key map the query map's values (each KV head takes its group's first query head)."""
        stride = self.spec.num_heads // self.spec.num_state_heads
        for name, parameter in self.key_parameters.items():
            init.copy_(parameter, self.query_parameters[name][::stride])


@functools.cache
def constant_zeros(size: int, device: torch.device) -> torch.Tensor:
    """float32 zeros (size,) that nobody writes to, made once per device."""
    # one made in inference mode could never be saved for a backward pass
    with torch.inference_mode(False):
        return torch.zeros(size, device=device)


def project(x: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """float32 (B, H, T, d) times (H', d, n) -> (B, H, T, n); H is a multiple of H'."""
    return x @ per_head(frequencies, x)


def per_head(parameter: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """float32 parameter (H', ...) -> (H, ...) for x (B, H, ...): one row serves each group of heads."""
    return parameter.float().repeat_interleave(x.shape[1] // parameter.shape[0], dim=0)


def init_identity(parameter: torch.Tensor) -> None:
    """Fills matrices (H', d, n) with the identity."""
    identity = torch.eye(*parameter.shape[1:], device=parameter.device, dtype=parameter.dtype)
    init.copy_(parameter, identity.expand_as(parameter))


def from_log(log_features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors each token's maximum out: features in (0, 1], and the maximum as log scale."""
    maximum = log_features.amax(-1, keepdim=True)
    return (log_features - maximum).exp(), maximum.squeeze(-1)


def log_cosh(x: torch.Tensor) -> torch.Tensor:
    """log cosh x without overflow."""
    x = x.abs()
    return x + torch.log1p((-2 * x).exp()) - math.log(2)
