"""Reading what others wrote: whatever is wrong with a model's files is told in one sentence, before it costs memory."""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from transformers import PreTrainedConfig, PreTrainedModel

from .progress import progress_bars_on_terminals_only

# settings that count something, such as num_labels and n_layer: transformers makes Python lists of such lengths
_COUNTS = re.compile(r"(^|_)(num|n)_|layers?$")
MOST_COUNTED = 2**20
MOST_TENSORS = 2**17
# a byte of a file describes no more of a model than this: names take room, and weights, which may be tied, bits
_TENSORS_PER_BYTE, _ELEMENTS_PER_BYTE = 1 / 64, 16
# of a layer in a GGUF file, at least
_TENSORS_PER_LAYER = 4
# what a model computes itself is in no file
_TENSORS_AT_LEAST, _ELEMENTS_AT_LEAST = 10_000, 2**28


def checked_settings(path: str | Path, file: str | None = None) -> dict[str, Any]:
    """What config.json, or the GGUF file of this name, says of a model.

    Raises:
        ValueError: if a setting counts more layers, heads, labels or the like than any model has.
    """
    if file:
        return _gguf_settings(Path(path, file), Path(path, file).stat().st_mtime_ns)
    return _checked(PreTrainedConfig.get_config_dict(path)[0])


@functools.lru_cache(maxsize=1)  # reading one takes seconds
def _gguf_settings(file: Path, modified_ns: int) -> dict[str, Any]:
    return _checked(PreTrainedConfig.get_config_dict(file.parent, gguf_file=file.name)[0])


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    for name, value in _numbers(settings):
        if value > MOST_COUNTED and _COUNTS.search(name):
            raise ValueError(f"{name} is {value:,}, more than any model has")
    return settings


def _numbers(settings: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Numbers by name, also those of a part of a model."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _numbers(value)
        elif isinstance(value, (int, float)):
            yield str(name), value


def load_weights(
    model_class: type[Any], path: str | Path, *, config: PreTrainedConfig, file: str | None = None, **settings: Any
) -> PreTrainedModel:
    """`model_class.from_pretrained`, where every weight must be there, in its shape.

    Args:
        path: folder or Hub id.
        file: name of the GGUF file in it; None for safetensors.
        settings: what else `from_pretrained` takes.

    Raises:
        ValueError: if weights are missing or of other shapes, or the configuration describes a model much larger than
            the files.
    """
    if file:
        _check_layers(config, Path(path, file))
    weights = {"gguf_file": file} if file else {"use_safetensors": True}
    with _bounded(_num_bytes(Path(path), file)), _reports_hidden(), progress_bars_on_terminals_only():
        model, report = model_class.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **weights, **settings
        )
    name = type(model).__name__
    if missing := report["missing_keys"]:
        raise ValueError(
            f"it lacks {len(missing)} weights of {name}, such as {min(missing)}, or `architectures` in "
            "config.json names another class than was saved"
        )
    if mismatched := [weight for weight, *_ in report["mismatched_keys"]]:
        raise ValueError(f"{len(mismatched)} weights of {name}, such as {min(mismatched)}, have other shapes")
    return model


def _check_layers(config: PreTrainedConfig, file: Path) -> None:
    # for each module of each layer, transformers makes a table of all layers' names
    with file.open("rb") as header:
        (num_tensors,) = struct.unpack("<8xQ", header.read(16))
    layers = config.get_text_config().num_hidden_layers
    if layers * _TENSORS_PER_LAYER > num_tensors:
        raise ValueError(f"its {num_tensors:,} tensors are too few for {layers:,} layers")


def _num_bytes(path: Path, file: str | None) -> int | None:
    """Bytes of a local model's weights; None for one that the Hub holds."""
    if not path.is_dir():
        return None
    return sum(weights.stat().st_size for weights in ([path / file] if file else path.glob("*.safetensors")))


@contextlib.contextmanager
def _bounded(num_bytes: int | None) -> Iterator[None]:
    """A ValueError where a model is laid out, on the meta device, that is much larger than its files."""
    counts = {"tensors": 0, "elements": 0}
    most = {"tensors": MOST_TENSORS}
    if num_bytes is not None:
        most["tensors"] = min(max(int(num_bytes * _TENSORS_PER_BYTE), _TENSORS_AT_LEAST), MOST_TENSORS)
        most["elements"] = max(num_bytes * _ELEMENTS_PER_BYTE, _ELEMENTS_AT_LEAST)

    def count(module: torch.nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        if tensor is None or not tensor.is_meta:
            return
        counts["tensors"] += 1
        counts["elements"] += tensor.numel()
        if large := next((unit for unit in most if counts[unit] > most[unit]), None):
            raise ValueError(
                f"config.json describes a model of more than {most[large]:,} {large}, which its files are not"
            )

    hooks = [
        torch_module.register_module_parameter_registration_hook(count),
        torch_module.register_module_buffer_registration_hook(count),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _reports_hidden() -> Iterator[None]:
    """transformers' table of weights that did not fit is not printed: what is wrong is said in one sentence."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
