"""What training runs over and over, compiled by Inductor: a model's layers, which share one compilation, and losses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .memory import layers_wrapped


def layers_compiled(model: PreTrainedModel, enabled: bool) -> contextlib.AbstractContextManager:
    """Context inside of which every layer's forward and backward pass is compiled, where `enabled`.

    Raises:
        FlexdistillError: if transformers does not say what the model's layers are.
    """
    return layers_wrapped(model, torch.compile) if enabled else contextlib.nullcontext()


def maybe_compiled(function: Callable, enabled: bool) -> Callable:
    """`function` itself, or compiled."""
    return torch.compile(function) if enabled else function
