import contextlib
import math

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM

from flexdistill.attention_modes import attention_function, softmax_mode
from flexdistill.conversion import restore_softmax
from flexdistill.distillation.layer_selection import choose_layers, converted_modules, kl_with_softmax_in
from flexdistill.errors import NonFiniteLossError
from flexdistill.runtime.interface import NAME
from tests.distillation.stages import MAKERS, assert_equal, parameters, sequences, student

every_model = pytest.mark.parametrize("name", MAKERS)


@torch.no_grad()
def logits(model, tokens=None):
    return model(input_ids=sequences() if tokens is None else tokens).logits


def mean_kl(expected, actual):
    expected, actual = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((expected.exp() * (expected - actual)).sum(-1).mean())


def measured(model, choices, batch_size=3):
    return kl_with_softmax_in(model, choices, sequences(), batch_size, Accelerator(cpu=True))


@every_model
def test_kl_is_that_of_the_restored_model(name):
    model = student(name)
    before, names = parameters(model), list(converted_modules(model))
    choices = [[], names[:1], names[1:], names]
    figures = measured(model, choices)
    assert_equal(parameters(model), before)
    assert model.config._attn_implementation == "flexformer"
    with softmax_mode(model):
        expected = logits(model)
    for choice, figure in zip(choices, figures, strict=True):
        restored = student(name)
        restore_softmax(restored, dict.fromkeys(choice, 0.0))
        assert figure == pytest.approx(mean_kl(expected, logits(restored)), rel=1e-4, abs=1e-6)
    assert figures[0] > figures[1] > figures[3] == pytest.approx(0, abs=1e-6)


def test_only_counted_positions_count():
    model = student("llama")
    tokens = sequences()
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.3
    with softmax_mode(model):
        expected = logits(model)
    arguments = (tokens, 3, Accelerator(cpu=True), counted)
    (figure,) = kl_with_softmax_in(model, [[]], *arguments)
    assert figure == pytest.approx(mean_kl(expected[counted], logits(model)[counted]), rel=1e-4)
    names = list(converted_modules(model))
    gains = choose_layers(model, len(names), *arguments)
    assert sum(gains.values()) == pytest.approx(figure, rel=1e-4)


@every_model
def test_the_choice_is_the_best_one_by_one(name):
    model = student(name)
    names = list(converted_modules(model))
    linear, *singles = measured(model, [[], *([n] for n in names)])
    both = choose_layers(model, 2, sequences(), 3, Accelerator(cpu=True))
    first, second = both
    assert both[first] == pytest.approx(linear - min(singles)) and names[singles.index(min(singles))] == first
    assert {first, second} == set(names)
    assert sum(both.values()) == pytest.approx(linear, rel=1e-4)  # all are softmax, so no KL is left
    assert choose_layers(model, 0, sequences(), 3, Accelerator(cpu=True)) == {}


def test_a_layer_gains_less_after_one_that_does_the_same(monkeypatch):
    """Two copies of the best layer, and one of a lesser: the second copy is worth nothing, which single gains miss."""
    model = student("llama")

    def kl(student, choices, *arguments):
        left = lambda choice: 1.0 - 0.5 * bool({"a", "copy"} & set(choice)) - 0.2 * ("lesser" in choice)  # noqa: E731
        return [left(choice) for choice in choices]

    monkeypatch.setattr("flexdistill.distillation.layer_selection.kl_with_softmax_in", kl)
    monkeypatch.setattr(
        "flexdistill.distillation.layer_selection.converted_modules",
        lambda model: dict.fromkeys(["a", "copy", "lesser"]),
    )
    chosen = choose_layers(model, 2, sequences(), 3, Accelerator(cpu=True))
    assert chosen == {"a": pytest.approx(0.5), "lesser": pytest.approx(0.2)}


def test_layers_that_gain_only_together_are_found(monkeypatch):
    """The best single layer is given up for the second of a pair."""
    model = student("llama")

    def kl(student, choices, *arguments):
        left = lambda choice: 1.0 - 0.3 * ("a" in choice) - 0.2 * ("b" in choice) - 0.5 * ({"b", "c"} <= choice)  # noqa: E731
        return [left(set(choice)) for choice in choices]

    monkeypatch.setattr("flexdistill.distillation.layer_selection.kl_with_softmax_in", kl)
    monkeypatch.setattr(
        "flexdistill.distillation.layer_selection.converted_modules", lambda model: dict.fromkeys(["a", "b", "c", "d"])
    )
    chosen = choose_layers(model, 2, sequences(), 3, Accelerator(cpu=True))
    assert chosen == {"b": pytest.approx(0.2), "c": pytest.approx(0.5)}


@pytest.mark.parametrize("figure", [0.0, math.nan])
def test_a_choice_among_equals_ends(monkeypatch, figure):
    module = "flexdistill.distillation.layer_selection"
    monkeypatch.setattr(f"{module}.kl_with_softmax_in", lambda student, choices, *arguments: [figure] * len(choices))
    monkeypatch.setattr(f"{module}.converted_modules", lambda model: dict.fromkeys(["a", "b", "c"]))
    unusable = pytest.raises(NonFiniteLossError, match="The KL with softmax in a is nan")
    with unusable if math.isnan(figure) else contextlib.nullcontext():
        assert choose_layers(None, 1, sequences(), 3, Accelerator(cpu=True)) == {"a": 0.0}


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("window", [0, 8])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_restored_model_generates_and_reloads(name, window, layer, tmp_path):
    model = student(name, window=window)
    kept = list(converted_modules(model))[layer]
    restore_softmax(model, {kept: 0.25})
    assert not hasattr(model.base_model.get_submodule(kept), NAME)
    prompt = sequences(2, 20)
    settings = dict(max_new_tokens=16, do_sample=False, eos_token_id=None, pad_token_id=0)
    output = model.generate(prompt, **settings, return_dict_in_generate=True)
    assert torch.equal(output.sequences, model.generate(prompt, **settings, use_cache=False))
    layers = output.past_key_values.layers
    assert [type(cache).__name__ for cache in layers] == [
        "DynamicLayer" if index == layer else "FlexformerCacheLayer" for index in range(2)
    ]
    assert layers[layer].keys.shape[-2] == 20 + 15

    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.config.flexformer["kept_softmax"] == {kept: 0.25}
    assert list(reloaded.config.kernel_specs) == list(converted_modules(model)) != []
    assert torch.equal(logits(reloaded), logits(model))
    assert torch.equal(reloaded.generate(prompt, **settings), output.sequences)


def test_restored_modules_compute_softmax():
    model, called = student("llama"), []
    first = next(iter(converted_modules(model)))
    restore_softmax(model, {first: 0.0})

    def record(call):
        called.append(call.feature_map is None)
        return call.flexformer()

    with attention_function(model, record):
        logits(model)
    assert called == [True, False]
