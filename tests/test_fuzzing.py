"""Files that come from elsewhere are damaged by a seed: reading one gives a FlexdistillError or a result, in time.

FLEXDISTILL_FUZZ=1000 damages each kind of file so many times; a handful unless told otherwise.
"""

import json
import os
import random
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.errors import FlexdistillError
from flexdistill.evaluation import load_converted
from flexdistill.recipe import KernelRecipe, Recipe
from flexdistill.sources import load_model, load_tokenizer, resolve_model
from tests import tiny
from tests.fuzzing import damaged_bytes, damaged_json, damaged_safetensors, damaged_yaml, either, limits

CASES = int(os.environ.get("FLEXDISTILL_FUZZ", "40"))
HEADER = 4096  # bytes of a GGUF file before its tensors; of safetensors, their description


def inspect(folder):
    make_plan(load_model(resolve_model(str(folder))), KernelRecipe())


def tokenize(folder):
    tokenizer = load_tokenizer(resolve_model(str(folder)))
    assert isinstance(tokenizer.decode(tokenizer("Miss Brooke had that kind of beauty.")["input_ids"]), str)


def inspect_gguf(folder):
    inspect(folder / "tiny.gguf")
    tokenize(folder / "tiny.gguf")


# kind -> file, how it is damaged, and what reads it
KINDS = {
    "config": ("config.json", either(damaged_json, damaged_bytes), inspect),
    "converted_config": ("converted/config.json", damaged_json, lambda folder: load_converted(folder / "converted")),
    "gpt2_config": ("gpt2/config.json", damaged_json, lambda folder: inspect(folder / "gpt2")),
    "recipe": ("recipe.yaml", either(damaged_yaml, damaged_bytes), lambda folder: Recipe.load(folder / "recipe.yaml")),
    "safetensors": ("model.safetensors", either(damaged_safetensors, partial(damaged_bytes, head=HEADER)), inspect),
    "tokenizer": ("tokenizer.json", either(damaged_json, damaged_bytes), tokenize),
    "tokenizer_config": ("tokenizer_config.json", either(damaged_json, damaged_bytes), tokenize),
    "gguf": ("tiny.gguf", partial(damaged_bytes, head=HEADER), inspect_gguf),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One of each file, sound."""
    folder, tokenizer = tmp_path_factory.mktemp("fuzzing"), tiny.tiny_tokenizer()
    tiny.save_tiny(folder, tiny.tiny_llama(), tokenizer)
    tiny.tiny_gpt2().save_pretrained(folder / "gpt2")
    model = tiny.tiny_llama()
    apply_plan(model, make_plan(model, KernelRecipe())).save_pretrained(folder / "converted")
    tiny.save_gguf(folder / "tiny.gguf", tiny.tiny_llama(), tokenizer)
    (folder / "recipe.yaml").write_text(Recipe.load("smollm2-20m").to_yaml())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(folder, kind, capfd):
    name, damage, read = KINDS[kind]
    file = folder / name
    content = file.read_bytes()
    read(folder)
    outcomes, failures = Counter(), []
    try:
        for case in range(CASES):
            file.write_bytes(damage(content, random.Random(f"{kind} {case}")))
            try:
                with limits():
                    read(folder)
                outcomes["read"] += 1
            except FlexdistillError as error:
                outcomes["refused"] += 1
                if not is_one_sentence(str(error)) or any(map(exceeds_limits, chain(error))):
                    failures.append((case, error))
            except Exception as error:
                failures.append((case, error))
    finally:
        file.write_bytes(content)
    with capfd.disabled():
        print(f"\n{kind}: {CASES} files, {outcomes['refused']} refused, {outcomes['read']} read")
    assert not failures, "\n".join(f"case {case}: {type(error).__name__}: {error}" for case, error in failures)
    assert outcomes["refused"] > CASES // 4  # the damage is felt


def is_one_sentence(message):
    return message.endswith((".", "?")) and "\n" not in message and len(message) > 20


def chain(error):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def exceeds_limits(error):
    return isinstance(error, (MemoryError, TimeoutError)) or "allocate" in str(error)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b'{"model_type": "llama", "num_labels": 1000000000}', "num_labels is 1,000,000,000, more than"),
        ("config.json", b"[" * 100_000, "maximum recursion depth"),
        ("model.safetensors", b"\xff" * 8, "cannot be loaded"),
        ("recipe.yaml", b"model: " + b"[" * 100_000, "is not valid YAML"),
        ("recipe.yaml", b"seed: 2001-13-01", "month must be in 1..12"),
    ],
)
def test_commands_refuse_hostile_files(folder, run, name, content, words):
    """One line on stderr, exit code 2, nothing written."""
    for file in ("config.json", "model.safetensors", "recipe.yaml"):
        Path(file).write_bytes((folder / file).read_bytes())
    Path(name).write_bytes(content)
    result = run("convert", ".", "--recipe", "recipe.yaml", "--data", "sample", "--output", "out")
    assert (result.code, result.out) == (2, "")
    assert result.err.count("\n") == 1 and words in result.err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_hidden_layers": 2**20},  # by the number of tensors
        {"intermediate_size": 2**32},  # by their sizes
        {"vocab_size": 2**40},
    ],
)
def test_a_model_larger_than_its_files_is_not_laid_out(folder, tmp_path, settings):
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with (
        limits(),
        pytest.raises(FlexdistillError, match="more than .* (tensors|elements), which"),
    ):
        load_model(resolve_model(str(tmp_path)))


def test_a_gguf_file_with_more_layers_than_tensors(tmp_path):
    model = tiny.tiny_llama()
    model.config.num_hidden_layers = 32
    tiny.save_gguf(tmp_path / "tiny.gguf", model)
    with limits(), pytest.raises(FlexdistillError, match="its 21 tensors are too few for 32 layers"):
        load_model(resolve_model(str(tmp_path / "tiny.gguf")))


def test_a_converted_model_that_lacks_weights_is_refused(folder, tmp_path):
    weights = load_file(folder / "converted" / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "converted" / "config.json").read_bytes())
    frequencies = weights.pop("model.layers.0.self_attn.flexformer.query_parameters.w1")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FlexdistillError, match="lacks 1 weights of FlexformerLlamaForCausalLM"):
        load_converted(tmp_path)
    weights["model.layers.0.self_attn.flexformer.query_parameters.w1"] = frequencies[:1].clone()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FlexdistillError, match="1 weights of FlexformerLlamaForCausalLM.* have other shapes"):
        load_converted(tmp_path)
