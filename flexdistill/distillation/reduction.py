"""Sums over processes: the gradients of a step and its losses.

Not DistributedDataParallel, which averages where a step divides a sum by a global count, hooks a forward pass that
attention transfer runs without gradients, and would reduce after every backward pass: a step has one per layer, or one
per piece of the head. Flat sums need neither hooks nor copies. They do not overlap with the backward pass, which would
gain little: a step's gradients are read and written once by the link, while the step reads the weights for every token.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from .sharding import own_shard, whole_tensor
from .stage import StepLosses


class Gradients:
    """The gradients of some parameters.

    Args:
        parameters: of those that every one of several processes holds whole, `grad` becomes a view of one flat buffer
            per dtype. FSDP sums what it shards, and in one process there is nothing to sum.
        stay: whether one process has such buffers too, so that every backward pass adds to the same memory.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], accelerator: Accelerator, *, stay: bool = False):
        self._processes, self._device = accelerator.num_processes, accelerator.device
        self._parameters = list(parameters)
        flat = [p for p in self._parameters if (stay or self._processes > 1) and not isinstance(p, DTensor)]
        self._buffers = []
        for dtype in dict.fromkeys(parameter.dtype for parameter in flat):
            alike = [parameter for parameter in flat if parameter.dtype == dtype]
            buffer = torch.zeros(sum(p.numel() for p in alike), dtype=dtype, device=alike[0].device)
            for parameter, part in zip(alike, buffer.split([p.numel() for p in alike]), strict=True):
                parameter.grad = part.view_as(parameter)
            self._buffers.append(buffer)
        self._others = [] if flat else self._parameters

    @property
    def are_sharded(self) -> bool:
        return any(isinstance(parameter, DTensor) for parameter in self._parameters)

    def zero(self) -> None:
        """Forgets what backward passes have added."""
        for buffer in self._buffers:
            buffer.zero_()
        for parameter in self._others:
            parameter.grad = None

    def average(self, count: torch.Tensor) -> None:
        """Sums over processes, divided by the scalar `count` of all of them."""
        for buffer in self._buffers:
            if self._processes > 1:
                torch.distributed.all_reduce(buffer)
            buffer.div_(count)
        for parameter in self._others:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self._others:
            gradients = [own_shard(parameter.grad) for parameter in self._others]
            # FSDP has summed its gradients, and divided them by the number of processes
            torch._foreach_div_(gradients, (count / self._processes).to(gradients[0].device))

    def clip(self, groups: list[list[nn.Parameter]], norm: float) -> torch.Tensor:
        """Scales each group down to a norm of at most `norm`; returns the norm of all of them before, a scalar."""
        if len(groups) > 1 and not self.are_sharded and len({len(group) for group in groups}) == 1:
            norms = _clip_alike([[parameter.grad for parameter in group] for group in groups], norm)
        else:
            norms = torch.stack(
                [whole_tensor(torch.nn.utils.clip_grad_norm_(group, norm)).to(self._device) for group in groups]
            )
        return norms.norm()

    def release(self) -> None:
        """Frees the memory."""
        self._buffers = []
        for parameter in self._parameters:
            parameter.grad = None


def _clip_alike(groups: list[list[torch.Tensor]], norm: float) -> torch.Tensor:
    """What `clip_grad_norm_` does to each of G groups of as many gradients: their norms (G,), in few launches."""
    each = torch._foreach_norm([gradient for group in groups for gradient in group])
    norms = torch.stack(each).unflatten(0, (len(groups), -1)).norm(dim=1)
    for group, factor in zip(groups, (norm / (norms + 1e-6)).clamp_max(1.0), strict=True):
        torch._foreach_mul_(group, factor)
    return norms


class LossReduction:
    """Sums a step's losses over processes by one small reduction, and without waiting for the device."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._names: list[str] | None = None

    def __call__(self, losses: StepLosses | None) -> StepLosses:
        """The sums as float64; a process that had no rows of the step's batch brings None."""
        several = self._accelerator.num_processes > 1
        if self._names is None:
            self._names = self._agree(losses) if several else list(losses.parts)
        sums = torch.zeros(2 + len(self._names), dtype=torch.float64, device=self._accelerator.device)
        if losses is not None:
            figures = [losses.total, *(losses.parts[name] for name in self._names)]
            figures = torch.stack([torch.as_tensor(figure, device=sums.device) for figure in figures]).double()
            sums += torch.cat([figures[:1], torch.as_tensor(losses.count, device=sums.device)[None], figures[1:]])
        if several:
            torch.distributed.all_reduce(sums)
        total, count, *parts = sums.unbind()
        return StepLosses(total, count, dict(zip(self._names, parts, strict=True)))

    def _agree(self, losses: StepLosses | None) -> list[str]:
        """The names of the parts, which a process without rows does not know; once, since it waits and pickles."""
        gathered = [None] * self._accelerator.num_processes
        torch.distributed.all_gather_object(gathered, None if losses is None else list(losses.parts))
        return next(names for names in gathered if names is not None)
