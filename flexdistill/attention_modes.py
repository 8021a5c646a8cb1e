"""Other attention in the place of Flexformer's: the teacher's softmax, recordings, and ablations for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from .runtime.attention import Memory, attend_without_window, attention_weights
from .runtime.feature_maps import FeatureMap
from .runtime.interface import NAME, ROTATION_ARGUMENT, flexformer_attention, softmax_attention, visible_keys
from .runtime.masks import LazyMask, flexformer_mask
from .runtime.near import near_sums
from .runtime.rotary import Rotation, part_of

_CUSTOM = NAME + "_custom"
# method of a sharded model that runs its base model, whose weights it gathers before
BASE_FORWARD = "forward_base_model"


@dataclass
class AttentionCall:
    """One call of an attention function: who called, with what."""

    module: nn.Module
    query: torch.Tensor  # (B, H, T, d)
    key: torch.Tensor  # (B, K, T, d)
    value: torch.Tensor  # (B, K, T, D)
    mask: Any
    arguments: dict[str, Any] = field(default_factory=dict)
    rotation: Rotation | None = None  # where the kernel sees queries and keys without rotary embedding

    @property
    def feature_map(self) -> FeatureMap | None:
        """The module's kernel; None where attention stays softmax."""
        return getattr(self.module, NAME, None)

    @property
    def scaling(self) -> float:
        scaling = self.arguments.get("scaling")
        return self.query.shape[-1] ** -0.5 if scaling is None else scaling

    @property
    def causal(self) -> bool:
        """What the mask says; else a keyword beats the module's attribute, as in transformers' own functions."""
        if isinstance(self.mask, LazyMask) and self.mask.is_plain:
            return self.mask.is_causal
        asked = self.arguments.get("is_causal")
        return getattr(self.module, "is_causal", True) if asked is None else asked

    def visible(self) -> torch.Tensor | None:
        """bool (B, T), False at padding; None if all keys are visible."""
        return visible_keys(self.mask, self.key.shape[-2])

    def documents(self) -> list[list[AttentionCall]]:
        """This call itself as [[self]]; where rows hold sequences end to end, a plain call per row and sequence."""
        packed = isinstance(self.mask, LazyMask) and not self.mask.is_plain
        boundaries = self.mask.boundaries() if packed else None
        if boundaries is None:
            return [[self]]
        parts = (self.query, self.key, self.value)
        return [
            [
                AttentionCall(
                    self.module,
                    *(x[row : row + 1, :, start:end] for x in parts),
                    None,
                    self.arguments,
                    part_of(self.rotation, row, slice(start, end)),
                )
                for start, end in pairwise(ends)
            ]
            for row, ends in enumerate(boundaries)
        ]

    def kernel_arguments(self) -> dict[str, Any]:
        """What every form of the kernel's attention takes beside queries, keys and values."""
        return {"scaling": self.scaling, "visible": self.visible(), "rotation": self.rotation}

    def kernel_weights(self) -> torch.Tensor:
        """The kernel's attention, with its window, as a float32 matrix (B, H, T, T)."""
        return attention_weights(self.feature_map, self.query, self.key, **self.kernel_arguments())

    def softmax(self) -> torch.Tensor:
        """The model's own attention output, (B, T, H, D)."""
        return softmax_attention(self.module, self.query, self.key, self.value, self.mask, **self.arguments)[0]

    def flexformer(self) -> torch.Tensor:
        """The module's attention output in a converted model, (B, T, H, D): softmax where it was not converted."""
        arguments = self.arguments | {ROTATION_ARGUMENT: self.rotation}
        return flexformer_attention(self.module, self.query, self.key, self.value, self.mask, **arguments)[0]

    def window_only(self) -> torch.Tensor:
        """Flexformer attention without its kernel: softmax over the window and the sinks alone, (B, T, H, D)."""
        spec = self.feature_map.spec
        memory = Memory.empty(self.key, self.value, spec)
        keys = memory.before(self.key, self.value, self.visible())
        rows, *_ = near_sums(self.query, *keys, spec.window, self.scaling, memory.sinks)
        output = rows.numerator / rows.denominator.masked_fill(rows.denominator == 0, 1.0)[..., None]
        return output.to(self.query.dtype).transpose(1, 2).contiguous()

    def kernel_only(self) -> torch.Tensor:
        """Flexformer attention with its kernel over all keys and no window, (B, T, H, D)."""
        output = attend_without_window(self.feature_map, self.query, self.key, self.value, **self.kernel_arguments())
        return output.transpose(1, 2).contiguous()

    def nothing(self) -> torch.Tensor:
        """Zeros in the place of the attention output, (B, T, H, D)."""
        batch, heads, length, _ = self.query.shape
        return self.query.new_zeros(batch, length, heads, self.value.shape[-1])


# what `_attend` calls: the last, of contexts that are still open
_functions: list[Callable[[AttentionCall], torch.Tensor]] = []


# not part of what is compiled around it: it may differentiate, and compile parts of its own
@torch.compiler.disable
def _attend(module, query, key, value, attention_mask=None, **arguments):
    rotation = arguments.pop(ROTATION_ARGUMENT, None)
    return _functions[-1](AttentionCall(module, query, key, value, attention_mask, arguments, rotation)), None


AttentionInterface.register(_CUSTOM, _attend)
AttentionMaskInterface.register(_CUSTOM, flexformer_mask)


@contextlib.contextmanager
def attention_function(model: PreTrainedModel, function: Callable[[AttentionCall], torch.Tensor]) -> Iterator[None]:
    """Every attention module of `model` calls `function`, which gives its output (B, T, H, D), inside the context."""
    _functions.append(function)
    try:
        with attention_implementation(model, _CUSTOM):
            yield
    finally:
        _functions.pop()


@contextlib.contextmanager
def attention_implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    """`model` uses the attention implementation that transformers knows by `name` inside the context."""
    with _attention_kept(model):
        model.set_attn_implementation(name)
        yield


@contextlib.contextmanager
def softmax_mode(model: PreTrainedModel) -> Iterator[None]:
    """Context in which a converted model computes its base model's softmax attention."""
    with _attention_kept(model) as models:
        for part in models:
            part.config._attn_implementation_internal = "sdpa" if part._supports_sdpa else "eager"
        yield


@contextlib.contextmanager
def _attention_kept(model: PreTrainedModel) -> Iterator[list[PreTrainedModel]]:
    """Gives every model inside `model`; each has its own attention implementation again after the context."""
    models = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = _with_sub_configs([part.config for part in models])
    before = [config._attn_implementation_internal for config in configs]
    try:
        yield models
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation_internal = implementation


def _with_sub_configs(configs: list[PreTrainedConfig]) -> list[PreTrainedConfig]:
    parts = [getattr(config, name, None) for config in configs for name in config.sub_configs]
    parts = [part for part in parts if part is not None]
    return configs + _with_sub_configs(parts) if parts else configs


def in_converted_modules(ablation: Callable[[AttentionCall], torch.Tensor]) -> Callable[[AttentionCall], torch.Tensor]:
    """An attention function that applies `ablation` to converted modules and softmax to the rest."""
    return lambda call: call.softmax() if call.feature_map is None else ablation(call)


def run_base_model(
    model: PreTrainedModel, sequences: torch.Tensor, cache: Cache | None = None, **settings: Any
) -> ModelOutput:
    """The base model's output for token sequences (B, T), whole or what follows on those that `cache` has seen.

    Further settings such as `output_hidden_states` are passed on.
    """
    arguments = {"use_cache": False} if hasattr(model.config, "use_cache") else {}
    if cache is not None:
        arguments = {"use_cache": True, "past_key_values": cache}
    return getattr(model, BASE_FORWARD, model.base_model)(input_ids=sequences, **arguments, **settings)


def record_attention(
    model: PreTrainedModel, function: Callable[[AttentionCall], torch.Tensor], sequences: torch.Tensor, **settings: Any
) -> list[AttentionCall]:
    """The attention calls of one forward pass of the base model without gradients, in order."""
    return record_calls(model, function, lambda: run_base_model(model, sequences, **settings))[0]


def record_calls(
    model: PreTrainedModel, function: Callable[[AttentionCall], torch.Tensor], forward: Callable[[], ModelOutput]
) -> tuple[list[AttentionCall], ModelOutput]:
    """The attention calls of `forward`, which runs `model` or a part of it, without gradients; and what it returns."""
    calls: list[AttentionCall] = []

    def record(call: AttentionCall) -> torch.Tensor:
        calls.append(call)
        return function(call)

    with torch.no_grad(), attention_function(model, record):
        output = forward()
    return calls, output
