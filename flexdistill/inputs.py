"""What a run reads: the model with its tokenizer, the token sequences, and whether all of it fits the recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversion import Plan, check_sequence_length
from .data import pack, read_documents, split_held_out
from .distill.heads import SplitModel
from .distill.memory import checkpointed_layers
from .errors import FlexdistillError
from .recipe import Recipe
from .sources import ModelSource, check_vocabulary, load_model, load_tokenizer, resolve_model

# enough to tell layers apart: the same tokens are compared with each of them
SELECTION_SEQUENCES = 8


@dataclass(frozen=True)
class Sequences:
    """Token ids of a run, int64."""

    training: torch.Tensor  # (N, T)
    evaluation: torch.Tensor  # (M, T')
    selection: torch.Tensor  # (S, T): training text that is held out to choose layers on


def load_source(recipe: Recipe) -> tuple[ModelSource, PreTrainedTokenizerBase, PreTrainedModel]:
    """The model that a recipe names, on CPU and not converted, with its tokenizer; its head is known to be there."""
    if recipe.model is None:
        raise FlexdistillError("The recipe names no model; set model, or name one on the command line.")
    source = resolve_model(recipe.model)
    tokenizer = load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    model = load_model(source, trust_remote_code=recipe.trust_remote_code)
    check_vocabulary(model, tokenizer)
    SplitModel(model)  # a model without a language-modelling head is told before it is trained
    return source, tokenizer, model


def check_lengths(recipe: Recipe) -> None:
    """Raises FlexdistillError if the window covers the training sequences, or they go beyond the kernel's horizon."""
    kernel, length = recipe.kernel, recipe.data.sequence_length
    if kernel.window >= length:
        raise FlexdistillError(
            f"A window of {kernel.window} tokens covers sequences of {length}, so the kernel would never be used; set "
            "a smaller --window or a larger --sequence-length."
        )
    longest = max(length, recipe.evaluation.sequence_length or 0)
    if kernel.horizon is not None and longest > kernel.horizon:
        raise FlexdistillError(
            f"Sequences of {longest} tokens are longer than the kernel's horizon of {kernel.horizon}; set a larger "
            "kernel.horizon or a smaller --sequence-length."
        )


def check_devices(recipe: Recipe, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Raises FlexdistillError if the recipe asks for what the devices of the run or the model's class cannot do."""
    logits, processes = recipe.logit_distillation, accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    if not on_gpu and (logits.max_memory or recipe.attention_transfer.max_memory):
        raise FlexdistillError(
            "--max-memory measures a GPU's memory and there is none; set --micro-batch-size instead."
        )
    if not on_gpu and logits.cpu_offload:
        raise FlexdistillError("cpu_offload moves weights off a GPU and there is none; remove it.")
    if logits.steps and (logits.gradient_checkpointing or logits.parallel == "fsdp"):
        checkpointed_layers(model)
    if logits.parallel != "fsdp":
        return
    if accelerator.mixed_precision == "fp16":
        raise FlexdistillError("--parallel fsdp has no gradient scaler for fp16; set --precision bf16.")
    if logits.batch_size % processes:
        raise FlexdistillError(
            f"--parallel fsdp needs as many sequences in each of the {processes} processes, and batches have "
            f"{logits.batch_size}; set a --batch-size that is a multiple of {processes}."
        )


def check_trainable(recipe: Recipe, plan: Plan) -> None:
    """Raises FlexdistillError if the kernels alone are to be trained and have no parameters."""
    logits = recipe.logit_distillation
    if not plan.parameters and logits.steps and logits.train == "kernels":
        raise FlexdistillError(
            f"Variant {recipe.kernel.variant!r} has no parameters, so train: kernels has nothing to train; set "
            "logit_distillation.train to full or lora, or its steps to 0."
        )


def load_sequences(recipe: Recipe, model: PreTrainedModel, tokenizer) -> Sequences:
    """Reads no more text than the run needs."""
    data, evaluation = recipe.data, recipe.evaluation
    length = evaluation.sequence_length or data.sequence_length
    for checked in (data.sequence_length, length):
        check_sequence_length(model, checked)
    if evaluation.source is None and length != data.sequence_length:
        raise FlexdistillError(
            "evaluation.sequence_length differs from data.sequence_length, but held-out sequences are cut like the "
            "training data; set evaluation.source, or remove evaluation.sequence_length."
        )
    needed = sum(stage.steps * stage.batch_size for stage in (recipe.attention_transfer, recipe.logit_distillation))
    evaluated = evaluation.sequences if evaluation.source is None else 0
    held_out = evaluated + (SELECTION_SEQUENCES if recipe.kernel.keep_softmax else 0)
    rows = pack(read_documents(data), tokenizer, data.sequence_length, max(needed, 1) + held_out)
    training, rows = split_held_out(rows, held_out)
    selection = rows[evaluated:]
    if evaluation.source is not None:
        return Sequences(training, pack(read_documents(evaluation), tokenizer, length, evaluation.sequences), selection)
    return Sequences(training, rows[:evaluated], selection)


def input_hashes(model: PreTrainedModel, sequences: Sequences) -> dict[str, str]:
    """SHA-256 of all that a run reads, by what it is."""
    data = {"training": sequences.training, "selection": sequences.selection}
    inputs = {"model": model.state_dict(), "data": data, "evaluation data": {"": sequences.evaluation}}
    return {name: _sha256(tensors) for name, tensors in inputs.items()}


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
