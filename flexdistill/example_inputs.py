"""Inputs that make a model of any kind run once: tokens, images or sound, by the names of its forward's arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig, PreTrainedModel

BATCH, LENGTH, PADDING = 2, 24, 4


def example_inputs(model: PreTrainedModel) -> Iterator[dict[str, torch.Tensor]]:
    """Keyword arguments for one forward pass of `model`, the likeliest first; some of a list may not fit.

    Text has shape (2, 24), its second sequence ends in 4 tokens of padding; images have the configured size. No random
    number is drawn. A model that takes several kinds of input gets all of them, then each alone.
    """
    accepted = inspect.signature(model.forward).parameters
    kinds = [
        (name, [tensor.to(model.device) for tensor in build(model.config)])
        for name, build in _BUILDERS.items()
        if name in accepted
    ]
    choices = [[(name, tensor) for tensor in tensors] for name, tensors in kinds if tensors]
    subsets = [choices] if len(choices) < 2 else [choices, *([choice] for choice in choices)]
    for subset in subsets:
        for chosen in product(*subset):
            inputs = {name: _as_dtype(tensor, model.dtype) for name, tensor in chosen}
            if "input_ids" in inputs and "attention_mask" in accepted:
                inputs["attention_mask"] = _padding(inputs["input_ids"])
            if "use_cache" in accepted:
                inputs["use_cache"] = False
            yield inputs


def float_tensors(output: Any) -> list[torch.Tensor]:
    """The floating-point tensors that a model returned, in order; those of a cache are left out."""
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Cache):
        return []
    if isinstance(output, dict):
        output = output.values()
    return [tensor for part in output for tensor in float_tensors(part)] if isinstance(output, Iterable) else []


def tokens(config: PreTrainedConfig, batch: int = BATCH, length: int = LENGTH) -> torch.Tensor:
    """Token ids (batch, length) that no configuration reserves for padding, images or the like."""
    configs = [config, config.get_text_config(), config.get_text_config(decoder=True)]
    reserved = {number for one in configs for number in _reserved(one)}
    size = next((one.vocab_size for one in reversed(configs) if getattr(one, "vocab_size", None)), 0)
    free = torch.tensor([number for number in range(min(size, 1000)) if number not in reserved], dtype=torch.long)
    return free[(torch.arange(batch * length) * 7 + 3) % len(free)].view(batch, length) if len(free) else free


def _reserved(config: PreTrainedConfig) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            yield from value if isinstance(value, (list, tuple)) else [value]


def _padding(input_ids: torch.Tensor) -> torch.Tensor:
    mask = torch.ones_like(input_ids)
    mask[1:, -PADDING:] = 0
    return mask


def _token_inputs(config: PreTrainedConfig) -> list[torch.Tensor]:
    ids = tokens(config)
    return [ids] if ids.numel() else []


def _target_tokens(config: PreTrainedConfig) -> list[torch.Tensor]:
    # of another length than the source, so that cross-attention shows
    return [ids[:, : LENGTH - 7] for ids in _token_inputs(config)]


def _images(config: PreTrainedConfig) -> list[torch.Tensor]:
    config = getattr(config, "vision_config", None) or config
    size, channels = (
        _first(config, "image_size", "input_size"),
        _first(config, "num_channels", "in_channels", "in_chans"),
    )
    if not isinstance(channels, int):
        channels = 3
    if isinstance(size, dict):
        size = (size["height"], size["width"])
    height, width = size if isinstance(size, (list, tuple)) else (size or 224,) * 2
    images = _waves(BATCH, channels, height, width)
    frames = _first(config, "num_frames")
    return [images] if frames is None else [images[:, None].expand(-1, frames, -1, -1, -1), images]


def _features(config: PreTrainedConfig) -> list[torch.Tensor]:
    config = getattr(config, "audio_config", None) or config
    bins = _first(config, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim") or 80
    frames = 2 * (_first(config, "max_source_positions") or 64)
    return [_waves(BATCH, bins, frames), _waves(BATCH, frames, bins)]


def _sound(config: PreTrainedConfig) -> list[torch.Tensor]:
    bins, frames = _first(config, "num_mel_bins"), _first(config, "max_length")
    spectrogram = [_waves(BATCH, frames, bins)] if bins and frames else []
    return [*spectrogram, _waves(BATCH, 16000), _waves(BATCH, 1, 16000)]


def _boxes(config: PreTrainedConfig) -> list[torch.Tensor]:
    return [torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)]


# name of a forward's argument -> tensors to try for it
_BUILDERS: dict[str, Callable[[PreTrainedConfig], list[torch.Tensor]]] = {
    "input_ids": _token_inputs,
    "decoder_input_ids": _target_tokens,
    "bbox": _boxes,
    "pixel_values": _images,
    "pixel_values_videos": _images,
    "input_features": _features,
    "input_values": _sound,
}


def _first(config: PreTrainedConfig, *names: str) -> Any:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _waves(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7).view(shape)


def _as_dtype(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
