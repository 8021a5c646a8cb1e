"""The attention function that converted models call through transformers' AttentionInterface."""

import sys

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .attention import attend
from .cache import FlexformerCacheLayer, memory_layer
from .masks import LazyMask, flexformer_mask
from .rotary import Rotation, part_of, rotation_among

# the name of a converted module's feature map
NAME = "flexformer"
# the name in transformers' registries; the copies inside checkpoints take one each, so that none serves another's model
_IS_COPY = __name__.startswith("transformers_modules.")
IMPLEMENTATION = f"{NAME}_{__name__.replace('.', '_')}" if _IS_COPY else NAME
_CACHE_ARGUMENT = "flexformer_cache_layer"
ROTATION_ARGUMENT = "flexformer_rotation"
# capped logits and learned sinks
_EAGER_ARGUMENTS = ("softcap", "s_aux", "sinks")


def flexformer_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: LazyMask | torch.Tensor | None = None,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Flexformer attention in a converted module, the model's own softmax attention in any other.

    Args:
        module: the calling attention module.
        query: (B, H, T, d); key: (B, K, T', d); value: (B, K, T', D), after rotary embedding.
        attention_mask: what `flexformer_mask` made.
        scaling: what q.k is multiplied with; None for 1 / sqrt(d).

    Returns:
        (B, T, H, D) in the query's dtype, and None in place of attention weights.

    Raises:
        ValueError: for a mask that linear attention cannot apply: a 4-D one, or one of its own kind; for keys that
            come from elsewhere than the queries.
    """
    cache_layer: FlexformerCacheLayer | None = kwargs.pop(_CACHE_ARGUMENT, None)
    rotation: Rotation | None = kwargs.pop(ROTATION_ARGUMENT, None)
    feature_map = getattr(module, NAME, None)
    if feature_map is None:
        return softmax_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    if key.shape[-2] != query.shape[-2]:
        raise ValueError(
            f"Flexformer attention was given {key.shape[-2]} keys for {query.shape[-2]} queries: its cache does not "
            "serve this way of running; pass use_cache=False."
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    packed = isinstance(attention_mask, LazyMask) and not attention_mask.is_plain and cache_layer is None
    if packed and (boundaries := attention_mask.boundaries()) is not None:
        return _packed_attention(feature_map, query, key, value, scaling, boundaries, rotation), None
    output, memory = attend(
        feature_map,
        query,
        key,
        value,
        scaling=scaling,
        visible=visible_keys(attention_mask, key.shape[-2]),
        memory=cache_layer.memory if cache_layer else None,
        keep_memory=cache_layer is not None,
        rotation=rotation,
    )
    if cache_layer is not None:
        cache_layer.remember(memory)
    return output.transpose(1, 2).contiguous(), None


def _packed_attention(feature_map, query, key, value, scaling, boundaries, rotation) -> torch.Tensor:
    """Attention within each of the sequences that every row holds end to end, (B, T, H, D)."""
    rows = [
        attend(
            feature_map,
            *(x[row : row + 1] for x in (query, key, value)),
            scaling=scaling,
            keep_memory=False,
            boundaries=ends,
            rotation=part_of(rotation, row),
        )[0]
        for row, ends in enumerate(boundaries)
    ]
    return torch.cat(rows).transpose(1, 2).contiguous()


def softmax_attention(module, query, key, value, attention_mask=None, **kwargs):
    """Softmax attention as the model's own implementation computes it, given a lazy mask."""
    if all(kwargs.get(name) is None for name in _EAGER_ARGUMENTS):
        if isinstance(attention_mask, LazyMask):
            attention_mask = attention_mask.build("sdpa")
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    # the model's own eager function knows what sdpa would ignore
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.build("eager")
    eager = sys.modules[type(module).__module__].eager_attention_forward
    return eager(module, query, key, value, attention_mask, **kwargs)


def visible_keys(mask: LazyMask | torch.Tensor | None, length: int) -> torch.Tensor | None:
    """bool (B, length) for the `length` keys of a call, False at padding; None if all are visible."""
    if mask is None:
        return None
    if isinstance(mask, LazyMask):
        if not mask.is_plain:
            raise ValueError(
                "Flexformer attention takes causal or bidirectional masks with padding only, or causal ones of "
                "sequences packed by position_ids without a cache; pass sequences one by one or padded."
            )
        mask = mask.padding_of(length)
        if mask is None:
            return None
    if mask.ndim != 2:
        raise ValueError("Flexformer attention takes a padding mask of shape (batch, length), not a 4-D mask.")
    return mask[:, -length:].bool()


def find_cache_layer(module: nn.Module, args, kwargs):
    """Forward pre-hook of a converted module: passes its cache layer on to `flexformer_attention`."""
    if getattr(module, NAME, None) is None:  # its kernel was taken out, so it keeps keys and values
        return None
    if module.config._attn_implementation != IMPLEMENTATION:  # another attention function keeps its own kind of cache
        return None
    layer = memory_layer(module, args, kwargs)
    return None if layer is None else (args, {**kwargs, _CACHE_ARGUMENT: layer})


def find_rotation(module: nn.Module, args, kwargs):
    """Forward pre-hook of a module whose kernel sees no rotary embedding: passes the rotation on to it."""
    if not str(module.config._attn_implementation).startswith(NAME):  # other attention functions know no such argument
        return None
    rotation = rotation_among(args, kwargs)
    return None if rotation is None else (args, {**kwargs, ROTATION_ARGUMENT: rotation})


AttentionInterface.register(IMPLEMENTATION, flexformer_attention)
AttentionMaskInterface.register(IMPLEMENTATION, flexformer_mask)
