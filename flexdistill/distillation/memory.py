"""What makes training fit: weights rounded once, activations computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

from ..errors import FlexdistillError


def round_linear_weights(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Rounds the weights that autocast would round at every use, so outputs under autocast to `dtype` do not change.

    Embeddings, norms and kernels stay as they are, and a head that shares the embedding's weight.
    """
    embedding = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D) and module.weight is not embedding:
            module.to(dtype)


@contextlib.contextmanager
def gradient_checkpointing(model: PreTrainedModel) -> Iterator[None]:
    """Inside the context layers keep their inputs only, and run again in the backward pass.

    transformers' own switch works in training mode alone, which would turn dropout on.

    Raises:
        FlexdistillError: if transformers does not say what the model's layers are.
    """
    # without dropout nothing is random, and a CUDA graph cannot ask for the random state
    settings = {"use_reentrant": False, "preserve_rng_state": model.training}
    with layers_wrapped(model, lambda forward: partial(checkpoint, forward, **settings)):
        yield


@contextlib.contextmanager
def layers_wrapped(model: PreTrainedModel, wrap: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside the context every layer runs what `wrap` makes of its forward pass.

    Raises:
        FlexdistillError: if transformers does not say what the model's layers are.
    """
    layers = repeated_layers(model)
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        layer.forward = wrap(layer.forward)
    try:
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def repeated_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that gradient checkpointing, sharding and compilation take one by one."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise FlexdistillError(
            f"transformers does not mark the layers of {type(model).__name__}, so they cannot be recomputed, sharded "
            "or compiled one by one; leave --gradient-checkpointing, --parallel fsdp and --compile out."
        )
    return layers
