"""Which implementation computes attention: the fused Triton kernels, or plain torch."""

import functools
import os

import torch

from .feature_maps import FeatureMap

VARIABLE = "FLEXDISTILL_BACKEND"


class BackendError(RuntimeError):
    """The environment asks for a backend that does not exist, cannot run or does not know the kernel."""


def fused_operators(device: torch.device):
    """The fused operators' module for tensors on `device`, or None where torch computes.

    Triton serves on CUDA when it can run. `FLEXDISTILL_BACKEND=triton` or `torch` overrides; with `TRITON_INTERPRET=1`
    as well, Triton's interpreter serves on CPU.

    Raises:
        BackendError: if the variable asks for a backend that does not exist or cannot run.
    """
    return _fused_operators(device.type, device.index, os.environ.get(VARIABLE))


def operators_for(feature_map: FeatureMap, query: torch.Tensor, value: torch.Tensor):
    """`fused_operators`, or None also where they do not know this map, these sizes or this dtype.

    Raises:
        BackendError: if they do not and the variable asks for them, and as `fused_operators` does.
    """
    fused = fused_operators(query.device)
    obstacle = None if fused is None else fused.obstacle(feature_map, query, value)
    if obstacle is None:
        return fused
    if os.environ.get(VARIABLE) == "triton":
        raise BackendError(f"{VARIABLE}=triton cannot serve here: {obstacle}; unset it or choose torch.")
    return None


@functools.cache
def _fused_operators(kind: str, index: int | None, asked: str | None):
    if asked not in (None, "triton", "torch"):
        raise BackendError(f"{VARIABLE}={asked} names no backend; choose triton or torch, or leave it unset.")
    if asked == "torch" or (asked is None and kind != "cuda"):
        return None
    obstacle = _obstacle(kind, index)
    if obstacle is None:
        from .fused import FusedAttention

        return FusedAttention
    if asked == "triton":
        raise BackendError(f"{VARIABLE}=triton cannot run: {obstacle}; unset it or choose torch.")
    return None


def _obstacle(kind: str, index: int | None) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if kind != "cuda":
        return f"the tensors are on {kind}"
    capability = torch.cuda.get_device_capability(index)
    return (
        None if capability >= (8, 0) else f"the GPU has compute capability {capability[0]}.{capability[1]}, below 8.0"
    )
