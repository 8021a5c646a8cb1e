"""The devices of a run, as Accelerate sees them, and the memory it took."""

from __future__ import annotations

import resource

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState


def make_accelerator(precision: str) -> Accelerator:
    """Accelerate's view of the devices; precision "auto" is bf16 on a GPU and fp32 on CPU."""
    on_gpu = torch.cuda.is_available()
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    # a second run in one process may ask for another precision, which the shared state would refuse
    AcceleratorState._reset_state()
    return Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=not on_gpu)


def forget_peak_memory(device: torch.device) -> None:
    """Counts the GPU's peak anew; that of a process on CPU cannot be forgotten."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: the GPU's allocations, or this process's resident memory on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
