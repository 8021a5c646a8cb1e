"""Errors that a user can act on: each message names the cause and the remedy."""

from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from safetensors import SafetensorError

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
_DISK |= {errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EBUSY, errno.ENAMETOOLONG}


class FlexdistillError(Exception):
    """Bad input or a run that cannot go on; the command line prints it in one line and exits with code 2."""


class NonFiniteLossError(FlexdistillError):
    """A loss or gradient became NaN or infinite; nothing after the named step was kept."""


class LostProcessError(FlexdistillError):
    """Another process of the run died or does not answer, so this one stopped too."""


class RunInterrupted(BaseException):
    """A signal stopped a run, which --resume goes on with; no Exception, so that nothing takes it for a failure.

    Args:
        number: the signal's.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.exit_code = 128 + number


def first_sentence(error: BaseException) -> str:
    """The beginning of a foreign error's message, without its full stop; its type where it has none."""
    return re.split(r"[.:]?\s*\n|\. |[.:]$", str(error).strip())[0] or type(error).__name__


@contextlib.contextmanager
def explained(what: str, remedy: str | Callable[[BaseException], str]) -> Iterator[None]:
    """Whatever a reader of foreign files raises becomes a FlexdistillError: `what` (the reason); `remedy`."""
    try:
        yield
    except FlexdistillError:
        raise
    except BaseException as error:
        is_panic = type(error).__module__ == "pyo3_runtime"  # of a library in Rust, which Python takes for no Exception
        if not (isinstance(error, Exception) or is_panic):
            raise
        told = remedy if isinstance(remedy, str) else remedy(error)
        raise FlexdistillError(f"{what} ({first_sentence(error)}); {told}.") from error


@contextlib.contextmanager
def long_names() -> Iterator[None]:
    """A name that no file can have becomes a FlexdistillError, wherever it is looked for."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        name = str(error.filename)
        raise FlexdistillError(
            f"{name[:40]!r}... has {len(name)} characters, too many for a file; shorten it."
        ) from error


@contextlib.contextmanager
def too_little_memory() -> Iterator[None]:
    """What allocators raise, of this machine's memory or of a GPU's, becomes a FlexdistillError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # a GPU's is a RuntimeError
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not known and "can't allocate memory" not in str(error):
            raise
        asked = re.search(r"allocate (\d[\d.]* \w+)", str(error))
        amount = f"{asked[1]} were asked for at once" if asked else "an array did not fit"
        raise FlexdistillError(
            f"Memory is too small ({amount}); set fewer steps or kernel.features, a smaller --micro-batch-size or "
            "--sequence-length, or a smaller model."
        ) from error


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """A full or read-only disk, or an impossible path, while writing below `path` becomes a FlexdistillError."""
    try:
        yield
    except (OSError, SafetensorError) as error:  # safetensors wraps the system's errors in its own
        if isinstance(error, OSError) and error.errno not in _DISK:
            raise
        reason = getattr(error, "strerror", None) or error
        raise FlexdistillError(
            f"{path} could not be written ({reason}); make room or choose another --output, then go on with "
            "--resume if checkpoints were written."
        ) from error
