"""What makes training fit: weights rounded once, activations computed again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
    layers = checkpointed_layers(model)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def checkpointed_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The layers that gradient checkpointing and sharding take apart."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise FlexdistillError(
            f"transformers does not mark the layers of {type(model).__name__}, so they can be neither recomputed nor "
            "sharded; leave --gradient-checkpointing and --parallel fsdp out."
        )
    return layers
