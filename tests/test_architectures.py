"""No family has code of its own: a sample of architectures converts, keeps its teacher, reloads and generates.

The sample comes from the sweep, `benchmarks/architectures.py`, which goes over all of transformers.
"""

from pathlib import Path

import pytest
import torch
import transformers

import flexdistill  # noqa: F401  registers converted models with the auto classes
from benchmarks.architectures import CONVERTS, IN_PART, REFUSED, WRONG, markdown, sweep
from flexdistill.attention_modes import softmax_mode
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.recipe import KernelRecipe
from flexdistill.runtime.cache import FlexformerCacheLayer

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
HYBRID = GROUPED | {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
# class -> (configuration, how many of its modules convert)
ARCHITECTURES = {
    "GPT2LMHeadModel": (SIZES, 2),
    "LlamaForCausalLM": (GROUPED, 2),
    "Qwen2ForCausalLM": (GROUPED, 2),
    "Qwen3ForCausalLM": (GROUPED, 2),
    "MistralForCausalLM": (GROUPED | {"sliding_window": None}, 2),
    "Gemma2ForCausalLM": (HYBRID | {"attn_logit_softcapping": None}, 1),
    "Gemma3ForCausalLM": (HYBRID, 1),
    "PhiForCausalLM": (SIZES, 2),
    "GPTNeoXForCausalLM": (SIZES, 2),
    "OPTForCausalLM": (SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}, 2),
    "MixtralForCausalLM": (GROUPED, 2),
    "OlmoeForCausalLM": (GROUPED, 2),
    "Olmo2ForCausalLM": (GROUPED, 2),
    "Phi3ForCausalLM": (GROUPED, 2),
    "GraniteForCausalLM": (GROUPED, 2),
    "Starcoder2ForCausalLM": (GROUPED | {"sliding_window": None}, 2),
    "SmolLM3ForCausalLM": (GROUPED, 2),
    "RobertaForMaskedLM": (SIZES, 2),
    "DistilBertForMaskedLM": ({"vocab_size": 128, "dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 4}, 2),
    "AlbertForMaskedLM": (SIZES | {"embedding_size": 16}, 1),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(name, tmp_path):
    torch.manual_seed(0)
    settings, converted_modules = ARCHITECTURES[name]
    base_class = getattr(transformers, name)
    model = base_class(base_class.config_class(**settings)).eval()
    tokens = torch.randint(3, 128, (2, 20))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    real = mask.bool()

    def logits(some_model):
        with torch.no_grad():
            return some_model(input_ids=tokens, attention_mask=mask).logits[real]

    teacher = logits(model)
    plan = make_plan(model, KernelRecipe())
    assert len(plan.converted) == converted_modules
    student = apply_plan(model, plan)
    with softmax_mode(student):
        assert torch.equal(logits(student), teacher)
    expected = logits(student)
    assert not torch.equal(expected, teacher)

    student.save_pretrained(tmp_path)
    reloaded = getattr(transformers, type(student)._auto_class).from_pretrained(tmp_path)
    assert type(reloaded) is type(student)
    assert (logits(reloaded) - expected).abs().max() <= 1e-5

    if plan.modules[0].causal:
        check_generation(student, tokens, mask)


def check_generation(student, tokens, mask):
    """With the cache as without, padded as alone, from states that do not grow."""
    arguments = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cached = student.generate(tokens, attention_mask=mask, return_dict_in_generate=True, **arguments)
    assert torch.equal(cached.sequences, student.generate(tokens, attention_mask=mask, use_cache=False, **arguments))
    first = int((mask[0] == 0).sum())
    assert torch.equal(cached.sequences[:1, first:], student.generate(tokens[:1, first:], **arguments))
    short = student(tokens, use_cache=True).past_key_values
    assert sum(map(state_bytes, cached.past_key_values.layers)) == sum(map(state_bytes, short.layers)) > 0


def state_bytes(layer) -> int:
    return layer.num_bytes if isinstance(layer, FlexformerCacheLayer) else 0


# model type -> (verdict, class, why attention modules stay softmax or the type is refused, whether it generates)
CROSS = "its keys are not of its own positions (cross-attention)"
SWEPT = {
    "llava": (CONVERTS, "LlavaForConditionalGeneration", "", True),
    "clip": (CONVERTS, "CLIPModel", "", False),
    "vit": (CONVERTS, "ViTForImageClassification", "", False),
    "olmoe": (CONVERTS, "OlmoeForCausalLM", "", True),
    "phi3": (CONVERTS, "Phi3ForCausalLM", "", True),
    "olmo2": (CONVERTS, "Olmo2ForCausalLM", "", True),
    "axk1": (CONVERTS, "AXK1ForCausalLM", "", True),
    "bart": (IN_PART, "BartForConditionalGeneration", CROSS, True),
    "whisper": (IN_PART, "WhisperForConditionalGeneration", CROSS, True),
    "gemma3": (IN_PART, "Gemma3ForConditionalGeneration", "sliding window of 4096 tokens", True),
    "modernbert": (IN_PART, "ModernBertForMaskedLM", "sliding window of", False),
    "t5": (REFUSED, "T5ForConditionalGeneration", "it adds a bias to each pair of positions", False),
    "gpt_oss": (REFUSED, "GptOssForCausalLM", "it has learned attention sinks", False),
    "diffllama": (REFUSED, "DiffLlamaForCausalLM", "it attends several times in one pass", False),
    "git": (REFUSED, "GitForCausalLM", "does more with its attention mask than pass it on", False),
    "gpt_neo": (REFUSED, "GPTNeoForCausalLM", "does not use the AttentionInterface", False),
}


@pytest.mark.parametrize("model_type", SWEPT)
def test_sweep(model_type):
    verdict, class_name, why, generates = SWEPT[model_type]
    outcome = sweep(model_type)
    assert (outcome.verdict, outcome.class_name) == (verdict, class_name), outcome.why
    assert why in (outcome.why or "; ".join(outcome.kept)) and outcome.generates == generates
    assert outcome.reload_difference <= 1e-5


def test_sweep_tells_what_is_wrong(monkeypatch):
    monkeypatch.setattr(FlexformerCacheLayer, "remember", lambda self, memory: None)
    outcome = sweep("llama")
    assert outcome.verdict == WRONG and "cached logits differ from uncached" in outcome.why
    assert outcome.why in markdown([outcome])


def test_docs_list_what_the_sweep_finds():
    document = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    converting, refused = document.split("## Refused")
    assert "## Wrong" not in document and converting.count("\n| ") > 200
    for model_type, (verdict, *_) in SWEPT.items():
        assert f"\n| {model_type} " in (refused if verdict == REFUSED else converting), model_type


def test_capped_logits_stay_softmax():
    settings = HYBRID | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings)).eval()
    with pytest.raises(flexdistill.FlexdistillError, match="Gemma2ForCausalLM.*its logits are capped"):
        make_plan(model, KernelRecipe())
