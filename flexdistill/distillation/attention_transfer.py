"""Stage 1: each kernel learns the softmax attention of its own layer while the model's own activations flow."""

from __future__ import annotations

import contextlib

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from ..attention_modes import AttentionCall, attention_function, run_base_model
from ..losses import (
    AttentionRows,
    cross_entropy_rows,
    entropy_rows,
    limited_negative_mass,
    negative_mass_rows,
    over_queries,
    relative_output_error,
)
from ..recipe_stages import AttentionTransferRecipe
from .compilation import layers_compiled, maybe_compiled
from .optimizers import make_optimizer
from .stage import StepLosses, feature_maps, kernel_parameters, trainable
from .throughput import kernel_flops, softmax_flops, weight_flops
from .tiled_transfer import can_run, tiled_rows


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
        kernels = {"name": "kernels", "lr": recipe.learning_rate, "params": list(kernel_parameters(model).values())}
        self.optimizer = make_optimizer(recipe, [kernels], betas=(0.9, 0.999))
        self.scaler = torch.amp.GradScaler(enabled=False)  # kernels are differentiated in float32 alone
        self.states = {}
        self._compare = maybe_compiled(self._compare_rows, recipe.compile)
        self._losses: list[tuple[str, StepLosses]] = []

    def trained(self) -> dict[str, nn.Parameter]:
        return kernel_parameters(self.model)

    def flops_per_token(self, length: int) -> float:
        """The frozen model's forward pass without its head, and forward and backward passes of the kernels."""
        frozen = weight_flops(self.model, head=False) + softmax_flops(self.model, length)
        return frozen + 3 * kernel_flops(self.model)

    @contextlib.contextmanager
    def active(self):
        layers = layers_compiled(self.model, self.recipe.compile)
        with trainable(self.model, set(self.trained())), attention_function(self.model, self._attend), layers:
            yield

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        self._losses = []
        with torch.no_grad(), self.accelerator.autocast():
            run_base_model(self.model, sequences)
        names = list(self._losses[0][1].parts)
        # together, because a launch for each layer's scalars would take longer than all of them do
        figures = [figure for _, loss in self._losses for figure in (loss.total, *loss.parts.values())]
        figures = torch.stack(figures).unflatten(0, (len(self._losses), -1))
        total, *means = figures.mean(0).unbind()
        parts = dict(zip(names, means, strict=True))
        kls: dict[str, list[torch.Tensor]] = {}
        for (layer, _), kl in zip(self._losses, figures[:, 1 + names.index("attention_kl")].unbind(), strict=True):
            kls.setdefault(layer, []).append(kl)
        # a module that several layers share comes several times
        parts |= {
            f"attention_kl/{layer}": own[0] if len(own) == 1 else sum(own) / len(own) for layer, own in kls.items()
        }
        return StepLosses(total, self._losses[0][1].count, parts)

    def blame(self, sequences: torch.Tensor) -> str:
        self.backward(sequences)
        bad = [name for name, loss in self._losses if not loss.total.isfinite()]
        return bad[0] if bad else "the gradients; every layer's loss is finite"

    def finish(self) -> None:
        """Nothing is left to do: kernels are trained in place."""

    def _attend(self, call: AttentionCall) -> torch.Tensor:
        if call.feature_map is None:
            return call.softmax()
        losses, outputs = [], []
        for sequence in call.documents():
            teacher = []
            for document in sequence:
                with torch.autocast(call.query.device.type, enabled=False), torch.enable_grad():
                    loss, output = self._compare(document)
                    loss.total.backward()
                losses.append(loss.detach())
                teacher.append(output.to(call.query.dtype))
            outputs.append(torch.cat(teacher, dim=2))
        self._losses.append((self._layers[call.module], sum(losses[1:], losses[0])))
        return torch.cat(outputs).transpose(1, 2).contiguous()

    def _compare_rows(self, call: AttentionCall) -> tuple[StepLosses, torch.Tensor]:
        """A layer's losses, and the teacher's attention output (B, H, T, D)."""
        recipe, visible = self.recipe, call.visible()
        rows = attention_rows(call)
        cross_entropy, count = over_queries(rows.cross_entropy, visible)
        entropy, _ = over_queries(rows.entropy, visible)
        error, _ = relative_output_error(rows.teacher, rows.student, visible)
        total = recipe.cross_entropy_weight * cross_entropy + recipe.output_mse_weight * error
        parts = {"attention_kl": cross_entropy - entropy, "output_error": error}
        if self._negative_mass_weight:
            mass, _ = limited_negative_mass(rows.negative_mass, visible)
            total = total + self._negative_mass_weight * mass
            parts["negative_mass"] = mass
        return StepLosses(total, count, parts), rows.teacher.detach()


def attention_rows(call: AttentionCall) -> AttentionRows:
    """What a layer's loss compares, with gradients for its kernel."""
    if is_tiled(call):
        return tiled_rows(call.feature_map, call.query, call.key, call.value, **call.kernel_arguments())
    return quadratic_rows(call)


def is_tiled(call: AttentionCall) -> bool:
    """Whether a call's rows are computed tile by tile instead of from T x T maps."""
    feature_map = call.feature_map
    return call.causal == feature_map.spec.causal and can_run(feature_map, call.query, call.key, call.value)


def quadratic_rows(call: AttentionCall) -> AttentionRows:
    """The reference: rows from T x T maps. One that sees no key has the mean of all values as the teacher's output."""
    with torch.no_grad():
        teacher = softmax_weights(call)
        value = call.value.float().repeat_interleave(teacher.shape[1] // call.value.shape[1], dim=1)
        entropy, output = entropy_rows(teacher), teacher @ value
    feature_map, student = call.feature_map, call.kernel_weights()
    # positive kernels need no third pass over the maps
    negative = negative_mass_rows(student) if feature_map.signed else torch.zeros_like(entropy)
    return AttentionRows(cross_entropy_rows(teacher, student), entropy, negative, output, student @ value)


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
