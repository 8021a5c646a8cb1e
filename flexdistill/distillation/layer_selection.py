"""Which layers stay softmax: those whose return to softmax lowers the KL to the teacher most (arXiv:2512.20569)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..attention_modes import AttentionCall, attention_function, softmax_mode
from ..errors import NonFiniteLossError
from ..losses import kl_divergence
from ..runtime.feature_maps import FeatureMap
from ..runtime.interface import NAME
from .heads import SplitModel
from .logits import position_pieces


def converted_modules(model: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Attention modules with a kernel, by name relative to the base model."""
    modules = model.base_model.named_modules()
    return {name: module for name, module in modules if isinstance(getattr(module, NAME, None), FeatureMap)}


def kl_with_softmax_in(
    student: PreTrainedModel,
    choices: Iterable[Iterable[str]],
    sequences: torch.Tensor,
    batch_size: int,
    accelerator: Accelerator,
    counted: torch.Tensor | None = None,
) -> list[float]:
    """Mean KL per token of the teacher's predictions from a student's in which some modules are softmax again.

    The teacher is the student's own weights under softmax attention, as attention transfer leaves them.

    Args:
        choices: for each figure, the names of the converted modules that are softmax.
        sequences: token ids (N, T), shared out over the processes.
        counted: (N, T) bool, the positions that the mean is over; None: all.

    Returns:
        nats per token, one figure per choice.
    """
    converted = converted_modules(student)
    choices = [{converted[name] for name in choice} for choice in choices]
    # one sum of KL per choice, then the number of positions
    sums = torch.zeros(len(choices) + 1, dtype=torch.float64, device=accelerator.device)
    teacher, split = SplitModel(student), SplitModel(student)
    if counted is None:
        counted = torch.ones(sequences.shape, dtype=torch.bool)
    batches = list(zip(sequences.split(batch_size), counted.split(batch_size), strict=True))
    with torch.no_grad(), accelerator.autocast():
        for batch, mask in batches[accelerator.process_index :: accelerator.num_processes]:
            batch, mask = batch.to(accelerator.device), mask.to(accelerator.device).flatten()
            with softmax_mode(student):
                expected = teacher.hidden(batch).flatten(0, 1)
            for index, softmax in enumerate(choices):
                with attention_function(student, _softmax_in(softmax)):
                    hidden = split.hidden(batch).flatten(0, 1)
                sums[index] += _kl_sum(split, hidden, teacher, expected, mask)
            sums[-1] += mask.sum()
    *totals, count = accelerator.reduce(sums, reduction="sum").tolist()
    return [total / count for total in totals]


def choose_layers(
    student: PreTrainedModel,
    count: int,
    sequences: torch.Tensor,
    batch_size: int,
    accelerator: Accelerator,
    counted: torch.Tensor | None = None,
) -> dict[str, float]:
    """The modules that stay softmax: chosen one after the other, each given those before it, and then exchanged.

    A layer's gain depends on the others: after one of two layers that do the same work, the second gains little, and
    layers that recall only together gain little alone. So as long as it lowers the KL by a thousandth or more, that
    chosen layer is given up for that other one for which it falls most.

    Args:
        student: converted, its kernels trained by attention transfer alone.
        count: how many stay softmax, at most all.
        sequences: token ids (N, T), of text that is neither trained nor evaluated on.
        counted: as in `kl_with_softmax_in`.

    Returns:
        name relative to the base model -> drop of the KL in nats per token after those before it.

    Raises:
        NonFiniteLossError: if a KL is NaN or infinite.
    """
    names, chosen = list(converted_modules(student)), []

    def measured(choices: list[list[str]]) -> list[float]:
        return kl_with_softmax_in(student, choices, sequences, batch_size, accelerator, counted)

    kl = math.inf
    for _ in range(count):
        chosen, kl = _best([[*chosen, name] for name in names if name not in chosen], measured)
    while 0 < count < len(names):
        others = [name for name in names if name not in chosen]
        kept = [[name for name in chosen if name != out] for out in chosen]
        best, least = _best([[*rest, name] for rest in kept for name in others], measured)
        if least >= 0.999 * kl:
            break
        chosen, kl = best, least
    figures = measured([chosen[:number] for number in range(count + 1)])
    return {name: before - after for name, (before, after) in zip(chosen, pairwise(figures), strict=True)}


def _best(choices: list[list[str]], measured: Callable[[list[list[str]]], list[float]]) -> tuple[list[str], float]:
    """The choice of the least KL, and that."""
    figures = measured(choices)
    for choice, figure in zip(choices, figures, strict=True):
        if not math.isfinite(figure):
            raise NonFiniteLossError(
                f"The KL with softmax in {', '.join(choice)} is {figure}, so layers cannot be chosen by it; train the "
                "kernels at a lower attention_transfer.learning_rate, or name the layers with --keep-layers."
            )
    least = min(figures)
    return choices[figures.index(least)], least


def _softmax_in(modules: set[torch.nn.Module]):
    def attend(call: AttentionCall) -> torch.Tensor:
        return call.softmax() if call.module in modules else call.flexformer()

    return attend


def _kl_sum(
    split: SplitModel, hidden: torch.Tensor, teacher: SplitModel, expected: torch.Tensor, counted: torch.Tensor
) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    for part in position_pieces(split.model, len(hidden)):
        total += kl_divergence(split.logits(hidden[part]), teacher.logits(expected[part]), counted[part])[0]
    return total
