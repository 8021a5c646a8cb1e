"""Documents to packed token sequences: one stream of tokens, cut into rows of equal length, in a fixed order."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from .errors import FlexdistillError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE_CHARACTERS = 1_000_000
_BATCH_CHARACTERS = 8_000_000


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    sequence_length: int,
    max_sequences: int | None = None,
) -> torch.Tensor:
    """Tokenises documents and cuts their token stream into consecutive rows; the remainder is dropped.

    One end-of-text token stands between two documents and no other special token is added, so a single document gives
    exactly its own tokens. Documents above a million characters are tokenised in pieces that end at a newline.

    Args:
        documents: read no further than `max_sequences` rows need.
        tokenizer: its eos token, else its sep token, separates documents.
        sequence_length: tokens T per row.
        max_sequences: rows at most; None for all.

    Returns:
        Token ids, (N, T) int64.

    Raises:
        FlexdistillError: if the text is shorter than one row, or a second document finds no separator token.
    """
    limit = None if max_sequences is None else max_sequences * sequence_length
    stream = array("q")
    for piece in token_pieces(text_pieces(documents, tokenizer), tokenizer):
        stream.extend(piece)
        if limit is not None and len(stream) >= limit:
            break
    return cut(torch.tensor(stream, dtype=torch.int64), sequence_length, max_sequences)


def cut(stream: torch.Tensor, sequence_length: int, max_sequences: int | None = None) -> torch.Tensor:
    """A token stream (S,) as consecutive rows (N, T), a view; the remainder is left out.

    Raises:
        FlexdistillError: if the stream is shorter than one row.
    """
    count = len(stream) // sequence_length
    if count == 0:
        raise FlexdistillError(
            f"The text has {len(stream)} tokens and one sequence needs {sequence_length}; "
            "give more text or a smaller sequence_length."
        )
    if max_sequences is not None:
        count = min(count, max_sequences)
    return stream[: count * sequence_length].view(count, sequence_length)


def split_held_out(sequences: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Holds out the first rows, which are the same however much text a run trains on.

    Args:
        sequences: (N, T).
        count: rows to hold out.

    Returns:
        Training rows, (N - count, T), and held-out rows, (count, T); both are views.

    Raises:
        FlexdistillError: if no row would be left to train on.
    """
    kept = len(sequences) - count
    if kept < 1:
        raise FlexdistillError(
            f"The text gives {len(sequences)} sequences and {count} are held out, which leaves none to train on; "
            "give more text or a smaller evaluation.sequences."
        )
    return sequences[count:], sequences[:count]


def train_order(num_sequences: int, steps: int, batch_size: int, seed: int) -> torch.Tensor:
    """Decides which rows each step trains on: every epoch is a new shuffle, and none repeats a row.

    The order is a pure function whose beginning does not depend on `steps`, so that a resumed run indexes into it.

    Returns:
        Row indices, (steps, batch_size) int64.
    """
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // num_sequences)
    shuffles = [torch.randperm(num_sequences, generator=generator) for _ in range(epochs)]
    order = torch.cat([torch.empty(0, dtype=torch.int64), *shuffles])
    return order[: steps * batch_size].view(steps, batch_size)


def separator_of(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stands between two documents; None if the tokenizer has none that could."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def text_pieces(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], str]]:
    """The text of documents in pieces of up to a million characters, each with the tokens that stand before it.

    Raises:
        FlexdistillError: if a second document finds no token that could stand before it.
    """
    separator = separator_of(tokenizer)
    for index, document in enumerate(documents):
        if index > 0 and separator is None:
            raise FlexdistillError(
                "The tokenizer has neither an eos nor a sep token to put between documents; join the text in one file "
                "or set one in its tokenizer_config.json."
            )
        before = [separator] if index > 0 else []
        for piece in _pieces(document):
            yield before, piece
            before = []


def token_pieces(pieces: Iterator[tuple[list[int], str]], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """The token stream of `text_pieces`, in parts that grow up to what a tokenizer does well on several cores."""
    characters = 1
    while batch := _taken(pieces, characters):
        texts = [text for _, text in batch]
        # verbose: a document is longer than the model's context on purpose
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        yield [token for (before, _), tokens in zip(batch, encoded, strict=True) for token in (*before, *tokens)]
        characters = min(2 * max(characters, sum(map(len, texts))), _BATCH_CHARACTERS)


def _taken(pieces: Iterator[tuple[list[int], str]], characters: int) -> list[tuple[list[int], str]]:
    taken, count = [], 0
    while count < characters and (piece := next(pieces, None)) is not None:
        taken.append(piece)
        count += len(piece[1])
    return taken


def _pieces(document: str) -> Iterator[str]:
    """Cuts a long document after the last newline of each million characters."""
    start = 0
    while len(document) - start > _PIECE_CHARACTERS:
        end = document.rfind("\n", start, start + _PIECE_CHARACTERS) + 1
        if end <= start:
            end = document.find("\n", start + _PIECE_CHARACTERS) + 1 or len(document)
        yield document[start:end]
        start = end
    yield document[start:]
