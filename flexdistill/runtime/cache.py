"""The cache layer of a converted module: a memory of constant size in the place of keys and values."""

import dataclasses

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, EncoderDecoderCache

from .attention import Memory


class FlexformerCacheLayer(CacheLayerMixin):
    """Holds a `Memory` and counts tokens; `update` hands back only the new keys and values."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.memory: Memory | None = None
        self.seen_tokens = 0

    def lazy_initialization(self, key_states, value_states) -> None:
        # some models ask a layer for its number of keys
        self.keys, self.values = (x.new_empty(*x.shape[:-2], 0, x.shape[-1]) for x in (key_states, value_states))
        self.is_initialized = True

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.seen_tokens += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen_tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    @property
    def num_bytes(self) -> int:
        """Bytes held, whatever the number of tokens seen."""
        return sum(tensor.untyped_storage().nbytes() for tensor in _tensors(self.memory)) if self.memory else 0

    def reset(self) -> None:
        self.memory, self.seen_tokens, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._map(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._map(lambda tensor: tensor[indices])

    def offload(self) -> None:
        self._map(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        if self.memory is not None and self.memory.key.device != self.device:
            self._map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise RuntimeError("A Flexformer state cannot forget single tokens, so its cache cannot be cropped.")

    def remember(self, memory: Memory) -> None:
        """Keeps what the layer carries to its next call."""
        self.memory, self.device = memory, memory.key.device

    def _map(self, function) -> None:
        if self.memory is not None:
            self.memory = _map_tensors(self.memory, function)


def memory_layer(module, args, kwargs) -> FlexformerCacheLayer | None:
    """The cache layer of a converted module among the arguments of its call, put in place of an unused KV layer.

    Raises:
        ValueError: if the cache already holds keys and values that did not pass through this module, or is static while
            other layers keep softmax attention.
    """
    cache = next((x for x in (*kwargs.values(), *args) if isinstance(x, Cache)), None)
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if cache is None:
        return None
    index = module.layer_idx
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, FlexformerCacheLayer):
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise ValueError(
                f"The cache holds keys and values of layer {index} that did not pass through its Flexformer attention; "
                "start with an empty cache."
            )
        converted = getattr(module.config, "flexformer", {"layers": {}})["layers"]  # a part's configuration has none
        if layer.is_compileable and len(converted) < module.config.num_hidden_layers:
            raise ValueError(
                "A static cache cannot serve a model in which some layers keep softmax attention, or one of several "
                "parts; leave cache_implementation out."
            )
        layer = cache.layers[index] = FlexformerCacheLayer()
    return layer


def cache_num_bytes(cache: Cache) -> int:
    """Bytes that a cache holds: constant for Flexformer layers, growing for softmax layers."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, FlexformerCacheLayer):
            total += layer.num_bytes
        else:  # keys and values, or what a model's own recurrent layers carry
            held = [x for value in vars(layer).values() for x in _values(value)]
            total += sum(x.nbytes for x in held if torch.is_tensor(x))
    return total


def _values(value) -> list:
    """A collection's values, or the value itself as the only one."""
    if isinstance(value, dict):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _map_tensors(holder, function):
    changes = {}
    for field in dataclasses.fields(holder):
        value = getattr(holder, field.name)
        if torch.is_tensor(value):
            changes[field.name] = function(value)
        elif dataclasses.is_dataclass(value):
            changes[field.name] = _map_tensors(value, function)
    return dataclasses.replace(holder, **changes)


def _tensors(holder) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _map_tensors(holder, lambda tensor: found.append(tensor) or tensor)
    return found
