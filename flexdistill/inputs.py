"""What a run reads: the model with its tokenizer, the token sequences, and whether all of it fits the recipe."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversion import Plan, check_sequence_length
from .data import cut, pack, read_documents, separator_of, split_held_out
from .distill.documents import DocumentMasks
from .distill.heads import SplitModel
from .errors import FlexdistillError
from .mixture import TokenRows, turns_of
from .recipe import DataRecipe, Recipe
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
    separator: int | None = None  # the token that ends a document


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
    separator = separator_of(tokenizer)
    if data.document_masks:
        DocumentMasks(model, separator).remove()  # a model that cannot is told before it is trained
    needed = sum(stage.steps * stage.batch_size for stage in (recipe.attention_transfer, recipe.logit_distillation))
    evaluated = evaluation.sequences if evaluation.source is None else 0
    held_out = evaluated + (SELECTION_SEQUENCES if recipe.kernel.keep_softmax else 0)
    training, rows = _read_mixture(data, tokenizer, max(needed, 1), held_out)
    evaluation_rows, selection = rows[:evaluated], rows[evaluated:]
    if evaluation.source is not None:
        evaluation_rows = pack(read_documents(evaluation), tokenizer, length, evaluation.sequences)
    return Sequences(training, evaluation_rows, selection, separator)


def _read_mixture(data: DataRecipe, tokenizer, needed: int, held_out: int) -> tuple[TokenRows, torch.Tensor]:
    """Rows to train on and held-out rows (held_out, T): the first of each text, however much a run trains on."""
    weights, folder = tuple(text.weight for text in data.texts), cache_folder(data.cache)
    kept, held = [], []
    turns = zip(data.texts, turns_of(weights, needed), turns_of(weights, held_out), strict=True)
    for text, its_rows, its_held_out in turns:
        count = max(its_rows, 1) + its_held_out
        stream = read_tokens(text, tokenizer, count * data.sequence_length, folder)
        training, first = split_held_out(cut(stream, data.sequence_length, count), its_held_out)
        kept.append(training)
        held.append(first)
    return TokenRows(tuple(kept), weights), TokenRows(tuple(held), weights).in_turn()


def input_hashes(model: PreTrainedModel, sequences: Sequences) -> dict[str, str]:
    """SHA-256 of all that a run reads, by what it is."""
    data = {f"training {index}": text for index, text in enumerate(sequences.training.texts)}
    data |= {"selection": sequences.selection}
    inputs = {"model": model.state_dict(), "data": data, "evaluation data": {"": sequences.evaluation}}
    return {name: _sha256(tensors) for name, tensors in inputs.items()}


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
