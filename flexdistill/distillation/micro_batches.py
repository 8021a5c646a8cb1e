"""How many sequences run at once: as the recipe says, as memory allows, and fewer once it has run out."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache

from ..devices import forget_peak_memory, is_out_of_memory, peak_memory_bytes
from ..errors import FlexdistillError
from .cuda_graphs import RecordedBackward
from .stage import Stage, StepLosses, backward_counting_guards, sum_losses


class MicroBatches:
    """Runs a process's rows of a step in micro-batches, and halves them when memory runs out.

    A process halves for itself at once, since gradients are sums that do not depend on the split; the others follow
    after the step.

    Args:
        size: sequences per micro-batch; None: all rows.
        discard: forgets the gradients added so far.
        sharded: whether a backward pass needs all processes, so that none can repeat it alone.
        recorded: whether micro-batches are replayed as CUDA graphs; gradients stay where they are then.
        copies: tensors of a parameter's shape that the optimiser's state comes to hold for it.
    """

    def __init__(
        self,
        stage: Stage,
        size: int | None,
        accelerator: Accelerator,
        discard: Callable[[], None],
        *,
        sharded: bool = False,
        recorded: bool = False,
        copies: int = 2,
    ):
        self.stage, self.accelerator, self.sharded = stage, accelerator, sharded
        self._size, self._discard, self._copies = size, discard, copies
        self._told = size
        self._recorded = RecordedBackward(stage) if recorded else None

    def split(self, batch: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Token sequences (B, T) -> micro-batches; none for an empty batch."""
        return batch.split(self._size or len(batch)) if len(batch) else ()

    def backward(self, batch: torch.Tensor) -> StepLosses | None:
        """Adds the gradients of token sequences (B, T), and returns their loss sums; None for an empty batch.

        Raises:
            FlexdistillError: if there is no memory for one sequence.
        """
        while True:
            try:
                return sum_losses([self._backward(micro) for micro in self.split(batch)])
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                size = min(self._size or len(batch), len(batch))
            # outside of the handler, whose traceback holds the tensors of the failed pass
            self._discard()
            if self._recorded:
                self._recorded.forget()
            clear_device_cache(garbage_collection=True)
            if self.sharded or size == 1:
                raise _no_memory(size, batch.shape[1])
            self._size = size // 2

    def _backward(self, micro_batch: torch.Tensor) -> StepLosses:
        return self._recorded(micro_batch) if self._recorded else backward_counting_guards(self.stage, micro_batch)

    def agree(self) -> torch.Tensor:
        """The smallest size of all processes, a scalar on the device; 0 while nothing limits it."""
        unlimited = torch.iinfo(torch.int64).max
        size = torch.full((), self._size or unlimited, device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            torch.distributed.all_reduce(size, op=torch.distributed.ReduceOp.MIN)
        return torch.where(size == unlimited, 0, size)

    def follow(self, size: int) -> None:
        """Takes the size that the processes agreed on; the main process says so where it has become smaller."""
        if self._recorded and (size or None) != self._size:  # another process's, which has forgotten its own
            self._recorded.forget()
        self._size = size or None
        if self._size != self._told and self.accelerator.is_main_process:
            print(f"A step ran out of memory; micro-batches have {self._size} sequences from now on.", file=sys.stderr)
        self._told = self._size

    def fit(self, limit: int, batch: torch.Tensor) -> None:
        """Doubles the size, from 1 on, as long as a trial step stays within `limit` bytes on every process.

        Args:
            batch: token sequences (B, T) of this process's part of a step.

        Raises:
            FlexdistillError: if one sequence takes more.
        """
        fitting, size = 0, 1
        while fitting < size <= len(batch):
            peak = torch.tensor(self._trial(batch[:size]), device=self.accelerator.device)
            if self.accelerator.num_processes > 1:
                torch.distributed.all_reduce(peak, op=torch.distributed.ReduceOp.MAX)
            if peak > limit:
                break
            fitting, size = size, min(2 * size, len(batch))
        if not fitting:
            raise FlexdistillError(
                f"One sequence of {batch.shape[1]} tokens takes {float(peak) / 2**30:.1f} GiB, and --max-memory allows "
                f"{limit / 2**30:.1f} GiB; set a larger one, --gradient-checkpointing or a smaller --sequence-length."
            )
        self._size = self._told = fitting

    def _trial(self, batch: torch.Tensor) -> int:
        """Bytes at the peak of a step, with the optimiser's state whether it is there yet or not."""
        device = self.accelerator.device
        forget_peak_memory(device)
        try:
            for _ in range(2):  # the second finds the gradients of the first there
                self.stage.backward(batch)
            peak = peak_memory_bytes(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            peak = torch.iinfo(torch.int64).max
        self._discard()
        clear_device_cache(garbage_collection=True)
        return peak if self.stage.optimizer.state else min(peak + self._state_bytes(), torch.iinfo(torch.int64).max)

    def _state_bytes(self) -> int:
        local = [p.to_local() if self.sharded else p for p in self.stage.trained().values()]
        return sum(
            self._copies * p.numel() * p.element_size() for p in local if p.device.type == self.accelerator.device.type
        )


def _no_memory(size: int, length: int) -> FlexdistillError:
    what = "One sequence" if size == 1 else f"A micro-batch of {size} sequences"
    return FlexdistillError(
        f"{what} of {length} tokens does not fit into memory; set a smaller --micro-batch-size or --sequence-length, "
        "--gradient-checkpointing, or go on with more processes and --parallel fsdp."
    )
