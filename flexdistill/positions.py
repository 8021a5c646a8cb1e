"""Perplexity by position: what a model gains from the text that stands before a token, read piece by piece."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import DynamicCache, PreTrainedModel

from .conversion import check_sequence_length
from .data import read_documents
from .devices import make_accelerator
from .distillation.heads import SplitModel
from .distillation.logits import positions_per_piece
from .evaluation import check_same_model, load_converted
from .losses import label_rows
from .packing import pack
from .recipe import EvaluationRecipe
from .scoring import check_causal
from .sources import load_model, load_tokenizer, resolve_model

FIRST_BUCKET = 512


@torch.no_grad()
def token_losses(
    model: PreTrainedModel, sequences: torch.Tensor, accelerator: Accelerator, chunk: int = 2048
) -> torch.Tensor:
    """Loss of each token but the first, in nats, given all before it.

    Args:
        model: a causal model, on the accelerator's device.
        sequences: token ids (B, T).
        chunk: tokens read at once; those before are in a cache, so memory is that of one chunk and the cache.

    Returns:
        (B, T - 1) float32 on CPU.
    """
    split, cache, losses = SplitModel(model), DynamicCache(config=model.config), []
    labels = sequences.roll(-1, dims=1)
    for tokens, following in zip(sequences.split(chunk, dim=1), labels.split(chunk, dim=1), strict=True):
        with accelerator.autocast():
            hidden = split.hidden(tokens.to(accelerator.device), cache).flatten(0, 1)
            expected = following.to(accelerator.device).flatten()
            piece = positions_per_piece(model)
            parts = zip(hidden.split(piece), expected.split(piece), strict=True)
            rows = torch.cat([label_rows(split.logits(part), answer) for part, answer in parts])
        losses.append(rows.view(tokens.shape).cpu())
    return torch.cat(losses, dim=1)[:, :-1]


def perplexity_by_position(
    model: PreTrainedModel,
    sequences: torch.Tensor,
    accelerator: Accelerator,
    batch_size: int = 1,
    chunk: int = 2048,
    first: int = FIRST_BUCKET,
) -> list[dict]:
    """Perplexity of tokens with 1 to 511 tokens before them, 512 to 1023, and so on in doubling spans.

    Args:
        sequences: token ids (N, T); the last span ends at T.
        batch_size: sequences read side by side; chunk: as in `token_losses`.
        first: tokens before which the first span ends; 1: it begins there.

    Returns:
        a dict per span: `from` and `to` (exclusive) in tokens before, `perplexity`, and the mean loss of each sequence
        in nats per token, `losses`.
    """
    batches = sequences.split(batch_size)
    losses = torch.cat([token_losses(model, batch, accelerator, chunk) for batch in batches]).double()
    spans = []
    for start, stop in _spans(sequences.shape[1], first):
        means = losses[:, max(start, 1) - 1 : stop - 1].mean(1)
        spans.append({"from": start, "to": stop, "perplexity": float(means.mean().exp()), "losses": means.tolist()})
    return spans


def evaluate_by_position(
    directory: str | Path, teacher: str, recipe: EvaluationRecipe, precision: str = "auto"
) -> dict[str, list[dict]]:
    """`perplexity_by_position` of a converted checkpoint and of the model it was made from; arguments as in
    `evaluation.evaluate_checkpoint`."""
    accelerator = make_accelerator(precision)
    source = resolve_model(teacher)
    tokenizer, model = load_tokenizer(source), load_model(source)
    student = load_converted(directory)
    check_causal(student)
    check_same_model(model, student)
    check_sequence_length(student, recipe.sequence_length)
    sequences = pack(read_documents(recipe), tokenizer, recipe.sequence_length, recipe.sequences)
    arguments = (sequences, accelerator, recipe.batch_size)
    return {
        "teacher": perplexity_by_position(model.to(accelerator.device), *arguments),
        "student": perplexity_by_position(student.to(accelerator.device), *arguments),
    }


def _spans(length: int, first: int) -> list[tuple[int, int]]:
    edges = [0] if first > 1 else []  # nothing is predicted of the first token
    edge = first
    while edge < length:
        edges.append(edge)
        edge *= 2
    return list(zip(edges, [*edges[1:], length], strict=True))
