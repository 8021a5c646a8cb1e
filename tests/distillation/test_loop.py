import errno
import json
import math
import os
import re
import resource
import signal
from pathlib import Path

import pytest
import torch

from flexdistill.distillation import checkpoints as checkpoints_module
from flexdistill.distillation.checkpoints import Checkpoints
from flexdistill.distillation.loop import learning_rate_factor
from flexdistill.distillation.stage import feature_maps
from flexdistill.errors import FlexdistillError, NonFiniteLossError
from tests.distillation.stages import (
    STAGES,
    assert_equal,
    log_entries,
    logit_distillation,
    make_stage,
    parameters,
    sequences,
    student,
    train,
)
from tests.forked import Forked

every_stage = pytest.mark.parametrize("name", STAGES)


def states(stage):
    return {
        f"{name}/{key}": torch.as_tensor(value).clone()
        for name, parameter in stage.trained().items()
        for key, value in stage.optimizer.state[parameter].items()
    }


@every_stage
@pytest.mark.parametrize("micro_batch_size", [1, 3])
def test_accumulation_is_one_batch(name, micro_batch_size):
    expected, actual = make_stage(name), make_stage(name, micro_batch_size=micro_batch_size)
    summaries = train(expected), train(actual)
    assert summaries[1]["first_loss"] == pytest.approx(summaries[0]["first_loss"], rel=1e-6)
    before = parameters(make_stage(name).model)
    trained = expected.trained()
    assert any(not torch.equal(before[key], parameter) for key, parameter in trained.items())
    for key, parameter in actual.trained().items():
        # parameters that start at 0 have a norm that is small beside the steps that Adam takes
        assert (parameter - trained[key]).norm() <= 1e-5 * max(float(trained[key].norm()), 1.0), key


def test_learning_rate_factor():
    factors = [learning_rate_factor(step, 100, 10, 0.05) for step in range(100)]
    cosine = [0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert factors[:10] == pytest.approx([cosine[step] * (step + 1) / 10 for step in range(10)])
    assert factors[10:] == pytest.approx(cosine[10:])
    assert factors[0] == pytest.approx(0.1) and max(factors) < 1
    assert 0.05 < factors[-1] < 0.051 and learning_rate_factor(100, 100, 10, 0.05) == pytest.approx(0.05)
    assert learning_rate_factor(0, 5, 0, 0.0) == 1 and learning_rate_factor(5, 5, 0, 0.0) == pytest.approx(0)
    assert learning_rate_factor(0, 1, 1, 1.0) == 1
    for steps, warmup_steps, highest in ((260, 30, 0.971), (20, 20, 0.302)):  # docs/training.md
        factors = [learning_rate_factor(step, steps, warmup_steps, 0.05) for step in range(steps)]
        assert max(factors) == pytest.approx(highest, abs=5e-4)


def test_other_schedules():
    linear = [learning_rate_factor(step, 100, 10, 0.2, "linear") for step in range(101)]
    assert linear[9:] == pytest.approx([0.2 + 0.8 * (1 - step / 100) for step in range(9, 101)])
    assert linear[0] == pytest.approx(0.1) and linear[100] == pytest.approx(0.2)
    constant = [learning_rate_factor(step, 100, 4, 0.2, "constant") for step in range(101)]
    assert constant == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 98)


def test_learning_rates_follow_the_factor(tmp_path):
    stage = make_stage("full", learning_rate=1e-4, kernel_learning_rate=2e-3, norm_learning_rate=3e-4)
    rates = []
    train(
        stage,
        log_file=tmp_path / "log.jsonl",
        update=lambda *a, **k: rates.append([g["lr"] for g in stage.optimizer.param_groups]),
    )
    for step, (kernels, norms, weights) in enumerate(rates):
        factor = learning_rate_factor(step, 6, 2, 0.05)
        assert (kernels, norms, weights) == pytest.approx((2e-3 * factor, 3e-4 * factor, 1e-4 * factor))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate_factor"] for line in lines] == [learning_rate_factor(s, 6, 2, 0.05) for s in range(6)]
    assert {"loss", "kl", "gradient_norm", "tokens_per_s"} <= lines[0].keys()


@every_stage
def test_summary_and_log_are_losses_per_token(name, tmp_path):
    stage = make_stage(name)
    with stage.active():
        losses = stage.backward(sequences(4))
    summary = train(make_stage(name), log_file=tmp_path / "log.jsonl")
    first = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert summary["first_loss"] == first["loss"] == pytest.approx(float(losses.total / losses.count), rel=1e-5)
    assert (summary["steps"], summary["tokens"], summary["name"]) == (6, 6 * 4 * 24, stage.name)
    for part, value in losses.parts.items():
        assert first[part] == pytest.approx(float(value / losses.count), rel=1e-4)


def test_gradients_are_clipped_per_group():
    stage = make_stage("attention transfer", clip_norm=1e-3)
    seen, step = [], stage.optimizer.step

    def recording():
        for group in stage.clip_groups:
            seen.append(float(torch.stack([p.grad.norm() for p in group]).norm()))
        return step()

    stage.optimizer.step = recording
    train(stage, steps=1)
    assert len(seen) == 2 and all(norm == pytest.approx(1e-3, rel=1e-3) for norm in seen)


class Interrupted(Exception):
    pass


@every_stage
@pytest.mark.parametrize("stop", [4, 5])
def test_resume_is_bit_identical(name, stop, tmp_path):
    whole = make_stage(name)
    train(whole, log_file=tmp_path / "whole.jsonl")

    checkpoints, log_file = Checkpoints(tmp_path / "run", keep=2, every_steps=3), tmp_path / "resumed.jsonl"

    def stop_at(step, **figures):
        if step == stop:
            raise Interrupted

    options = dict(checkpoints=checkpoints, checkpoint_number=1, log_file=log_file)
    with pytest.raises(Interrupted):
        train(make_stage(name), update=stop_at, **options)
    checkpoint = checkpoints.latest()
    assert (checkpoint.step, checkpoint.folder.name) == (3, "1-00000003")

    torch.manual_seed(99)
    model = student()
    with torch.no_grad():
        for feature_map in feature_maps(model).values():
            for parameter in feature_map.parameters():
                parameter.zero_()
    stage = STAGES[name](model)
    assert checkpoint.stage == stage.name
    checkpoint.load(stage)
    train(stage, start_step=checkpoint.step, **options)
    assert_equal(parameters(stage.model), parameters(whole.model))
    assert_equal(states(stage), states(whole))
    logs = [log_entries(file) for file in (tmp_path / "whole.jsonl", log_file)]
    assert logs[0] == logs[1] and len(logs[0]) == 6


def test_old_checkpoints_are_removed(tmp_path):
    for keep, expected in ((1, [6]), (2, [5, 6]), (9, [1, 2, 3, 4, 5, 6])):
        folder = tmp_path / str(keep)
        train(make_stage("kernels"), checkpoints=Checkpoints(folder, keep, every_steps=1), checkpoint_number=1)
        assert sorted(file.name for file in folder.iterdir()) == [f"1-{step:08d}" for step in expected]
        assert Checkpoints(folder, keep).latest().step == 6
    files = sorted(file.name for file in (tmp_path / "1" / "1-00000006").iterdir())
    tensors = ["optimizer.safetensors", "parameters.safetensors", "states.safetensors"]
    assert files == sorted(["counters.json", "manifest.json", "random.json", *tensors])


def test_the_last_step_is_kept_and_later_stages_are_newer(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=5)
    assert checkpoints.latest() is None
    train(make_stage("attention transfer"), checkpoints=checkpoints)
    assert checkpoints.latest().step == 6
    stage = make_stage("kernels")
    train(stage, steps=1, checkpoints=checkpoints, checkpoint_number=1)
    assert (checkpoints.latest().stage, checkpoints.latest().step) == ("logit_distillation", 1)
    model = student()
    checkpoints.latest().load(logit_distillation(model, train="kernels"))
    assert_equal(parameters(model), parameters(stage.model))


def test_only_one_process_writes(tmp_path):
    train(make_stage("kernels"), checkpoints=Checkpoints(tmp_path, 2, writes=False, every_steps=1))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["first file", "second file", "rename"])
def test_a_checkpoint_that_cannot_be_written_is_not_there(when, tmp_path, monkeypatch):
    checkpoints, calls = Checkpoints(tmp_path, keep=2, every_steps=1), []
    stage = make_stage("kernels")
    train(stage, steps=1, checkpoints=checkpoints)
    before = {file.name: file.read_bytes() for file in (tmp_path / "0-00000001").iterdir()}

    def full(*args):
        calls.append(args)
        if when == "second file" and len(calls) == 1:
            return Path(args[1]).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    target = (os, "replace") if when == "rename" else (checkpoints_module, "save_file")
    monkeypatch.setattr(*target, full)
    message = "0-00000002 could not be written .*No space left on device.*make room .*--resume"
    with pytest.raises(FlexdistillError, match=message):
        checkpoints.save(stage, 0, 2)
    assert [file.name for file in tmp_path.iterdir()] == ["0-00000001"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "0-00000001").iterdir()} == before
    assert checkpoints.latest().step == 1


def write_beyond_the_limit():
    stage = make_stage("full")
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        Checkpoints(Path("run"), 2).save(stage, 0, 1)
    except FlexdistillError as error:
        print(error)


def test_a_real_write_error_is_explained(tmp_path):
    """safetensors has an error type of its own for files that cannot be written."""
    process = Forked([], tmp_path, program=write_beyond_the_limit)
    assert process.wait() == 0, process.stderr
    assert "0-00000001 could not be written" in process.stdout and process.stdout.count("\n") == 1, process.stdout
    assert list((tmp_path / "run").iterdir()) == []


def test_a_torn_checkpoint_is_not_taken(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    stage = make_stage("kernels")
    train(stage, steps=1, checkpoints=checkpoints)
    (tmp_path / "writing-0-00000009").mkdir()
    (tmp_path / "writing-0-00000009" / "parameters.safetensors").write_bytes(b"half")
    assert checkpoints.latest().step == 1
    checkpoints.save(stage, 0, 9)
    assert checkpoints.latest().step == 9


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    train(make_stage("kernels"), steps=1, checkpoints=checkpoints)
    other = student(layers="0")
    with pytest.raises(FlexdistillError, match="layers.1.self_attn.flexformer.*--overwrite"):
        checkpoints.latest().load(logit_distillation(other, train="kernels"))


@every_stage
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kept", [True, False], ids=["checkpoint", "none"])
def test_a_loss_that_is_not_finite_names_its_place(name, layer, kept, tmp_path):
    stage = make_stage(name)

    def poison(step, **figures):
        if step == 3:
            with torch.no_grad():
                next(feature_maps(stage.model)[f"model.layers.{layer}.self_attn"].parameters()).fill_(torch.nan)

    checkpoints = Checkpoints(tmp_path, 2, every_steps=2) if kept else None
    with pytest.raises(NonFiniteLossError) as caught:
        train(stage, update=poison, checkpoints=checkpoints)
    message = str(caught.value)
    assert f"{stage.name} stopped at step 4: the loss is nan" in message
    assert re.search(rf"is in \S*layers\.{layer}\.self_attn", message), message
    assert f"checkpoint is {tmp_path / '0-00000002'};" in message if kept else "no earlier checkpoint" in message
    assert "\n" not in message


def test_a_gradient_that_is_not_finite_stops_before_the_step():
    stage = make_stage("full")
    original, count = stage.backward, []

    def backward(batch):
        losses = original(batch)
        count.append(1)
        if len(count) == 3:
            next(iter(stage.trained().values())).grad.fill_(torch.inf)
        return losses

    stage.backward, before = backward, {}
    with pytest.raises(NonFiniteLossError, match="stopped at step 3: .* the gradients; every layer's output is finite"):
        train(stage, update=lambda *args, **figures: before.update(parameters(stage.model)))
    assert_equal(parameters(stage.model), before)


@every_stage
def test_a_stage_in_pieces_is_the_whole_stage(name, tmp_path):
    whole, pieces = make_stage(name), make_stage(name)
    expected = train(whole, log_file=tmp_path / "whole.jsonl")
    for start, stop in ((0, 2), (2, 5), (5, 6)):
        actual = train(pieces, start_step=start, stop_step=stop, log_file=tmp_path / "pieces.jsonl")
    assert_equal(parameters(pieces.model), parameters(whole.model))
    assert actual | {"elapsed_s": None} == expected | {"elapsed_s": None}
