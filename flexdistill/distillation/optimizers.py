"""What the stages optimise with: groups of parameters, each with its own learning rate, and its course."""

from __future__ import annotations

import math

import torch
from torch import nn

from ..recipe_stages import ModelStageRecipe, StageRecipe
from .stage import kernel_parameters


def make_optimizer(recipe: StageRecipe, groups: list[dict], betas: tuple[float, float]) -> torch.optim.Optimizer:
    """Adam, or AdamW, whose groups have no weight decay unless they say so."""
    optimizer = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[recipe.optimizer]
    return optimizer([{"weight_decay": 0.0} | group for group in groups], betas=betas)


def model_groups(model: nn.Module, trained: dict[str, nn.Parameter], recipe: ModelStageRecipe) -> list[dict]:
    """The trained parameters as kernels, norms and the rest, of which only the rest decays."""
    kernels, norms = kernel_parameters(model).keys(), norm_parameters(model).keys()
    norm_rate = recipe.learning_rate if recipe.norm_learning_rate is None else recipe.norm_learning_rate
    groups = [
        {"name": "kernels", "lr": recipe.kernel_learning_rate, "params": trained.keys() & kernels},
        {"name": "norms", "lr": norm_rate, "params": trained.keys() & norms},
        {
            "name": "weights",
            "lr": recipe.learning_rate,
            "params": trained.keys() - kernels - norms,
            "weight_decay": recipe.weight_decay,
        },
    ]
    # in the order of the model, which sets of names do not have
    groups = [group | {"params": [p for name, p in trained.items() if name in group["params"]]} for group in groups]
    return [group for group in groups if group["params"]]


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of normalisation layers by name: modules whose class is called a norm, as all of theirs are."""
    found = {}
    for prefix, module in model.named_modules():
        if "norm" in type(module).__name__.lower() and not any(True for _ in module.children()):
            found |= {f"{prefix}.{name}": parameter for name, parameter in module.named_parameters()}
    return found


def learning_rate_factor(
    step: int, steps: int, warmup_steps: int, final_ratio: float, schedule: str = "cosine"
) -> float:
    """Linear warm-up times a schedule from step 0 on, which would be `final_ratio` at `steps`, one after the last.

    It is a function of the step alone, so resuming needs no state.
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = {
        "cosine": 0.5 * (1 + math.cos(math.pi * step / steps)),
        "linear": 1 - step / steps,
        "constant": 1.0,
    }[schedule]
    return warmup * (final_ratio + (1 - final_ratio) * left)
