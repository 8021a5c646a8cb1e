import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM, DynamicCache, StaticCache
from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

from flexdistill.runtime.cache import FlexformerCacheLayer, cache_num_bytes
from flexdistill.runtime.configuration_flexformer import KernelSpec
from flexdistill.runtime.feature_maps import FeatureMap
from flexdistill.runtime.interface import NAME, visible_keys
from flexdistill.runtime.masks import LazyMask
from flexdistill.runtime.modeling_flexformer import FlexformerMixin, convert_model, flexformer_class
from flexdistill.runtime.registry import feature_map_class
from tests.runtime.kernels import CAUSAL_KERNELS, every_kernel
from tests.tiny import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}
MODULES = {"gpt2": "h.{}.attn", "llama": "layers.{}.self_attn", "bert": "encoder.layer.{}.attention.self"}
AUTO = {"gpt2": AutoModelForCausalLM, "llama": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
every_model = pytest.mark.parametrize("name", MAKERS)
every_generator = pytest.mark.parametrize("name", ["gpt2", "llama"])
every_near = pytest.mark.parametrize(
    "near", [{}, {"window": 8}, {"window": 8, "sinks": 3}], ids=["linear", "window", "sinks"]
)


GENERATORS = [pair for pair in CAUSAL_KERNELS if pair[0] not in ("nonstationary", "stationary")]


def specs(name, layers=(0, 1), variant="nonstationary", component="hyperbolic", **changes):
    kind = feature_map_class(variant, component)
    settings = dict(
        matrix=next(iter(kind.matrices), None),
        horizon=512 if kind.has_horizon else None,
        num_heads=4,
        num_key_value_heads=2 if name == "llama" else 4,
        head_dim=16,
        num_frequencies=16,
        tied=False,
        causal=name != "bert",
    )
    spec = KernelSpec(variant, component, **settings | changes)
    return {MODULES[name].format(layer): spec for layer in layers}


def sharpened(model):
    """Larger weights than initialisation gives, so that attention matters and greedy decoding does not loop at once."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter += 0.08 * torch.randn(parameter.shape, generator=generator)
    return model


def converted(name, **changes):
    model = convert_model(sharpened(MAKERS[name]()), specs(name, **changes))
    torch.manual_seed(4)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, FeatureMap):
                for parameter in module.parameters():
                    parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def tokens(length=40, batch=2, seed=5):
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(input_ids=ids, **arguments).logits


def assert_close(actual, expected, tolerance=1e-5):
    """Within a tolerance relative to the largest logit."""
    assert actual.isfinite().all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp_min(1)


@every_model
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_softmax_mode_is_the_teacher(name, padded):
    teacher, model = sharpened(MAKERS[name]()), converted(name)
    mask = torch.ones(2, 40, dtype=torch.long)
    if padded:
        mask[0, :15] = 0
    expected = logits(teacher, tokens(), attention_mask=mask)
    assert (logits(model, tokens(), attention_mask=mask) - expected).abs().max() > 1e-3
    model.set_attn_implementation("sdpa")
    assert torch.equal(logits(model, tokens(), attention_mask=mask), expected)
    model.set_attn_implementation(NAME)
    assert not torch.equal(logits(model, tokens(), attention_mask=mask), expected)


@every_model
def test_base_weights_are_taken_over(name):
    before = {key: value.clone() for key, value in sharpened(MAKERS[name]()).state_dict().items()}
    after = converted(name).state_dict()
    assert {key for key in after if f".{NAME}." not in key} == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@every_kernel
@pytest.mark.parametrize("key_heads", ["query", "kv"])
def test_every_kernel_survives_a_round_trip(variant, component, key_heads, tmp_path):
    causal = feature_map_class(variant, component).causal_safe
    name, window = ("llama", 3) if causal else ("bert", 0)
    model = converted(name, variant=variant, component=component, key_heads=key_heads, window=window)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)  # nothing random may be drawn anew
    reloaded = AUTO[name].from_pretrained(tmp_path)
    assert reloaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in reloaded.state_dict().items())
    assert torch.equal(logits(reloaded, tokens()), logits(model, tokens()))


@pytest.mark.parametrize(("variant", "component"), GENERATORS)
def test_every_kernel_generates(variant, component):
    """Left-padded and with a window: a state that goes on from a prompt gives what the whole sequence gives."""
    model = converted("llama", variant=variant, component=component, window=3)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0
    settings = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=1, eos_token_id=None)
    with_state = model.generate(tokens(12), **settings)
    assert torch.equal(with_state, model.generate(tokens(12), use_cache=False, **settings))


def test_fixed_frequencies_keep_full_precision(tmp_path):
    model = converted("llama", variant="performer", component=None)
    model.save_pretrained(tmp_path)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("frequencies"):
            assert torch.equal(half.get_buffer(name), buffer)


@every_model
def test_reload(name, tmp_path):
    model = converted(name)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "first")
    reloaded, report = AUTO[name].from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert type(reloaded) is type(model) and isinstance(reloaded, MAKERS[name]().__class__)
    assert torch.equal(logits(reloaded, tokens()), expected)
    reloaded.set_attn_implementation("sdpa")
    assert torch.equal(logits(reloaded, tokens()), logits(sharpened(MAKERS[name]()), tokens()))
    reloaded.set_attn_implementation(NAME)
    reloaded.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(AUTO[name].from_pretrained(tmp_path / "second"), tokens()), expected)
    first, second = (
        {file.name: file.read_bytes() for file in (tmp_path / folder).iterdir() if file.suffix != ".safetensors"}
        for folder in ("first", "second")
    )
    assert first == second


@every_model
def test_reload_of_the_base_model_alone(name, tmp_path):
    model = converted(name)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, FlexformerMixin)
    with torch.no_grad():
        assert torch.equal(
            base(input_ids=tokens()).last_hidden_state, model.base_model(input_ids=tokens()).last_hidden_state
        )


@every_model
def test_hidden_states_are_given(name):
    model = converted(name)
    layers = model(input_ids=tokens(), output_hidden_states=True).hidden_states
    assert len(layers) == 3
    with torch.no_grad():
        last = model.base_model(input_ids=tokens()).last_hidden_state
    assert torch.equal(layers[-1], last)


OUTSIDE = """
import sys
sys.modules["flexdistill"] = None
import torch, transformers
from safetensors.torch import save_file
folder, again, auto = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
ids = torch.arange(2, 42)[None]
with torch.no_grad():
    first = model(input_ids=ids).logits
# a name of its own, so that the code of one checkpoint does not serve another's model
assert model.config._attn_implementation.startswith("flexformer_transformers_modules_")
model.save_pretrained(again)
reloaded = getattr(transformers, auto).from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    second = reloaded(input_ids=ids).logits
tensors = {"first": first, "second": second}
if model.can_generate():
    tensors["generated"] = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
save_file(tensors, again + "/results.safetensors")
"""


# kernels that need more than their own parameters: positions, constants, what is visible
ELSEWHERE = {
    "gpt2": dict(variant="cosformer", component=None, window=4),
    "llama": dict(window=4, sinks=2),
    "bert": dict(variant="spectraformer", component="saderf", matrix="fastfood"),
}


@every_model
def test_loads_where_flexdistill_is_missing(name, tmp_path, monkeypatch):
    model = converted(name, **ELSEWHERE[name])
    model.save_pretrained(tmp_path / "first")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    again = tmp_path / "again"
    arguments = [str(tmp_path / "first"), str(again), AUTO[name].__name__]
    # no -I, which would also drop a PYTHONPATH that chooses the version of transformers
    run = subprocess.run(
        [sys.executable, "-c", OUTSIDE, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    results = load_file(again / "results.safetensors")
    ids = torch.arange(2, 42)[None]
    assert_close(results["first"], logits(model, ids))
    assert_close(results["second"], logits(model, ids))
    if model.can_generate():
        expected = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=1)
        assert torch.equal(results["generated"], expected)
    assert_close(logits(AUTO[name].from_pretrained(again), ids), logits(model, ids))


@every_model
def test_config_json(name, tmp_path):
    model = converted(name, layers=[1])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "flexformer" and config["base_model_type"] == name
    assert config["flexformer"] == {"layers": {key: spec.to_dict() for key, spec in specs(name, layers=[1]).items()}}
    assert config["architectures"] == [type(model).__name__]
    assert config["auto_map"]["AutoConfig"] == "modeling_flexformer.FlexformerConfig"
    assert config["auto_map"][AUTO[name].__name__] == f"modeling_flexformer.{type(model).__name__}"
    assert (
        config["auto_map"]["AutoModel"] == f"modeling_flexformer.Flexformer{type(MAKERS[name]().base_model).__name__}"
    )
    for reference in config["auto_map"].values():
        file, cls = reference.split(".")
        assert (tmp_path / f"{file}.py").is_file()
    reloaded = AutoConfig.from_pretrained(tmp_path)
    assert reloaded.model_type == name and reloaded.kernel_specs == specs(name, layers=[1])
    weights = load_file(tmp_path / "model.safetensors")
    kernels = [key for key in weights if f".{NAME}." in key]
    assert kernels and all(MODULES[name].format(1) in key for key in kernels)


def test_unknown_base_model_type_is_named(tmp_path):
    converted("gpt2").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"base_model_type": "gpt99"}))
    with pytest.raises(ValueError, match="base_model_type is 'gpt99', which transformers .* does not know"):
        AutoConfig.from_pretrained(tmp_path)


def test_tied_embeddings_stay_tied(tmp_path):
    model = converted("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert reloaded.lm_head.weight is reloaded.transformer.wte.weight
    untied = converted("llama")
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


@every_model
@pytest.mark.parametrize("whole", [False, True], ids=["with head", "base model"])
def test_missing_kernels_are_initialised(name, whole, tmp_path):
    converted(name).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in weights.items() if f".{NAME}." not in key}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(0)
    filler = [torch.full((1 << 16,), torch.nan) for _ in range(50)]  # memory that is handed out again holds NaN
    del filler
    model = (AutoModel if whole else AUTO[name]).from_pretrained(tmp_path)
    found = {key: value for key, value in model.named_parameters() if f".{NAME}." in key}
    assert found
    for key, value in found.items():
        if key.endswith("log_amplitude") or key.endswith("norm_factor"):
            assert (value == 0).all(), key
        elif key.endswith("decay"):
            memories = 1 / torch.sigmoid(5 * value)
            assert 1.5 < memories.min() < 2 and 5e3 < memories.max() < 1e4, key
        else:
            expected = 0.25 * 16**-0.25 if key.endswith("w1") else 0.02
            assert abs(value.std() - expected) < 0.1 * expected, key


@every_model
def test_deepcopy_and_pickle(name):
    model = converted(name)
    expected = logits(model, tokens())
    copied = copy.deepcopy(model)
    unpickled = pickle.loads(pickle.dumps(model))
    for other in (copied, unpickled):
        assert type(other) is type(model) and torch.equal(logits(other, tokens()), expected)
    with torch.no_grad():
        next(p for n, p in copied.named_parameters() if n.endswith("w1")).add_(1.0)
    assert not torch.equal(logits(copied, tokens()), expected)
    assert torch.equal(logits(model, tokens()), expected)
    if model.can_generate():  # the copies' hooks find their own modules
        assert torch.equal(generate(unpickled, tokens(), 5), generate(model, tokens(), 5))


def test_pickle_finds_inner_classes_that_transformers_does_not_export():
    sizes = dict(d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_layers=1, decoder_layers=1)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, vocab_size=99, max_position_embeddings=64)
    model = transformers.BartForConditionalGeneration(transformers.BartConfig(**sizes, **heads)).eval()
    spec = KernelSpec("nonstationary", "hyperbolic", 2, 2, 16, 16, tied=False, causal=False)
    model = convert_model(model, {"encoder.layers.0.self_attn": spec})
    assert not hasattr(transformers, "BartEncoder") and isinstance(model.model.encoder, FlexformerMixin)
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert type(other.model.encoder) is type(model.model.encoder)
            assert torch.equal(other(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_a_cache_beside_recurrent_layers_of_the_models_own_has_a_size():
    cache = DynamicCache()
    recurrent = type("LinearAttentionLayer", (), {})()  # as of Qwen3-Next: neither keys nor values
    recurrent.conv_states, recurrent.recurrent_states = {0: torch.zeros(2, 3)}, [torch.zeros(5, dtype=torch.bfloat16)]
    cache.layers = [recurrent]
    assert cache_num_bytes(cache) == 2 * 3 * 4 + 5 * 2


def test_a_static_cache_of_a_part_is_refused():
    text = dict(vocab_size=99, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    text |= dict(head_dim=16, num_hidden_layers=1, layer_types=["full_attention"], pad_token_id=0)
    vision = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | dict(image_size=16, patch_size=8), mm_tokens_per_image=4
    )
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    model = convert_model(model, {"language_model.layers.0.self_attn": next(iter(specs("llama").values()))})
    settings = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert model.generate(torch.tensor([[5, 6]]), **settings).shape == (1, 5)
    with pytest.raises(ValueError, match="A static cache cannot serve"):
        model.generate(torch.tensor([[5, 6]]), cache_implementation="static", **settings)


def test_classes_are_made_once():
    assert flexformer_class(type(tiny_gpt2())) is type(converted("gpt2"))
    from flexdistill.runtime import modeling_flexformer

    assert modeling_flexformer.FlexformerGPT2LMHeadModel is type(converted("gpt2"))
    with pytest.raises(AttributeError, match="has no attribute 'FlexformerNothing'"):
        _ = modeling_flexformer.FlexformerNothing


def generate(model, ids, count, **arguments):
    arguments = {"do_sample": False, "eos_token_id": None, "pad_token_id": 1} | arguments
    return model.generate(ids, max_new_tokens=count, min_new_tokens=count, **arguments)


@every_generator
@every_near
def test_greedy_with_cache_is_without(name, near):
    model = converted(name, **near)
    cached = generate(model, tokens(12), 64)
    assert torch.equal(cached, generate(model, tokens(12), 64, use_cache=False))
    assert cached.shape == (2, 76) and len(cached[0, 12:].unique()) > 3


@every_generator
@every_near
def test_step_by_step_logits_are_those_of_one_pass(name, near):
    model, ids = converted(name, **near), tokens(40)
    cache, pieces = DynamicCache(config=model.config), []
    for start, stop in ((0, 17), (17, 18), (18, 19), (19, 40)):
        pieces.append(logits(model, ids[:, start:stop], past_key_values=cache))
        assert cache.get_seq_length() == stop
    assert_close(torch.cat(pieces, dim=1), logits(model, ids, use_cache=False))
    assert all(isinstance(layer, FlexformerCacheLayer) for layer in cache.layers)


@pytest.mark.parametrize("cache_class", [DynamicCache, StaticCache])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_mask_may_be_longer_than_what_was_seen(name, cache_class):
    """Loops of static shapes pass one mask of a fixed length, 0 where no token has come yet."""
    model, ids = converted(name), tokens(20)
    visible = torch.ones(2, 20, dtype=torch.long)
    visible[1, :6] = 0
    settings = {"max_cache_len": 32} if cache_class is StaticCache else {}
    cache, pieces = cache_class(config=model.config, **settings), []
    positions = (visible.cumsum(1) - 1).clamp_min(0)
    for start, stop in ((0, 9), (9, 10), (10, 20)):
        mask = torch.zeros(2, 32, dtype=torch.long)
        mask[:, :stop] = visible[:, :stop]
        part = slice(start, stop)
        settings = dict(attention_mask=mask, position_ids=positions[:, part], past_key_values=cache)
        pieces.append(logits(model, ids[:, part], **settings))
    expected = logits(model, ids, attention_mask=visible, position_ids=positions, use_cache=False)
    seen = visible.bool()
    assert_close(torch.cat(pieces, dim=1)[seen], expected[seen])


@every_generator
@every_near
def test_sampling_with_cache_is_without(name, near):
    model, results = converted(name, **near), []
    for use_cache in (True, False):
        torch.manual_seed(9)
        results.append(generate(model, tokens(12), 40, do_sample=True, use_cache=use_cache))
    assert torch.equal(*results)
    torch.manual_seed(10)
    assert not torch.equal(generate(model, tokens(12), 40, do_sample=True), results[0])


@every_generator
@every_near
def test_beam_search_with_cache_is_without(name, near):
    model = converted(name, **near)
    settings = {"num_beams": 3, "num_return_sequences": 2}
    cached = generate(model, tokens(12), 20, **settings)
    assert torch.equal(cached, generate(model, tokens(12), 20, use_cache=False, **settings))
    assert cached.shape == (4, 32)


@every_generator
@every_near
@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["whole", "partial"])
def test_left_padded_batch_is_each_sequence_alone(name, near, layers):
    model, ids = converted(name, **near, layers=layers), tokens(20)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    together = generate(model, ids, 30, attention_mask=mask)
    assert torch.equal(together[:1], generate(model, ids[:1], 30))
    assert torch.equal(together[1:, 13:], generate(model, ids[1:, 13:], 30))
    single = generate(model, ids[1:], 30, attention_mask=mask[1:])  # and batches of one
    assert torch.equal(single[:, 13:], together[1:, 13:])


@every_model
@pytest.mark.parametrize("layers", [(0, 1), (0,)], ids=["whole", "partial"])
@pytest.mark.parametrize("batch", [1, 2])
def test_padding_does_not_change_logits(name, layers, batch):
    model, ids = converted(name, layers=layers), tokens(30, batch=batch)
    alone = logits(model, ids[:, :18])
    right = torch.ones_like(ids)
    right[:, 18:] = 0
    assert_close(logits(model, ids, attention_mask=right)[:, :18], alone)


@every_generator
@every_near
@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["whole", "partial"])
def test_continuing_a_conversation_is_one_call(name, near, layers):
    model = converted(name, **near, layers=layers)
    first = generate(model, tokens(12, batch=1), 10, return_dict_in_generate=True)
    more = torch.cat([first.sequences, tokens(7, batch=1, seed=8)], dim=1)
    # the last generated token has not been fed yet, so it and the new ones are
    assert first.past_key_values.get_seq_length() == first.sequences.shape[1] - 1
    continued = generate(model, more, 15, past_key_values=first.past_key_values)
    assert torch.equal(continued, generate(model, more, 15))


@every_generator
@every_near
def test_state_does_not_grow(name, near):
    # rotary positions and learned ones both end at 512, so the longer text is fed without them being exceeded
    model = converted(name, **near)
    sizes = []
    for calls in (1, 32):
        cache = DynamicCache(config=model.config)
        for call in range(calls):
            position_ids = torch.arange(64)[None]
            logits(model, tokens(64, batch=1, seed=call), past_key_values=cache, position_ids=position_ids)
        assert cache.get_seq_length() == 64 * calls
        sizes.append(cache_num_bytes(cache))
    assert sizes[0] == sizes[1] > 0


def test_softmax_layers_of_a_partial_conversion_grow():
    model, sizes = converted("llama", layers=[0]), []
    for length in (64, 128):
        cache = DynamicCache(config=model.config)
        logits(model, tokens(length, batch=1), past_key_values=cache)
        sizes.append(cache_num_bytes(cache))
    assert sizes[1] - sizes[0] == 64 * 2 * 2 * 16 * 4


@every_generator
@pytest.mark.parametrize("layers", [(0,), (1,)], ids=["first", "second"])
@every_near
def test_partial_conversion_generates(name, layers, near):
    model = converted(name, layers=layers, **near)
    assert torch.equal(generate(model, tokens(12), 30), generate(model, tokens(12), 30, use_cache=False))
    cache = DynamicCache(config=model.config)
    logits(model, tokens(), past_key_values=cache)
    assert [isinstance(layer, FlexformerCacheLayer) for layer in cache.layers] == [i in layers for i in range(2)]


@every_model
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_layers_that_stay_compute_exactly_their_softmax(name, padded):
    teacher, model, mask = sharpened(MAKERS[name]()), converted(name, layers=[1]), torch.ones(2, 40, dtype=torch.long)
    mask[0, : 15 * padded] = 0
    theirs, ours = (m(input_ids=tokens(), attention_mask=mask, output_hidden_states=True) for m in (teacher, model))
    assert torch.equal(ours.hidden_states[1], theirs.hidden_states[1])
    assert not torch.equal(ours.hidden_states[2], theirs.hidden_states[2])


@every_generator
def test_layers_that_stay_compute_exactly_their_softmax_when_generating(name):
    teacher, model = sharpened(MAKERS[name]()), converted(name, layers=[1])
    caches = [DynamicCache(config=m.config) for m in (teacher, model)]
    for part in tokens(30).split([20, *[1] * 10], dim=1):
        theirs, ours = (
            m(input_ids=part, past_key_values=cache, output_hidden_states=True).hidden_states[1]
            for m, cache in zip((teacher, model), caches, strict=True)
        )
        assert torch.equal(ours, theirs)


@every_generator
def test_four_dimensional_masks_are_refused(name):
    mask = torch.ones(2, 1, 40, 40, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match="not a 4-D mask"):
        logits(converted(name), tokens(), attention_mask=mask)


def packed_positions(*lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


@every_generator
@every_near
@pytest.mark.parametrize("layers", [(0, 1), (1,)], ids=["whole", "partial"])
def test_packed_sequences_are_each_alone(name, near, layers):
    model, ids, lengths = converted(name, **near, layers=layers), tokens(40), [[25, 14, 1], [3, 30, 7]]
    positions = torch.cat([packed_positions(*row) for row in lengths])
    packed = logits(model, ids, position_ids=positions, use_cache=False)
    for row, lengths_of_row in enumerate(lengths):
        alone = [logits(model, part[None], use_cache=False) for part in ids[row].split(lengths_of_row)]
        assert_close(packed[row, None], torch.cat(alone, dim=1))


def test_sequences_flattened_by_the_collator():
    model, ids = converted("llama", window=8).train(), tokens(40, batch=1)[0]
    collator = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = collator([{"input_ids": part.tolist()} for part in ids.split([25, 15])])
    del batch["labels"]
    packed = logits(model, **{"ids": batch.pop("input_ids"), **batch}, use_cache=False)
    assert_close(packed, torch.cat([logits(model, part[None], use_cache=False) for part in ids.split([25, 15])], dim=1))


def test_gradients_of_packed_sequences():
    model, ids, found = converted("llama", window=8), tokens(40, batch=1), []
    for parts in ([ids], ids.split([25, 15], dim=1)):
        model.zero_grad()
        positions = packed_positions(25, 15)
        for part in parts:
            position_ids = positions if part is ids else None
            model(input_ids=part, position_ids=position_ids, use_cache=False).logits.square().sum().backward()
        found.append({n: p.grad.clone() for n, p in model.named_parameters() if f".{NAME}." in n})
    for key, expected in found[1].items():
        assert (found[0][key] - expected).norm() <= 1e-4 * expected.norm().clamp_min(1e-3), key


def test_a_packed_mask_of_another_kind_is_refused():
    mask = LazyMask(mask_function=or_masks(causal_mask_function, blockwise_overlay(torch.zeros(1, 4))))
    assert mask.boundaries() is None
    with pytest.raises(ValueError, match="sequences packed by position_ids"):
        visible_keys(mask, 4)


@every_generator
def test_a_foreign_cache_is_refused(name):
    cache = DynamicCache()
    logits(sharpened(MAKERS[name]()), tokens(10), past_key_values=cache)
    with pytest.raises(ValueError, match="keys and values of layer 0 that did not pass through .* an empty cache"):
        logits(converted(name), tokens(10), past_key_values=cache)


@every_generator
def test_cropping_is_refused(name):
    model = converted(name)
    cache = DynamicCache(config=model.config)
    logits(model, tokens(10), past_key_values=cache)
    with pytest.raises(RuntimeError, match="cannot forget single tokens"):
        cache.crop(-3)
    with pytest.raises(ValueError, match="(?i)assisted"):
        generate(model, tokens(10, batch=1), 5, assistant_model=converted(name))


@every_generator
def test_a_source_may_ask_for_assisted_decoding(name):
    source = MAKERS[name]()
    source.generation_config.prompt_lookup_num_tokens = 2
    model = convert_model(source, specs(name))
    assert generate(model, tokens(10, batch=1), 5).shape == (1, 15)
    assert source.generation_config.prompt_lookup_num_tokens == 2


@every_generator
def test_softmax_mode_keeps_its_own_cache(name):
    model, teacher = converted(name), sharpened(MAKERS[name]())
    model.set_attn_implementation("sdpa")
    assert torch.equal(generate(model, tokens(12), 20), generate(teacher, tokens(12), 20))


@every_model
def test_bf16(name):
    model = converted(name)
    expected = logits(model, tokens())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = logits(model, tokens())
    assert (autocast - expected).abs().max() <= 0.1 * expected.abs().max()
    half = convert_model(sharpened(MAKERS[name]()).to(torch.bfloat16), specs(name)).eval()
    kernels = {p.dtype for n, p in half.named_parameters() if f".{NAME}." in n}
    assert kernels == {torch.float32} and half.get_input_embeddings().weight.dtype == torch.bfloat16
    assert logits(half, tokens()).dtype == torch.bfloat16 and logits(half, tokens()).isfinite().all()
    whole = model.to(torch.bfloat16)
    assert (logits(whole, tokens()).float() - expected).abs().max() <= 0.1 * expected.abs().max()


@every_model
def test_kernels_keep_full_precision(name, tmp_path):
    MAKERS[name]().save_pretrained(tmp_path / "base")
    base = AUTO[name].from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    model = convert_model(base, specs(name)).eval()
    ids = torch.randint(2, VOCABULARY, (2, 20))
    model.save_pretrained(tmp_path)
    reloaded = AUTO[name].from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    for parameter_name, parameter in reloaded.named_parameters():
        is_kernel = NAME in parameter_name.split(".")
        assert parameter.dtype == (torch.float32 if is_kernel else torch.bfloat16), parameter_name
    with torch.no_grad():
        assert torch.equal(reloaded(input_ids=ids).logits, model(input_ids=ids).logits)


@every_generator
@pytest.mark.slow
def test_compiled_without_graph_breaks(name):
    model = converted(name, window=8)
    ids = torch.randint(2, VOCABULARY, (2, 20))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for arguments in ({}, {"attention_mask": torch.ones_like(ids)}):
            actual = compiled(input_ids=ids, use_cache=False, **arguments).logits
            assert (actual - model(input_ids=ids, use_cache=False).logits).abs().max() <= 1e-5


@every_generator
def test_static_cache(name):
    ids = torch.randint(2, VOCABULARY, (2, 10))
    arguments = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    model = converted(name, window=4)
    expected = model.generate(ids, **arguments)
    assert torch.equal(model.generate(ids, cache_implementation="static", **arguments), expected)
    with pytest.raises(ValueError, match="static cache cannot serve"):
        converted(name, layers=(0,)).generate(ids, cache_implementation="static", **arguments)


@every_model
def test_gradient_checkpointing_gives_the_same_gradients(name):
    gradients = []
    for checkpointing in (False, True):
        model = converted(name, window=0 if name == "bert" else 4).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        model(input_ids=tokens(), labels=tokens(), **({} if name == "bert" else {"use_cache": False})).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    assert sum(f".{NAME}." in key for key in plain) == sum(f".{NAME}." in n for n, _ in model.named_parameters())
    for key, expected in plain.items():
        assert (checkpointed[key] - expected).norm() <= 1e-6 * expected.norm().clamp_min(1e-3), key
