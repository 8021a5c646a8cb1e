"""No family has code of its own: a sample of architectures converts, keeps its teacher, reloads and generates."""

import pytest
import torch
import transformers

import flexdistill  # noqa: F401  registers converted models with the auto classes
from flexdistill.attention_modes import softmax_mode
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.recipe import KernelRecipe

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
    "Qwen2ForCausalLM": (GROUPED, 2),
    "Qwen3ForCausalLM": (GROUPED, 2),
    "MistralForCausalLM": (GROUPED | {"sliding_window": None}, 2),
    "Gemma2ForCausalLM": (HYBRID | {"attn_logit_softcapping": None}, 1),
    "Gemma3ForCausalLM": (HYBRID, 1),
    "PhiForCausalLM": (SIZES, 2),
    "GPTNeoXForCausalLM": (SIZES, 2),
    "OPTForCausalLM": (SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}, 2),
    "MixtralForCausalLM": (GROUPED, 2),
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
        arguments = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 20, "do_sample": False}
        arguments |= {"pad_token_id": 0, "eos_token_id": None}
        assert torch.equal(student.generate(**arguments), student.generate(**arguments, use_cache=False))


def test_capped_logits_stay_softmax():
    settings = HYBRID | {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    model = transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**settings)).eval()
    with pytest.raises(flexdistill.FlexdistillError, match="Gemma2ForCausalLM.*its logits are capped"):
        make_plan(model, KernelRecipe())
