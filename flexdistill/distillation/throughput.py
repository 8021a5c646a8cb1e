"""Model FLOP utilisation: the arithmetic that a model needs per second, over what the device can do."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from .stage import Stage, feature_maps, kernel_parameters

# dense bf16 operations per second, by part of the device's name; the first that fits; TF32 is half of it
_PEAKS = {
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Operations per second of a CUDA device that is known; `precision` as Accelerate names it."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    peak = next((peak for part, peak in _PEAKS.items() if part in name), None)
    return peak / 2 if peak is not None and precision == "no" else peak


class Throughput:
    """What a stage's tokens per second mean in arithmetic; one for each call of the loop."""

    def __init__(self, stage: Stage, length: int, accelerator: Accelerator):
        peak = peak_flops(accelerator.device, accelerator.mixed_precision)
        self._share = None if peak is None else stage.flops_per_token(length) / (peak * accelerator.num_processes)

    def utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """For the log; empty where the device's peak is not known."""
        return {} if self._share is None else {"model_flop_utilisation": self._share * tokens_per_s}


def weight_flops(model: PreTrainedModel, *, head: bool = True) -> float:
    """Forward operations per token in the model's matrices: two per weight, but for embeddings that are looked up."""
    kernels, output = kernel_parameters(model).keys(), getattr(model.get_output_embeddings(), "weight", None)
    left_out = {output, *(module.weight for module in model.modules() if isinstance(module, nn.Embedding))}
    matrices = [p for name, p in model.named_parameters() if name not in kernels and p not in left_out and p.ndim > 1]
    return 2.0 * sum(parameter.numel() for parameter in [*matrices, *([] if output is None or not head else [output])])


def softmax_flops(model: PreTrainedModel, length: int) -> float:
    """Forward operations per token of softmax attention in the converted layers: scores and values."""
    total = 0.0
    for feature_map in feature_maps(model).values():
        spec = feature_map.spec
        seen = length / 2 if spec.causal else length
        total += 4 * seen * spec.num_heads * spec.head_dim
    return total


def kernel_flops(model: PreTrainedModel) -> float:
    """Forward operations per token of Flexformer attention: features of query and key, state, window and sinks."""
    total = 0.0
    for feature_map in feature_maps(model).values():
        spec = feature_map.spec
        features = 4 * spec.head_dim * feature_map.num_features
        state = 4 * feature_map.num_features * spec.head_dim
        total += spec.num_heads * (features + state + 4 * (spec.window + spec.sinks) * spec.head_dim)
    return total
