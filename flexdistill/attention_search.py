"""Which attention modules a model has, told by running it once, and which of them can become linear."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.utils import ModelOutput

from .attention_modes import AttentionCall, record_calls
from .distillation.attention_transfer import softmax_weights
from .errors import FlexdistillError, first_sentence
from .example_inputs import example_inputs, float_tensors
from .runtime.masks import LazyMask

# argument of an attention function -> why linear attention cannot honour it
_UNSUPPORTED = {
    "softcap": "its logits are capped",
    "position_bias": "it adds a bias to each pair of positions",
    "s_aux": "it has learned attention sinks",
    "sinks": "it has learned attention sinks",
    "indices": "it attends to selected positions only",
    "block_indices": "it attends to selected positions only",
}


@contextlib.contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """No module of `model` is in training mode inside the context."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def attention_calls(model: PreTrainedModel) -> dict[nn.Module, list[AttentionCall]]:
    """The recorded calls of each attention module, in order.

    Models inside `model` whose attention its own run did not reach, such as an image encoder that was given no
    image, are run by themselves.
    """
    calls: dict[nn.Module, list[AttentionCall]] = {}
    if model._can_set_attn_implementation():
        parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]
        for number, part in enumerate(parts):
            if not calls.keys() & set(part.modules()):
                for call in _calls_of_a_run(part, required=number == 0):
                    calls.setdefault(call.module, []).append(call)
    if not calls:
        raise FlexdistillError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) does not call transformers' "
            "AttentionInterface, through which attention is replaced; choose an architecture that does, such as gpt2, "
            "llama, mistral, qwen3, gemma3 or bert."
        )
    return calls


def _calls_of_a_run(part: PreTrainedModel, required: bool) -> list[AttentionCall]:
    """The calls of the first run that its inputs fit; none if none does, unless a run is required."""
    refusals = ["no inputs are known"]
    for inputs in example_inputs(part):
        try:
            with torch.no_grad():
                own = part(**inputs)
        except Exception as error:  # a model raises what it likes for inputs of another kind
            refusals.append(first_sentence(error))
            continue
        try:
            calls, recorded = record_calls(part, AttentionCall.softmax, partial(part, **inputs))
        except Exception as error:
            raise FlexdistillError(
                f"{type(part).__name__} does more with its attention mask than pass it on ({first_sentence(error)}), "
                "so it cannot be converted."
            ) from error
        _check_unchanged(part, recorded, own)
        return calls
    if required:
        raise FlexdistillError(
            f"{type(part).__name__} could not be run on example inputs, by which attention is found: {refusals[-1]}."
        )
    return []


def _check_unchanged(part: PreTrainedModel, recorded: ModelOutput, own: ModelOutput) -> None:
    expected = float_tensors(own)
    if not any(theirs.isfinite().any() for theirs in expected):
        raise FlexdistillError(
            f"{type(part).__name__} computes no finite number from example inputs; its weights or config.json are "
            "damaged, so get them again."
        )
    for ours, theirs in zip(float_tensors(recorded), expected, strict=True):
        largest = float(theirs.abs().nan_to_num(0, 0, 0).max())
        if not torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3 * largest, equal_nan=True):
            raise FlexdistillError(
                f"{type(part).__name__} computes something else when its attention is called through transformers' "
                "AttentionInterface, so it cannot be converted."
            )


def reason_to_keep(model: PreTrainedModel, calls: list[AttentionCall]) -> str | None:
    """Why a module, given its calls of one run, must stay softmax; None if it can be converted."""
    module = calls[0].module
    if module not in set(model.base_model.modules()):
        return "it lies outside the base model"
    reason = next((why for call in calls if (why := _not_linear(call)) is not None), None)
    if reason is None and calls[0].causal and model.can_generate():
        reason = _not_cached(model, calls)
    return reason


def _not_linear(call: AttentionCall) -> str | None:
    """What a call does that linear attention cannot."""
    if call.query.shape[-2] != call.key.shape[-2] or getattr(call.module, "is_cross_attention", False):
        return "its keys are not of its own positions (cross-attention)"
    if call.arguments.get("sliding_window") is not None:
        return f"its own sliding window of {call.arguments['sliding_window']} tokens is bounded already"
    if not (call.mask is None or isinstance(call.mask, LazyMask)):
        return "its mask is a tensor of its own"
    if isinstance(call.mask, LazyMask) and not call.mask.is_plain:
        return "its mask is neither causal nor bidirectional with padding alone"
    reason = next((why for name, why in _UNSUPPORTED.items() if call.arguments.get(name) is not None), None)
    if reason is None and not _is_plain_softmax(call):
        reason = "it computes something else than softmax of queries and keys"
    return reason


def _not_cached(model: PreTrainedModel, calls: list[AttentionCall]) -> str | None:
    """Why a causal module of a model that generates could not keep its state in a cache."""
    index = getattr(calls[0].module, "layer_idx", None)
    if index is None:
        return "it has no layer_idx, by which its part of a cache is found"
    if len(calls) > 1:
        return "it attends several times in one pass, and a cache holds one state"
    layers = DynamicCache(config=model.config).layers
    if index < len(layers) and isinstance(layers[index], LinearAttentionCacheLayerMixin):
        return "its layer of the cache holds the state of other modules too"
    return None


def _is_plain_softmax(call: AttentionCall) -> bool:
    """Whether the module's attention is that which a kernel imitates, told by its numbers."""
    with torch.no_grad():
        expected = call.softmax().float()
        weights = softmax_weights(call)
        value = call.value.float().repeat_interleave(weights.shape[1] // call.value.shape[1], dim=1)
        difference = ((weights @ value).transpose(1, 2) - expected).abs()
    visible = call.visible()
    if visible is not None:
        difference = difference[visible]
    tolerance = 1e-4 if call.query.dtype == torch.float32 else 3e-2
    return bool(difference.max() <= tolerance * expected.abs().max())
