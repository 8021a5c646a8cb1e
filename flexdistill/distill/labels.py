"""Stage 3, or training from scratch: all weights learn the next token of the text itself."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..losses import label_loss
from ..recipe import LabelTrainingRecipe
from .compilation import layers_compiled
from .heads import SplitModel, backward_in_pieces
from .logits import BETAS, next_tokens, positions_per_piece
from .optimizers import make_optimizer, model_groups
from .stage import StepLosses, first_non_finite_module, trainable
from .throughput import kernel_flops, weight_flops


class LabelTraining:
    """Cross-entropy with the next token; there is no teacher, and everything is trained."""

    name = "label_training"

    def __init__(self, model: PreTrainedModel, recipe: LabelTrainingRecipe, accelerator: Accelerator):
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        self._split = SplitModel(model)
        self._trained = dict(model.named_parameters())
        self.optimizer = make_optimizer(recipe, model_groups(model, self._trained, recipe), BETAS)
        self.clip_groups = [list(self._trained.values())]
        self.scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
        self.states = {"gradient_scaler": self.scaler}

    def trained(self) -> dict[str, nn.Parameter]:
        return self._trained

    def flops_per_token(self, length: int) -> float:
        """A forward and a backward pass."""
        return 3 * (weight_flops(self.model) + kernel_flops(self.model))

    @contextlib.contextmanager
    def active(self):
        with trainable(self.model, set(self._trained)), layers_compiled(self.model, self.recipe.compile):
            yield

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        labels = next_tokens(sequences).flatten()
        with self.accelerator.autocast():
            hidden = self._split.hidden(sequences).flatten(0, 1)
            total = backward_in_pieces(
                hidden,
                positions_per_piece(self.model),
                lambda part_hidden, part: label_loss(self._split.logits(part_hidden), labels[part])[0],
                scale=self.scaler.scale,
            )
        return StepLosses(total, (labels != -100).sum())

    def blame(self, sequences: torch.Tensor) -> str:
        with self.accelerator.autocast():
            return first_non_finite_module(self.model, lambda: self.model(input_ids=sequences))

    def finish(self) -> None:
        """Nothing is left to do: weights are trained in place."""
