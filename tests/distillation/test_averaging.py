import pytest
import torch

from flexdistill.distillation.averaging import averaged, use_final_weights
from flexdistill.distillation.checkpoints import Checkpoints
from tests.distillation.stages import (
    assert_equal,
    log_entries,
    make_stage,
    parameters,
    sequences,
    train,
)

every_stage = pytest.mark.parametrize("name", ["attention transfer", "full"])


def trained(stage):
    return {name: parameter.detach().clone() for name, parameter in stage.trained().items()}


@every_stage
def test_the_average_is_that_of_all_steps(name):
    stage, course = make_stage(name, ema_decay=0.9), []
    train(stage, steps=12, update=lambda *args, **figures: course.append(trained(stage)))
    expected = course[0]
    for step, weights in enumerate(course, start=1):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in weights.items()}
    last = parameters(stage.model)
    with averaged(stage.optimizer):
        inside = trained(stage)
    assert_equal(parameters(stage.model), last)
    use_final_weights(stage.optimizer)
    assert_equal(trained(stage), inside)
    for name, value in inside.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(value, course[-1][name]) for name, value in inside.items())


@every_stage
def test_averages_survive_resuming(name, tmp_path):
    whole = make_stage(name, ema_decay=0.9)
    train(whole)
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=3)
    first = make_stage(name, ema_decay=0.9)
    train(first, stop_step=3, checkpoints=checkpoints)
    second = make_stage(name, ema_decay=0.9)
    checkpoints.latest().load(second)
    train(second, start_step=3)
    for stage in (whole, second):
        use_final_weights(stage.optimizer)
    assert_equal(parameters(second.model), parameters(whole.model))


def test_without_averages_the_last_weights_stay():
    stage = make_stage("full")
    train(stage)
    last = parameters(stage.model)
    use_final_weights(stage.optimizer)
    assert_equal(parameters(stage.model), last)


@pytest.mark.parametrize("settings", [{"ema_decay": 0.9}, {"validation_every": 1, "patience": 9}])
def test_steps_that_overflow_in_fp16_count_for_nothing(settings, tmp_path):
    """The scaler skips them before the optimiser has any state; a checkpoint after the first has none either."""

    def overflowing():
        stage = make_stage("full", **settings)
        stage.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
        stage.states = {"scaler": stage.scaler}
        return stage

    options = {"validation": sequences(), "log_file": tmp_path / "log.jsonl"}
    stage, course = overflowing(), []
    before = trained(stage)
    train(stage, steps=12, update=lambda *args, **figures: course.append(trained(stage)), **options)
    skipped = sum(all(torch.equal(weights[name], before[name]) for name in before) for weights in course)
    assert 0 < skipped < 12
    assert sum("validation_loss" in entry for entry in log_entries(options["log_file"])) in (0, 12 - skipped)
    use_final_weights(stage.optimizer)
    final = trained(stage)
    assert any(not torch.equal(final[name], before[name]) for name in before)
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    train(overflowing(), steps=12, stop_step=1, checkpoints=checkpoints, **options)
    resumed = overflowing()
    checkpoints.latest().load(resumed)
    train(resumed, steps=12, start_step=1, **options)
    use_final_weights(resumed.optimizer)
    assert_equal(trained(resumed), final)
