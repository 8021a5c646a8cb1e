import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

from flexdistill.distillation.embeddings import has_tied_embeddings, retie, untie
from tests.distillation.stages import logit_distillation, sequences, student, teacher, train

AUTO = {"gpt2": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
tied_models = pytest.mark.parametrize("name", AUTO)


@torch.no_grad()
def logits(model):
    return model(input_ids=sequences()).logits


def test_which_models_are_tied():
    assert has_tied_embeddings(teacher("gpt2")) and has_tied_embeddings(teacher("bert"))
    assert not has_tied_embeddings(teacher("llama"))


@tied_models
@pytest.mark.parametrize("end", ["untied", "retied"])
def test_embeddings_are_trained_apart(name, end, tmp_path):
    torch.manual_seed(0)
    model = student(name)
    before = logits(model)
    tied = untie(model)
    assert not has_tied_embeddings(model) and torch.equal(logits(model), before)
    train(logit_distillation(model, learning_rate=1e-2))
    source, target = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    mean = (source + target).detach() / 2
    assert not torch.equal(source, target)
    bias = model.get_output_embeddings().bias
    trained_bias = None if bias is None else bias.detach().clone()
    if end == "retied":
        retie(model, tied)
        assert has_tied_embeddings(model)
        torch.testing.assert_close(model.get_input_embeddings().weight.detach(), mean)
    expected = logits(model)
    bias = model.get_output_embeddings().bias
    assert bias is None or torch.equal(bias, trained_bias)
    model.save_pretrained(tmp_path)
    reloaded = AUTO[name].from_pretrained(tmp_path)
    assert has_tied_embeddings(reloaded) == (end == "retied")
    assert torch.equal(logits(reloaded), expected)


@tied_models
def test_retying_what_was_not_trained_changes_nothing(name):
    model = student(name)
    before, names = logits(model), [n for n, _ in model.named_parameters()]
    retie(model, untie(model))
    assert torch.equal(logits(model), before) and [n for n, _ in model.named_parameters()] == names
