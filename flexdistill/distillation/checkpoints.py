"""Where an interrupted run goes on: tensors in safetensors, counters in JSON, nothing pickled, all checksummed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file

from ..errors import FlexdistillError, NonFiniteLossError, disk_errors
from ..storage import sha256_of_file, sync
from .interruption import Interruption
from .random_state import random_state, set_random_state
from .sharding import own_shard, shard_like, whole_on_cpu
from .stage import Stage

_COUNTERS, _RANDOM, _MANIFEST = "counters.json", "random.json", "manifest.json"
_PARAMETERS, _OPTIMIZER, _STATES = "parameters.safetensors", "optimizer.safetensors", "states.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A folder `STAGE-STEP` with the state after that many steps of that stage."""

    folder: Path
    stage: str
    step: int
    num_processes: int
    states: dict[str, dict[str, Any]]  # the plain values of further states, by name

    def load(self, stage: Stage) -> None:
        """Puts parameters, optimiser state, further states and this process's random generators back.

        Raises:
            FlexdistillError: if the checkpoint belongs to another model.
        """
        parameters = stage.trained()
        tensors = load_file(self.folder / _PARAMETERS)
        differing = sorted((tensors.keys() ^ parameters.keys()) | (self.states.keys() ^ stage.states.keys()))
        if differing:
            raise FlexdistillError(
                f"Checkpoint {self.folder} is of another model (it differs in {differing[0]}, ...); start again with "
                "--overwrite."
            )
        with torch.no_grad():
            for name, tensor in tensors.items():
                parameters[name].copy_(shard_like(tensor, parameters[name]))
        optimizer = _unflatten(load_file(self.folder / _OPTIMIZER))
        for name, parameter in parameters.items():
            stage.optimizer.state[parameter] = {
                key: shard_like(value, parameter) if value.ndim else value
                for key, value in optimizer.get(name, {}).items()
            }
        further = _unflatten(load_file(self.folder / _STATES))
        for name, state in stage.states.items():
            state.load_state_dict(self.states[name] | further.get(name, {}))
        process = PartialState()
        random_states = json.loads((self.folder / _RANDOM).read_text())
        set_random_state(random_states[process.process_index], process.device)

    def check_processes(self) -> None:
        """Raises FlexdistillError if another number of processes wrote it."""
        now = PartialState().num_processes
        if now != self.num_processes:
            raise FlexdistillError(
                f"The unfinished run used {_processes(self.num_processes)} and this one has {now}; resume with "
                f"--num-processes {self.num_processes}, or start again with --overwrite."
            )


class Checkpoints:
    """The checkpoints of one run, newest last; older ones than the newest `keep` are removed.

    Args:
        folder: the run's working folder.
        keep: how many stay.
        writes: whether this process is the one that writes.
        every_steps, every_minutes: how often one is written; None: not so.
        interruption: what may stop the run after a step, once its checkpoint is written.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        writes: bool = True,
        *,
        every_steps: int | None = None,
        every_minutes: float | None = None,
        interruption: Interruption | None = None,
    ):
        self.folder, self.keep, self.writes = folder, keep, writes
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.interruption = interruption or Interruption(folder)
        self._saved_s = time.monotonic()
        self._due, self._signal = False, 0

    def agree(self) -> None:
        """All processes decide together what `after_step` does; called where they wait for each other anyway."""
        due = self.every_minutes is not None and time.monotonic() - self._saved_s >= 60 * self.every_minutes
        self._due, self._signal = self.interruption.agree(due)

    def after_step(self, stage: Stage, number: int, step: int, *, last: bool) -> None:
        """Writes a checkpoint after the stage's last step, after as many as were asked for, or if it was agreed on.

        Raises:
            RunInterrupted: after it is written, if a signal has come.
        """
        signal = self.interruption.received_alone or self._signal
        by_steps = self.every_steps is not None and step % self.every_steps == 0
        if last or by_steps or self._due or signal:
            self.save(stage, number, step)
        if signal:
            raise self.interruption.stopped(signal, f" after step {step} of {stage.name}")

    def save(self, stage: Stage, number: int, step: int) -> None:
        """Writes aside, syncs, then renames, so that a checkpoint is whole or not there; all processes call it.

        Raises:
            NonFiniteLossError: if a parameter is not finite; nothing is written then.
            FlexdistillError: if the disk is full or not writable.
        """
        _check_finite(stage, step)
        parameters = whole_on_cpu(stage.trained(), keep=self.writes)
        optimizer = whole_on_cpu(_optimizer_tensors(stage), keep=self.writes)
        random_states = gather_object([random_state(PartialState().device)])
        self._saved_s = time.monotonic()
        if not self.writes:
            return
        target = self.folder / f"{number}-{step:08d}"
        aside = self.folder / f"writing-{target.name}"
        states = {name: state.state_dict() for name, state in stage.states.items()}
        values = {name: {k: v for k, v in state.items() if not torch.is_tensor(v)} for name, state in states.items()}
        counters = {"stage": stage.name, "step": step, "num_processes": len(random_states), "states": values}
        with disk_errors(target), _removed_on_failure(aside):
            aside.mkdir(parents=True)
            save_file(parameters, aside / _PARAMETERS)
            save_file(optimizer, aside / _OPTIMIZER)
            save_file(_flatten(states), aside / _STATES)
            (aside / _COUNTERS).write_text(json.dumps(counters))
            (aside / _RANDOM).write_text(json.dumps(random_states))
            files = sorted(aside.iterdir())
            manifest = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of_file(file)} for file in files}
            (aside / _MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            # the logs too, so that they do not end before the checkpoint
            for path in (*aside.iterdir(), aside, *self.folder.glob("*.jsonl")):
                sync(path)
            os.replace(aside, target)
            sync(self.folder)
        for old in self._folders()[: -self.keep]:
            shutil.rmtree(old)

    def latest(self) -> Checkpoint | None:
        """The newest whole checkpoint; None if there has been none. Damaged ones passed over are named on stderr.

        Raises:
            FlexdistillError: if there are checkpoints and none is whole.
        """
        damaged = []
        for folder in reversed(self._folders()):
            damage = _damage(folder)
            if damage is None:
                for other, reason in damaged if self.writes else ():
                    print(f"Checkpoint {other} is damaged ({reason}); going on from {folder.name}.", file=sys.stderr)
                return Checkpoint(folder, **json.loads((folder / _COUNTERS).read_text()))
            damaged.append((folder, damage))
        if damaged:
            reasons = "; ".join(f"{folder.name}: {reason}" for folder, reason in damaged)
            raise FlexdistillError(
                f"No checkpoint in {self.folder} is whole ({reasons}); start again with --overwrite."
            )
        return None

    def forget_after(self, checkpoint: Checkpoint | None) -> None:
        """Removes what is newer than a checkpoint, or was being written."""
        newer = [folder for folder in self._folders() if checkpoint is None or folder.name > checkpoint.folder.name]
        for folder in (*newer, *self.folder.glob("writing-*")):
            shutil.rmtree(folder)

    def _folders(self) -> list[Path]:
        return sorted(folder for folder in self.folder.glob("[0-9]*-[0-9]*") if folder.is_dir())


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint's files; None if nothing is."""
    try:
        manifest = json.loads((folder / _MANIFEST).read_text())
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest.items()}
    except FileNotFoundError:
        return f"{_MANIFEST} is missing"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{_MANIFEST} cannot be read"
    missing = {_COUNTERS, _RANDOM, _PARAMETERS, _OPTIMIZER, _STATES} - expected.keys()
    if missing:
        return f"{_MANIFEST} lacks {min(missing)}"
    for name, (size, checksum) in expected.items():
        file = folder / name
        try:
            found = file.stat().st_size
            if found != size:
                return f"{name} has {found:,} of {size:,} bytes"
            if sha256_of_file(file) != checksum:
                return f"{name} does not match its checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error.strerror}"
    return None


def _optimizer_tensors(stage: Stage) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in stage.trained().items():
        for key, value in stage.optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{key}"] = torch.as_tensor(value)
    return tensors


def _check_finite(stage: Stage, step: int) -> None:
    """All processes find the same, also where each holds a part of the parameters."""
    process, trained = PartialState(), stage.trained()
    finite = [own_shard(parameter).isfinite().all().to(process.device) for parameter in trained.values()]
    finite = torch.stack(finite).int()
    if process.num_processes > 1:
        torch.distributed.all_reduce(finite, op=torch.distributed.ReduceOp.MIN)
    if not finite.all():
        bad = list(trained)[finite.tolist().index(0)]
        raise NonFiniteLossError(
            f"{stage.name} stopped after step {step}: {bad} is not finite any more, so no checkpoint was written; go "
            "on from the last good one with --resume, or start again with --overwrite and a lower learning rate."
        )


def _flatten(states: Mapping[str, Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """The tensors of states by `NAME/KEY`."""
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for name, state in states.items()
        for key, value in state.items()
        if torch.is_tensor(value)
    }


def _unflatten(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    states: dict[str, dict[str, torch.Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, key = path.rpartition("/")
        states.setdefault(name, {})[key] = tensor
    return states


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
