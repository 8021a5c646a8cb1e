"""Stage 3, or training from scratch: all weights learn the next token of the text itself."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..losses import label_loss
from ..recipe_stages import LabelTrainingRecipe
from .compilation import layers_compiled
from .heads import SplitModel, backward_in_pieces
from .logits import next_tokens, positions_per_piece
from .model_stage import ModelStage
from .stage import StepLosses, trainable
from .throughput import kernel_flops, weight_flops


class LabelTraining(ModelStage):
    """Cross-entropy with the next token; there is no teacher, and everything is trained."""

    name = "label_training"

    def __init__(self, model: PreTrainedModel, recipe: LabelTrainingRecipe, accelerator: Accelerator):
        super().__init__(model, recipe, accelerator)
        self._split = SplitModel(model)
        self.train_only(dict(model.named_parameters()))

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

    def finish(self) -> None:
        """Nothing is left to do: weights are trained in place."""
