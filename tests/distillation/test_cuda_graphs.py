"""What can be recorded as a CUDA graph never waits for the device: no operation's result decides what Python does."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.utils import import_utils

from flexdistill.distillation.cuda_graphs import plain_masks
from flexdistill.distillation.stage import backward_counting_guards

from .stages import STAGES, sequences, student

WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class Waited(Exception):
    pass


class NeverWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if WAITS & set(function.tags):
            raise Waited(str(function))
        if "scaled_dot_product" in str(function):  # whose mask could only be of all pairs of tokens
            assert not [x for x in (*arguments[3:], *(keywords or {}).values()) if torch.is_tensor(x) and x.ndim == 4]
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def recording(monkeypatch):
    """transformers takes what runs for something that is recorded."""
    monkeypatch.setattr(import_utils, "is_cuda_stream_capturing", lambda: True)


@pytest.mark.parametrize("kernel", [{}, {"window": 4, "sinks": 2}, {"component": "trigonometric"}], ids=str)
@pytest.mark.parametrize("model", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("name", STAGES)
def test_steps_wait_for_nothing(name, model, kernel, recording):
    if model == "bert" and (name == "labels" or "window" in kernel):
        pytest.skip("an encoder has neither labels nor a window")
    stage = STAGES[name](student(model, **kernel))
    with stage.active(), plain_masks():
        expected = backward_counting_guards(stage, sequences(2))
        gradients = {key: value.grad.clone() for key, value in stage.trained().items() if value.grad is not None}
        stage.optimizer.zero_grad()
        with NeverWaiting():
            losses = backward_counting_guards(stage, sequences(2))
    assert gradients and torch.equal(losses.total, expected.total)
    for key, gradient in gradients.items():
        assert torch.equal(stage.trained()[key].grad, gradient), key


def test_a_packed_sequence_would_make_it_wait(recording):
    stage = STAGES["attention transfer"](student())
    with stage.active(), NeverWaiting(), pytest.raises(Waited):
        backward_counting_guards(stage, sequences(2))


def test_sequences_are_looked_at_again_afterwards():
    stage = STAGES["attention transfer"](student())
    with stage.active():
        with plain_masks():
            backward_counting_guards(stage, sequences(2))
        with NeverWaiting(), pytest.raises(Waited):
            backward_counting_guards(stage, sequences(2))
