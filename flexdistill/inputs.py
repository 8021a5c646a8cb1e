"""What a run reads: the model with its tokenizer, the token sequences, and whether all of it fits the recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversion import Plan, check_sequence_length, make_plan
from .data import read_documents
from .distillation.documents import DocumentMasks
from .distillation.embeddings import has_tied_embeddings
from .distillation.freedom import check_shareable
from .distillation.heads import SplitModel
from .distillation.labels import LabelTraining
from .distillation.logits import check_adapters
from .distillation.memory import repeated_layers
from .distillation.model_stage import check_labels
from .errors import FlexdistillError
from .mixture import TokenRows, turns_of
from .packing import cut, pack, separator_of, split_held_out
from .recipe import STAGES, Recipe
from .repeats import repeat_spans
from .runtime.registry import feature_map_class
from .sources import ModelSource, check_vocabulary, load_model, load_tokenizer, resolve_model
from .token_cache import cache_folder, read_tokens

# enough to tell layers apart: the same tokens are compared with each of them
SELECTION_SEQUENCES = 8


@dataclass(frozen=True)
class Sequences:
    """Token ids of a run."""

    training: TokenRows  # (N, T)
    evaluation: torch.Tensor  # (M, T')
    selection: torch.Tensor  # (S, T): training text that is held out to choose layers on
    recalled: torch.Tensor | None  # (S, T) bool: the positions of it that count; None: all
    validation: torch.Tensor  # (V, T): held out where a stage validates
    labels: TokenRows | None  # (L, T''): for label training, cut from what follows the other stages' rows
    separator: int | None  # the token that ends a document


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
    kernel, lengths = recipe.kernel, [recipe.sequence_length(stage) for stage in STAGES]
    length = min(lengths)
    if kernel.window + kernel.num_sinks >= length:
        sinks = f" and {kernel.num_sinks} sinks cover" if kernel.num_sinks else " covers"
        raise FlexdistillError(
            f"A window of {kernel.window} tokens{sinks} sequences of {length}, so the kernel would never be used; set "
            "a smaller --window or a larger --sequence-length."
        )
    longest = max(recipe.evaluation.sequence_length or 0, *lengths)
    if kernel.horizon is not None and longest > kernel.horizon:
        raise FlexdistillError(
            f"Sequences of {longest} tokens are longer than the kernel's horizon of {kernel.horizon}; set a larger "
            "kernel.horizon or a smaller --sequence-length."
        )


def check_devices(recipe: Recipe, model: PreTrainedModel, accelerator: Accelerator) -> None:
    """Raises FlexdistillError if the recipe asks for what the devices of the run or the model's class cannot do."""
    logits, processes = recipe.logit_distillation, accelerator.num_processes
    on_gpu = accelerator.device.type == "cuda"
    if not on_gpu and any(stage.max_memory for stage in recipe.stages.values()):
        raise FlexdistillError(
            "--max-memory measures a GPU's memory and there is none; set --micro-batch-size instead."
        )
    if any(stage.compile for stage in recipe.stages.values()):
        if not on_gpu:  # in torch 2.13, what Inductor makes of linear attention's gradients for CPUs is wrong
            raise FlexdistillError("--compile is for GPUs and there is none; leave it out.")
        repeated_layers(model)
    if any(stage.cuda_graphs for stage in recipe.stages.values()):
        if not on_gpu:
            raise FlexdistillError("--cuda-graphs is for GPUs and there is none; leave it out.")
        if recipe.data.document_masks:  # where documents end decides what runs
            raise FlexdistillError("--cuda-graphs cannot follow data.document_masks; leave one of them out.")
    if not logits.steps:
        return
    if not on_gpu and logits.cpu_offload:
        raise FlexdistillError("cpu_offload moves weights off a GPU and there is none; remove it.")
    if logits.gradient_checkpointing or logits.parallel == "fsdp":
        repeated_layers(model)
    if logits.parallel != "fsdp":
        return
    if processes == 1:
        raise FlexdistillError(
            "--parallel fsdp shards a model over several processes and there is one; set --num-processes, or leave "
            "--parallel and cpu_offload out."
        )
    if accelerator.mixed_precision == "fp16":
        raise FlexdistillError("--parallel fsdp has no gradient scaler for fp16; set --precision bf16.")
    if logits.batch_size % processes:
        raise FlexdistillError(
            f"--parallel fsdp needs as many sequences in each of the {processes} processes, and batches have "
            f"{logits.batch_size}; set a --batch-size that is a multiple of {processes}."
        )
    if logits.validation_every and recipe.data.validation_sequences % processes:
        raise FlexdistillError(
            f"--parallel fsdp needs as many sequences in each of the {processes} processes, and validation has "
            f"{recipe.data.validation_sequences}; set data.validation_sequences to a multiple of {processes}."
        )


def check_trainable(recipe: Recipe, plan: Plan, model: PreTrainedModel) -> None:
    """Raises FlexdistillError if a stage or setting has nothing to work on in this model.

    That is: the negative mass of positive kernels, kernels alone where they have no parameters, labels where the next
    token is not predicted, and what `check_embeddings` finds.
    """
    transfer, logits, labels = recipe.attention_transfer, recipe.logit_distillation, recipe.label_training
    kernels = [feature_map_class(m.spec.variant, m.spec.component) for m in plan.converted if m.spec]
    if transfer.steps and transfer.negative_mass_weight is not None and not any(kernel.signed for kernel in kernels):
        raise FlexdistillError(
            f"Features of variant {recipe.kernel.variant!r} have no negative mass, as they are not signed; leave "
            "attention_transfer.negative_mass_weight out."
        )
    if not plan.parameters and logits.steps and logits.train == "kernels":
        raise FlexdistillError(
            f"Variant {recipe.kernel.variant!r} has no parameters, so train: kernels has nothing to train; set "
            "logit_distillation.train to full or lora, or its steps to 0."
        )
    if logits.steps and logits.train == "lora":
        check_adapters(model, logits.lora)
    if labels.steps:
        check_labels(model, plan.converted, "set label_training.steps to 0")
    check_embeddings(recipe, model)


def check_embeddings(recipe: Recipe, model: PreTrainedModel) -> None:
    """Raises FlexdistillError if embeddings are to be untied that are not tied, or that no stage trains."""
    if recipe.tied_embeddings == "tied":
        return
    if not has_tied_embeddings(model):
        raise FlexdistillError(
            f"{type(model).__name__} has no output embeddings that are tied to its input embeddings; leave "
            "tied_embeddings out."
        )
    logits = recipe.logit_distillation
    if not recipe.label_training.steps and not (logits.steps and logits.train == "full"):
        raise FlexdistillError(
            "No stage trains the embeddings, so untying them would change nothing; leave tied_embeddings out, or set "
            "logit_distillation.train to full."
        )


def checked_plan(recipe: Recipe, model: PreTrainedModel, accelerator: Accelerator) -> Plan:
    """What becomes of the model's attention, where the run's devices, the model and the lengths fit the recipe.

    Raises:
        FlexdistillError: if one of them does not; no text has been read then.
    """
    check_devices(recipe, model, accelerator)
    plan = make_plan(model, recipe.kernel)
    if plan.shares_frequencies:
        check_shareable(plan.frequencies)
    check_trainable(recipe, plan, model)
    check_lengths(recipe)
    return plan


def load_sequences(recipe: Recipe, model: PreTrainedModel, tokenizer) -> Sequences:
    """Reads no more text than the run needs."""
    data, evaluation = recipe.data, recipe.evaluation
    length = evaluation.sequence_length or data.sequence_length
    for checked in (length, *map(recipe.sequence_length, STAGES)):
        check_sequence_length(model, checked)
    if evaluation.source is None and length != data.sequence_length:
        raise FlexdistillError(
            "evaluation.sequence_length differs from data.sequence_length, but held-out sequences are cut like the "
            "training data; set evaluation.source, or remove evaluation.sequence_length."
        )
    separator = separator_of(tokenizer)
    if data.document_masks:
        DocumentMasks(model, separator).remove()  # a model that cannot is told before it is trained
    sizes = [
        evaluation.sequences if evaluation.source is None else 0,
        SELECTION_SEQUENCES if recipe.kernel.keep_softmax else 0,
        data.validation_sequences if any(stage.validation_every for stage in recipe.stages.values()) else 0,
    ]
    training, rows, labels = _read_mixture(recipe, tokenizer, sum(sizes))
    held_out, selection, validation = rows.split(sizes)
    recalled = None
    if data.repeats and len(selection):
        recalled = repeat_spans(selection, torch.arange(len(selection)), 1.0)
        if not recalled.any():
            raise FlexdistillError(
                f"Sequences of {selection.shape[1]} tokens are too short to choose layers by what they recall; set a "
                "larger --sequence-length, or data.repeats: 0."
            )
    if recipe.label_training.validation_every and recipe.label_training.steps:
        cut(validation.flatten(), recipe.sequence_length(LabelTraining.name))  # too few are told before training
    if evaluation.source is not None:
        held_out = pack(read_documents(evaluation), tokenizer, length, evaluation.sequences)
    return Sequences(training, held_out, selection, recalled, validation, labels, separator)


def _read_mixture(recipe: Recipe, tokenizer, held_out: int) -> tuple[TokenRows, torch.Tensor, TokenRows | None]:
    """Rows to train on; held-out rows (held_out, T), the first of each text; and rows for label training.

    The latter follow the others in the text, or begin where training does if too little follows.
    """
    data, weights = recipe.data, tuple(text.weight for text in recipe.data.texts)
    folder = cache_folder(data.cache)
    length, label_length = data.sequence_length, recipe.sequence_length(LabelTraining.name)
    sizes = {name: stage.steps * stage.batch_size for name, stage in recipe.stages.items()}
    label_rows = sizes.pop(LabelTraining.name, 0)
    counts = (max(sum(sizes.values()), 1), held_out, label_rows)
    kept, held, labels = [], [], []
    for text, *turns in zip(data.texts, *(turns_of(weights, count) for count in counts), strict=True):
        trained, held_back, label_count = turns
        trained = max(trained, 1)
        needed = (trained + held_back) * length + label_count * label_length
        stream = read_tokens(text, tokenizer, needed, folder)
        kept_rows, first = split_held_out(cut(stream, length, trained + held_back), held_back)
        kept.append(kept_rows)
        held.append(first)
        if label_rows:
            begin = (trained + held_back if len(stream) >= needed else held_back) * length
            labels.append(cut(stream[begin:], label_length, max(label_count, 1)))
    held_out_rows = TokenRows(tuple(held), weights).in_turn()
    training, for_labels = (TokenRows(tuple(rows), weights, data.repeats) for rows in (kept, labels))
    return training, held_out_rows, for_labels if label_rows else None


def input_hashes(model: PreTrainedModel, sequences: Sequences) -> dict[str, str]:
    """SHA-256 of all that a run reads, by what it is."""
    data = {f"training {index}": text for index, text in enumerate(sequences.training.texts)}
    data |= {"selection": sequences.selection, "validation": sequences.validation}
    data |= {f"labels {index}": text for index, text in enumerate(sequences.labels.texts if sequences.labels else ())}
    inputs = {"model": model.state_dict(), "data": data, "evaluation data": {"": sequences.evaluation}}
    return {name: _sha256(tensors) for name, tensors in inputs.items()}


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
