import pytest
import torch

from tests.distillation.stages import label_training, sequences, student, train


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_loss_and_gradients_are_the_models_own(name):
    model = student(name)
    stage = label_training(model)
    with stage.active():
        losses = stage.backward(sequences())
    actual = {key: p.grad.clone() for key, p in stage.trained().items() if p.grad is not None}
    model.zero_grad()
    expected = model(input_ids=sequences(), labels=sequences()).loss
    expected.backward()
    assert float(losses.total / losses.count) == pytest.approx(expected.item(), rel=1e-5)
    own = dict(model.named_parameters())
    for key, gradient in actual.items():
        torch.testing.assert_close(gradient / losses.count, own[key].grad, rtol=1e-4, atol=1e-6)


def test_everything_learns():
    model = student()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    summary = train(label_training(model, learning_rate=1e-2), steps=30)
    assert summary["last_loss"] < 0.7 * summary["first_loss"]
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())
