"""The command line in processes of their own, forked from one that has imported everything: quick to start."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import datasets  # noqa: F401 - so that the forked need not

import flexdistill.pipeline  # noqa: F401
from flexdistill.cli import main
from flexdistill.distillation import interruption, loop

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload([__name__])


@dataclass
class AtStep:
    """A signal that the process sends itself at the beginning of the n-th step that it trains."""

    number: int
    step: int

    def prepare(self) -> None:
        calls, factor = [], loop.learning_rate_factor

        def counting(*args):
            calls.append(args)
            if len(calls) == self.step:
                os.kill(os.getpid(), self.number)
            return factor(*args)

        loop.learning_rate_factor = counting


@dataclass
class Launched:
    """As under torch's launcher, which would kill the process some time after it has asked it to stop."""

    grace_s: float

    def prepare(self) -> None:
        os.environ["TORCHELASTIC_RUN_ID"] = "tests"
        interruption.GRACE_S = self.grace_s


class Forked:
    """`flexdistill ARGUMENTS` in `folder`; its output goes to files.

    Args:
        program: what runs in the place of `flexdistill`.
        change: what is done in it before it runs.
        rank, num_processes, port: its place among processes that train together.
    """

    def __init__(
        self,
        arguments: list[str],
        folder: Path,
        change: AtStep | Launched | None = None,
        *,
        program: Callable[[], None] = main,
        rank: int = 0,
        num_processes: int = 1,
        port: int | None = None,
    ):
        environment = {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": "", "FLEXDISTILL_DEBUG": "0"}
        if num_processes > 1:
            environment |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_processes)}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        self._logs = [folder / f"{stream}-{rank}.txt" for stream in ("stdout", "stderr")]
        self.process = _context.Process(target=_run, args=(arguments, folder, self._logs, environment, change, program))
        self.process.start()

    def wait(self, timeout_s: float = 120) -> int:
        """Its exit code; negative for a signal that killed it."""
        self.process.join(timeout_s)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"still running after {timeout_s} s: {self.stderr}")
        return self.process.exitcode

    @property
    def stdout(self) -> str:
        return self._logs[0].read_text()

    @property
    def stderr(self) -> str:
        return self._logs[1].read_text()


def together(arguments: list[str], folder: Path, changes: tuple = (None, None), **settings) -> list[Forked]:
    """Two processes that train together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        Forked(arguments, folder, change, rank=rank, num_processes=2, port=port, **settings)
        for rank, change in enumerate(changes)
    ]


def _run(arguments: list[str], folder: Path, logs: list[Path], environment: dict[str, str], change, program) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    for stream, log in enumerate(logs, start=1):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if change is not None:
        change.prepare()
    sys.argv = ["flexdistill", *arguments]
    program()
