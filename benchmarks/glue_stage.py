"""How the models of benchmarks/glue.py learn a task: from its labels, or from a teacher that has learned it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from glue_tasks import MULTIPLE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexdistill.distillation.optimizers import make_optimizer, model_groups
from flexdistill.distillation.stage import StepLosses, first_non_finite_module, kernel_parameters, trainable
from flexdistill.distillation.throughput import kernel_flops, softmax_flops, weight_flops
from flexdistill.losses import hidden_state_error, kl_divergence, label_loss
from flexdistill.recipe import LogitDistillationRecipe


class Classification:
    """A stage: the label of rows (B, 1 + T) is learned from their tokens, or from what a teacher makes of these.

    A student learns as in logit distillation, and without dropout, under which its hidden states could not be the
    teacher's.
    """

    name = "classification"

    def __init__(
        self,
        model: PreTrainedModel,
        recipe: LogitDistillationRecipe,
        accelerator: Accelerator,
        tokenizer: PreTrainedTokenizerBase,
        teacher: PreTrainedModel | None = None,
        *,
        train_kernels: bool = True,
    ):
        self.model, self.teacher, self.recipe, self.accelerator = model, teacher, recipe, accelerator
        self.tokenizer = tokenizer
        kept = {} if train_kernels else kernel_parameters(model)
        self._trained = {name: p for name, p in model.named_parameters() if name not in kept}
        self.optimizer = make_optimizer(recipe, model_groups(model, self._trained, recipe), (0.9, 0.999))
        self.clip_groups = [list(self._trained.values())]
        self.scaler, self.states = torch.amp.GradScaler(enabled=False), {}

    def trained(self) -> dict:
        return self._trained

    @contextlib.contextmanager
    def active(self):
        models = [model for model in (self.model, self.teacher) if model is not None]
        with contextlib.ExitStack() as stack:
            for model in models:
                stack.enter_context(padding_by_tokens(model, self.tokenizer))
            stack.enter_context(trainable(self.model, set(self._trained)))
            self.model.train(self.teacher is None)
            yield
        self.model.eval()

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        labels, tokens = sequences[:, 0], sequences[:, 1:]
        with self.accelerator.autocast():
            output = self.model(input_ids=tokens, output_hidden_states=self.teacher is not None)
            total, count = label_loss(output.logits, labels)
            parts = {"label_loss": total.detach()}
            if self.teacher is not None:
                with torch.no_grad():
                    expected = self.teacher(input_ids=tokens, output_hidden_states=True)
                kl, _ = kl_divergence(output.logits, expected.logits, torch.ones_like(labels, dtype=torch.bool))
                seen = (tokens != self.tokenizer.pad_token_id)[:, : expected.hidden_states[0].shape[1]]
                # a sequence's weight is 1 however long it is, as with labels
                error, _ = hidden_state_error(output.hidden_states, expected.hidden_states, seen / seen.sum(1)[:, None])
                weight = self.recipe.label_weight
                total = weight * total + (1 - weight) * kl + self.recipe.hidden_state_weight * error
                parts |= {"kl": kl.detach(), "hidden_state_error": error.detach()}
        total.backward()
        return StepLosses(total.detach(), count, parts)

    def flops_per_token(self, length: int) -> float:
        weights = weight_flops(self.model)
        teacher = 0 if self.teacher is None else weights + softmax_flops(self.model, length)
        return teacher + 3 * (weights + kernel_flops(self.model))

    def blame(self, sequences: torch.Tensor) -> str:
        return first_non_finite_module(self.model, lambda: self.model(input_ids=sequences[:, 1:]))

    def finish(self) -> None:
        """Nothing is left to do."""


@contextlib.contextmanager
def padding_by_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """The base model tells padding and the second text by the tokens alone, and cuts columns of padding off.

    What is left has a multiple of 16 columns, for matrix units and so that Triton compiles kernels of one kind.
    """

    def read(base_model, args, kwargs):
        tokens = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
        mask = tokens != tokenizer.pad_token_id
        longest = -(-int(mask.sum(1).max()) // MULTIPLE) * MULTIPLE
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        ends = tokens == tokenizer.sep_token_id
        second = (ends.cumsum(1) - ends.long()).clamp_max(1) * mask
        return (), kwargs | {"input_ids": tokens, "attention_mask": mask.long(), "token_type_ids": second}

    handle = model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
