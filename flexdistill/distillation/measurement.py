"""What kernels take from data before they are trained."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..attention_modes import AttentionCall, attention_function, run_base_model
from ..runtime.feature_maps import FeatureMap
from ..runtime.rotary import kernel_side
from .stage import feature_maps


@torch.no_grad()
def measure_kernels(model: PreTrainedModel, sequences: torch.Tensor, accelerator: Accelerator) -> None:
    """Calibrates feature maps to token sequences (B, T), with softmax attention between layers."""
    if not any(feature_map.measures for feature_map in feature_maps(model).values()):
        return
    # a module that several layers share is called several times
    found: dict[FeatureMap, list[torch.Tensor]] = {}

    def attend(call: AttentionCall) -> torch.Tensor:
        feature_map = call.feature_map
        if feature_map is not None and feature_map.measures:
            query, key = (kernel_side(x, call.rotation, feature_map.spec) for x in (call.query, call.key))
            query = query * (call.scaling * call.query.shape[-1] ** 0.5)
            found.setdefault(feature_map, []).append(feature_map(query, key, type(feature_map).measure))
        return call.softmax()

    with attention_function(model, attend), accelerator.autocast():
        run_base_model(model, sequences)
    for feature_map, values in found.items():
        feature_map.calibrate(torch.stack(values).mean(0))
