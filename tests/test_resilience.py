"""What ends a run early, what it says then, and that it goes on to the very weights of a run that nothing ended."""

import contextlib
import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexdistill import export as export_module
from flexdistill import pipeline
from flexdistill.distillation import checkpoints as checkpoints_module
from flexdistill.distillation import interruption, loop
from flexdistill.distillation.stage import feature_maps
from flexdistill.recipe import Recipe
from flexdistill.runs import locked
from tests.distillation.stages import assert_equal
from tests.forked import AtStep, Forked, Launched, together

# how often the run of the kill test is killed; a handful unless told otherwise
KILLS = int(os.environ.get("FLEXDISTILL_KILLS", "6"))
WRITING = "while a checkpoint was written"
RECIPE = {
    "data.source": "text.txt",
    "data.cache": False,  # which says when it is used
    "data.sequence_length": 16,
    "evaluation.sequences": 2,
    "attention_transfer.steps": 4,
    "attention_transfer.batch_size": 2,
    "logit_distillation.steps": 4,
    "logit_distillation.batch_size": 2,
    "checkpoint.every_steps": 2,
}
STEPS = 4 + 4
CONVERT = ["convert", "llama", "--recipe", "recipe.yaml", "--output", "out"]
RESUME = [*CONVERT, "--resume"]


@pytest.fixture(autouse=True)
def interrupts():
    """SIGINT means something even where these tests run in the background, whose jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def sources(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(sources / "llama", folder / "llama")
    shutil.copyfile(sources / "text.txt", folder / "text.txt")
    (folder / "recipe.yaml").write_text(Recipe().override(RECIPE).to_yaml())
    return folder


@pytest.fixture
def folder(sources, tmp_path):
    """The folder in which `run` runs, with model, text and recipe."""
    shutil.copytree(sources, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """Weights of the run that nothing ends."""
    folder = tmp_path_factory.mktemp("whole")
    shutil.copytree(sources, folder, dirs_exist_ok=True)
    forked = Forked(CONVERT, folder)
    assert forked.wait() == 0, forked.stderr
    return weights(folder)


def weights(folder):
    return load_file(folder / "out" / "model.safetensors")


def checkpoints_in(folder):
    return sorted(path.name for path in (folder / "out.partial").glob("[0-9]-*"))


def assert_resumes(run, folder, whole, *arguments):
    result = run(*RESUME, *arguments)
    assert result.code == 0, result.err
    assert_equal(weights(folder), whole)
    assert not (folder / "out.partial").exists()
    return result


def assert_one_line(result, code, *parts):
    assert result.code == code, result.err
    assert result.err.count("\n") == 1 and result.out == ""
    for part in parts:
        assert part in result.err, result.err


@pytest.fixture
def at_step(monkeypatch):
    """Does something once, at the beginning of the n-th step from now on, counted over both stages."""

    def arm(step, action):
        calls = []

        def counting(*args):
            calls.append(args)
            if len(calls) == step:
                action()
            return factor(*args)

        monkeypatch.setattr(loop, "learning_rate_factor", counting)

    factor = loop.learning_rate_factor
    return arm


@pytest.mark.parametrize("step", [1, 3, 4, 7, STEPS])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(run, folder, whole, at_step, number, step):
    handlers = [signal.getsignal(each) for each in interruption.SIGNALS]
    at_step(step, lambda: signal.raise_signal(number))
    result = run(*CONVERT)
    stage, done = divmod(step - 1, 4)
    name = ("attention_transfer", "logit_distillation")[stage]
    message = f"Stopped by {number.name} after step {done + 1} of {name}; give the same command with --resume to go on."
    assert (result.code, result.err, result.out) == (128 + number, f"{message}\n", "")
    assert checkpoints_in(folder)[-1] == f"{stage}-{done + 1:08d}"
    assert [signal.getsignal(each) for each in interruption.SIGNALS] == handlers
    at_step(None, None)
    assert_resumes(run, folder, whole)


def test_a_second_signal_stops_at_once(run, folder, whole, at_step):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    at_step(4, twice)
    assert_one_line(run(*CONVERT), 143, "Stopped by SIGTERM; give the same command with --resume")
    assert checkpoints_in(folder) == ["0-00000002"]
    at_step(None, None)
    assert_resumes(run, folder, whole)


@pytest.mark.parametrize("where", ["load_source", "compare_models", "export"])
def test_a_signal_between_steps_stops_at_once(run, folder, whole, monkeypatch, where):
    def stop(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("not reached")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, where, stop)
        result = run(*CONVERT)
    if where == "load_source":
        assert_one_line(result, 143, "Stopped by SIGTERM; nothing was written yet, so start again.")
        assert not (folder / "out.partial").exists()
        return
    assert_one_line(result, 143, "Stopped by SIGTERM; give the same command with --resume to go on.")
    assert_resumes(run, folder, whole)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=errno.errorcode.get)
@pytest.mark.parametrize("write", [1, 2, 5])
def test_a_disk_that_cannot_be_written(run, folder, whole, monkeypatch, number, write):
    """At a file of the first, and of the second checkpoint."""
    calls, save_file = [], checkpoints_module.save_file

    def full(*args):
        calls.append(args)
        if len(calls) >= write:
            args[1].write_bytes(b"half")
            raise OSError(number, os.strerror(number))
        return save_file(*args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints_module, "save_file", full)
        result = run(*CONVERT)
    assert_one_line(result, 2, "could not be written", os.strerror(number), "make room", "--resume")
    assert checkpoints_in(folder) == ["0-00000002"][: write // 4]
    assert list((folder / "out.partial").glob("writing-*")) == []
    assert_resumes(run, folder, whole)


def test_a_log_that_cannot_be_written(run, folder, whole, at_step, monkeypatch):
    def full():
        monkeypatch.setattr(loop.json, "dumps", no_space)

    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    dumps = json.dumps
    at_step(3, full)
    result = run(*CONVERT)
    monkeypatch.setattr(loop.json, "dumps", dumps)
    assert_one_line(result, 2, "could not be written (No space left on device)", "--resume")
    at_step(None, None)
    assert_resumes(run, folder, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere there is no folder that root cannot write")
def test_a_read_only_output(run, folder, whole):
    result = run(*CONVERT[:-1], "/sys/out")
    assert_one_line(result, 2, "/sys/out could not be written (", "choose another --output")
    assert run(*CONVERT).code == 0
    assert_equal(weights(folder), whole)


def corrupt(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "corrupted": (corrupt, "does not match its checksum"),
    "torn": (lambda file: file.write_bytes(file.read_bytes()[:-9]), "bytes"),
    "missing": (lambda file: file.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_checkpoint(run, folder, whole, at_step, damage, keep):
    at_step(7, lambda: signal.raise_signal(signal.SIGTERM))
    setting = ("--set", f"checkpoint.keep={keep}")
    assert run(*CONVERT, *setting).code == 143
    at_step(None, None)
    newest = checkpoints_in(folder)[-1]
    assert newest == "1-00000003"
    change, reason = DAMAGES[damage]
    change(folder / "out.partial" / newest / "parameters.safetensors")
    if keep == 1:
        result = run(*RESUME, *setting)
        assert_one_line(result, 2, "No checkpoint in", f"{newest}: parameters.safetensors", reason, "--overwrite")
        assert checkpoints_in(folder) == [newest]
        assert run(*CONVERT, "--overwrite").code == 0
        assert_equal(weights(folder), whole)
        return
    result = assert_resumes(run, folder, whole, *setting)
    assert result.err.count("\n") == 1
    assert f"{newest} is damaged (parameters.safetensors" in result.err and reason in result.err
    assert "going on from 1-00000002" in result.err


def change_recipe(folder):
    (folder / "recipe.yaml").write_text(
        (folder / "recipe.yaml").read_text().replace("temperature: 1.0", "temperature: 2.0")
    )


def change_data(folder):
    (folder / "text.txt").write_text((folder / "text.txt").read_text().replace("with", "from"))


def change_model(folder):
    tensors = load_file(folder / "llama" / "model.safetensors")
    next(iter(tensors.values()))[0] += 1e-3
    save_file(tensors, folder / "llama" / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "recipe": (change_recipe, "used another recipe: logit_distillation.temperature (1.0, now 2.0); use the same"),
    "data": (change_data, "The data and the evaluation data changed since the unfinished run began; restore"),
    "model": (change_model, "The model changed since the unfinished run began; restore what it began with"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused(run, folder, sources, whole, at_step, change):
    at_step(6, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*CONVERT).code == 143
    at_step(None, None)
    before = {path: path.read_bytes() for path in (folder / "out.partial").rglob("*") if path.is_file()}
    apply, message = CHANGES[change]
    apply(folder)
    assert_one_line(run(*RESUME), 2, message, "--overwrite")
    assert {path: path.read_bytes() for path in (folder / "out.partial").rglob("*") if path.is_file()} == before
    shutil.copytree(sources, folder, dirs_exist_ok=True)
    assert_resumes(run, folder, whole)


def test_how_often_checkpoints_are_written_may_change(run, folder, whole, at_step):
    at_step(6, lambda: signal.raise_signal(signal.SIGTERM))
    assert run(*CONVERT).code == 143
    at_step(None, None)
    assert_resumes(run, folder, whole, "--set", "checkpoint.keep=1", "--set", "checkpoint.every_steps=null")


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_that_gives_nan(run, folder, whole, at_step, monkeypatch, layer):
    """As from a bit that flipped once: resumed, the run goes on as if it had not."""
    models, apply_plan = [], pipeline.apply_plan

    def remember(model, plan):
        models.append(apply_plan(model, plan))
        return models[-1]

    def poison():
        with torch.no_grad():
            next(feature_maps(models[-1])[f"model.layers.{layer}.self_attn"].parameters()).fill_(torch.nan)

    monkeypatch.setattr(pipeline, "apply_plan", remember)
    at_step(7, poison)
    result = run(*CONVERT)
    assert_one_line(result, 2, "stopped at step 3: the loss is nan", f"layers.{layer}.self_attn", "--resume")
    assert f"the last good checkpoint is {folder}/out.partial/1-00000002" in result.err
    at_step(None, None)
    assert_resumes(run, folder, whole)


def test_a_clock_that_goes_backwards(run, folder, whole, monkeypatch):
    backwards = itertools.count(2e9, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(backwards)))
    result = run(*CONVERT, "--set", "checkpoint.every_minutes=60", "--json")
    assert result.code == 0, result.err
    assert_equal(weights(folder), whole)
    metrics = json.loads(result.out)
    assert 0 < sum(stage["elapsed_s"] for stage in metrics["stages"]) < metrics["elapsed_s"] < 300
    lines = [json.loads(line) for line in (folder / "out" / "logit_distillation.jsonl").read_text().splitlines()]
    assert [line["elapsed_s"] for line in lines] == sorted(line["elapsed_s"] for line in lines)
    assert all(line["tokens_per_s"] > 0 for line in lines)


@pytest.mark.parametrize("arguments", [CONVERT, RESUME, [*CONVERT, "--overwrite"]], ids=lambda x: x[-1])
def test_a_second_run_into_the_folder_is_refused(run, folder, whole, arguments):
    first = Forked(CONVERT, folder, AtStep(signal.SIGSTOP, 4))
    try:
        while "0-00000002" not in checkpoints_in(folder):
            assert first.process.is_alive(), first.stderr
        before = sorted((folder / "out.partial").rglob("*"))
        result = run(*arguments)
        assert_one_line(result, 2, f"Another process is writing {folder}/out.partial; wait for it to end or stop it")
        assert sorted((folder / "out.partial").rglob("*")) == before
    finally:
        first.process.kill()
    assert first.wait() == -signal.SIGKILL  # and with it goes its lock
    assert_resumes(run, folder, whole)


def test_a_run_that_began_meanwhile_is_left_alone(run, folder, monkeypatch):
    """Both found nothing there, and one loaded its model more quickly."""
    work, load_source = folder / "out.partial", pipeline.load_source

    def slowly(recipe):
        work.mkdir()
        stack.enter_context(locked(work))
        return load_source(recipe)

    monkeypatch.setattr(pipeline, "load_source", slowly)
    with contextlib.ExitStack() as stack:
        assert_one_line(run(*CONVERT), 2, "Another process is writing")
    assert [path.name for path in work.iterdir()] == ["lock"]


def test_a_result_that_came_meanwhile_is_kept(run, folder, monkeypatch):
    load_source = pipeline.load_source

    def slowly(recipe):
        (folder / "out").mkdir()
        (folder / "out" / "precious.txt").write_text("mine")
        return load_source(recipe)

    monkeypatch.setattr(pipeline, "load_source", slowly)
    assert_one_line(run(*CONVERT), 2, "out is not empty; choose another --output")
    assert not (folder / "out.partial").exists()


def test_a_run_that_died_as_it_began_is_no_obstacle(run, folder, whole):
    work = folder / "out.partial"
    work.mkdir()
    for name in ("lock", "inputs.json", "recipe.yaml.writing"):
        (work / name).write_text("{")
    assert_one_line(run(*RESUME), 2, "There is no unfinished run in", "leave --resume out")
    assert run(*CONVERT).code == 0
    assert_equal(weights(folder), whole)


def test_killed_between_the_old_result_and_the_new(run, folder, whole, monkeypatch):
    """The old one comes back when the run goes on, and is replaced in the end."""

    class Killed(BaseException):
        pass

    def die(source, target):
        if os.path.basename(source) == "export":
            monkeypatch.setattr(export_module.os, "replace", dead)
            raise Killed
        return replace(source, target)

    def dead(*args):
        raise Killed

    replace = os.replace
    (folder / "out").mkdir()
    (folder / "out" / "config.json").write_text('{"model_type": "flexformer"}')
    (folder / "out" / "old.txt").write_text("old")
    monkeypatch.setattr(export_module.os, "replace", die)
    with pytest.raises(Killed):
        run(*CONVERT, "--overwrite")
    monkeypatch.setattr(export_module.os, "replace", replace)
    assert not (folder / "out").exists()
    seen, run_stages = [], pipeline.run_stages
    monkeypatch.setattr(
        pipeline,
        "run_stages",
        lambda *args, **more: seen.append(sorted(os.listdir("out"))) or run_stages(*args, **more),
    )
    assert_resumes(run, folder, whole)
    assert seen == [["config.json", "old.txt"]] and not (folder / "out" / "old.txt").exists()


@pytest.fixture(scope="module")
def whole_of_two(sources, tmp_path_factory):
    """Weights of two processes that nothing ends."""
    folder = tmp_path_factory.mktemp("two")
    shutil.copytree(sources, folder, dirs_exist_ok=True)
    for process in together(CONVERT, folder):
        assert process.wait() == 0, process.stderr
    return weights(folder)


def assert_two_resume(folder, whole_of_two):
    for process in together(RESUME, folder):
        assert process.wait() == 0, process.stderr
    assert_equal(weights(folder), whole_of_two)


@pytest.mark.parametrize("receiver", [0, 1])
def test_a_signal_to_one_process_stops_all_at_the_same_step(run, folder, whole_of_two, receiver):
    signals = tuple(AtStep(signal.SIGTERM, 7) if rank == receiver else None for rank in (0, 1))
    main, other = together(CONVERT, folder, signals)
    assert (main.wait(), other.wait()) == (143, 143), main.stderr + other.stderr
    message = "Stopped by SIGTERM after step 3 of logit_distillation; give the same command with --resume to go on.\n"
    assert (main.stderr, other.stderr) == (message, "")
    newest = checkpoints_in(folder)[-1]
    assert newest == "1-00000003"
    states = json.loads((folder / "out.partial" / newest / "random.json").read_text())
    assert len(states) == 2
    refused = run(*RESUME)
    assert_one_line(refused, 2, "The unfinished run used 2 processes and this one has 1; resume with --num-processes 2")
    assert checkpoints_in(folder)[-1] == newest
    assert_two_resume(folder, whole_of_two)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_is_killed_stops_the_others(folder, whole_of_two, victim):
    signals = [None, None]
    signals[victim] = AtStep(signal.SIGKILL, 7)
    processes = together(CONVERT, folder, tuple(signals))
    started = time.monotonic()
    assert processes[victim].wait() == -signal.SIGKILL
    survivor = processes[1 - victim]
    assert survivor.wait(30) == 2 and time.monotonic() - started < 60
    message = f"Error: Process {1 - victim} of 2 lost another one, which died or does not answer; give the same command"
    assert survivor.stderr == f"{message} with --resume to go on.\n"
    assert checkpoints_in(folder)[-1] == "1-00000002"
    assert_two_resume(folder, whole_of_two)


def test_the_main_process_decides_when_it_is_time(folder, whole_of_two):
    by_time = ("--set", "checkpoint.every_steps=null", "--set", "checkpoint.every_minutes=1e-9")
    processes = together([*CONVERT, *by_time], folder, (AtStep(signal.SIGKILL, 4), None))
    assert [process.wait() for process in processes] == [-signal.SIGKILL, 2]
    assert checkpoints_in(folder) == ["0-00000002", "0-00000003"]
    assert_two_resume(folder, whole_of_two)


def test_a_process_that_hangs_does_not_hold_up_the_end(folder, whole_of_two):
    """The main thread waits for it where no signal handler runs."""
    waiting, hanging = together(CONVERT, folder, (Launched(grace_s=0.5), AtStep(signal.SIGSTOP, 7)))
    try:
        while "1-00000002" not in checkpoints_in(folder):
            assert waiting.process.is_alive(), waiting.stderr
        waiting.process.terminate()
        assert waiting.wait(30) == 143
    finally:
        hanging.process.kill()
    hanging.wait()
    message = "Error: Stopped by SIGTERM while a step did not end; give the same command with --resume to go on.\n"
    assert waiting.stderr == message
    assert_two_resume(folder, whole_of_two)


def test_the_table_of_faults_names_tests():
    root = Path(__file__).parents[1]
    rows = re.findall(r"^\|.*\| `(test_\w+)` \|$", (root / "docs" / "resume.md").read_text(), re.MULTILINE)
    code = "".join(file.read_text() for file in (root / "tests").rglob("test_*.py"))
    assert len(rows) > 15 and [name for name in rows if f"def {name}(" not in code] == []


def test_killed_at_random_moments(folder, whole, capsys):
    """Every second time while a checkpoint is written."""
    generator = random.Random(int(os.environ.get("FLEXDISTILL_KILLS_SEED", "0")))
    work, landed, results, longest_s = folder / "out.partial", Counter(), 0, 1.0
    recipe = ("--set", "checkpoint.every_steps=1", "--set", "checkpoint.keep=1")
    while sum(landed.values()) < KILLS or not landed[WRITING]:
        forked = Forked([*(RESUME if (work / "recipe.yaml").exists() else CONVERT), *recipe], folder)
        started = time.monotonic()
        if sum(landed.values()) % 2:
            wait_for_writing(forked.process, work, generator.randrange(3))
            time.sleep(generator.uniform(0, 0.004))
        else:
            forked.process.join(generator.uniform(0, longest_s))
        forked.process.kill()
        if forked.wait() == -signal.SIGKILL:
            landed[moment(folder)] += 1
        else:  # it was done before
            assert forked.wait() == 0, forked.stderr
            longest_s = time.monotonic() - started
        if (folder / "out").exists():
            assert_equal(weights(folder), whole)
            shutil.rmtree(folder / "out")
            shutil.rmtree(work, ignore_errors=True)
            results += 1
    last = Forked([*(RESUME if (work / "recipe.yaml").exists() else CONVERT), *recipe], folder)
    assert last.wait() == 0, last.stderr
    assert_equal(weights(folder), whole)
    with capsys.disabled():
        if "FLEXDISTILL_KILLS" in os.environ:
            where = ", ".join(f"{count} {name}" for name, count in sorted(landed.items()))
            print(f"\n{sum(landed.values())} kills in {results + 1} runs: {where}; all weights are bit-identical")


def wait_for_writing(process, work, skipped):
    """Until a checkpoint is being written, after as many others as are to be skipped; or the process is done."""
    seen = set()
    while process.is_alive():
        with contextlib.suppress(FileNotFoundError):  # it goes when the run is done
            seen |= {path.name for path in work.glob("writing-*")}
        if len(seen) > skipped:
            return


def moment(folder):
    work = folder / "out.partial"
    if (folder / "out").exists():
        return "when the result was there"
    if not (work / "recipe.yaml").exists():
        return "before the run began"
    if (work / "export").exists():
        return "while the result was written"
    return WRITING if list(work.glob("writing-*")) else "between checkpoints"
