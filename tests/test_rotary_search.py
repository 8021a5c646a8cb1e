"""What rotary embeddings models are found to have."""

import math

import pytest
import torch

from flexdistill.conversion import apply_plan, make_plan
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
        ({"longest_wavelength": 10**6}, (None, 0)),
        ({"decay": False}, (None, 0)),
        ({"decay": False, "longest_wavelength": 70}, ("halves", 3)),
        ({"variant": "hedgehog"}, (None, 0)),
    ],
)
def test_kernels_see_short_wavelengths(settings, expected):
    for module in make_plan(tiny_llama(), KernelRecipe(**settings)).converted:
        assert (module.spec.rotary, module.spec.rotary_pairs) == expected


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
