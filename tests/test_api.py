"""The public functions as a user of the package meets them."""

import copy
import inspect
from importlib.resources import files

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexdistill.api
from flexdistill.runtime import registry
from flexdistill.runtime.baselines import EluFeatureMap
from tests import tiny

SHORT = {
    "data__source": "sample",
    "data__sequence_length": 16,
    "evaluation__sequences": 2,
    "attention_transfer__steps": 2,
    "attention_transfer__batch_size": 2,
    "logit_distillation__steps": 2,
    "logit_distillation__batch_size": 2,
}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    return tiny.save_tiny(tmp_path / "llama", tiny.tiny_llama(), tiny_tokenizer)


@pytest.fixture
def restored_registry(monkeypatch):
    monkeypatch.setattr(registry, "FEATURE_MAPS", dict(registry.FEATURE_MAPS))


def test_public_names_have_documentation_and_types():
    assert sorted(flexdistill.__all__) == flexdistill.__all__
    assert {"convert", "plan", "distill", "evaluate", "compare", "report"} <= set(flexdistill.__all__)
    for name in flexdistill.__all__:
        found = getattr(flexdistill.api, name, getattr(flexdistill, name))
        assert inspect.getdoc(found), name
        if inspect.isfunction(found):
            assert "Raises:" in found.__doc__, name
            signature = inspect.signature(found)
            assert signature.return_annotation is not inspect.Signature.empty, name
            assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values()), name
    assert (files("flexdistill") / "py.typed").is_file()


def test_distill_in_memory_is_a_conversion(folder, tmp_path):
    metrics = flexdistill.convert(str(folder), tmp_path / "out", **SHORT)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    student, in_memory = flexdistill.distill(model, tokenizer, **SHORT)
    assert in_memory["rows"] == metrics["rows"] and in_memory["attention_kl"] == metrics["attention_kl"]
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(student.state_dict()[name], weight), name
    for name, weight in tiny.tiny_llama().state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    assert not student.training
    with pytest.raises(flexdistill.FlexdistillError, match="and 4 sinks cover sequences of 16"):
        flexdistill.distill(model, tokenizer, **SHORT, kernel__window=12, kernel__sinks=4)


def test_distill_takes_a_model_as_it_is_trained(folder):
    """In training mode, or in half precision: the student is that of the same weights as `convert` loads them."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    original = AutoModelForCausalLM.from_pretrained(folder).bfloat16()
    given = {"bf16": original, "float32": copy.deepcopy(original).float(), "trained": copy.deepcopy(original).train()}
    with torch.no_grad():
        given["trained"].config.attention_dropout = 0.5
        for module in given["trained"].modules():
            module.attention_dropout = 0.5
    results = {name: flexdistill.distill(model, tokenizer, **SHORT) for name, model in given.items()}
    expected, metrics = results.pop("float32")
    for name, (student, found) in results.items():
        assert found["rows"] == metrics["rows"], name
        assert not student.training and {p.dtype for p in student.parameters()} == {torch.float32}
        assert all(map(torch.equal, student.state_dict().values(), expected.state_dict().values())), name
    assert given["trained"].training and given["bf16"].dtype == torch.bfloat16


def test_a_student_of_adapters_can_be_trained_further(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    student, _ = flexdistill.distill(model, tokenizer, **SHORT, logit_distillation__train="lora")
    assert all(parameter.requires_grad for parameter in student.parameters())
    student(input_ids=torch.tensor([[3, 4, 5]])).logits.sum().backward()


def test_plans_of_loaded_models_are_those_of_their_folders(folder):
    loaded = flexdistill.plan(AutoModelForCausalLM.from_pretrained(folder), kernel__window=4)
    assert loaded.to_dict() == flexdistill.plan(str(folder), kernel__window=4).to_dict()


def test_report_refuses_what_it_would_ignore(folder):
    with pytest.raises(flexdistill.FlexdistillError, match="heads is for data"):
        flexdistill.report(folder, heads=[0])


class Renamed(EluFeatureMap):
    """A kernel of a user."""


def test_a_registered_kernel_is_converted_to_and_loaded(restored_registry, folder, tmp_path):
    flexdistill.register_feature_map("renamed", Renamed)
    flexdistill.register_feature_map("renamed", Renamed)  # a module that is run again
    flexdistill.convert(str(folder), tmp_path / "out", kernel__variant="renamed", **SHORT)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {type(module.flexformer) for name, module in model.named_modules() if name.endswith("attn")} == {Renamed}


def test_a_kernel_that_is_not_registered_is_named(restored_registry, folder, tmp_path):
    flexdistill.register_feature_map("mine", EluFeatureMap)
    flexdistill.convert(str(folder), tmp_path / "out", kernel__variant="mine", **SHORT)
    del registry.FEATURE_MAPS["mine"]
    with pytest.raises(flexdistill.FlexdistillError, match="The kernel 'mine' of .* is none of flexdistill's"):
        flexdistill.evaluate(tmp_path / "out", teacher=str(folder), data="sample")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("renamed", torch.nn.Linear), "not a subclass of FeatureMap"),
        (("Re named", Renamed), "no name of a kernel"),
        (("hedgehog", Renamed), "HedgehogFeatureMap is registered under this name already"),
        (("hedgehog", Renamed, "other"), "'hedgehog' is registered already"),
        (("nonstationary", Renamed, "hyperbolic"), "HyperbolicFeatureMap is registered"),
        (("nonstationary", Renamed), "'nonstationary' is registered already"),
    ],
)
def test_registration_refuses(restored_registry, arguments, message):
    before = dict(registry.FEATURE_MAPS)
    with pytest.raises(ValueError, match=message):
        flexdistill.register_feature_map(*arguments)
    assert before == registry.FEATURE_MAPS


def test_a_component_is_added_to_one_variant(restored_registry):
    flexdistill.register_feature_map("nonstationary", Renamed, "mine")
    assert registry.feature_map_class("nonstationary", "mine") is Renamed
    assert "mine" not in registry.FEATURE_MAPS["stationary"]
