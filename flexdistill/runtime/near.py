"""Exact softmax attention to a few keys: those of the window, which are a query's nearest, and a sequence's sinks.

Softmax attention leaves much of its weight on the first tokens of a sequence, whatever they are (Xiao et al. 2023,
arXiv:2309.17453). As sinks they never enter the state: a key that leaves the window takes a place of its own if it is
among the first visible ones.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch

from .configuration_flexformer import KernelSpec
from .linear_attention import RowSums

# what a key is: hidden from every query, seen until it leaves the window and by the kernel from then on, or a sink
HIDDEN, SEEN, SINK = 0, 1, 2


@dataclass
class Sinks:
    """The first visible keys that have left the window, in at most S places."""

    key: torch.Tensor  # (B, K, S, d)
    value: torch.Tensor  # (B, K, S, D)
    taken: torch.Tensor  # (B,) int64: places in use, from the first on

    @classmethod
    def empty(cls, key: torch.Tensor, value: torch.Tensor, places: int) -> "Sinks":
        batch, heads, _, size = key.shape
        return cls(
            key=key.new_zeros(batch, heads, places, size),
            value=value.new_zeros(batch, heads, places, value.shape[-1]),
            taken=torch.zeros(batch, dtype=torch.int64, device=key.device),
        )

    def before(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """All places, followed by the keys (B, K, T, d or 2 d), values and kinds of tokens that come after them."""
        count = self.key.shape[2]
        # where the kernel's side of a key follows the window's, a sink has none
        sinks = torch.nn.functional.pad(self.key, (0, key.shape[-1] - self.key.shape[-1]))
        taken = torch.arange(count, device=key.device) < self.taken[:, None]
        kinds = [SINK * taken.to(torch.uint8), token_kinds(visible, count, self.taken)]
        return torch.cat([sinks, key], 2), torch.cat([self.value, value], 2), torch.cat(kinds, 1)

    def after(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor
    ) -> tuple["Sinks", torch.Tensor, torch.Tensor]:
        """What becomes of T keys (B, K, T, d), values (B, K, T, D), visible (B, T), that leave the window in turn.

        Returns:
            the sinks after the last; int64 (B, S), which of the T keys took each place: -1 where an earlier one had,
            T where none has yet; and bool (B, T), the keys that took one.
        """
        length, places = key.shape[2], torch.arange(self.key.shape[2], device=key.device)
        rank = self.taken[:, None] + visible.cumsum(1)
        chosen = visible & (rank <= len(places))
        takes = chosen[:, None] & (rank[:, None] == places[:, None] + 1)  # (B, S, T)
        arrives, arrival = takes.any(-1), takes.int().argmax(-1)

        def placed(before, new):
            new = new.gather(2, arrival[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[-1]))
            return torch.where(arrives[:, None, :, None], new, before)

        sinks = Sinks(placed(self.key, key), placed(self.value, value), rank[:, -1].clamp_max(len(places)))
        never = torch.where(places < self.taken[:, None], -1, length)
        return sinks, torch.where(arrives, arrival, never), chosen


def visible_or_all(visible: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: which tokens of x (B, H, T, d) are visible, all where nothing says so."""
    if visible is None:
        return torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    return visible


def near_side(sides: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    """Queries or keys as the window sees them, of (B, H, T, d), or of (B, H, T, 2 d) where the kernel sees others."""
    return sides[..., : spec.head_dim]


def far_side(sides: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    """As the kernel sees them: the last d."""
    return sides[..., -spec.head_dim :]


def token_kinds(visible: torch.Tensor, count: int, taken: torch.Tensor | None = None) -> torch.Tensor:
    """What each of the tokens (B, T) is, uint8, where `taken` (B,) of `count` places for sinks were in use before."""
    left = count if taken is None else count - taken[:, None]
    return visible.to(torch.uint8) + first_visible(visible, left).to(torch.uint8)


def sink_spans(kinds: torch.Tensor) -> torch.Tensor:
    """From which index to which the sinks of each sequence lie, the end excluded: int32 (B, 2), zeros without any."""
    sinks = (kinds == SINK).int()
    spans = torch.stack([sinks.argmax(1), kinds.shape[1] - sinks.flip(1).argmax(1)], dim=1)
    return torch.where(sinks.amax(1, keepdim=True) > 0, spans, 0).int()


def kinds_and_spans(
    visible: torch.Tensor, count: int, boundaries: list[int] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_kinds` and `sink_spans` of tokens (B, T); with `boundaries`, of sequences end to end, spans by query."""
    if boundaries is None:
        kinds = token_kinds(visible, count)
        return kinds, sink_spans(kinds)
    kinds, spans = [], []
    for start, end in pairwise(boundaries):
        kinds.append(token_kinds(visible[:, start:end], count))
        spans.append((start + sink_spans(kinds[-1])).expand(end - start, 2))
    return torch.cat(kinds, dim=1), torch.cat(spans)


def first_visible(visible: torch.Tensor, count: int | torch.Tensor) -> torch.Tensor:
    """The first `count`, or (B, 1) counts, of the visible tokens (B, T): (B, T) bool."""
    return visible & (visible.cumsum(1) <= count)


def near_sums(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    window: int,
    scaling: float,
    sinks: Sinks | None = None,
) -> tuple[RowSums, Sinks | None, torch.Tensor]:
    """Softmax attention of each of T queries to the window and to the sinks, as one; in linear cost.

    Args:
        query, key, value, visible: as `window_sums` takes them.
        sinks: those of the keys before these.

    Returns:
        the row sums; the sinks after the first T keys, which leave the window; and (B, T), which of those T keys are
        visible and no sinks.
    """
    rows, length = window_sums(query, key, value, visible, window, scaling), query.shape[-2]
    leaving = visible[:, :length]
    if sinks is None:
        return rows, None, leaving
    sinks, arrival, chosen = sinks.after(key[:, :, :length], value[:, :, :length], leaving)
    # query t sees outside its window what has left it up to t
    seen = arrival[:, None] <= torch.arange(length, device=query.device)[:, None]
    weights, maximum = softmax_scores(query, repeat(sinks.key, query.shape[1]), seen[:, None], scaling)
    first = RowSums(weights @ repeat(sinks.value, query.shape[1]).float(), weights.sum(-1), weights.sum(-1), maximum)
    return _together(rows, first), sinks, leaving & ~chosen


def window_sums(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, window: int, scaling: float
) -> RowSums:
    """Softmax attention of each of T queries to the last `window` of T + window keys, itself included, in linear cost.

    Args:
        query: (B, H, T, d); key: (B, K, window + T, d); value: (B, K, window + T, D); visible: (B, window + T) bool.
    """
    heads, length = query.shape[1], query.shape[-2]
    chunk = min(max(window, 64), length)
    padding = -length % chunk
    query = torch.nn.functional.pad(query, (0, 0, 0, padding)).unflatten(-2, (-1, chunk))

    def spans(x, axis):
        x = torch.nn.functional.pad(x, (0, 0) * (x.ndim - 1 - axis) + (0, padding))
        return x.unfold(axis, chunk + window, chunk).movedim(-1, axis + 1)

    # query r of a chunk stands at place window + r of the chunk's span of keys
    place = torch.arange(chunk + window, device=query.device) - torch.arange(chunk, device=query.device)[:, None]
    banded = (place > 0) & (place <= window) & spans(visible, 1)[:, None, :, None, :]
    weights, maximum = softmax_scores(query, repeat(spans(key, 2), heads), banded, scaling)
    numerator = weights @ repeat(spans(value, 2), heads).float()
    numerator, denominator, maximum = (x.flatten(2, 3)[:, :, :length] for x in (numerator, weights.sum(-1), maximum))
    return RowSums(numerator, denominator, denominator, maximum)


def softmax_scores(query, key, allowed, scaling):
    """exp(scaling q.k - maximum) where allowed, else 0, with the maximum of each row."""
    logits = (query.float() @ key.float().transpose(-1, -2) * scaling).masked_fill(~allowed, -torch.inf)
    maximum = logits.detach().amax(-1)
    return (logits - maximum.masked_fill(maximum == -torch.inf, 0.0)[..., None]).exp(), maximum


def repeat(x: torch.Tensor, heads: int) -> torch.Tensor:
    """(B, K, ...) -> (B, heads, ...): each KV head repeated for its group."""
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def _together(one: RowSums, other: RowSums) -> RowSums:
    """The row sums over the keys of both."""
    maximum = torch.maximum(one.maximum, other.maximum)
    finite = maximum.masked_fill(maximum == -torch.inf, 0.0)
    weights = [(rows.maximum - finite).exp() for rows in (one, other)]
    numerator = sum(weight[..., None] * rows.numerator for weight, rows in zip(weights, (one, other), strict=True))
    denominator = sum(weight * rows.denominator for weight, rows in zip(weights, (one, other), strict=True))
    return RowSums(numerator, denominator, denominator, maximum)
