"""Which attention modules use rotary embedding, and how, told by running a model with its text at two places."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from .attention_modes import AttentionCall, record_attention
from .runtime.interface import find_rotation
from .runtime.rotary import LAYOUTS, Rotation, angles, turned_back

_LENGTH, _LATER = 24, 40
# a relative difference of queries or keys that is rounding
_SAME = {torch.float32: 1e-2, torch.float64: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}


@dataclass(frozen=True)
class RotaryEmbedding:
    """How an attention module's rotary embedding pairs coordinates, and in how many tokens each pair turns once."""

    layout: str
    wavelengths: tuple[float, ...]  # never falling

    def pairs_within(self, wavelength: float) -> int:
        return sum(own <= wavelength for own in self.wavelengths)


def rotary_embeddings(model: PreTrainedModel, modules: Iterable[nn.Module]) -> dict[nn.Module, RotaryEmbedding | None]:
    """The rotary embeddings of those modules that turn queries and keys by it.

    None stands for one that cannot be taken out again: it is of a form that is not known here, or places show in
    queries and keys by more than it.
    """
    handles = [module.register_forward_pre_hook(find_rotation, with_kwargs=True) for module in modules]
    try:
        first, later = (_calls(model, start) for start in (0, _LATER))
    except torch.OutOfMemoryError:
        raise
    except Exception:  # it takes no position ids, or not so many; a model raises what it likes
        return {}
    finally:
        for handle in handles:
            handle.remove()
    return {
        module: _embedding(call, later[module])
        for module, call in first.items()
        if module in later and call.rotation is not None and not _are_same(call.query, later[module].query)
    }


def _calls(model: PreTrainedModel, start: int) -> dict[nn.Module, AttentionCall]:
    positions = torch.arange(_LENGTH, device=model.device)[None]
    tokens = positions % model.get_input_embeddings().num_embeddings
    calls: dict[nn.Module, AttentionCall] = {}
    for call in record_attention(model, AttentionCall.softmax, tokens, position_ids=positions + start):
        calls.setdefault(call.module, call)
    return calls


def _embedding(first: AttentionCall, later: AttentionCall) -> RotaryEmbedding | None:
    for layout in LAYOUTS:
        if _undoes(layout, first, later):
            wavelengths = _wavelengths(first.rotation, layout)
            return RotaryEmbedding(layout, wavelengths) if wavelengths == tuple(sorted(wavelengths)) else None
    return None


def _undoes(layout: str, first: AttentionCall, later: AttentionCall) -> bool:
    size = first.rotation[0].shape[-1]
    if size % 2 or size > first.query.shape[-1]:
        return False
    return all(
        _are_same(turned_back(before, first.rotation, layout, 0), turned_back(after, later.rotation, layout, 0))
        for before, after in ((first.query, later.query), (first.key, later.key))
    )


def _wavelengths(rotation: Rotation, layout: str) -> tuple[float, ...]:
    cos, sin = (angles(part, layout)[0, :2].double() for part in rotation)
    turns = torch.atan2(sin, cos).diff(dim=0)[0].remainder(2 * math.pi)
    return tuple((2 * math.pi / turns).tolist())


def _are_same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    difference = (actual.float() - expected.float()).norm()
    return bool(difference <= _SAME[expected.dtype] * expected.float().norm())
