"""Sequences in which spans come again: practice in recalling what stood far back, which plain text seldom asks for."""

from __future__ import annotations

import random

import torch

# tokens of a span
SHORTEST, LONGEST = 16, 256
# a sequence that repeats has a span for so many tokens, but two at least, so that long ones practise as much
TOKENS_PER_SPAN = 512


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
    positions = torch.arange(length)
    for sequence, known, row in zip(tokens, recalled, rows.tolist(), strict=True):
        generator = random.Random(row)
        if generator.random() >= share:
            continue
        origins = torch.full((length,), -1)
        for _ in range(max(2, length // TOKENS_PER_SPAN)):
            size = generator.randint(min(SHORTEST, longest), longest)
            start = generator.randint(0, length - 2 * size)
            copy = generator.randint(start + size, length - size)
            sequence[copy : copy + size] = sequence[start : start + size].clone()
            origins[copy : copy + size] = positions[start : start + size]
            known[copy : copy + size - 1] = True
        # copies may have cut others since, and what those were copied from
        whole = (origins >= 0) & (sequence[origins] == sequence)
        known[:-1] &= whole[:-1] & whole[1:] & (origins[1:] == origins[:-1] + 1)
    return recalled
