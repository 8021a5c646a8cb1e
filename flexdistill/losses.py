"""Losses as pure functions that return (sum, count); training and evaluation share them, and only the loop divides.

Attention losses are in units of tokens: means over heads, sums over queries, so that any split of a batch into
micro-batches and processes adds up to the same total.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

# weights below this share of a row have no gradient in the cross-entropy: an exact zero has no logarithm
LEAST_WEIGHT = 1e-8
# one nearly cancelled row must not outweigh all others
MOST_NEGATIVE_MASS = 10.0

Loss = tuple[torch.Tensor, torch.Tensor]


@dataclass
class AttentionRows:
    """What attention transfer compares, of each head and query; all float32."""

    cross_entropy: torch.Tensor  # (B, H, T), as `cross_entropy_rows` defines it
    entropy: torch.Tensor  # (B, H, T), as `entropy_rows` does
    negative_mass: torch.Tensor  # (B, H, T), as `negative_mass_rows` does
    teacher: torch.Tensor  # (B, H, T, D): the output of softmax attention
    student: torch.Tensor  # (B, H, T, D): the output of the kernel


def cross_entropy_rows(teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (B, H, T) between float32 rows (B, H, T, T): the student's may be signed."""
    return -(teacher * student.clamp_min(LEAST_WEIGHT).log()).sum(-1)


def entropy_rows(teacher: torch.Tensor) -> torch.Tensor:
    """Entropy (B, H, T) of rows (B, H, T, T)."""
    return -torch.special.xlogy(teacher, teacher).sum(-1)


def negative_mass_rows(student: torch.Tensor) -> torch.Tensor:
    """Negative weight (B, H, T) of rows (B, H, T, T), without limit."""
    return (-student).clamp_min(0).sum(-1)


def attention_cross_entropy(teacher: torch.Tensor, student: torch.Tensor, visible: torch.Tensor | None = None) -> Loss:
    """Cross-entropy between softmax rows and kernel rows, the paper's attention distillation loss (arXiv:2606.27748).

    Args:
        teacher: (B, H, T, T) float32 rows that sum to 1; student: (B, H, T, T) float32 rows, possibly signed.
        visible: (B, T) bool, False where the query is padding.

    Returns:
        sum over queries of the mean over heads, and the number of queries.
    """
    return over_queries(cross_entropy_rows(teacher, student), visible)


def attention_entropy(teacher: torch.Tensor, visible: torch.Tensor | None = None) -> Loss:
    """Entropy of softmax rows: what the cross-entropy is at best. Shapes as in `attention_cross_entropy`."""
    return over_queries(entropy_rows(teacher), visible)


def negative_mass(student: torch.Tensor, visible: torch.Tensor | None = None) -> Loss:
    """Negative weight of each kernel row, at most 10 per row. Shapes as in `attention_cross_entropy`."""
    return limited_negative_mass(negative_mass_rows(student), visible)


def limited_negative_mass(rows: torch.Tensor, visible: torch.Tensor | None = None) -> Loss:
    """`negative_mass` from each row's own (B, H, T)."""
    return over_queries(rows.clamp_max(MOST_NEGATIVE_MASS), visible)


def over_queries(rows: torch.Tensor, visible: torch.Tensor | None = None) -> Loss:
    """Rows (B, H, T) -> sum over queries of the mean over heads, and the number of queries."""
    weight = _query_weight(rows[..., None], visible)
    return (rows.mean(1) * weight).sum(), weight.sum()


def relative_output_error(teacher: torch.Tensor, student: torch.Tensor, visible: torch.Tensor | None = None) -> Loss:
    """Squared error of the attention output over the teacher's mean square in the same sequence.

    Args:
        teacher, student: (B, H, T, D) float32.
        visible: (B, T) bool, False where the query is padding.

    Returns:
        sum over sequences of (relative error x queries), and the number of queries.
    """
    weight = _query_weight(teacher, visible)
    error = ((student - teacher).square().mean((1, 3)) * weight).sum(-1)
    scale = (teacher.square().mean((1, 3)) * weight).sum(-1)
    tokens = weight.sum(-1)
    return (error / scale.clamp_min(torch.finfo(scale.dtype).tiny) * tokens).sum(), tokens.sum()


def hidden_state_error(
    student: Sequence[torch.Tensor], teacher: Sequence[torch.Tensor], weight: torch.Tensor | None = None
) -> Loss:
    """Squared error of hidden states over the teacher's mean square at the same position, the mean over layers.

    Args:
        student, teacher: (B, T, E) of any dtype after each layer; computed in float32.
        weight: (B, T) of each position, 0 at padding; None: 1.

    Returns:
        weighted sum over positions, and the sum of their weights.
    """
    rows = sum(
        (ours.float() - theirs.float()).square().mean(-1)
        / theirs.float().square().mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
        for ours, theirs in zip(student, teacher, strict=True)
    ) / len(student)
    weight = torch.ones_like(rows) if weight is None else weight
    return (rows * weight).sum(), weight.sum()


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor, temperature: float = 1.0) -> Loss:
    """Forward KL of the student's distribution from the teacher's, times temperature squared.

    Args:
        student, teacher: logits (N, V) of any dtype; computed in float32.
        mask: (N,) bool, True where a position counts.
    """
    log_student = (student.float() / temperature).log_softmax(-1)
    log_teacher = (teacher.float() / temperature).log_softmax(-1)
    rows = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(-1) * temperature**2
    return _masked(rows, mask)


def label_loss(logits: torch.Tensor, labels: torch.Tensor) -> Loss:
    """Cross-entropy with labels (N,); logits (N, V); label -100 does not count."""
    return _masked(label_rows(logits, labels), labels != -100)


def label_rows(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy (N,) of each row, float32; shapes as in `label_loss`."""
    return F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=-100)


def top1_agreement(student: torch.Tensor, teacher: torch.Tensor, mask: torch.Tensor) -> Loss:
    """How often both put the same token first; logits (N, V), mask (N,)."""
    return _masked((student.argmax(-1) == teacher.argmax(-1)).float(), mask)


def _masked(rows: torch.Tensor, mask: torch.Tensor) -> Loss:
    return rows.masked_fill(~mask, 0).sum(), mask.sum()


def _query_weight(x: torch.Tensor, visible: torch.Tensor | None) -> torch.Tensor:
    batch, _, length, _ = x.shape
    return x.new_ones(batch, length) if visible is None else visible.to(x.dtype)
