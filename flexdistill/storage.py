"""Paths, JSON, and files that are whole or as they were, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import FlexdistillError

_BLOCK = 2**20


def expanded(path: str | Path) -> Path:
    """A path whose leading ~ or ~USER is that home.

    Raises:
        FlexdistillError: if there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FlexdistillError(f"{path} names the home of a user that is not known; write the whole path.") from error


def write_whole(file: Path, text: str) -> None:
    """Writes aside, syncs, then renames."""
    aside = file.with_name(file.name + ".writing")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, file)
    sync(file.parent)


def to_json(value: Any) -> str:
    """JSON of figures; null where one is not finite, for which JSON has no word."""
    return json.dumps(_finite(value), indent=2)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(file: Path, value: dict) -> None:
    """`write_whole` of a value as JSON."""
    write_whole(file, to_json(value) + "\n")


def empty(folder: Path, *, but: str) -> None:
    """Removes all that a folder holds except the file `but`."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != but:
            path.unlink()


def sync(path: Path) -> None:
    """Waits until a file or a folder's list of files is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of_file(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
