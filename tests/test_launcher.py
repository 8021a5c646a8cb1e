"""Several processes from one command: what is passed on, what is refused, and errors that are told once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import flexdistill
from flexdistill import launcher
from tests import tiny


@pytest.fixture
def launched(monkeypatch):
    """The configurations and commands that would run."""
    found = []
    monkeypatch.setattr(
        launcher, "elastic_launch", lambda config, program: lambda *words: found.append((config, words))
    )
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return found


@pytest.mark.parametrize("option", [["--num-processes", "3"], ["--num-processes=3"]])
def test_processes_get_the_same_arguments(run, launched, option, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert run("convert", "gpt2", *option, "--variant", "hedgehog", "--output", "--num-processes-4").code == 0
    ((config, words),) = launched
    assert words == ("-m", "flexdistill", "convert", "gpt2", "--variant", "hedgehog", "--output", "--num-processes-4")
    assert (config.nproc_per_node, config.min_nodes, config.max_nodes, config.max_restarts) == (3, 1, 1, 0)


def test_one_process_is_this_one(launched):
    assert launcher.launch(1) is False and launched == []


def refusal(result):
    assert result.code == 2 and result.out == "" and result.err.count("\n") == 1, result
    return result.err


def test_bad_numbers_are_refused(run, launched, monkeypatch):
    assert "--num-processes 0 runs nothing; give 1 or more." in refusal(run("convert", "gpt2", "--num-processes", "0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    message = refusal(run("convert", "gpt2", "--num-processes", "3"))
    assert "--num-processes 3 needs as many GPUs and this machine has 2; give at most 2." in message
    monkeypatch.setenv("RANK", "0")
    assert "leave --num-processes out" in refusal(run("convert", "gpt2", "--num-processes", "2"))
    assert launched == []


def test_a_plan_is_printed_by_this_process(run, launched, tmp_path):
    tiny.save_tiny(tmp_path / "tiny", tiny.tiny_gpt2(), tiny.tiny_tokenizer())
    result = run("convert", str(tmp_path / "tiny"), "--dry-run", "--num-processes", "2")
    assert result.code == 0 and "Adds 8,968 parameters" in result.out and launched == []


def failing(tmp_path, exitcodes):
    failures = {rank: ProcessFailure(rank, 1, code, str(tmp_path / "no file")) for rank, code in exitcodes.items()}

    def run(*words):
        raise ChildFailedError("flexdistill", failures)

    return lambda config, program: run


@pytest.mark.parametrize(("exitcode", "code", "how"), [(1, 1, "exit code 1"), (-9, 137, "SIGKILL")])
def test_a_process_that_died_is_named(launched, monkeypatch, tmp_path, capsys, exitcode, code, how):
    monkeypatch.setattr(launcher, "elastic_launch", failing(tmp_path, {1: exitcode}))
    with pytest.raises(SystemExit) as stop:
        launcher.launch(2)
    assert stop.value.code == code
    assert f"Error: Process 1 ended with {how}; see what it printed" in capsys.readouterr().err


@pytest.mark.slow
def test_an_error_of_all_processes_is_printed_once(tmp_path):
    tiny.save_tiny(tmp_path / "tiny", tiny.tiny_gpt2(), tiny.tiny_tokenizer())
    command = [sys.executable, "-m", "flexdistill", "convert", "tiny", "--data", "nosuch.txt", "--num-processes", "2"]
    environment = os.environ | {"PYTHONPATH": str(Path(flexdistill.__file__).parents[1]), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == "Error: Text 'nosuch.txt' does not exist; check the path or use `sample`.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
