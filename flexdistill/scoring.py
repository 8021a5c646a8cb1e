"""Given continuations scored token by token: what recall and multiple choice are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .distillation.heads import SplitModel
from .distillation.logits import positions_per_piece
from .errors import FlexdistillError
from .runtime.configuration_flexformer import FlexformerConfigMixin


@dataclass(frozen=True)
class Continuation:
    """Token ids of a text, and of what follows on it."""

    prompt: list[int]
    continuation: list[int]


@dataclass(frozen=True)
class Score:
    """How likely a model finds a continuation."""

    log_likelihood: float  # nats, summed over its tokens
    greedy: bool  # whether greedy decoding gives exactly this continuation


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text that goes on: with what the tokenizer puts before it, without what it would end it with."""
    # verbose: a prompt may be longer than the positions that the tokenizer knows of
    whole, bare = (tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"] for special in (True, False))
    if not bare:
        return whole
    ends = range(len(bare), len(whole) + 1)
    return next((whole[:end] for end in ends if whole[end - len(bare) : end] == bare), whole)


def tokenize(tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str) -> Continuation:
    """Tokens of `prompt` and of what `continuation` adds to it, divided where the two texts' tokens part.

    Raises:
        FlexdistillError: if the continuation adds no token, or nothing stands before it.
    """
    before, whole = (prompt_tokens(tokenizer, text) for text in (prompt, prompt + continuation))
    pairs = zip(before, whole, strict=False)
    common = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), min(len(before), len(whole)))
    if common in (0, len(whole)):
        raise FlexdistillError(f"{continuation!r} adds no token to the end of its prompt; give both some text.")
    return Continuation(whole[:common], whole[common:])


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel, continuations: Sequence[Continuation], accelerator: Accelerator, batch_tokens: int = 2**14
) -> list[Score]:
    """Scores each continuation, batches made of those of about the same length.

    Args:
        model: a causal model, on the accelerator's device.
        batch_tokens: tokens per forward pass, padding included; a longer text is a batch of its own.

    Raises:
        FlexdistillError: if the model is a converted encoder, whose predictions see what they predict.
    """
    check_causal(model)
    split, scores = SplitModel(model), {}
    for batch in _batches(continuations, batch_tokens):
        rows = [torch.tensor(continuations[index].prompt + continuations[index].continuation) for index in batch]
        # padding stands on the right, where a causal model does not look, so there is no mask
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(accelerator.device)
        with accelerator.autocast():
            hidden = split.hidden(tokens)
            for row, index in enumerate(batch):
                start, stop = len(continuations[index].prompt), len(rows[row])
                scores[index] = _score(split, hidden[row, start - 1 : stop - 1], tokens[row, start:stop])
    return [scores[index] for index in range(len(continuations))]


def check_causal(model: PreTrainedModel) -> None:
    """Raises FlexdistillError if the model is a converted encoder, whose predictions see what they predict."""
    if isinstance(model.config, FlexformerConfigMixin) and not all(
        s.causal for s in model.config.kernel_specs.values()
    ):
        raise FlexdistillError(
            f"{type(model).__name__} attends in both directions, so it cannot continue text; give a causal model."
        )


def _score(split: SplitModel, hidden: torch.Tensor, tokens: torch.Tensor) -> Score:
    log_likelihood, greedy = 0.0, True
    piece = positions_per_piece(split.model)
    for part_hidden, part in zip(hidden.split(piece), tokens.split(piece), strict=True):
        logits = split.logits(part_hidden).float()
        log_likelihood += float(logits.log_softmax(-1).gather(-1, part[:, None]).double().sum())
        greedy = greedy and bool((logits.argmax(-1) == part).all())
    return Score(log_likelihood, greedy)


def _batches(continuations: Sequence[Continuation], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, the longest first, so that a batch too large for memory is met at once."""
    lengths = [len(one.prompt) + len(one.continuation) for one in continuations]
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
