"""A stage's own loss on held-out sequences while it trains, and when that ends the stage."""

from __future__ import annotations

import math

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..devices import to_device
from ..recipe_stages import StageRecipe
from .averaging import averaged, keep_best
from .micro_batches import MicroBatches
from .reduction import LossReduction
from .stage import sum_losses

# in the log
VALIDATION_LOSS = "validation_loss"


class Validation:
    """The validations of one stage.

    Args:
        sequences: held-out token ids (N, T), shared out over the processes.
        log: the main process's log of the steps before, whose validations count; empty elsewhere.
    """

    def __init__(self, recipe: StageRecipe, sequences: torch.Tensor, accelerator: Accelerator, log: list[dict]):
        self._recipe, self._device = recipe, accelerator.device
        mine = sequences[accelerator.process_index :: accelerator.num_processes]
        # no more at once than a process's share of a step
        self._batches = mine.split(-(-recipe.batch_size // accelerator.num_processes)) if len(mine) else ()
        history = [(entry["step"], entry[VALIDATION_LOSS]) for entry in log if VALIDATION_LOSS in entry]
        self._history: list[tuple[int, float]] = broadcast_object_list([history])[0]

    def is_due(self, step: int) -> bool:
        return step % self._recipe.validation_every == 0 or step == self._recipe.steps

    @property
    def ended_at(self) -> int | None:
        """The step at which the stage ended, its patience without a new best being over; None if it goes on."""
        losses = [loss for _, loss in self._history]
        if self._recipe.patience is None or not losses:
            return None
        since_best = len(losses) - 1 - losses.index(min(losses))
        return self._history[-1][0] if since_best >= self._recipe.patience else None

    def measure(self, step: int, micro_batches: MicroBatches, reduce_losses: LossReduction) -> float:
        """The mean loss per token after a step, of the averaged weights where there are some.

        It runs as a step does, and adds to the gradients, which the next step forgets.
        """
        optimizer = micro_batches.stage.optimizer
        with averaged(optimizer):
            batches = (to_device(batch, self._device) for batch in self._batches)
            losses = reduce_losses(sum_losses(map(micro_batches.backward, batches)))
            loss = float(losses.total / losses.count)
            best = min((loss for _, loss in self._history), default=math.inf)
            if self._recipe.patience is not None and loss < best:
                keep_best(optimizer)
        self._history.append((step, loss))
        return loss
