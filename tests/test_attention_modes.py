"""Other attention in the place of a model's own, for as long as its context lasts."""

import gc
import weakref

import torch

from flexdistill.attention_modes import AttentionCall, attention_function
from tests.tiny import tiny_llama

TOKENS = torch.tensor([[3, 4, 5, 6]])


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_the_innermost_function_is_called():
    model, called = tiny_llama(), []

    def named(name):
        def function(call):
            called.append(name)
            return call.softmax()

        return function

    expected = logits(model)
    with attention_function(model, named("outer")):
        with attention_function(model, named("inner")):
            logits(model)
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(model), expected)
    layers = model.config.num_hidden_layers
    assert called == ["inner"] * layers + ["outer"] * layers


def test_nothing_holds_a_model_behind_its_context():
    class Function:
        def __call__(self, call: AttentionCall) -> torch.Tensor:
            return call.softmax()

    model, function = tiny_llama(), Function()
    with attention_function(model, function):
        logits(model)
    function = weakref.ref(function)
    gc.collect()
    assert function() is None
