"""The gradients of a step and its losses; sums over processes are in test_parallel.py."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from flexdistill.distillation.reduction import Gradients, LossReduction
from flexdistill.distillation.stage import StepLosses

SIZES = {
    "alike": [[(3, 4), (5,)], [(2, 2), (7,)], [(1,), (6, 2)]],
    "unlike": [[(3, 4), (5,)], [(2, 2)]],
    "one": [[(9,)]],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_groups_are_clipped_each_by_its_own_norm(sizes, scale):
    torch.manual_seed(0)
    groups = [[nn.Parameter(torch.zeros(size)) for size in group] for group in sizes]
    for factor, group in enumerate(groups, start=1):
        for parameter in group:
            parameter.grad = factor * scale * torch.randn_like(parameter)
    expected = [[parameter.grad.clone() for parameter in group] for group in groups]
    norms = torch.stack([torch.cat([x.flatten() for x in group]).norm() for group in expected])
    norm = Gradients([p for group in groups for p in group], Accelerator(cpu=True)).clip(groups, 0.5)
    torch.testing.assert_close(norm, norms.norm())
    for group, before, own in zip(groups, expected, norms, strict=True):
        for parameter, gradient in zip(group, before, strict=True):
            torch.testing.assert_close(parameter.grad, gradient * min(1.0, 0.5 / float(own)), rtol=1e-5, atol=1e-8)


def test_a_group_that_is_not_finite_leaves_the_others():
    groups = [[nn.Parameter(torch.zeros(2))] for _ in range(2)]
    groups[0][0].grad, groups[1][0].grad = torch.tensor([torch.inf, 1.0]), torch.tensor([3.0, 4.0])
    norm = Gradients([group[0] for group in groups], Accelerator(cpu=True)).clip(groups, 1.0)
    assert not norm.isfinite()
    torch.testing.assert_close(groups[1][0].grad, torch.tensor([0.6, 0.8]))


def test_sums_keep_counts_that_float32_does_not_hold():
    count = torch.tensor(2**24 + 1)
    losses = StepLosses(torch.tensor(1.5), count, {"kl": torch.tensor(0.25), "share": torch.tensor(0.5).double()})
    sums = LossReduction(Accelerator(cpu=True))(losses)
    assert (sums.total, sums.count, sums.parts) == (1.5, 2**24 + 1, {"kl": 0.25, "share": 0.5})
    assert sums.count.dtype == torch.float64
