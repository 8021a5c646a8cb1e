"""What rotary embeddings models are found to have."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexdistill import rotary_search
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.errors import FlexdistillError
from flexdistill.evaluation import load_converted
from flexdistill.recipe import KernelRecipe
from flexdistill.rotary_search import rotary_embeddings
from flexdistill.runtime.cache import cache_num_bytes
from tests.tiny import tiny_gpt2, tiny_llama


def test_wavelengths_of_llama():
    model = tiny_llama()
    modules = [layer.self_attn for layer in model.model.layers]
    found = rotary_embeddings(model, modules)
    assert list(found) == modules
    embedding = found[modules[0]]
    assert embedding.layout == "halves"
    expected = [2 * math.pi * 10_000 ** (pair / 8) for pair in range(8)]
    assert embedding.wavelengths == pytest.approx(expected, rel=1e-3)
    assert [embedding.pairs_within(tokens) for tokens in (0, 6, 7, 20, 10**6)] == [0, 0, 1, 2, 8]
    assert not any(module._forward_pre_hooks for module in modules)


def test_models_without_rotary_embedding_have_none():
    model = tiny_gpt2()
    assert not rotary_embeddings(model, [block.attn for block in model.transformer.h])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, ("halves", 2)),
        ({"longest_wavelength": 0}, ("halves", 0)),
        ({"window": 19}, ("halves", 2)),
        ({"window": 20}, ("halves", 0)),
        ({"window": 20, "longest_wavelength": 70}, ("halves", 3)),
        ({"longest_wavelength": 10**6}, (None, 0)),
        ({"decay": False}, (None, 0)),
        ({"decay": False, "longest_wavelength": 70}, ("halves", 3)),
        ({"variant": "hedgehog"}, (None, 0)),
    ],
)
def test_kernels_see_short_wavelengths(settings, expected):
    for module in make_plan(tiny_llama(), KernelRecipe(**settings)).converted:
        assert (module.spec.rotary, module.spec.rotary_pairs) == expected


def test_what_is_not_there_cannot_be_taken_out(monkeypatch):
    message = "that becomes linear has rotary embedding that can be taken out; leave --longest-wavelength out"
    with pytest.raises(FlexdistillError, match=f"No layer of GPT2LMHeadModel {message}"):
        make_plan(tiny_gpt2(), KernelRecipe(longest_wavelength=20))
    monkeypatch.setattr(rotary_search, "LAYOUTS", ())
    with pytest.raises(FlexdistillError, match=message):
        make_plan(tiny_llama(), KernelRecipe(longest_wavelength=20))


def test_half_precision_is_told_from_other_forms():
    model = tiny_llama().bfloat16()
    found = rotary_embeddings(model, [layer.self_attn for layer in model.model.layers])
    assert [embedding.layout for embedding in found.values()] == ["halves", "halves"]


def test_unknown_forms_stay_and_are_named(monkeypatch):
    monkeypatch.setattr(rotary_search, "LAYOUTS", ("interleaved",))
    plan = make_plan(tiny_llama(), KernelRecipe())
    assert all(module.spec.rotary is None for module in plan.converted)
    reason = "softmax attention; kernel sees all rotary embedding, which is of an unknown form"
    assert [module.reason for module in plan.converted] == [reason, reason]
    monkeypatch.undo()
    reasons = [module.reason for module in make_plan(tiny_llama(), KernelRecipe()).converted]
    assert reasons == ["softmax attention; kernel sees 2 of 8 rotary pairs"] * 2


@torch.no_grad()
def test_models_converted_before_load_as_they_are(tmp_path):
    student = apply_plan(model := tiny_llama(), make_plan(model, KernelRecipe(longest_wavelength=10**9)))
    student.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if not n.endswith("_unit")}, file, {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for spec in config["flexformer"]["layers"].values():
        for name in ("rotary", "rotary_dim", "rotary_pairs"):
            del spec[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens = torch.arange(30)[None]
    assert torch.equal(load_converted(tmp_path)(tokens).logits, student(tokens).logits)


@torch.no_grad()
@pytest.mark.parametrize("window", [0, 6])
def test_a_converted_model_does_not_see_where_text_starts(window):
    model = tiny_llama()
    plan = make_plan(model, KernelRecipe(window=window, longest_wavelength=0))
    student = apply_plan(model, plan)
    tokens = torch.arange(40)[None]
    cached = student(tokens, use_cache=True)
    later = student(tokens, position_ids=tokens + 400).logits
    torch.testing.assert_close(later, cached.logits, rtol=1e-3, atol=1e-3)
    assert cache_num_bytes(cached.past_key_values) == plan.state_bytes
