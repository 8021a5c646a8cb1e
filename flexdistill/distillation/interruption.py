"""How a run stops early: on a signal, at a step that all processes agree on, or because another process is gone."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState

from ..errors import LostProcessError, RunInterrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# a launcher passes on what the terminal has already sent to every process
REPEAT_S = 2.0
# torch's launcher kills 30 s after it has asked to stop
GRACE_S = 25.0
_GO_ON = "give the same command with --resume to go on"


class Interruption:
    """Inside the context, SIGTERM and SIGINT raise RunInterrupted: at once, or while `deferred` after the step.

    A second signal raises at once. Collectives that fail raise LostProcessError.

    Args:
        begun: a file that is there once there is a run to go on with.
    """

    def __init__(self, begun: Path):
        self._begun = begun
        self._deferred = False
        self._number, self._received_s = 0, 0.0
        self._previous: dict[int, object] = {}
        self._left = threading.Event()
        self._wakeup: int | None = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as for jobs in the background
                    self._previous[number] = signal.signal(number, self._receive)
            if "TORCHELASTIC_RUN_ID" in os.environ and _has_peers():
                self._watch()
        return self

    def __exit__(self, kind, error: BaseException | None, traceback) -> None:
        self._left.set()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
        if error is not None and _is_lost_process(error):
            raise LostProcessError(
                f"Process {PartialState().process_index} of {PartialState().num_processes} lost another one, which "
                f"died or does not answer; {self._remedy()}."
            ) from error

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal waits for whoever asks after a step, at the latest for the end of the context."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._number:
            raise self.stopped(self._number)

    def agree(self, checkpoint_due: bool) -> tuple[bool, int]:
        """What all processes do after this step; all call it.

        Returns:
            whether the main process wants a checkpoint, and the number of a signal that any process received, or 0.
        """
        state = PartialState()
        if not _has_peers():
            return checkpoint_due, self._number
        wish = torch.tensor([checkpoint_due and state.is_main_process, self._number], device=state.device)
        torch.distributed.all_reduce(wish, op=torch.distributed.ReduceOp.MAX)
        due, number = wish.tolist()
        return bool(due), number

    @property
    def received_alone(self) -> int:
        """The number of a signal that this process received, or 0; with others, they have to `agree` first."""
        return 0 if _has_peers() else self._number

    def stopped(self, number: int, when: str = "") -> RunInterrupted:
        """The error that says which signal stopped the run, and how to go on."""
        return RunInterrupted(f"Stopped by {signal.Signals(number).name}{when}; {self._remedy()}.", number)

    def _receive(self, number: int, frame) -> None:
        now, first = time.monotonic(), not self._number
        if not first and _has_peers() and now - self._received_s < REPEAT_S:
            return
        self._number, self._received_s = number, now
        if not (first and self._deferred):
            raise self.stopped(number)

    def _remedy(self) -> str:
        return _GO_ON if self._begun.is_file() else "nothing was written yet, so start again"

    def _watch(self) -> None:
        """Ends the process if a signal does not, as when the main thread waits in a collective for one that died."""
        reading, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

        def wait() -> None:
            received = os.read(reading, 1)
            os.close(reading)
            if received and not self._left.wait(GRACE_S):
                name = signal.Signals(received[0]).name
                message = f"Error: Stopped by {name} while a step did not end; {self._remedy()}.\n"
                os.write(2, message.encode())
                os._exit(128 + received[0])

        threading.Thread(target=wait, daemon=True).start()


def _has_peers() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _is_lost_process(error: BaseException) -> bool:
    # gloo raises nothing more specific than RuntimeError
    by_backend = isinstance(error, RuntimeError) and "gloo" in str(error)
    return _has_peers() and (by_backend or isinstance(error, torch.distributed.DistError))
