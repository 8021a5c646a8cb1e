"""What training runs over and over, compiled by Inductor: a model's layers, which share one compilation, and losses."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .memory import layers_wrapped

# layers with and without a kernel, as teacher and as student, of every stage: more forms than Dynamo's 8, beyond which
# it would run the rest uncompiled
_FORMS = 64


@contextlib.contextmanager
def layers_compiled(model: PreTrainedModel, enabled: bool):
    """Inside the context every layer's forward and backward pass is compiled, where `enabled`.

    Raises:
        FlexdistillError: if transformers does not say what the model's layers are.
    """
    if not enabled:
        yield
        return
    with (
        layers_wrapped(model, torch.compile),
        torch._dynamo.config.patch(recompile_limit=_FORMS),
        warnings.catch_warnings(),
    ):
        # kernels keep constants and the choice of a backend in caches, which a run never changes
        warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_cache`")
        yield


def maybe_compiled(function: Callable, enabled: bool) -> Callable:
    """`function` itself, or compiled."""
    return torch.compile(function) if enabled else function
