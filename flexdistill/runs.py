"""A run from its first file to its result: its folder, who may write it, what it began with, where it goes on."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from accelerate import Accelerator, PartialState
from filelock import FileLock, Timeout

from .distillation.checkpoints import Checkpoint, Checkpoints
from .distillation.interruption import Interruption
from .errors import FlexdistillError, disk_errors
from .recipe import Recipe
from .recipe_sections import flat
from .runtime.configuration_flexformer import MODEL_TYPE
from .storage import empty, expanded, write_json, write_whole

# written last, so that a run that has it has all that --resume needs
RECIPE = "recipe.yaml"
_INPUTS, _LOCK = "inputs.json", "lock"
# the file of a comparison's figures
COMPARISON = "compare.json"
# the processes of one run look at its lock at the same moment, each for an instant; a run holds it until its end
_PROBE_S = 1.0
# settings that the result does not depend on
INDECISIVE = {"checkpoint": True, "data": {"cache"}, "tracking": True}
# the result while it is written, and the one that it replaces
ASIDE, REPLACED = "export", "replaced"
# all that a run has written before its recipe, and all that one without steps ever writes
_BEGINNING = {_LOCK, _INPUTS, f"{_INPUTS}.writing", f"{RECIPE}.writing", ASIDE}


class Run:
    """A run that makes the folder `output` and lives in `output`.partial, its `work`, until that is whole."""

    def __init__(self, output: Path, held: contextlib.ExitStack, check: Callable[[], None], resume: bool):
        self.output, self.work = output, working_folder(output)
        self.interruption = Interruption(self.work / RECIPE)
        self._held, self._check, self._resume = held, check, resume

    def take(self) -> None:
        """Takes the folder for this process alone, which is all that a run needs that has no steps to go on from.

        Raises:
            FlexdistillError: if another process has the folder.
        """
        self._check()  # again: loading takes long, and another run may have begun or even ended
        self.work.mkdir(parents=True, exist_ok=True)
        self._held.enter_context(locked(self.work))
        put_back(self.work / REPLACED, self.output)

    def begin(
        self, recipe: Recipe, hashes: dict[str, str], accelerator: Accelerator
    ) -> tuple[Checkpoints, Checkpoint | None]:
        """Takes the folder for this run alone, and starts anew or goes on; all processes call it.

        Args:
            hashes: of all that the run reads, by what it is.

        Returns:
            where the run's checkpoints go, and the one to go on from.

        Raises:
            FlexdistillError: if another process has the folder, or the run in it does not fit this one or is damaged.
        """
        if self._resume:
            self._check_same(recipe, hashes)
        accelerator.wait_for_everyone()  # all have checked the output before it changes
        if accelerator.is_main_process:
            self.take()
        settings = recipe.checkpoint
        checkpoints = Checkpoints(
            self.work,
            settings.keep,
            writes=accelerator.is_main_process,
            every_steps=settings.every_steps,
            every_minutes=settings.every_minutes,
            interruption=self.interruption,
        )
        checkpoint = checkpoints.latest() if self._resume else None
        if checkpoint is not None:
            checkpoint.check_processes()
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            if self._resume:
                checkpoints.forget_after(checkpoint)
            else:
                self._empty()
                write_json(self.work / _INPUTS, hashes)
                write_whole(self.work / RECIPE, recipe.to_yaml())
        accelerator.wait_for_everyone()
        return checkpoints, checkpoint

    def check_unfinished(self) -> None:
        """Raises FlexdistillError if there is nothing to go on from."""
        if not (self.work / RECIPE).is_file():
            raise FlexdistillError(f"There is no unfinished run in {self.work} to resume; leave --resume out.")

    def _check_same(self, recipe: Recipe, hashes: dict[str, str]) -> None:
        self.check_unfinished()
        _check_same_recipe(Recipe.load(self.work / RECIPE), recipe)
        changed = [name for name, before in read_json(self.work / _INPUTS).items() if before != hashes[name]]
        if changed:
            raise FlexdistillError(
                f"The {' and the '.join(changed)} changed since the unfinished run began; restore what it began with, "
                "or start again with --overwrite."
            )

    def _empty(self) -> None:
        (self.work / RECIPE).unlink(missing_ok=True)  # first, so that a run that is half removed is none
        empty(self.work, but=_LOCK)


@contextlib.contextmanager
def open_run(output: str | Path, *, overwrite: bool, resume: bool, inputs: tuple[str | None, ...]) -> Iterator[Run]:
    """A run whose signals, full disks and lost processes become errors that say how to go on; gone once it is done.

    Raises:
        FlexdistillError: as `check_output` and `Run.begin` do.
        LostProcessError: if another process of the run dies.
        RunInterrupted: on SIGTERM or SIGINT.
    """
    output = expanded(output).resolve()
    check = partial(check_output, output, overwrite=overwrite, resume=resume, inputs=inputs)
    with disk_errors(output), contextlib.ExitStack() as held:
        run = Run(output, held, check, resume)
        with run.interruption:
            check()
            if resume:
                run.check_unfinished()
            yield run
        if PartialState().is_main_process:
            shutil.rmtree(run.work)


def working_folder(output: Path) -> Path:
    """Where a run lives until its result is whole."""
    return output.with_name(output.name + ".partial")


def check_output(output: Path, *, overwrite: bool, resume: bool, inputs: tuple[str | None, ...] = ()) -> None:
    """Raises FlexdistillError if writing `output` would touch a result, another run or an input that is there."""
    work = working_folder(output)
    for name in inputs:
        path = expanded(name).resolve() if name else None
        if path is None or not path.exists():
            continue
        if path.is_relative_to(output) or path.is_relative_to(work):
            raise FlexdistillError(f"Output {output} would replace the input {name}; choose another --output.")
        # a folder of texts is read as a whole; in that of a model there may be more than the model
        if path.is_dir() and output.is_relative_to(path) and not (path / "config.json").is_file():
            raise FlexdistillError(
                f"Output {output} is inside the folder {name} that is read, which would read its files, too; choose an "
                "--output outside."
            )
    if output.exists() and not output.is_dir():
        raise FlexdistillError(f"Output {output} is a file; name a folder.")
    if not output.name or output.is_mount():
        raise FlexdistillError(f"Output {output} cannot be replaced as a whole; name a folder inside it.")
    if work.exists() and not _is_run(work):
        raise FlexdistillError(
            f"{work} is in the way of the run and holds something else than one that is unfinished; move it, or choose "
            "another --output."
        )
    if _is_locked(work):
        raise _being_written(work)
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise FlexdistillError(f"Output {output} is not empty; choose another --output, or pass --overwrite.")
        if not _is_result(output):
            raise FlexdistillError(
                f"Output {output} holds something else than a result of flexdistill, which --overwrite would delete; "
                "choose another --output, or empty it yourself."
            )
    if work.exists() and not (overwrite or resume) and not _has_just_begun(work):
        raise FlexdistillError(
            f"{work} holds a run that is unfinished; pass --resume to go on with it, or --overwrite to start again."
        )


@contextlib.contextmanager
def locked(work: Path) -> Iterator[None]:
    """No other process may write `work` inside the context; the lock goes when this process does, however it ends.

    Raises:
        FlexdistillError: if another process has it.
    """
    lock = FileLock(work / _LOCK, timeout=_PROBE_S)
    try:
        lock.acquire()
    except Timeout as error:
        raise _being_written(work) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def writing_alone(output: Path) -> Iterator[None]:
    """No other run may write `output` inside the context; for a result that grows in its own place.

    Raises:
        FlexdistillError: if another process has it.
    """
    work = working_folder(output)
    work.mkdir(parents=True, exist_ok=True)
    with locked(work):
        try:
            yield
        finally:
            (work / _LOCK).unlink()
            with contextlib.suppress(OSError):  # an unfinished run that stood there stays
                work.rmdir()


def read_json(file: Path) -> dict:
    """What an unfinished run has written.

    Raises:
        FlexdistillError: if it is missing or damaged.
    """
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise FlexdistillError(
            f"{file} is missing or damaged, so the unfinished run cannot go on; start again with --overwrite."
        ) from error


def put_back(replaced: Path, output: Path) -> None:
    """Undoes what a run left that was stopped while it put its result in the place of an earlier one."""
    if replaced.exists() and not output.exists():
        os.replace(replaced, output)


def _is_result(output: Path) -> bool:
    """Whether a folder is one that --overwrite may replace: a model's or a comparison's."""
    config = output / "config.json"
    is_model = config.is_file() and f'"{MODEL_TYPE}"' in config.read_text(encoding="utf-8", errors="replace")
    return is_model or (output / COMPARISON).is_file()


def _is_run(work: Path) -> bool:
    """Whether a working folder is a run's, or empty."""
    return work.is_dir() and (_has_just_begun(work) or (work / _LOCK).exists() or (work / RECIPE).exists())


def _has_just_begun(work: Path) -> bool:
    return work.is_dir() and {path.name for path in work.iterdir()} <= _BEGINNING


def _is_locked(work: Path) -> bool:
    file = work / _LOCK
    if not file.exists():
        return False
    try:
        with FileLock(file, timeout=_PROBE_S):
            return False
    except Timeout:
        return True


def _being_written(work: Path) -> FlexdistillError:
    return FlexdistillError(
        f"Another process is writing {work}; wait for it to end or stop it, or choose another --output."
    )


def _check_same_recipe(before: Recipe, now: Recipe) -> None:
    old, new = (flat(recipe.model_dump(exclude=INDECISIVE)) for recipe in (before, now))
    differing = [f"{key} ({old.get(key)!r}, now {new.get(key)!r})" for key in new | old if old.get(key) != new.get(key)]
    if differing:
        raise FlexdistillError(
            f"The unfinished run used another recipe: {', '.join(differing)}; use the same settings to resume, or "
            "start again with --overwrite."
        )
