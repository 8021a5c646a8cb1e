import pytest
import torch

from flexdistill.distillation.optimizers import norm_parameters
from flexdistill.distillation.stage import kernel_parameters
from tests.distillation.stages import (
    MAKERS,
    attention_transfer,
    label_training,
    logit_distillation,
    parameters,
    student,
    teacher,
    train,
)

NORMS = {"gpt2": 2 * (2 * 2 + 1), "llama": 2 * 2 + 1, "bert": 2 * (2 * 2 + 2)}


@pytest.mark.parametrize("name", MAKERS)
def test_norms(name):
    found = norm_parameters(teacher(name))
    assert len(found) == NORMS[name]
    assert all(parameter.ndim == 1 for parameter in found.values())


@pytest.mark.parametrize("make", [logit_distillation, label_training])
def test_groups(make):
    model = student()
    stage = make(model, learning_rate=1e-3, kernel_learning_rate=2e-3, norm_learning_rate=3e-3, weight_decay=0.1)
    groups = {group["name"]: group for group in stage.optimizer.param_groups}
    assert list(groups) == ["kernels", "norms", "weights"]
    assert [group["lr"] for group in groups.values()] == [2e-3, 3e-3, 1e-3]
    assert [group["weight_decay"] for group in groups.values()] == [0, 0, 0.1]
    assert groups["kernels"]["params"] == list(kernel_parameters(model).values())
    assert groups["norms"]["params"] == list(norm_parameters(model).values())
    assert sum(len(group["params"]) for group in groups.values()) == len(list(model.parameters()))


def test_norms_learn_as_the_rest_does_unless_told():
    stage = logit_distillation(student(), learning_rate=1e-3, kernel_learning_rate=3e-3)
    assert [group["lr"] for group in stage.optimizer.param_groups] == [3e-3, 1e-3, 1e-3]
    lora = logit_distillation(student(), train="lora")
    assert [group["name"] for group in lora.optimizer.param_groups] == ["kernels", "weights"]


@pytest.mark.parametrize("make", [attention_transfer, logit_distillation])
def test_optimizer_is_the_one_that_is_named(make):
    for name, expected in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        assert type(make(student(), optimizer=name).optimizer) is expected
    betas = {attention_transfer: (0.9, 0.999), logit_distillation: (0.9, 0.95)}
    assert make(student()).optimizer.param_groups[0]["betas"] == betas[make]


def test_weights_decay_and_kernels_do_not():
    results = []
    for weight_decay in (0.0, 0.5):
        torch.manual_seed(1)
        model = student()
        train(logit_distillation(model, weight_decay=weight_decay, learning_rate=1e-2), steps=1)
        results.append(parameters(model))
    kernels, norms = kernel_parameters(model), norm_parameters(model)
    for name, plain in results[0].items():
        assert torch.equal(plain, results[1][name]) == (name in kernels or name in norms), name
