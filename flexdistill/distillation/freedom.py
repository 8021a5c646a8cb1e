"""How many frequencies each layer gets: shared out by the degrees of freedom of its attention (arXiv:2507.03340)."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..attention_modes import AttentionCall, attention_function, run_base_model
from ..devices import to_device
from ..errors import FlexdistillError
from .attention_transfer import softmax_weights

# tokens of a sequence that are measured: maps are as large as their square
_TOKENS = 512
# a direction counts half where the square of its singular value is as much
_RIDGE = 0.1
# frequencies are shared out in so many at a time, at most twice as many as every layer would have
_UNIT, _MOST = 8, 2


@torch.no_grad()
def degrees_of_freedom(
    model: PreTrainedModel, names: list[str], sequences: torch.Tensor, accelerator: Accelerator
) -> dict[str, float]:
    """How many dimensions the softmax attention of some modules has: Tr(A A' (A A' + r)^-1), r = 0.1.

    A holds a head's attention weights of all queries on all keys of a sequence, also on later ones: features have to
    follow them as a function of query and key. The figure is a mean over heads and sequences, from the main process.

    Args:
        names: of attention modules, relative to the base model.
        sequences: token ids (B, T), of which the first 512 tokens are read.

    Returns:
        name -> degrees of freedom, the same in all processes.
    """
    modules = {model.base_model.get_submodule(name): name for name in names}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def attend(call: AttentionCall) -> torch.Tensor:
        if call.module in modules:
            with torch.autocast(call.query.device.type, enabled=False):
                weights = softmax_weights(replace(call, mask=None, arguments=call.arguments | {"is_causal": False}))
                gram = (weights @ weights.mT).flatten(0, 1).double()
            ridge = _RIDGE * torch.eye(len(gram[0]), dtype=gram.dtype, device=gram.device)
            # Tr(G (G + r)^-1) = size - r Tr((G + r)^-1)
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram + ridge))
            found[modules[call.module]].append(len(ridge) - _RIDGE * inverse.diagonal(dim1=-2, dim2=-1).sum(-1).mean())
        return call.softmax()

    with attention_function(model, attend), accelerator.autocast():
        run_base_model(model, to_device(sequences[:, :_TOKENS], accelerator.device))
    # a module that several layers share is called several times
    figures = torch.stack([torch.stack(values).mean() for values in found.values()])
    if not accelerator.is_main_process:
        figures.zero_()  # rounding may differ between devices, and with it who gets the last frequencies
    return dict(zip(names, accelerator.reduce(figures, reduction="sum").tolist(), strict=True))


def check_shareable(even: dict[str, int]) -> None:
    """Raises FlexdistillError if modules have too few frequencies to be shared out."""
    fewest = min(even.values())
    if fewest < _UNIT:
        raise FlexdistillError(
            f"{fewest} frequencies are too few to be shared out in {_UNIT}s; set more kernel.features, or leave "
            "kernel.features_by out."
        )


def shared_frequencies(freedom: dict[str, float], even: dict[str, int]) -> dict[str, int]:
    """As many frequencies in all as modules have by themselves, more of them where there is more freedom.

    Were a module's error its degrees of freedom over its frequencies, all errors together would be least with
    frequencies proportional to the root of the freedom. Eight at a time go to the module that has the largest root for
    what it has got (Webster's method). Every module has eight at least and twice its own number at most.

    Args:
        freedom: name -> degrees of freedom, positive.
        even: name -> frequencies that the module has by itself, as `check_shareable` lets through.
    """
    units = dict.fromkeys(freedom, 1)
    for _ in range(sum(even.values()) // _UNIT - len(units)):
        growing = [name for name, size in even.items() if _UNIT * (units[name] + 1) <= _MOST * size]
        units[max(growing, key=lambda name: math.sqrt(freedom[name]) / (units[name] + 0.5))] += 1
    return {name: _UNIT * count for name, count in units.items()}
