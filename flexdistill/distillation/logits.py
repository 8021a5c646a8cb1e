"""Stage 2: the converted model learns the teacher's distribution over the next token."""

from __future__ import annotations

import contextlib
import copy
import re

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from ..attention_modes import softmax_mode
from ..errors import FlexdistillError, first_sentence
from ..losses import hidden_state_error, kl_divergence, label_loss
from ..recipe_stages import LogitDistillationRecipe, LoraRecipe
from .compilation import layers_compiled, maybe_compiled
from .heads import SplitModel, backward_in_pieces
from .memory import gradient_checkpointing, round_linear_weights
from .model_stage import ModelStage, check_labels
from .sharding import free_gathered, gather_into, sharded_copy
from .stage import StepLosses, feature_maps, kernel_parameters, trainable
from .throughput import kernel_flops, softmax_flops, weight_flops

# logits held at once, of teacher and student each; a GPU waits for whoever sends it small pieces
LOGITS_PER_PIECE = {"cpu": 2**25, "cuda": 2**27}


class LogitDistillation(ModelStage):
    """Forward KL to the teacher, mixed with the label loss; trains everything, LoRA adapters or kernels only.

    With adapters or kernels alone, the teacher is the student's own frozen weights under softmax attention.

    Raises:
        FlexdistillError: if the model gives no logits, or labels are asked for and the model is not causal.
    """

    name = "logit_distillation"

    def __init__(self, model: PreTrainedModel, recipe: LogitDistillationRecipe, accelerator: Accelerator):
        super().__init__(model, recipe, accelerator)
        if recipe.label_weight:
            kernels = (feature_map.spec for feature_map in feature_maps(model).values())
            check_labels(model, kernels, "set logit_distillation.label_weight to 0")
        self._own_teacher = self._copy_as_teacher(model) if recipe.train == "full" else None
        self._whole = model
        if self._shards:
            model = sharded_copy(model, accelerator, cpu_offload=recipe.cpu_offload)
        self.model, self._student = model, SplitModel(model)
        self._teacher = SplitModel(self._own_teacher) if self._own_teacher is not None else self._student
        if recipe.train == "lora":
            # PEFT freezes all of them
            self._requires_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
            add_adapters(model, recipe.lora)
        kernels = kernel_parameters(model)
        weights = {}
        if recipe.train == "full":
            weights = {name: p for name, p in model.named_parameters() if name not in kernels}
        elif recipe.train == "lora":
            weights = {name: p for name, p in model.named_parameters() if "lora_" in name}
        self._kl_divergence = maybe_compiled(kl_divergence, recipe.compile)
        self.train_only(kernels | weights)

    def flops_per_token(self, length: int) -> float:
        """Forward passes of teacher and student, and a backward pass, without gradients of weights that are frozen."""
        weights = weight_flops(self.model)
        teacher = weights + softmax_flops(self.model, length)
        return teacher + (3 if self.recipe.train == "full" else 2) * weights + 3 * kernel_flops(self.model)

    @contextlib.contextmanager
    def active(self):
        teacher = softmax_mode(self._own_teacher) if self._own_teacher is not None else contextlib.nullcontext()
        saving = gradient_checkpointing(self.model) if self.recipe.gradient_checkpointing else contextlib.nullcontext()
        with contextlib.ExitStack() as compiled:
            for model in {self.model, self._teacher.model}:
                compiled.enter_context(layers_compiled(model, self.recipe.compile))
            with trainable(self.model, set(self._trained)), teacher, saving:
                yield

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        recipe = self.recipe
        mask = torch.ones_like(sequences, dtype=torch.bool).flatten()
        labels = next_tokens(sequences).flatten()
        # sums are divided by the number of positions, of which the last has no label
        positions_per_label = len(labels) / (labels != -100).sum()
        parts = {"kl": 0.0}
        all_layers = recipe.hidden_state_weight > 0
        # kept casts of a sharded model's weights would be a whole model
        with self.accelerator.autocast(AutocastKwargs(cache_enabled=not self._shards)):
            with torch.no_grad(), self._as_teacher():
                teacher_states = self._teacher.states(sequences, all_layers)
                teacher_hidden = teacher_states[-1].flatten(0, 1)
            states = self._student.states(sequences, all_layers)
            hidden, further_loss = states[-1].flatten(0, 1), None
            if all_layers:
                error, _ = hidden_state_error(states, teacher_states)
                parts["hidden_state_error"] = error.detach()
                further_loss = recipe.hidden_state_weight * error

            def loss(part_hidden, part):
                with torch.no_grad(), adapters_disabled(self._teacher.model):
                    teacher_logits = self._teacher.logits(teacher_hidden[part])
                logits = self._student.logits(part_hidden)
                kl, _ = self._kl_divergence(logits, teacher_logits, mask[part], recipe.temperature)
                parts["kl"] = parts["kl"] + kl.detach()
                if not recipe.label_weight:
                    return kl
                label = label_loss(logits, labels[part])[0] * positions_per_label
                parts["label_loss"] = parts.get("label_loss", 0.0) + label.detach()
                return (1 - recipe.label_weight) * kl + recipe.label_weight * label

            total = backward_in_pieces(
                hidden,
                positions_per_piece(self.model),
                loss,
                further_loss,
                scale=self.scaler.scale,
                model=self.model,
            )
        free_gathered(self._teacher.model)
        return StepLosses(total, mask.sum(), parts)

    def finish(self) -> None:
        """Merges the adapters into the weights, or gathers the shards; the model given at first is trained then."""
        if self.recipe.train == "lora":
            merge_adapters(self.model)
            for parameter, required in self._requires_grad.items():
                parameter.requires_grad_(required)
        if self._shards:
            gather_into(self._whole, self.model)
            self._whole.to(self.accelerator.device)

    @property
    def _shards(self) -> bool:
        return self.recipe.parallel == "fsdp" and self.accelerator.num_processes > 1

    def _copy_as_teacher(self, model: PreTrainedModel) -> PreTrainedModel:
        if self._shards:
            model.cpu()  # until it is trained, its shards alone are on the devices
        teacher = copy.deepcopy(model).requires_grad_(False)
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self.accelerator.mixed_precision)
        if precision is not None:
            round_linear_weights(teacher, precision)
        return sharded_copy(teacher, self.accelerator) if self._shards else teacher

    @contextlib.contextmanager
    def _as_teacher(self):
        if self._own_teacher is not None:
            yield
            return
        with softmax_mode(self.model), adapters_disabled(self.model):
            yield


def positions_per_piece(model: PreTrainedModel) -> int:
    """Positions whose logits over the model's vocabulary are held at once."""
    weight = model.get_output_embeddings().weight
    return max(1, LOGITS_PER_PIECE.get(weight.device.type, LOGITS_PER_PIECE["cpu"]) // weight.shape[0])


def position_pieces(model: PreTrainedModel, count: int) -> list[slice]:
    """Spans of `count` positions, of as many each as `positions_per_piece` says."""
    size = positions_per_piece(model)
    return [slice(start, start + size) for start in range(0, count, size)]


def next_tokens(sequences: torch.Tensor) -> torch.Tensor:
    """Labels of token sequences (B, T): the next token, and -100 at the end."""
    return torch.cat([sequences[:, 1:], torch.full_like(sequences[:, :1], -100)], dim=1)


def add_adapters(model: PreTrainedModel, recipe: LoraRecipe | None) -> None:
    """Puts LoRA adapters beside the model's linear layers, not its kernels.

    Raises:
        FlexdistillError: if no layer fits the targets, or an adapted layer shares its weight with the input embedding.
    """
    recipe = recipe or LoraRecipe()
    try:
        model.add_adapter(LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules=recipe.target_modules))
    except (ValueError, TypeError, re.error) as error:
        raise FlexdistillError(
            f"Adapters cannot be put on {recipe.target_modules!r} ({first_sentence(error)}); set "
            "logit_distillation.lora.target_modules to names of linear layers, or to all-linear."
        ) from error
    embedding = model.get_input_embeddings().weight
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.get_base_layer().weight is embedding:
            raise FlexdistillError(
                f"An adapter on {name} would change the input embedding too, whose weight it shares; leave it out of "
                "logit_distillation.lora.target_modules."
            )


def check_adapters(model: PreTrainedModel, recipe: LoraRecipe | None) -> None:
    """Raises FlexdistillError as `add_adapters` would, and leaves the model as it is."""
    with torch.device("meta"):
        shell = type(model)(copy.deepcopy(model.config))
    add_adapters(shell, recipe)


def merge_adapters(model: PreTrainedModel) -> None:
    """Adds the adapters to the weights and takes them out."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    del model.peft_config
    model._hf_peft_config_loaded = False


@contextlib.contextmanager
def adapters_disabled(model: PreTrainedModel):
    """The model's own weights alone inside the context."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
