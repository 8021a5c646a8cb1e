"""The devices of a run, as Accelerate sees them, and the memory it took."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs
from accelerate.utils.memory import should_reduce_batch_size

from .errors import FlexdistillError
from .runtime.backend import fused_operators


def make_accelerator(precision: str, *, cpu_offload: bool = False) -> Accelerator:
    """Accelerate's view of the devices; precision "auto" is bf16 on a GPU and fp32 on CPU.

    Args:
        cpu_offload: whether tensors on CPU are reduced over processes too.

    Raises:
        FlexdistillError: for a precision that needs a GPU where there is none, or where Accelerate's own configuration
            asks for what the recipe decides.
        BackendError: if the environment asks for a backend of attention that cannot run.
    """
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise FlexdistillError(
                f"Accelerate is configured for {name}, and sharding is a setting of the recipe here; run `accelerate "
                "config` without it and pass --parallel fsdp."
            )
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    if precision in ("fp16", "tf32") and not on_gpu:
        raise FlexdistillError(f"Precision {precision} needs a GPU; set --precision fp32 or bf16.")
    if on_gpu:
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    # a second run in one process may ask for another precision, which the shared state would refuse
    AcceleratorState._reset_state()
    mixed_precision = precision if precision in ("bf16", "fp16") else "no"
    handlers = [InitProcessGroupKwargs(backend="cuda:nccl,cpu:gloo")] if cpu_offload and on_gpu else []
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=not on_gpu, kwargs_handlers=handlers)
    fused_operators(accelerator.device)  # a backend that cannot run is told before anything is read
    return accelerator


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Products of float32 matrices have float32's precision inside the context, whatever a run has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a tensor on CPU, for which the processor does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def forget_peak_memory(device: torch.device) -> None:
    """Counts the GPU's peak anew; that of a process on CPU cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the GPU's allocations, or this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's allocator, or the processor's, has raised an error because memory is full."""
    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
