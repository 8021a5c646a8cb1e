import json

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaForCausalLM,
)

from flexdistill import conversion
from flexdistill.attention_modes import AttentionCall, attention_function
from flexdistill.conversion import apply_plan, check_sequence_length, make_plan, resolve_kernel
from flexdistill.distillation.heads import SplitModel
from flexdistill.errors import FlexdistillError
from flexdistill.recipe import KernelRecipe
from flexdistill.runtime.cache import cache_num_bytes
from flexdistill.runtime.feature_maps import FeatureMap
from flexdistill.runtime.registry import FEATURE_MAPS, feature_map_class
from tests.runtime.kernels import CAUSAL_KERNELS, LEARNED_KERNELS
from tests.tiny import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}
every_model = pytest.mark.parametrize("name", MAKERS)
TOKENS = torch.arange(2, 50)[None]


def hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return {(name, kind): len(getattr(module, kind)) for name, module in model.named_modules() for kind in kinds}


@every_model
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_plan_changes_nothing(name, implementation):
    model = MAKERS[name]()
    model.set_attn_implementation(implementation)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    modules, settings, hooks_before = dict(model.named_modules()), model.config.to_dict(), hooks(model)
    random_state = torch.get_rng_state()
    plan = make_plan(model, KernelRecipe())
    assert plan == make_plan(model, KernelRecipe())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert dict(model.named_modules()) == modules and hooks(model) == hooks_before
    assert model.config.to_dict() == settings and model.config._attn_implementation == implementation
    assert not model.training and torch.equal(torch.get_rng_state(), random_state)
    assert not any(p.grad is not None for p in model.parameters())
    assert json.loads(json.dumps(plan.to_dict()))["parameters"] == plan.parameters


@every_model
def test_plan_restores_a_model_that_fails(name):
    model = MAKERS[name]()
    model.base_model.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(FlexdistillError, match="could not be run on example inputs.*: division by zero"):
        make_plan(model, KernelRecipe())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(("variant", "component"), CAUSAL_KERNELS)
@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 6}, {"window": 6, "sinks": 3}, {"key_heads": "kv", "features": 24}, {"tied": True, "layers": "1"}],
    ids=lambda settings: ",".join(settings) or "defaults",
)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_plan_numbers_are_true(variant, component, settings, name):
    if not feature_map_class(variant, component).takes_frequencies:
        settings = {key: value for key, value in settings.items() if key != "features"}
    model = MAKERS[name]()
    parameters = sum(p.numel() for p in model.parameters())
    plan = make_plan(model, KernelRecipe(variant=variant, component=component, **settings))

    def kv_bytes(length):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=TOKENS[:, :length], past_key_values=cache)
        return cache_num_bytes(cache)

    share = len(plan.converted) / 2
    assert plan.kv_bytes_per_token == (kv_bytes(31) - kv_bytes(30)) * share
    student = apply_plan(model, plan)
    assert sum(p.numel() for p in student.parameters()) - parameters == plan.parameters
    assert (plan.parameters > 0) == ((variant, component) in LEARNED_KERNELS or "window" in settings)
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(input_ids=TOKENS, past_key_values=cache)
    softmax = TOKENS.shape[1] * plan.kv_bytes_per_token / share * (1 - share)
    assert cache_num_bytes(cache) == plan.state_bytes + softmax
    tokens = plan.break_even_tokens
    assert tokens * plan.kv_bytes_per_token >= plan.state_bytes > (tokens - 1) * plan.kv_bytes_per_token


def test_plan_of_bf16_counts_its_bytes():
    model = tiny_llama().to(torch.bfloat16)
    plan = make_plan(model, KernelRecipe(window=6))
    assert plan.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    student = apply_plan(model, plan)
    cache = DynamicCache(config=student.config)
    with torch.no_grad():
        student(input_ids=TOKENS, past_key_values=cache)
    assert cache_num_bytes(cache) == plan.state_bytes


def test_plan_of_an_encoder_has_no_cache():
    model = tiny_bert()
    parameters = sum(p.numel() for p in model.parameters())
    plan = make_plan(model, KernelRecipe())
    assert plan.state_bytes == plan.kv_bytes_per_token == 0 and plan.break_even_tokens is None
    assert [module.name for module in plan.converted] == [f"encoder.layer.{i}.attention.self" for i in range(2)]
    assert not any(module.causal or module.spec.causal for module in plan.converted)
    assert sum(p.numel() for p in apply_plan(model, plan).parameters()) - parameters == plan.parameters


def test_plan_of_grouped_query_attention():
    (first, second) = make_plan(tiny_llama(), KernelRecipe(key_heads="kv", features=5, layers="1")).modules
    assert (first.name, first.action, first.spec) == ("layers.0.self_attn", "keep", None)
    assert first.reason == "not among the layers 1" and first.parameters == 0
    assert (second.name, second.action) == ("layers.1.self_attn", "convert")
    spec = second.spec
    assert (spec.num_heads, spec.num_key_value_heads, spec.head_dim, spec.num_frequencies) == (4, 2, 16, 5)
    assert (spec.key_heads, spec.window, spec.causal, spec.tied) == ("kv", 0, True, False)


@pytest.mark.parametrize("layers", ["all", "0", "1"])
@every_model
def test_apply_gives_the_plan(name, layers):
    model = MAKERS[name]()
    model.train()
    plan = make_plan(model, KernelRecipe(layers=layers))
    student = apply_plan(model, plan)
    found = {
        n.removesuffix(".flexformer"): m.spec
        for n, m in student.base_model.named_modules()
        if isinstance(m, FeatureMap)
    }
    assert found == {module.name: module.spec for module in plan.converted}
    assert student.config.kernel_specs == found and student.training
    assert all(p.isfinite().all() and not p.is_meta for p in student.parameters())


def tiny_gemma3():
    config = Gemma3TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
    )
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def test_recorded_softmax_is_the_models_own():
    for model in (tiny_gemma3(), *(maker() for maker in MAKERS.values())):
        with torch.no_grad():
            expected = model(input_ids=TOKENS).logits
            with attention_function(model, AttentionCall.softmax):
                assert torch.equal(model(input_ids=TOKENS).logits, expected)


def test_sliding_window_layers_are_kept():
    model = tiny_gemma3()
    plan = make_plan(model, KernelRecipe(layers="0"))
    assert [module.action for module in plan.modules] == ["keep", "keep", "convert"]
    assert plan.modules[0].reason == "its own sliding window of 8 tokens is bounded already"
    assert plan.modules[2].name == "layers.2.self_attn"
    student = apply_plan(model, plan)
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    assert torch.equal(student.generate(TOKENS, **settings), student.generate(TOKENS, use_cache=False, **settings))


def test_kept_layers():
    plan = make_plan(tiny_gpt2(), KernelRecipe(keep_layers="0"))
    assert [module.reason for module in plan.modules] == ["among the layers 0 that stay", "softmax attention"]
    plan = make_plan(tiny_bart(), KernelRecipe(layers="decoder.*"))
    assert [module.name for module in plan.converted] == ["decoder.layers.0.self_attn"]
    with pytest.raises(FlexdistillError, match="none is left to become linear without every:1; set another"):
        make_plan(tiny_llama(), KernelRecipe(keep_layers="every:1"))


def test_unknown_kernels_are_errors():
    known = ", ".join(FEATURE_MAPS)
    for call in (resolve_kernel, lambda kernel: make_plan(tiny_gpt2(), kernel)):
        with pytest.raises(FlexdistillError, match=f"Unknown variant 'sationary'; choose one of: {known}"):
            call(KernelRecipe(variant="sationary"))
        with pytest.raises(FlexdistillError, match="no component 'cubic'; choose one of: hyperbolic, trigonometric"):
            call(KernelRecipe(component="cubic"))
        with pytest.raises(FlexdistillError, match="no component 'hyperbolic'; leave the component out"):
            call(KernelRecipe(variant="hedgehog", component="hyperbolic"))


def test_defaults_of_a_kernel_are_filled_in():
    expected = KernelRecipe(component="hyperbolic", frequency_scale=0.25, tied=False)
    assert resolve_kernel(KernelRecipe()).model_dump() == expected.model_dump()
    assert resolve_kernel(KernelRecipe(component="trigonometric")).tied is True
    assert resolve_kernel(KernelRecipe(component="trigonometric", tied=False)).tied is False
    assert resolve_kernel(KernelRecipe(variant="hedgehog")).component is None
    assert [resolve_kernel(KernelRecipe(window=8, sinks=sinks)).sinks for sinks in (None, 0, 2)] == [0, 0, 2]


def test_defaults_of_the_grid_are_filled_in():
    kernel = resolve_kernel(KernelRecipe(variant="spectraformer"))
    assert (kernel.component, kernel.matrix, kernel.tied) == ("oprf", "fastfood_learnable", True)
    kernel = resolve_kernel(KernelRecipe(variant="spectraformer", component="gerf", matrix="qmc", tied=False))
    assert (kernel.component, kernel.matrix, kernel.tied) == ("gerf", "qmc", False)
    assert resolve_kernel(KernelRecipe(variant="performer")).matrix is None
    with pytest.raises(FlexdistillError, match="Variant 'performer' has no matrix 'orf'; leave the matrix out."):
        resolve_kernel(KernelRecipe(variant="performer", matrix="orf"))
    with pytest.raises(FlexdistillError, match="choose one of: oprf, posrf, gerf, saderf, trigrf"):
        resolve_kernel(KernelRecipe(variant="spectraformer", component="hyperbolic"))


def test_the_matrix_is_in_the_spec():
    plan = make_plan(tiny_llama(), KernelRecipe(variant="spectraformer", component="posrf", matrix="orf"))
    assert {module.spec.matrix for module in plan.modules} == {"orf"}
    assert {module.spec.to_dict()["horizon"] for module in plan.modules} == {None}


def test_frequencies_start_as_large_as_the_recipe_says():
    torch.manual_seed(0)
    spreads = {}
    for given in (None, 0.5):
        student = apply_plan(tiny_llama(), make_plan(tiny_llama(), KernelRecipe(features=64, frequency_scale=given)))
        found = [x for name, x in student.named_parameters() if name.endswith("query_parameters.w1")]
        spreads[given] = float(torch.stack(found).detach().std()) * found[0].shape[-2] ** 0.25
    assert spreads[None] == pytest.approx(0.25, rel=0.05) and spreads[0.5] == pytest.approx(0.5, rel=0.05)
    refused = "starts with frequencies of one size; leave kernel.frequency_scale out."
    with pytest.raises(FlexdistillError, match=f"Variant 'hedgehog' {refused}"):
        make_plan(tiny_llama(), KernelRecipe(variant="hedgehog", frequency_scale=0.5))
    with pytest.raises(FlexdistillError, match=f"Component 'trigonometric' {refused}"):
        make_plan(tiny_llama(), KernelRecipe(component="trigonometric", frequency_scale=0.5))


def test_a_horizon_is_the_models_positions_unless_given(monkeypatch):
    horizons = {}
    for given in (None, 64):
        plan = make_plan(tiny_gpt2(), KernelRecipe(variant="cosformer", horizon=given))
        student = apply_plan(tiny_gpt2(), plan)
        horizons[given] = {module.spec.horizon for module in plan.modules}
        limit = given or 512
        check_sequence_length(student, limit)
        with pytest.raises(FlexdistillError, match=f"longer than the {limit} positions"):
            check_sequence_length(student, limit + 1)
    assert horizons == {None: {512}, 64: {64}}
    monkeypatch.setattr(conversion, "max_positions", lambda model: None)
    with pytest.raises(FlexdistillError, match="Variant 'cosformer' needs a horizon; set kernel.horizon."):
        make_plan(tiny_llama(), KernelRecipe(variant="cosformer"))


def test_a_window_on_an_encoder_is_refused():
    with pytest.raises(FlexdistillError, match="encoder.layer.0.attention.self attends in both directions"):
        make_plan(tiny_bert(), KernelRecipe(window=8))


@pytest.mark.parametrize(("variant", "decay", "expected"), [
    ("nonstationary", None, True),
    ("nonstationary", False, False),
    ("hedgehog", None, False),
    ("hedgehog", True, True),
])  # fmt: skip
def test_decay_of_causal_layers(variant, decay, expected):
    plan = make_plan(tiny_llama(), KernelRecipe(variant=variant, decay=decay))
    assert {module.spec.decay for module in plan.modules} == {expected}
    student = apply_plan(tiny_llama(), plan)
    rates = [p for name, p in student.named_parameters() if name.endswith("flexformer.decay")]
    assert len(rates) == (len(plan.modules) if expected else 0)


def test_an_encoder_has_no_decay():
    plan = make_plan(tiny_bert(), KernelRecipe())
    assert {module.spec.decay for module in plan.converted} == {False}
    with pytest.raises(
        FlexdistillError, match="in both directions here, which cannot decay; set kernel.decay to false"
    ):
        make_plan(tiny_bert(), KernelRecipe(decay=True))


REFUSED = {
    "gpt_neo": lambda: GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
        )
    ),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=2)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, rotary_dim=8)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_architectures_without_the_attention_interface_are_refused_by_name(name):
    model = REFUSED[name]()
    message = f"{type(model).__name__} \\(model type '{name}'\\) does not call transformers' AttentionInterface"
    with pytest.raises(FlexdistillError, match=message):
        make_plan(model, KernelRecipe())


def tiny_bart():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
    )
    return BartForConditionalGeneration(config).eval()


def test_encoder_decoders_keep_cross_attention():
    plan = make_plan(tiny_bart(), KernelRecipe())
    assert {(module.name, module.action, module.causal) for module in plan.modules} == {
        ("encoder.layers.0.self_attn", "convert", False),
        ("decoder.layers.0.self_attn", "convert", True),
        ("decoder.layers.0.encoder_attn", "keep", False),
    }
    assert {module.reason for module in plan.modules if module.spec is None} == {
        "its keys are not of its own positions (cross-attention)"
    }


def test_encoder_decoders_are_not_distilled():
    with pytest.raises(FlexdistillError, match="BartForConditionalGeneration is an encoder-decoder"):
        SplitModel(tiny_bart())


def test_classes_from_elsewhere_are_refused():
    class MyLlama(LlamaForCausalLM):
        pass

    with pytest.raises(FlexdistillError, match="MyLlama is not a class of transformers"):
        make_plan(MyLlama(tiny_llama().config), KernelRecipe())


@every_model
def test_too_long_sequences_are_refused(name):
    model = MAKERS[name]()
    check_sequence_length(model, 512)
    with pytest.raises(FlexdistillError, match="513 tokens are longer than the 512 positions .* --sequence-length"):
        check_sequence_length(model, 513)
