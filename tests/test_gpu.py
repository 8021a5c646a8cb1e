"""What only a GPU shows: the same numbers as on CPU, in float32 and bf16, and a whole conversion."""

import pytest
import torch

from flexdistill.pipeline import convert
from flexdistill.recipe import Recipe
from flexdistill.runtime.attention import attend
from flexdistill.runtime.configuration_flexformer import KernelSpec
from flexdistill.runtime.registry import build_feature_map, kernels

from .tiny import save_tiny, tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("window", [0, 64])
@pytest.mark.parametrize(("variant", "component"), kernels())
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_attention_on_gpu_equals_cpu(variant, component, window, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    torch.manual_seed(0)
    feature_map = build_feature_map(KernelSpec(variant, component, 8, 4, 64, 64, False, window=window))
    feature_map.reset_parameters()
    query, key, value = torch.randn(2, 8, 500, 64), torch.randn(2, 4, 500, 64), torch.randn(2, 4, 500, 64)
    visible = torch.ones(2, 500, dtype=torch.bool)
    visible[1, :77] = False
    inputs = [x.to(dtype) for x in (query, key, value)]
    expected, _ = attend(feature_map, *(x.float() for x in inputs), scaling=64**-0.5, visible=visible)
    feature_map.cuda()
    actual, _ = attend(feature_map, *(x.cuda() for x in inputs), scaling=64**-0.5, visible=visible.cuda())
    assert (actual.float().cpu() - expected).norm() <= tolerance * expected.norm()


def test_conversion_on_gpu(tmp_path):
    source = tmp_path / "tiny"
    source.mkdir()
    save_tiny(source, tiny_llama(), tiny_tokenizer())
    recipe = Recipe().override(
        {
            "model": str(source),
            "kernel.window": 8,
            "data.source": "sample",
            "data.sequence_length": 64,
            "attention_transfer.steps": 5,
            "logit_distillation.steps": 5,
            "evaluation.sequences": 8,
        }
    )
    metrics = convert(recipe, tmp_path / "out")
    assert metrics["device"] != "cpu"
    assert metrics["reload_max_logit_difference"] <= 1e-5
    assert metrics["student"]["kl"] < metrics["rows"][-1]["kl"]
