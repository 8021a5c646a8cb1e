"""Models spread over the processes by FSDP2: each holds a part of every weight, its gradient and its moments."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import MethodType

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from ..attention_modes import BASE_FORWARD
from .memory import repeated_layers


def sharded_copy(model: PreTrainedModel, accelerator: Accelerator, *, cpu_offload: bool = False) -> PreTrainedModel:
    """A copy of a model on CPU whose parameters are shards; layers are gathered one at a time.

    `fully_shard` is called here and not by `Accelerator.prepare`, which takes one model that is called as a whole: a
    stage shards two, and calls base model and head apart. Weights are gathered in float32 and rounded by autocast, so
    that sharded and whole training give the same numbers.

    Args:
        cpu_offload: keep shards, gradients and moments in the host's memory.
    """
    model = copy.deepcopy(model)
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    settings = {"mesh": mesh, "offload_policy": CPUOffloadPolicy() if cpu_offload else OffloadPolicy()}
    for layer in repeated_layers(model):
        fully_shard(layer, **settings)
    # what is outside of the layers stays gathered from the base model's run until the head's last piece
    fully_shard(model, reshard_after_forward=False, **settings)
    setattr(model, BASE_FORWARD, MethodType(_base_forward, model))
    register_fsdp_forward_method(model, BASE_FORWARD)
    return model


def gather_into(model: PreTrainedModel, sharded: PreTrainedModel) -> None:
    """Copies the parameters of a sharded copy back into the model that it was made from; every process calls it."""
    whole = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in sharded.named_parameters():
            whole[name].copy_(whole_tensor(parameter))


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as every process would hold it without sharding; every process calls it for one that is sharded."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # shards may be offloaded


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds; all of it without sharding."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_on_cpu(tensors: dict[str, torch.Tensor], *, keep: bool) -> dict[str, torch.Tensor]:
    """Copies of whole tensors on CPU; a process that does not keep them only takes part in gathering shards."""
    found = {}
    for name, tensor in tensors.items():
        if keep or isinstance(tensor, DTensor):
            tensor = whole_tensor(tensor)
        if keep:
            found[name] = tensor.cpu().contiguous()
    return found


def shard_like(tensor: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """A whole tensor on the device of a parameter, and sharded as that is."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    shards = distribute_tensor(
        tensor.to(parameter.device_mesh.device_type), parameter.device_mesh, parameter.placements
    )
    return shards.to(parameter.device)


@contextlib.contextmanager
def gradients_stay_whole(model: nn.Module) -> Iterator[None]:
    """Backward passes inside the context are not the last of their forward pass: they reduce and free nothing."""
    if not isinstance(model, FSDPModule):
        yield
        return
    _is_last(model, False)
    try:
        yield
    finally:
        _is_last(model, True)


def free_gathered(model: nn.Module) -> None:
    """Frees the weights that a forward pass without a backward pass has left gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def _is_last(model: FSDPModule, last: bool) -> None:
    model.set_is_last_backward(last)
    model.set_requires_gradient_sync(last)
    model.set_reshard_after_backward(last)


def _base_forward(model: PreTrainedModel, **arguments):
    return model.base_model(**arguments)
