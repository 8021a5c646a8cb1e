import pytest
import torch

from flexdistill.distillation.averaging import averaged, use_final_weights
from flexdistill.distillation.checkpoints import Checkpoints
from tests.distillation.stages import (
    assert_equal,
    make_stage,
    parameters,
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
