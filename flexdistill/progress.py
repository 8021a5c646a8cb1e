"""Progress: a bar on a terminal, a line a minute elsewhere, so that logs and pipes stay readable.

What draws is imported where it draws: every command asks here whether it may print.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

# where there is no terminal
SECONDS_PER_LINE = 60


def is_main_process() -> bool:
    """Whether this is the one process of a run that prints."""
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


@contextmanager
def stage_progress(
    name: str, total_steps: int, start_step: int = 0, *, enabled: bool = True
) -> Iterator[Callable[..., None]]:
    """Yields `update(step, **figures)`, which shows how far the stage is, figures such as the loss, and the time left.

    Args:
        name: what stands before the bar.
        total_steps: the step at which the bar is full.
        start_step: steps done before, by the run that this one resumes.
        enabled: False on every process but the main one.
    """
    if not enabled:
        yield lambda step, **figures: None
        return
    if not sys.stderr.isatty():
        yield _lines(name, total_steps, start_step)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=total_steps, completed=start_step, figures="")

        yield lambda step, **figures: progress.update(task, completed=step, figures=_shown(figures))


def _lines(name: str, total_steps: int, start_step: int) -> Callable[..., None]:
    started = printed = time.monotonic()

    def update(step: int, **figures: float) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed < SECONDS_PER_LINE:
            return
        printed = now
        left = round((now - started) / (step - start_step) * (total_steps - step))
        line = f"{name} {step}/{total_steps}  {_shown(figures)}  {timedelta(seconds=left)} left"
        print(line, file=sys.stderr, flush=True)

    return update


def _shown(figures: dict[str, float]) -> str:
    return "  ".join(f"{label} {value:.4g}" for label, value in figures.items())


@contextmanager
def progress_bars_on_terminals_only() -> Iterator[None]:
    """tqdm's bars show inside the context only if stderr is a terminal."""
    from tqdm.std import tqdm

    # transformers' own switch misses the GGUF reader, which calls tqdm itself
    original = tqdm.__init__

    def quieter(self: tqdm, *args: Any, disable: bool | None = None, **settings: Any) -> None:
        original(self, *args, disable=disable or None, **settings)

    tqdm.__init__ = quieter
    try:
        yield
    finally:
        tqdm.__init__ = original
