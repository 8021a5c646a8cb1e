"""Documents from a file, a folder or a dataset."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from .errors import FlexdistillError
from .storage import expanded, sha256_of_file

if TYPE_CHECKING:
    from .recipe import DataRecipe, EvaluationRecipe

SAMPLE = Path(__file__).parent / "samples" / "middlemarch.txt.xz"

# rows of text that would be trained on with their quotes and commas
_NO_TEXT = {".json", ".csv", ".tsv"}
_KINDS = {
    **dict.fromkeys((".txt", ".text", ".raw", ".md"), "text"),
    ".jsonl": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIONS = (".xz", ".gz", ".zst")


def read_documents(section: DataRecipe | EvaluationRecipe) -> Iterator[str]:
    """Reads the documents that a section of the recipe names; blank documents are left out.

    A text file is one document, each row of jsonl, parquet or a `datasets` name is one. Files of a folder are read in
    the order of their paths. `source: sample` is the novel shipped with the package.

    Returns:
        An iterator that reads while it is consumed.

    Raises:
        FlexdistillError: if the source is missing, damaged, not UTF-8 or empty, lacks the column, or if a setting of
            the section does not apply to it.
    """
    files = _files_of(section)
    if files is None:
        return _with_text(_read_dataset(section), section.source)
    column = section.column or "text"
    return _with_text((document for file in files for document in _read_file(file, column)), section.source)


def _files_of(section: DataRecipe | EvaluationRecipe) -> list[Path] | None:
    """`_local_files`, where all settings of the section apply to them."""
    files = _local_files(section.source)
    if files is None:
        return None
    for setting in ("config", "split"):
        if getattr(section, setting) is not None:
            raise FlexdistillError(
                f"Setting {setting!r} applies to `datasets` names only and {section.source!r} is local; remove it."
            )
    plain = next((file for file in files if _kind(file) == "text"), None)
    if section.column is not None and plain is not None:
        raise FlexdistillError(f"Setting 'column' does not apply to plain text and {plain} is that; remove it.")
    return files


def text_identity(section: DataRecipe | EvaluationRecipe) -> list:
    """What names the documents of a section by their content, ready for JSON; the files of local text are read for it.

    Raises:
        FlexdistillError: as `read_documents` does.
    """
    files = _files_of(section)
    if files is not None:
        return [[_kind(file), file.suffix if _is_compressed(file) else "", _sha256(file)] for file in files]
    with _dataset_errors(section):
        from datasets import load_dataset_builder

        builder = load_dataset_builder(section.source, section.config)
    # `datasets` names its own cache by configuration, data files, version and revision
    return ["dataset", section.source, section.split, *Path(builder.cache_dir).parts[-3:]]


def _sha256(file: Path) -> str:
    with _explained(file):
        return sha256_of_file(file)


def _local_files(source: str) -> list[Path] | None:
    """The files of a local source, or None for a `datasets` name."""
    path = SAMPLE if source == "sample" else expanded(source)
    if path.is_file():
        files = [path]
    elif source and path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and _kind(file))
        if not files:
            raise FlexdistillError(
                f"Folder {source} holds no text; it needs files named {', '.join('*' + suffix for suffix in _KINDS)}."
            )
    elif not source or source[0] in "./~" or source.count("/") > 1 or _kind(path) or _is_compressed(path):
        raise FlexdistillError(f"Text {source!r} does not exist; check the path or use `sample`.")
    else:
        return None
    for file in files:
        if file.suffix.lower() in _NO_TEXT:
            raise FlexdistillError(
                f"{file} is not read as text; write its rows as .jsonl or .parquet, or name it .txt if it is one text."
            )
        if _kind(file) == "parquet" and _is_compressed(file):
            raise FlexdistillError(f"{file} is compressed parquet, which is not read; decompress it first.")
    return files


def dataset_name(source: str) -> str | None:
    """The `datasets` name that a source is; None for local text, also where it is gone since it was read."""
    try:
        return source if _local_files(source) is None else None
    except FlexdistillError:
        return None


def _is_compressed(path: Path) -> bool:
    return path.suffix.lower() in _COMPRESSIONS


def _kind(path: Path) -> str | None:
    inner = Path(path.stem) if _is_compressed(path) else path
    return _KINDS.get(inner.suffix.lower())


def _read_file(path: Path, column: str) -> Iterator[str]:
    read_rows = {"jsonl": lambda path, column: json_lines(path), "parquet": _parquet_rows}.get(_kind(path))
    with _explained(path):
        if read_rows is None:
            with _open(path) as stream:
                yield stream.read()
        else:
            for number, row in enumerate(read_rows(path, column), start=1):
                yield _text_of(row, column, f"Row {number} of {path}")


def _open(path: Path) -> TextIO:
    """UTF-8, without the mark that some programs begin it with."""
    match path.suffix.lower():
        case ".xz":
            return lzma.open(path, "rt", encoding="utf-8-sig")
        case ".gz":
            return gzip.open(path, "rt", encoding="utf-8-sig")
        case ".zst":
            # unlike zstandard's reader, arrow's reports a truncated file and reads every frame
            import pyarrow

            return io.TextIOWrapper(pyarrow.input_stream(str(path), compression="zstd"), encoding="utf-8-sig")
        case _:
            return path.open(encoding="utf-8-sig")


def json_lines(path: Path) -> Iterator[Any]:
    """The values of a file of JSON lines, blank ones left out.

    Raises:
        FlexdistillError: for a line that is not JSON.
    """
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                reason = getattr(error, "msg", "too deep")
                raise FlexdistillError(
                    f"Line {number} of {path} is not JSON ({reason}); give one JSON object per line."
                ) from error


def _parquet_rows(path: Path, column: str) -> Iterator[dict[str, Any]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if column not in names:
            raise _missing_column(str(path), column, names)
        for batch in file.iter_batches(batch_size=1024, columns=[column]):
            yield from batch.to_pylist()


def _read_dataset(section: DataRecipe | EvaluationRecipe) -> Iterator[str]:
    column = section.column or "text"
    with _dataset_errors(section):
        from datasets import load_dataset

        rows = load_dataset(section.source, section.config, split=section.split or "train", streaming=True)
        for row in rows:
            yield _text_of(row, column, f"Dataset {section.source!r}")


@contextmanager
def _dataset_errors(section: DataRecipe | EvaluationRecipe) -> Iterator[None]:
    try:
        yield
    except FlexdistillError:
        raise
    except Exception as error:  # `datasets` lets errors of any network and file library through
        raise FlexdistillError(
            f"Dataset {section.source!r} cannot be read ({_reason(error)}); check its name, config and split, "
            "the network and, if it is gated, HF_TOKEN, or give a local file or folder."
        ) from error


def _text_of(row: Any, column: str, where: str) -> str:
    if not isinstance(row, dict):
        raise FlexdistillError(f"{where} is a {type(row).__name__}; it must be an object with a text column.")
    if column not in row:
        raise _missing_column(where, column, row)
    if not isinstance(row[column], str):
        raise FlexdistillError(
            f"{where} holds a {type(row[column]).__name__} in column {column!r}; set data.column to one of text."
        )
    text = row[column]
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can hold them, tokenizers refuse them
        raise FlexdistillError(
            f"{where} holds half of a surrogate pair, which is no text; repair or remove it."
        ) from error
    return text


def _missing_column(where: str, column: str, names: Iterable[str]) -> FlexdistillError:
    return FlexdistillError(f"{where} has no column {column!r}; set data.column to one of: {', '.join(names)}.")


def _with_text(documents: Iterator[str], source: str) -> Iterator[str]:
    empty = True
    for document in documents:
        if document.strip():
            empty = False
            yield document
    if empty:
        raise FlexdistillError(f"Text {source!r} is empty; give a source that holds text.")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise FlexdistillError(f"{path} is not UTF-8 text; convert it, for example with iconv.") from error
    except (OSError, EOFError, ValueError, lzma.LZMAError, zlib.error) as error:  # arrow raises ValueErrors
        raise FlexdistillError(
            f"{path} cannot be read ({_reason(error)}); check that it is complete and that you may read it."
        ) from error


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:") or type(error).__name__
