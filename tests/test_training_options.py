"""What a recipe says of training, in whole conversions."""

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from flexdistill import inputs
from flexdistill.conversion import apply_plan, make_plan
from flexdistill.devices import make_accelerator
from flexdistill.errors import FlexdistillError
from flexdistill.pipeline import convert, run_stages
from flexdistill.recipe import Recipe
from tests.conversions import Interrupted, assert_same_weights, make_recipe, weights

LABELS = {
    "label_training.steps": 4,
    "label_training.batch_size": 1,
    "label_training.sequence_length": 64,
    "label_training.warmup_steps": 1,
}
# everything at once
OPTIONS = LABELS | {
    "kernel.keep_softmax": 1,
    "attention_transfer.optimizer": "adamw",
    "attention_transfer.schedule": "constant",
    "attention_transfer.ema_decay": 0.9,
    "logit_distillation.schedule": "linear",
    "logit_distillation.validation_every": 2,
    "logit_distillation.patience": 1,
    "logit_distillation.hidden_state_weight": 0.5,
    "logit_distillation.weight_decay": 0.1,
    "label_training.ema_decay": 0.99,
    "label_training.validation_every": 2,
}


def test_label_training_is_a_third_stage(sources, tmp_path):
    metrics = convert(make_recipe(sources, **LABELS), tmp_path / "out")
    assert [(stage["name"], stage["tokens"]) for stage in metrics["stages"]] == [
        ("attention_transfer", 256),
        ("logit_distillation", 256),
        ("label_training", 256),
    ]
    assert metrics["rows"][0]["kl"] == pytest.approx(0, abs=1e-6) and metrics["tokens"] == 768
    lines = [json.loads(line) for line in (tmp_path / "out" / "label_training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]


def test_label_training_reads_what_follows(sources):
    recipe = make_recipe(sources, **LABELS | {"attention_transfer.validation_every": 2})
    source, tokenizer, model = inputs.load_source(recipe)
    sequences = inputs.load_sequences(recipe, model, tokenizer)
    tokens = tokenizer((sources / "text.txt").read_text(), add_special_tokens=False).input_ids
    parts = [sequences.evaluation, sequences.validation, sequences.training[:], sequences.labels[:]]
    assert [tuple(part.shape) for part in parts] == [(4, 32), (16, 32), (16, 32), (4, 64)]
    stream = torch.cat([part.flatten() for part in parts]).tolist()
    assert stream == tokens[: len(stream)]
    # too short for all: it begins where the others did
    long = recipe.override({"label_training.steps": 10**6})
    again = inputs.load_sequences(long, model, tokenizer)
    assert again.labels[:2].flatten().tolist() == tokens[20 * 32 : 20 * 32 + 128]


@pytest.mark.parametrize("step", [3, 7, 9, 11])
def test_all_options_resume_as_the_uninterrupted_run(sources, whole_run, tmp_path, interrupt, step):
    recipe = make_recipe(sources, **OPTIONS)
    whole, expected = whole_run(recipe)
    interrupt(step)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    interrupt(None)
    moved = recipe.override({"data.cache": str(tmp_path / "cache")})
    metrics = convert(moved, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "resumed", whole)
    assert metrics["rows"] == expected["rows"]
    resolved = {"kernel.component": "hyperbolic", "kernel.frequency_scale": 0.25, "kernel.tied": False}
    assert Recipe.load(whole / "recipe.yaml") == recipe.override(resolved)


@pytest.fixture(scope="module")
def tied_source(sources, tmp_path_factory, tiny_tokenizer):
    from tests.distillation.stages import teacher
    from tests.tiny import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tied") / "gpt2", teacher("gpt2"), tiny_tokenizer)


@pytest.mark.parametrize("tied_embeddings", ["untied", "retied"])
def test_embeddings_are_trained_apart(sources, tied_source, tmp_path, interrupt, tied_embeddings):
    recipe = make_recipe(sources, model=str(tied_source), tied_embeddings=tied_embeddings, **LABELS)
    convert(recipe, tmp_path / "whole")
    assert ("lm_head.weight" in weights(tmp_path / "whole")) == (tied_embeddings == "untied")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    assert model.config.tie_word_embeddings == (tied_embeddings == "retied")
    interrupt(11)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    interrupt(None)
    convert(recipe, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


BAD_OPTIONS = [
    ("llama", {"tied_embeddings": "untied"}, "LlamaForCausalLM has no output embeddings that are tied"),
    ("bert", {"tied_embeddings": "retied", "logit_distillation.train": "lora"}, "No stage trains the embeddings"),
    ("llama", {"attention_transfer.negative_mass_weight": 0.5}, "'nonstationary' have no negative mass"),
    ("bert", LABELS, "BertForMaskedLM does not predict the next token"),
    ("llama", LABELS | {"label_training.sequence_length": 513}, "longer than the 512 positions"),
    (
        "llama",
        LABELS | {"label_training.validation_every": 1, "data.validation_sequences": 1},
        "has 32 tokens and one sequence needs 64",
    ),
]


def test_shards_need_validation_shared_out_evenly(sources):
    settings = {"logit_distillation.parallel": "fsdp", "logit_distillation.validation_every": 2}
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"), mixed_precision="no")
    for count, refusal in (
        (4, contextlib.nullcontext()),
        (5, pytest.raises(FlexdistillError, match="validation has 5")),
    ):
        recipe = make_recipe(sources, **settings, **{"data.validation_sequences": count})
        with refusal:
            inputs.check_devices(recipe, inputs.load_source(recipe)[2], two)


def test_pauses_tell_the_tokens_of_a_stage_that_ends_early(sources, tmp_path):
    early = {"steps": 40, "learning_rate": 0.2, "validation_every": 1, "patience": 1, "warmup_steps": 0}
    settings = {"attention_transfer.steps": 0} | {f"logit_distillation.{name}": value for name, value in early.items()}
    recipe, tokens = make_recipe(sources, **settings), []
    _, tokenizer, model = inputs.load_source(recipe)
    sequences, accelerator = inputs.load_sequences(recipe, model, tokenizer), make_accelerator("fp32")
    student = apply_plan(model, make_plan(model, recipe.kernel))
    pauses = {"pause_every": 3, "at_pause": tokens.append}
    (stage,) = run_stages(recipe, student, sequences, accelerator, tmp_path, **pauses)
    assert stage["steps"] < 37 and tokens[-1] == stage["tokens"] == stage["steps"] * 2 * 32
    assert tokens == sorted(set(tokens))


def test_the_last_pause_is_of_the_weights_that_a_stage_ends_with(sources, tmp_path):
    recipe, course = make_recipe(sources, **{"logit_distillation.ema_decay": 0.9}), []
    _, tokenizer, model = inputs.load_source(recipe)
    sequences, accelerator = inputs.load_sequences(recipe, model, tokenizer), make_accelerator("fp32")
    student = apply_plan(model, make_plan(model, recipe.kernel))

    def pause(tokens):
        course.append(next(student.parameters()).detach().clone())

    run_stages(recipe, student, sequences, accelerator, tmp_path, pause_every=1, at_pause=pause)
    assert torch.equal(course[-1], next(student.parameters())) and not torch.equal(course[-2], course[-1])
    assert len(course) == 1 + sum(stage.steps for stage in recipe.stages.values())


def test_spans_come_again_in_every_stage(sources):
    _, tokenizer, model = inputs.load_source(make_recipe(sources))
    plain, repeating = (
        inputs.load_sequences(make_recipe(sources, **LABELS, **{"data.repeats": share}), model, tokenizer)
        for share in (0.0, 1.0)
    )
    for one, other in ((plain.training, repeating.training), (plain.labels, repeating.labels)):
        assert (one[:] != other[:]).any(1).all()
    assert torch.equal(plain.evaluation, repeating.evaluation)


@pytest.mark.parametrize(("name", "settings", "message"), BAD_OPTIONS)
def test_options_that_do_not_fit_change_nothing(sources, tmp_path, name, settings, message):
    with pytest.raises(FlexdistillError, match=message):
        convert(make_recipe(sources, name, **settings), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_cached_run_is_the_same_run(sources, tmp_path, capsys):
    recipe = make_recipe(sources)
    for name in ("first", "second"):
        convert(recipe, tmp_path / name)
    convert(recipe.override({"data.cache": False}), tmp_path / "third")
    assert capsys.readouterr().err.count("come from the cache") == 1
    assert_same_weights(tmp_path / "second", tmp_path / "first")
    assert_same_weights(tmp_path / "third", tmp_path / "first")
    assert AutoTokenizer.from_pretrained(tmp_path / "second").eos_token == "<eos>"
