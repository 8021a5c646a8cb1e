"""What the stages that train more than kernels have in common."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..conversion import ModulePlan
from ..errors import FlexdistillError
from ..recipe_stages import ModelStageRecipe
from ..runtime.configuration_flexformer import KernelSpec
from .optimizers import make_optimizer, model_groups
from .stage import first_non_finite_module

# of Adam and AdamW where all weights are trained
BETAS = (0.9, 0.95)


class ModelStage:
    """A stage whose parameters are optimised together and clipped by one norm, with scaled gradients in fp16."""

    def __init__(self, model: PreTrainedModel, recipe: ModelStageRecipe, accelerator: Accelerator):
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        self.scaler = accelerator.scaler or torch.amp.GradScaler(enabled=False)
        self.states = {"gradient_scaler": self.scaler}

    def train_only(self, parameters: dict[str, nn.Parameter]) -> None:
        """Names what the stage trains."""
        self._trained = parameters
        self.optimizer = make_optimizer(self.recipe, model_groups(self.model, parameters, self.recipe), BETAS)
        self.clip_groups = [list(parameters.values())]

    def trained(self) -> dict[str, nn.Parameter]:
        return self._trained

    def blame(self, sequences: torch.Tensor) -> str:
        with self.accelerator.autocast():
            return first_non_finite_module(self.model, lambda: self.model(input_ids=sequences))


def check_labels(model: PreTrainedModel, modules: Iterable[ModulePlan | KernelSpec], remedy: str) -> None:
    """Raises FlexdistillError if one of the attention modules, or of their kernels, sees the token that follows."""
    if not all(module.causal for module in modules):
        raise FlexdistillError(
            f"{type(model).__name__} does not predict the next token, so there are no labels to learn; {remedy}."
        )
