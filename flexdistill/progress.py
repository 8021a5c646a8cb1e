"""Progress bars: on a terminal only, so that logs and pipes stay readable."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tqdm.std import tqdm


def is_main_process() -> bool:
    """Whether this is the one process of a run that prints."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


@contextmanager
def stage_progress(
    name: str, total_steps: int, start_step: int = 0, *, enabled: bool = True
) -> Iterator[Callable[..., None]]:
    """Yields `update(step, **figures)`, which moves the bar to `step` and shows figures such as the loss beside it.

    Args:
        name: what stands before the bar.
        total_steps: the step at which the bar is full.
        start_step: steps done before, by the run that this one resumes.
        enabled: False on every process but the main one.
    """
    if not (enabled and sys.stderr.isatty()):
        yield lambda step, **figures: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total_steps, completed=start_step, figures="")

        def update(step: int, **figures: float) -> None:
            shown = "  ".join(f"{label} {value:.4g}" for label, value in figures.items())
            progress.update(task, completed=step, figures=shown)

        yield update


@contextmanager
def progress_bars_on_terminals_only() -> Iterator[None]:
    """tqdm's bars show inside the context only if stderr is a terminal."""
    # transformers' own switch misses the GGUF reader, which calls tqdm itself
    original = tqdm.__init__
    tqdm.__init__ = partialmethod(original, disable=None)
    try:
        yield
    finally:
        tqdm.__init__ = original
