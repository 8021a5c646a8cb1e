"""Text tokenised once: token streams in memory-mapped files, named by the content of the text and the tokenizer."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy
import torch
from filelock import FileLock
from huggingface_hub import constants

from .data import read_documents, text_identity
from .errors import FlexdistillError
from .packing import text_pieces, token_pieces
from .progress import is_main_process
from .sources import vocabulary_size
from .storage import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .recipe_sections import TextRecipe

# raised when the tokens of the same text by the same tokenizer change
_FORMAT = 2


def cache_folder(setting: bool | str) -> Path | None:
    """Where a recipe's `data.cache` keeps tokens; None: nowhere."""
    if isinstance(setting, str):
        return expanded(setting).resolve()
    return Path(constants.HF_HOME) / "flexdistill" / "tokens" if setting else None


def read_tokens(text: TextRecipe, tokenizer: PreTrainedTokenizerBase, count: int, folder: Path | None) -> torch.Tensor:
    """The first tokens of a text: `count` or more, all if it has fewer; `packing.pack` says how documents are joined.

    With a folder they come from a file there, which is written first where it is missing or too short. Processes that
    need the same file wait for the one that writes it.

    Returns:
        (S,) uint16, or int32 where the vocabulary needs it, memory-mapped from the folder.

    Raises:
        FlexdistillError: as `data.read_documents` does, or if the folder cannot be written.
    """
    dtype = numpy.dtype(numpy.uint16 if vocabulary_size(tokenizer) <= 2**16 else numpy.int32)
    if folder is None:
        tokens = array(dtype.char)
        pieces = text_pieces(read_documents(text), tokenizer)
        for piece in _until(token_pieces(pieces, tokenizer), count):
            tokens.extend(piece)
        return torch.from_numpy(numpy.asarray(tokens))
    name = _key(text, tokenizer)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / f"{name}.lock"):
            file = _find(folder, name, count)
            if file is None:
                file = _write(text, tokenizer, count, folder, name, dtype)
            elif is_main_process():
                print(f"Tokens of {text.source} come from the cache: {file}", file=sys.stderr)
            # copy on write, so that torch may take it for writable
            return torch.from_numpy(numpy.load(file, mmap_mode="c"))
    except OSError as error:
        raise FlexdistillError(
            f"Token cache {folder} cannot be used ({error.strerror or error}); set data.cache to another folder, or to "
            "false to do without."
        ) from error


def _key(text: TextRecipe, tokenizer: PreTrainedTokenizerBase) -> str:
    identity = [_FORMAT, text.column or "text", text_identity(text), _tokenizer_identity(tokenizer)]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list:
    special = [tokenizer.eos_token_id, tokenizer.sep_token_id]
    if tokenizer.is_fast:
        return [tokenizer.backend_tokenizer.to_str(), *special]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        return [[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in files] + special


def _whole(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def _beginning(folder: Path, name: str) -> Path:
    return folder / f"{name}.beginning.npy"


def _find(folder: Path, name: str, count: int) -> Path | None:
    """The file that holds the whole text, or enough of its beginning; a damaged one counts as missing."""
    for file in (_whole(folder, name), _beginning(folder, name)):
        try:
            stored = len(numpy.load(file, mmap_mode="r"))
        except (FileNotFoundError, ValueError, EOFError):
            continue
        if stored >= count or file == _whole(folder, name):
            return file
    return None


def _write(text, tokenizer, count: int, folder: Path, name: str, dtype: numpy.dtype) -> Path:
    """Writes aside, syncs, then renames, so that a file is whole or not there."""
    aside = folder / f"{name}.writing"
    pieces = text_pieces(read_documents(text), tokenizer)
    header = {"descr": numpy.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (0,)}
    stored = 0
    try:
        with aside.open("wb") as file:
            numpy.lib.format.write_array_header_1_0(file, header)
            for piece in _until(token_pieces(pieces, tokenizer), count):
                file.write(numpy.asarray(piece, dtype).tobytes())
                stored += len(piece)
            is_whole = next(pieces, None) is None
            # the header has room for the largest number, so its length stays
            file.seek(0)
            numpy.lib.format.write_array_header_1_0(file, header | {"shape": (stored,)})
            file.flush()
            os.fsync(file.fileno())
        target = _whole(folder, name) if is_whole else _beginning(folder, name)
        os.replace(aside, target)
    finally:
        aside.unlink(missing_ok=True)
    if is_whole:
        _beginning(folder, name).unlink(missing_ok=True)
    return target


def _until(pieces: Iterator[list[int]], count: int) -> Iterator[list[int]]:
    """Pieces up to the one that brings the number of tokens to `count`."""
    stored = 0
    while stored < count and (piece := next(pieces, None)) is not None:
        yield piece
        stored += len(piece)
