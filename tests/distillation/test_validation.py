import json

import pytest

from flexdistill.distillation.averaging import use_final_weights
from flexdistill.distillation.checkpoints import Checkpoints
from tests.distillation.stages import (
    assert_equal,
    make_stage,
    parameters,
    sequences,
    train,
)

HELD_OUT = sequences(20)[-5:]


def losses(log):
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return {entry["step"]: entry["validation_loss"] for entry in entries if "validation_loss" in entry}


@pytest.mark.parametrize("name", ["attention transfer", "full", "lora", "labels"])
def test_validation_is_the_stages_own_loss_and_changes_nothing(name, tmp_path):
    plain, validated, log = make_stage(name), make_stage(name, validation_every=4), tmp_path / "log.jsonl"
    train(plain)
    train(validated, validation=HELD_OUT, log_file=log)
    assert_equal(parameters(validated.model), parameters(plain.model))
    found = losses(log)
    assert list(found) == [4, 6]
    with plain.active():
        expected = plain.backward(HELD_OUT)
    assert found[6] == pytest.approx(float(expected.total / expected.count), rel=1e-5)


def test_validation_is_of_the_averaged_weights(tmp_path):
    stage = make_stage("full", validation_every=6, ema_decay=0.9)
    train(stage, validation=HELD_OUT, log_file=tmp_path / "log.jsonl")
    use_final_weights(stage.optimizer)
    with stage.active():
        expected = stage.backward(HELD_OUT)
    assert losses(tmp_path / "log.jsonl")[6] == pytest.approx(float(expected.total / expected.count), rel=1e-5)


DIVERGING = dict(learning_rate=0.2, validation_every=1, patience=2, warmup_steps=0)


@pytest.mark.parametrize("name", ["attention transfer", "full"])
def test_a_stage_ends_early_with_its_best_weights(name, tmp_path):
    """At this learning rate the loss soon rises."""
    stage, log, course = make_stage(name, **DIVERGING), tmp_path / "log.jsonl", []
    checkpoints = Checkpoints(tmp_path / "run", keep=9, every_steps=100)
    options = dict(validation=HELD_OUT, log_file=log, checkpoints=checkpoints)
    summary = train(stage, steps=40, update=lambda *a, **k: course.append(parameters(stage.model)), **options)
    found = losses(log)
    best = min(found, key=found.get)
    assert best < 38 and list(found) == list(range(1, best + 3))
    assert (summary["steps"], summary["tokens"]) == (best + 2, (best + 2) * 4 * 24)
    assert checkpoints.latest().step == best + 2
    use_final_weights(stage.optimizer)
    assert_equal(parameters(stage.model), course[best - 1])

    resumed = make_stage(name, **DIVERGING)
    checkpoints.latest().load(resumed)
    again = train(resumed, steps=40, start_step=best + 2, **options)
    assert again["steps"] == best + 2 and again["last_loss"] == summary["last_loss"]
    use_final_weights(resumed.optimizer)
    assert_equal(parameters(resumed.model), course[best - 1])


def test_patience_survives_resuming(tmp_path):
    whole = make_stage("full", **DIVERGING)
    expected = train(whole, steps=40, validation=HELD_OUT, log_file=tmp_path / "whole.jsonl")
    stop, options = expected["steps"] - 1, dict(validation=HELD_OUT, log_file=tmp_path / "log.jsonl")
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=stop)
    stopping = dict(stop_step=stop, checkpoints=checkpoints)
    train(make_stage("full", **DIVERGING), steps=40, **stopping, **options)
    resumed = make_stage("full", **DIVERGING)
    checkpoints.latest().load(resumed)
    actual = train(resumed, steps=40, start_step=stop, **options)
    assert actual["steps"] == expected["steps"]
    for stage in (whole, resumed):
        use_final_weights(stage.optimizer)
    assert_equal(parameters(resumed.model), parameters(whole.model))


def test_a_stage_that_improves_runs_to_its_end(tmp_path):
    stage = make_stage("full", validation_every=2, patience=1, learning_rate=1e-3)
    summary = train(stage, validation=sequences(), log_file=tmp_path / "log.jsonl")  # what it trains on
    found = list(losses(tmp_path / "log.jsonl").values())
    assert summary["steps"] == 6 and found == sorted(found, reverse=True) and len(found) == 3
