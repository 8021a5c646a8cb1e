"""Several processes from one command, by torch's elastic launcher; several machines are `accelerate launch`'s."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import uuid

import torch
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.launcher import LaunchConfig, elastic_launch

from .distillation.interruption import SIGNALS
from .errors import FlexdistillError, LostProcessError
from .progress import is_main_process

_OPTION = "--num-processes"
# set for the processes whose errors the launcher prints
_LAUNCHED = "FLEXDISTILL_LAUNCHED"
_STOPPED = {128 + number for number in SIGNALS}


def launch(num_processes: int) -> bool:
    """Runs this process's own command line in `num_processes` processes.

    Returns:
        False if one process is asked for, which is this one.

    Raises:
        FlexdistillError: if there are fewer GPUs, or this process has been launched itself.
        SystemExit: if a process fails, with its exit code; its error has been printed once.
    """
    _check(num_processes)
    if num_processes == 1:
        return False
    os.environ[_LAUNCHED] = "1"
    # torch's own report of a failure is a page long
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # all processes at once would share the processor's cores badly
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_processes)))
    with tempfile.TemporaryDirectory() as folder:  # of the processes' errors
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=num_processes,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            monitor_interval=0.5,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "flexdistill", *_without_option(sys.argv[1:]))
        except ChildFailedError as error:
            rank, failure = error.get_first_failure()
            if failure.exitcode not in _STOPPED:  # by a signal, which the main process has told
                print(f"Error: {_message(rank, failure)}", file=sys.stderr)
            raise SystemExit(failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode) from None
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
    return True


def report(error: FlexdistillError) -> None:
    """Tells the user of an error that each of several processes may have: by the launcher, or by the main process."""
    get_error_handler().record_exception(error)
    lost = isinstance(error, LostProcessError)  # it may be the main process that died
    if _LAUNCHED not in os.environ and (lost or is_main_process()):
        print(f"Error: {error}", file=sys.stderr)


def _check(num_processes: int) -> None:
    if num_processes < 1:
        raise FlexdistillError(f"{_OPTION} {num_processes} runs nothing; give 1 or more.")
    if "RANK" in os.environ:
        raise FlexdistillError(f"This process has been launched as one of several already; leave {_OPTION} out.")
    gpus = torch.cuda.device_count()
    if gpus and num_processes > gpus:
        raise FlexdistillError(
            f"{_OPTION} {num_processes} needs as many GPUs and this machine has {gpus}; give at most {gpus}."
        )


def _without_option(arguments: list[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip:
            skip = False
        elif argument == _OPTION:
            skip = True
        elif not argument.startswith(f"{_OPTION}="):
            kept.append(argument)
    return kept


def _message(rank: int, failure: ProcessFailure) -> str:
    """What a process has recorded, without the type before it; else how it ended."""
    recorded = failure.error_file_data["message"]
    if isinstance(recorded, dict):
        return recorded["message"].partition(": ")[2]
    how = f"exit code {failure.exitcode}" if failure.exitcode > 0 else failure.signal_name()
    return f"Process {rank} ended with {how}; see what it printed, and go on with --resume."
