"""Files that come from elsewhere are damaged by a seed: reading one gives a FlexdistillError or a result, in time.

FLEXDISTILL_FUZZ=1000 damages each kind of file so many times; a handful unless told otherwise.
"""

import os
import random
from functools import partial
from types import SimpleNamespace

import pytest

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
    "converted_config": ("converted/config.json", either(damaged_json, damaged_bytes), lambda f: load_converted(f / "converted")),
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
    model = tiny.tiny_llama()
    apply_plan(model, make_plan(model, KernelRecipe())).save_pretrained(folder / "converted")
    tiny.save_gguf(folder / "tiny.gguf", tiny.tiny_llama(), tokenizer)
    (folder / "recipe.yaml").write_text(Recipe.load("smollm2-20m").to_yaml())
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files(folder, kind, tmp_path, capfd):
    name, damage, read = KINDS[kind]
    content, file = (folder / name).read_bytes(), folder / name
    read(folder)
    told, failures = SimpleNamespace(errors=0, accepted=0), []
    try:
        for case in range(CASES):
            damaged = damage(content, random.Random(f"{kind} {case}"))
            file.write_bytes(damaged)
            try:
                with limits():
                    read(folder)
                told.accepted += 1
            except FlexdistillError as error:
                told.errors += 1
                causes = (error, error.__cause__, error.__context__)
                if not str(error).strip() or "\n" in str(error) or any(isinstance(c, (MemoryError, TimeoutError)) for c in causes):
                    failures.append((case, error))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append((case, error))
    finally:
        file.write_bytes(content)
    with capfd.disabled():
        print(f"\n{kind}: {CASES} files, {told.errors} refused, {told.accepted} read, {len(failures)} failures")
    lines = [f"case {case}: {type(error).__name__}: {str(error)[:300]}" for case, error in failures]
    assert not failures, "\n".join(lines[:40])
