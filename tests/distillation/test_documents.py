import copy
from itertools import pairwise

import pytest
import torch

from flexdistill.attention_modes import run_base_model, softmax_mode
from flexdistill.distillation.documents import DocumentMasks, document_positions
from flexdistill.errors import FlexdistillError
from tests.distillation.stages import attention_transfer, logit_distillation, student, teacher

SEPARATOR = 0
ENDS = [[7, 24], [2, 5, 20, 24]]


def packed() -> torch.Tensor:
    tokens = torch.randint(2, 256, (2, 24), generator=torch.Generator().manual_seed(6))
    for row, ends in zip(tokens, ENDS, strict=True):
        row[[end - 1 for end in ends]] = SEPARATOR
    return tokens


def documents() -> list[torch.Tensor]:
    rows = zip(packed(), ENDS, strict=True)
    return [row[None, start:end] for row, ends in rows for start, end in pairwise([0, *ends])]


def test_positions():
    tokens = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [5, 6, 7, 8, 9, 5, 6]])
    assert document_positions(tokens, 0).tolist() == [[0, 1, 0, 1, 2, 0, 0], [0, 1, 2, 3, 4, 5, 6]]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("softmax", [False, True])
@torch.no_grad()
def test_each_document_is_run_as_if_alone(name, softmax):
    model = student(name)
    masks = DocumentMasks(model, SEPARATOR)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        with softmax_mode(each) if softmax else torch.no_grad(), masks.active():
            together = run_base_model(each, packed())[0]
            alone = torch.cat([run_base_model(each, part)[0][0] for part in documents()])
        torch.testing.assert_close(together.flatten(0, 1), alone, rtol=1e-4, atol=1e-5)
    inactive = run_base_model(model, packed())[0]
    masks.remove()
    assert torch.equal(inactive, run_base_model(model, packed())[0])


@pytest.mark.parametrize("make", [attention_transfer, logit_distillation])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_gradients_are_those_of_the_documents_one_by_one(make, name):
    torch.manual_seed(0)
    model = student(name, window=3)
    masks = DocumentMasks(model, SEPARATOR)
    stage = make(model)
    results = []
    for batches in ([packed()], documents()):
        model.zero_grad()
        with stage.active(), masks.active():
            losses = [stage.backward(batch) for batch in batches]
        gradients = torch.cat([p.grad.flatten() for p in stage.trained().values() if p.grad is not None])
        results.append((sum(losses[1:], losses[0]), gradients))
    (together, actual), (alone, expected) = results
    assert int(together.count) == int(alone.count) == 48
    assert float(together.total) == pytest.approx(float(alone.total), rel=1e-4)
    for name, part in alone.parts.items():
        assert float(together.parts[name]) == pytest.approx(float(part), rel=1e-4, abs=1e-6)
    assert (actual - expected).norm() <= 1e-4 * expected.norm() and expected.norm() > 0


def test_models_that_cannot_are_refused():
    model = teacher("bert")
    with pytest.raises(FlexdistillError, match="BertForMaskedLM lets documents of one sequence see each other"):
        DocumentMasks(model, SEPARATOR)
    assert not model.base_model._forward_pre_hooks
    with pytest.raises(FlexdistillError, match="no token that ends a document"):
        DocumentMasks(teacher("llama"), None)
