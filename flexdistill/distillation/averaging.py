"""Weights that a stage may end with instead of its last: their exponential average, and those that validated best.

They live in the optimiser's state, so checkpoints hold them like its moments.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..recipe_stages import StageRecipe
from .sharding import own_shard

AVERAGE, BEST = "average", "best"


def copies_kept(recipe: StageRecipe) -> int:
    """Tensors of a parameter's shape that a stage keeps for it: two moments, average, best, and the last meanwhile."""
    averages = recipe.ema_decay is not None
    return 2 + averages + (recipe.patience is not None) + (averages and recipe.validation_every > 0)


def has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether any step has moved the weights; an overflow of fp16 skips a step, and the first ones are likely to."""
    return any(optimizer.state.values())


@torch.no_grad()
def update_average(optimizer: torch.optim.Optimizer, decay: float, step: int) -> None:
    """Moves the averages, float32, towards the parameters after step `step`, counted from 1.

    The decay begins low, so that the average forgets the weights that training began with.
    """
    share = 1 - min(decay, (1 + step) / (10 + step))
    averages, parameters = [], []
    for parameter, state in optimizer.state.items():
        if AVERAGE not in state:
            state[AVERAGE] = parameter.detach().to(torch.float32, copy=True)
        averages.append(own_shard(state[AVERAGE]))
        parameters.append(own_shard(parameter).float())
    torch._foreach_lerp_(averages, parameters, share)


@torch.no_grad()
def keep_best(optimizer: torch.optim.Optimizer) -> None:
    """Remembers the parameters as they are."""
    for parameter, state in optimizer.state.items():
        state[BEST] = parameter.detach().clone()


@torch.no_grad()
def use_final_weights(optimizer: torch.optim.Optimizer) -> None:
    """Puts what a stage ends with into the parameters: the best weights, else the average, else the last."""
    for parameter, state in optimizer.state.items():
        chosen = state.get(BEST, state.get(AVERAGE))
        if chosen is not None:
            parameter.copy_(chosen)


@contextlib.contextmanager
def averaged(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """The parameters are their averages inside the context, where there are some."""
    last = {parameter: parameter.detach().clone() for parameter, state in optimizer.state.items() if AVERAGE in state}
    try:
        with torch.no_grad():
            for parameter in last:
                parameter.copy_(optimizer.state[parameter][AVERAGE])
        yield
    finally:
        with torch.no_grad():
            for parameter, value in last.items():
                parameter.copy_(value)
