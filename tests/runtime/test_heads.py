"""One export serves every head that transformers has for its base model."""

import pytest
import torch
import transformers

from benchmarks.architectures import outputs, runs, tiny_model
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.recipe import KernelRecipe
from flexdistill.runtime.interface import NAME
from flexdistill.runtime.modeling_flexformer import FlexformerMixin

# heads that must be among those that the type's auto_map names
HEADS = {
    "llama": {"CausalLM", "SequenceClassification", "TokenClassification", "QuestionAnswering"},
    "bert": {"MaskedLM", "SequenceClassification", "TokenClassification", "QuestionAnswering", "MultipleChoice"},
    "bart": {"Seq2SeqLM", "CausalLM", "SequenceClassification", "QuestionAnswering"},
    "whisper": {"SpeechSeq2Seq", "CausalLM", "AudioClassification"},
    "vit": {"ImageClassification", "MaskedImageModeling"},
    "clip": {"ZeroShotImageClassification", "ImageClassification"},
    "llava": {"ImageTextToText"},
}


def is_kernel(key):
    return NAME in key.split(".")


@pytest.mark.parametrize("model_type", HEADS)
def test_heads(model_type, tmp_path):
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path / "base")
    model = apply_plan(model, make_plan(model, KernelRecipe()))
    model.save_pretrained(tmp_path / "converted")
    kernels = [parameter for name, parameter in model.named_parameters() if is_kernel(name)]
    autos = [name for name in model.config.auto_map if name.startswith("AutoModel")]
    assert {f"AutoModelFor{head}" for head in HEADS[model_type]} | {"AutoModel"} <= set(autos)
    for auto in (getattr(transformers, name) for name in autos):
        base, base_report = auto.from_pretrained(tmp_path / "base", output_loading_info=True)
        head, report = auto.from_pretrained(tmp_path / "converted", output_loading_info=True)
        assert isinstance(head, FlexformerMixin) and isinstance(head, type(base))
        missing = {key for key in report["missing_keys"] if not is_kernel(key)}
        assert missing == base_report["missing_keys"], auto
        if base.base_model_prefix != model.base_model_prefix:
            continue  # transformers' own head, too, does not find the base model's weights then
        assert missing == report["missing_keys"], auto
        found = [parameter for name, parameter in head.named_parameters() if is_kernel(name)]
        assert found and all(any(torch.equal(ours, theirs) for theirs in kernels) for ours in found), auto


@pytest.mark.parametrize("model_type", ["llama", "bert", "vit"])
def test_base_model_of_every_head_is_the_same(model_type, tmp_path):
    model = tiny_model(model_type)
    model = apply_plan(model, make_plan(model, KernelRecipe())).eval()
    model.save_pretrained(tmp_path)
    _, inputs = next(runs(model.base_model))
    expected = outputs(model.base_model, inputs)[0]
    for auto in (name for name in model.config.auto_map if name.startswith("AutoModel")):
        head = getattr(transformers, auto).from_pretrained(tmp_path)
        if head.base_model_prefix != model.base_model_prefix and head.base_model is not head:
            continue
        assert torch.equal(outputs(head.base_model, inputs)[0], expected), auto
