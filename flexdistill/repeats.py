"""Sequences in which spans come again: practice in recalling what stood far back, which plain text seldom asks for."""

from __future__ import annotations

import random

import torch

# of a sequence that repeats
SPANS = 2
# tokens of a span
SHORTEST, LONGEST = 16, 256


def repeat_spans(tokens: torch.Tensor, rows: torch.Tensor, share: float) -> torch.Tensor:
    """Overwrites spans of some sequences, in place, with what stood before them in the same sequence.

    A teacher that finds the copies goes on with what followed the first time, so a student learns to find them, too
    (induction heads: Olsson et al. 2022, arXiv:2209.11895).

    Args:
        tokens: (R, T), any dtype.
        rows: (R,), the sequences' numbers; they alone decide which sequences repeat, and what.
        share: of the sequences that repeat, 0 to 1.

    Returns:
        (R, T) bool: positions inside a copy whose next token is a copy, too, so that recall can tell it.
    """
    length = tokens.shape[1]
    recalled = torch.zeros(tokens.shape, dtype=torch.bool)
    longest = max(1, min(LONGEST, length // 4))
    for sequence, known, row in zip(tokens, recalled, rows.tolist(), strict=True):
        generator = random.Random(row)
        if generator.random() >= share:
            continue
        for _ in range(SPANS):
            size = generator.randint(min(SHORTEST, longest), longest)
            start = generator.randint(0, length - 2 * size)
            copy = generator.randint(start + size, length - size)
            sequence[copy : copy + size] = sequence[start : start + size].clone()
            known[copy : copy + size - 1] = True
    return recalled
