"""Where an interrupted run goes on: tensors in safetensors, counters in JSON, nothing pickled."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import FlexdistillError, disk_errors
from .sharding import shard_like, whole_on_cpu
from .stage import Stage


@dataclass(frozen=True)
class Checkpoint:
    """A folder `STAGE-STEP` with the state after that many steps of that stage."""

    folder: Path
    stage: str
    step: int

    def load(self, stage: Stage) -> None:
        """Puts parameters and optimiser state back into a stage.

        Raises:
            FlexdistillError: if the files are damaged or belong to another model.
        """
        parameters = stage.trained()
        try:
            tensors = load_file(self.folder / "parameters.safetensors")
            state = load_file(self.folder / "optimizer.safetensors")
        except (OSError, SafetensorError) as error:
            raise _unreadable(self.folder, error) from error
        if tensors.keys() != parameters.keys():
            differing = sorted(tensors.keys() ^ parameters.keys())
            raise FlexdistillError(
                f"Checkpoint {self.folder} is of another model (it differs in {differing[0]}, ...); start again with "
                "--overwrite."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(shard_like(tensor, parameters[name]))
        for name, parameter in parameters.items():
            stage.optimizer.state[parameter] = {
                key.removeprefix(f"{name}/"): shard_like(value, parameter) if value.ndim else value
                for key, value in state.items()
                if key.startswith(f"{name}/")
            }


class Checkpoints:
    """The checkpoints of one run, newest last; older ones than the newest `keep` are removed.

    Args:
        folder: the run's working folder.
        keep: how many stay.
        writes: whether this process is the one that writes.
    """

    def __init__(self, folder: Path, keep: int, writes: bool = True):
        self.folder, self.keep, self.writes = folder, keep, writes

    def save(self, stage: Stage, number: int, step: int) -> None:
        """Writes aside, syncs, then renames, so that a checkpoint is whole or not there."""
        parameters = whole_on_cpu(stage.trained(), keep=self.writes)
        optimizer = whole_on_cpu(_optimizer_tensors(stage), keep=self.writes)
        if not self.writes:
            return
        target = self.folder / f"{number}-{step:08d}"
        aside = self.folder / f"writing-{target.name}"
        with disk_errors(target), _removed_on_failure(aside):
            aside.mkdir(parents=True)
            save_file(parameters, aside / "parameters.safetensors")
            save_file(optimizer, aside / "optimizer.safetensors")
            (aside / "counters.json").write_text(json.dumps({"stage": stage.name, "step": step}))
            for file in aside.iterdir():
                _sync(file)
            os.replace(aside, target)
            _sync(self.folder)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint; None if there is none."""
        folders = self._folders()
        if not folders:
            return None
        try:
            return Checkpoint(folders[-1], **json.loads((folders[-1] / "counters.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable(folders[-1], error) from error

    def _folders(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("[0-9]*-[0-9]*") if folder.is_dir())


def _unreadable(folder: Path, error: Exception) -> FlexdistillError:
    return FlexdistillError(
        f"Checkpoint {folder} cannot be read ({error}); delete it to go on from the one before, or start again with "
        "--overwrite."
    )


def _optimizer_tensors(stage: Stage) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in stage.trained().items():
        for key, value in stage.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
