"""Sequences of one or several texts: cut, mixed by weight and held out, in an order fixed by the seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .packing import train_order
from .repeats import repeat_spans


@dataclass(frozen=True)
class TokenRows:
    """Token ids (N, T) of several texts, one after the other, of which rows are read when they are indexed."""

    texts: tuple[torch.Tensor, ...]  # (N_i, T) each, of any integer dtype, possibly memory-mapped
    weights: tuple[float, ...] = (1.0,)
    repeats: float = 0.0  # share of the rows in which spans come again

    def __len__(self) -> int:
        return sum(map(len, self.texts))

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self.texts[0].shape[1]

    def __getitem__(self, rows: torch.Tensor | slice) -> torch.Tensor:
        """Rows by a slice or by indices (R,); (R, T) int64."""
        if isinstance(rows, slice):
            rows = torch.arange(len(self))[rows]
        result = torch.empty(len(rows), self.shape[1], dtype=torch.int64)
        start = 0
        for text in self.texts:
            mine = (rows >= start) & (rows < start + len(text))
            result[mine] = text[rows[mine] - start].long()
            start += len(text)
        if self.repeats:
            repeat_spans(result, rows, self.repeats)
        return result

    def order(self, count: int, seed: int) -> torch.Tensor:
        """The rows (count,) to train on: of each text in its share, none twice before all of that text were used.

        The beginning does not depend on `count`, so that a resumed run indexes into it.
        """
        return self._in_turn(count, lambda index, size, taken: train_order(size, 1, taken, seed + index)[0])

    def in_turn(self) -> torch.Tensor:
        """All rows (N, T) mixed by weight, those of each text in their order."""
        return self[self._in_turn(len(self), lambda index, size, taken: torch.arange(size))]

    def _in_turn(self, count: int, choose: Callable[[int, int, int], torch.Tensor]) -> torch.Tensor:
        turns, order = interleave(self.weights, count), torch.empty(count, dtype=torch.int64)
        start = 0
        for index, text in enumerate(self.texts):
            mine = turns == index
            order[mine] = start + choose(index, len(text), int(mine.sum()))
            start += len(text)
        return order


def interleave(weights: tuple[float, ...], count: int) -> torch.Tensor:
    """Which of several texts has each turn (count,), spread evenly; the beginning does not depend on `count`."""
    shares = [weight / sum(weights) for weight in weights]
    # the j-th sequence of a text is due in the middle of the j-th of its equal parts
    due = [(torch.arange(int(count * share) + 2, dtype=torch.float64) + 0.5) / share for share in shares]
    owners = torch.cat([torch.full((len(times),), index) for index, times in enumerate(due)])
    return owners[torch.cat(due).sort(stable=True).indices[:count]]


def turns_of(weights: tuple[float, ...], count: int) -> list[int]:
    """How many of the first `count` turns each text has."""
    return interleave(weights, count).bincount(minlength=len(weights)).tolist()
