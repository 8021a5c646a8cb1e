"""What the training loop asks of a stage."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from ..runtime.attention import count_guards
from ..runtime.feature_maps import FeatureMap
from ..runtime.interface import NAME


@dataclass
class StepLosses:
    """Loss sums of some sequences, for the log; over layers that learn apart from each other, their mean."""

    total: torch.Tensor
    count: torch.Tensor
    parts: dict[str, torch.Tensor] = field(default_factory=dict)

    def __add__(self, other: StepLosses) -> StepLosses:
        parts = {name: self.parts[name] + other.parts[name] for name in self.parts}
        return StepLosses(self.total + other.total, self.count + other.count, parts)

    def detach(self) -> StepLosses:
        parts = {name: part.detach() for name, part in self.parts.items()}
        return StepLosses(self.total.detach(), self.count, parts)


def sum_losses(losses: Iterable[StepLosses | None]) -> StepLosses | None:
    """The sum of those that are there; None if none is."""
    total = None
    for loss in losses:
        if loss is not None:
            total = loss if total is None else total + loss
    return total


class Stateful(Protocol):
    """Anything whose state is tensors and plain values by name, such as a gradient scaler."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and values that JSON holds."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Puts back what `state_dict` gave."""


class Stage(Protocol):
    """A way to train a converted model: what it trains, and the gradients that a batch adds."""

    name: str
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the gradients that `backward` adds; not enabled where they are not scaled
    states: dict[str, Stateful]  # what a checkpoint keeps beside parameters and optimiser
    clip_groups: list[list[nn.Parameter]]  # each clipped by its own norm
    model: PreTrainedModel

    def flops_per_token(self, length: int) -> float:
        """Floating-point operations that training on a token of a sequence of that length takes."""

    def active(self) -> contextlib.AbstractContextManager:
        """Context in which the stage's forward passes run."""

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        """Adds the gradients of the loss sum of token sequences (B, T), and returns the sums."""

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that the stage trains, by name in the model."""

    def finish(self) -> None:
        """Leaves a model that needs nothing of the stage any more."""

    def blame(self, sequences: torch.Tensor) -> str:
        """The first layer whose output or loss is not finite on these sequences."""


def backward_counting_guards(stage: Stage, sequences: torch.Tensor) -> StepLosses:
    """`stage.backward`, whose parts also tell the share of attention rows that the guard changed."""
    with count_guards(sequences.device) as guards:
        losses = stage.backward(sequences)
    # without a converted layer there are no rows, nor guarded ones
    losses.parts["guarded_rows"] = guards.guarded / guards.rows.clamp_min(1) * losses.count
    return losses


@contextlib.contextmanager
def trainable(model: nn.Module, names: set[str]) -> Iterator[None]:
    """Only the named parameters of `model` require gradients inside the context."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in names)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before.get(name, True))


def kernel_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of all feature maps by name."""
    return {name: p for name, p in model.named_parameters() if NAME in name.split(".")}


def feature_maps(model: nn.Module) -> dict[str, FeatureMap]:
    """Feature maps by the name of the module that they serve."""
    suffix = "." + NAME
    return {n.removesuffix(suffix): m for n, m in model.named_modules() if isinstance(m, FeatureMap)}


def first_non_finite_module(model: nn.Module, forward) -> str:
    """Name of the first module of `model` whose output is not finite while `forward` runs."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():

        def check(module, args, output, name=name):
            tensors = [x for x in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(x)]
            if not found and any(x.is_floating_point() and not x.isfinite().all() for x in tensors):
                found.append(name)

        handles.append(module.register_forward_hook(check))
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the gradients; every layer's output is finite"
