"""Stage 1: each kernel learns the softmax attention of its own layer while the model's own activations flow."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..attention_modes import AttentionCall, attention_function, run_base_model
from ..losses import attention_cross_entropy, attention_entropy, negative_mass, relative_output_error
from ..recipe import AttentionTransferRecipe
from ..runtime.attention import attention_weights
from .stage import StepLosses, feature_maps, kernel_parameters, trainable


class AttentionTransfer:
    """Trains kernels only, layer by layer within one frozen forward pass.

    A layer's loss is differentiated as soon as the layer has run, so the activations of one layer at most are held.
    """

    name = "attention_transfer"

    def __init__(self, model: PreTrainedModel, recipe: AttentionTransferRecipe, accelerator: Accelerator):
        self.model, self.recipe, self.accelerator = model, recipe, accelerator
        self._layers = {module: name for name, module in model.base_model.named_modules()}
        maps = feature_maps(model).values()
        signed = any(feature_map.signed for feature_map in maps)
        weight = recipe.negative_mass_weight
        self._negative_mass_weight = (2.0 if signed else 0.0) if weight is None else weight
        # layers learn independently of each other, so each is clipped by its own norm
        self.clip_groups = [list(feature_map.parameters()) for feature_map in maps]
        self.optimizer = torch.optim.Adam(kernel_parameters(model).values(), lr=recipe.learning_rate)
        self._losses: list[tuple[str, StepLosses]] = []  # a module that several layers share comes several times

    def trained(self) -> dict[str, nn.Parameter]:
        return kernel_parameters(self.model)

    @contextlib.contextmanager
    def active(self):
        with trainable(self.model, set(self.trained())), attention_function(self.model, self._attend):
            yield

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        self._losses = []
        with torch.no_grad(), self.accelerator.autocast():
            run_base_model(self.model, sequences)
        losses = [loss for _, loss in self._losses]
        total = sum(loss.total for loss in losses)
        parts = {name: sum(loss.parts[name] for loss in losses) / len(losses) for name in losses[0].parts}
        return StepLosses(total / len(losses), losses[0].count, parts)

    def blame(self, sequences: torch.Tensor) -> str:
        self.backward(sequences)
        bad = [name for name, loss in self._losses if not loss.total.isfinite()]
        return bad[0] if bad else "the gradients; every layer's loss is finite"

    def finish(self) -> None:
        """Nothing is left to do: kernels are trained in place."""

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        if call.feature_map is None:
            return call.softmax()
        with torch.autocast(call.query.device.type, enabled=False):
            teacher = softmax_weights(call)
            value = call.value.float().repeat_interleave(teacher.shape[1] // call.value.shape[1], dim=1)
            output = teacher @ value
            with torch.enable_grad():
                loss = self._layer_loss(call, teacher, value, output)
                loss.total.backward()
        detached = {name: part.detach() for name, part in loss.parts.items()}
        self._losses.append((self._layers[call.module], StepLosses(loss.total.detach(), loss.count, detached)))
        return output.to(call.query.dtype).transpose(1, 2).contiguous()

    def _layer_loss(self, call, teacher, value, output) -> StepLosses:
        recipe, visible = self.recipe, call.visible()
        student = attention_weights(call.feature_map, call.query, call.key, scaling=call.scaling, visible=visible)
        cross_entropy, count = attention_cross_entropy(teacher, student, visible)
        entropy, _ = attention_entropy(teacher, visible)
        error, _ = relative_output_error(output, student @ value, visible)
        total = recipe.cross_entropy_weight * cross_entropy + recipe.output_mse_weight * error
        parts = {"attention_kl": cross_entropy - entropy, "output_error": error}
        if self._negative_mass_weight:
            mass, _ = negative_mass(student, visible)
            total = total + self._negative_mass_weight * mass
            parts["negative_mass"] = mass
        return StepLosses(total, count, parts)


def softmax_weights(call: AttentionCall) -> torch.Tensor:
    """Softmax attention as a float32 matrix (B, H, T, T), from the queries and keys of a call."""
    query, key = call.query.float(), call.key.float()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    length = query.shape[-2]
    allowed = torch.ones(length, length, dtype=torch.bool, device=query.device)
    if call.causal:
        allowed = allowed.tril()
    visible = call.visible()
    if visible is not None:
        allowed = allowed & visible[:, None, None]
    # the least finite number instead of -inf: a row without any key becomes uniform, not NaN
    logits = (query @ key.transpose(-1, -2) * call.scaling).masked_fill(~allowed, torch.finfo(query.dtype).min)
    return logits.softmax(-1)
