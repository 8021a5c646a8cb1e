import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertModel

import flexdistill.runtime
from flexdistill import export as export_module
from flexdistill import inputs, pipeline
from flexdistill.conversion import make_plan
from flexdistill.distillation.stage import feature_maps, kernel_parameters
from flexdistill.errors import FlexdistillError, NonFiniteLossError
from flexdistill.evaluation import evaluate_checkpoint, load_converted
from flexdistill.pipeline import convert
from flexdistill.recipe import EvaluationRecipe, KernelRecipe, Recipe
from flexdistill.sources import resolve_model
from tests.conversions import SHORT, Interrupted, assert_same_weights, listing, make_recipe, weights
from tests.distillation.stages import log_entries, teacher
from tests.forked import together
from tests.tiny import save_tiny

AUTO = {"llama": AutoModelForCausalLM, "bert": AutoModelForMaskedLM}
every_model = pytest.mark.parametrize("name", AUTO)


@pytest.fixture(scope="module")
def results(sources, tmp_path_factory):
    """Each model converted once: name -> (folder, metrics)."""
    folder = tmp_path_factory.mktemp("results")
    return {name: (folder / name, convert(make_recipe(sources, name), folder / name)) for name in AUTO}


@every_model
def test_files(results, name):
    folder, _ = results[name]
    names = {path.name for path in folder.iterdir()}
    runtime = {path.name for path in Path(flexdistill.runtime.__file__).parent.glob("*.py")} - {"__init__.py"}
    assert runtime - {path for path in runtime if path.startswith("triton_")} <= names
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "metrics.json"}
    expected |= {"README.md", "recipe.yaml", "attention_transfer.jsonl", "logit_distillation.jsonl"}
    assert expected <= names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"))]
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted(results)  # no .partial, nothing set aside
    for stage in ("attention_transfer", "logit_distillation"):
        lines = [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2, 3, 4]
        assert all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(sources, tmp_path, parallel):
    settings = {"evaluation.sequences": 5, "kernel.window": 4, "logit_distillation.parallel": parallel}
    recipe = make_recipe(sources, **settings, **{"data.cache": False})  # which one of the processes would find filled
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    arguments = ["convert", recipe.model, "--recipe", "recipe.yaml", "--output", "two"]
    if parallel == "ddp":
        command = [sys.executable, "-m", "flexdistill", *arguments, "--num-processes", "2"]
        environment = os.environ | {"PYTHONPATH": str(Path(flexdistill.__file__).parents[1])}
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        stdout, stderr = run.stdout, run.stderr
    else:  # without a launcher, which takes its time
        processes = together(arguments, tmp_path)
        assert [process.wait() for process in processes] == [0, 0], processes[0].stderr + processes[1].stderr
        stdout, stderr = ("".join(getattr(p, name) for p in processes) for name in ("stdout", "stderr"))
    assert stdout.count("Attention KL") == 1 and stderr == ""
    one = convert(recipe.override({"logit_distillation.parallel": "ddp"}), tmp_path / "one")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert (one["num_processes"], two["num_processes"]) == (1, 2)
    actual, expected = weights(tmp_path / "two"), weights(tmp_path / "one")
    for name, value in expected.items():
        # amplitudes start at 0, so their own norm is small beside the steps that Adam takes
        assert (actual[name] - value).norm() <= 1e-5 * max(float(value.norm()), 1.0), name
    for ours, theirs in zip(two["rows"], one["rows"], strict=True):
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "two")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_transfer.max_memory": "1GiB"}, "--max-memory measures a GPU's memory and there is none"),
        ({"label_training.steps": 1, "label_training.compile": True}, "--compile is for GPUs and there is none"),
        ({"attention_transfer.cuda_graphs": True}, "--cuda-graphs is for GPUs and there is none"),
        ({"logit_distillation.parallel": "fsdp", "logit_distillation.cpu_offload": True}, "cpu_offload moves weights"),
    ],
)
def test_what_needs_a_gpu_is_refused_without(sources, tmp_path, settings, message):
    with pytest.raises(FlexdistillError, match=message):
        convert(make_recipe(sources, **settings), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_whoever_may_read_the_configuration_may_read_the_weights(results):
    folder, *_ = results["llama"]
    assert len({file.stat().st_mode for file in folder.iterdir()}) == 1


@pytest.mark.parametrize(
    ("processes", "precision", "message"),
    [
        (3, "no", "as many sequences in each of the 3 processes, and batches have 2; set a --batch-size"),
        (2, "fp16", "no gradient scaler for fp16; set --precision bf16"),
        (1, "no", "shards a model over several processes and there is one; set --num-processes, or leave"),
    ],
)
def test_what_sharding_cannot_do_is_refused(sources, processes, precision, message):
    accelerator = SimpleNamespace(num_processes=processes, mixed_precision=precision, device=torch.device("cpu"))
    recipe = make_recipe(sources, **{"logit_distillation.parallel": "fsdp"})
    with pytest.raises(FlexdistillError, match=message):
        inputs.check_devices(recipe, teacher("llama"), accelerator)


def test_what_cuda_graphs_cannot_do_is_refused(sources):
    settings = {"attention_transfer.cuda_graphs": True, "data.document_masks": True}
    recipe = make_recipe(sources, **settings)
    accelerator = SimpleNamespace(num_processes=1, mixed_precision="no", device=torch.device("cuda"))
    with pytest.raises(FlexdistillError, match="--cuda-graphs cannot follow data.document_masks"):
        inputs.check_devices(recipe, teacher("llama"), accelerator)
    with pytest.raises(FlexdistillError, match="cuda_graphs cannot be recorded with parallel: fsdp"):
        recipe.override({"logit_distillation.parallel": "fsdp", "logit_distillation.cuda_graphs": True})


@every_model
def test_metrics(results, sources, name):
    folder, metrics = results[name]
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    rows = {row["name"]: row for row in metrics["rows"]}
    assert list(rows) == ["teacher", "student", "no attention"]
    assert metrics["teacher"] == rows["teacher"] and metrics["student"] == rows["student"]
    assert rows["teacher"]["kl"] == pytest.approx(0, abs=1e-6) and rows["teacher"]["top1_agreement"] == 1
    assert rows["student"]["kl"] > 0 and 0 <= rows["student"]["top1_agreement"] <= 1
    for row in rows.values():
        assert row["perplexity"] is None if name == "bert" else 1 < row["perplexity"] < 1000
    assert metrics["model"] == str(sources / name) and metrics["kernel"]["component"] == "hyperbolic"
    plan = make_plan(teacher(name), KernelRecipe())
    assert metrics["attention_kl"].keys() == {module.name for module in plan.converted}
    assert all(value >= -1e-6 for value in metrics["attention_kl"].values())
    assert metrics["plan"]["parameters"] == plan.parameters and metrics["plan"]["converted"] == 2
    assert metrics["evaluated_tokens"] == 4 * 32 and metrics["tokens"] == 2 * 4 * 2 * 32
    assert metrics["guarded_rows"] == 0 and metrics["num_processes"] == 1 and metrics["device"] == "cpu"
    assert metrics["elapsed_s"] > 0 and metrics["peak_memory_bytes"] > 10**7
    assert metrics["reload_max_logit_difference"] <= 1e-5
    assert [(stage["name"], stage["steps"], stage["tokens"]) for stage in metrics["stages"]] == [
        ("attention_transfer", 4, 256),
        ("logit_distillation", 4, 256),
    ]


@every_model
def test_recipe_and_card(results, sources, name):
    folder, metrics = results[name]
    recipe = Recipe.load(folder / "recipe.yaml")
    resolved = {"kernel.component": "hyperbolic", "kernel.frequency_scale": 0.25, "kernel.tied": False}
    expected = make_recipe(sources, name, **resolved)
    assert recipe == expected
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and recipe.to_yaml().strip() in card
    assert ("fill-mask" if name == "bert" else "text-generation") in card
    assert f"{AUTO[name].__name__}.from_pretrained" in card
    front = ModelCard(card).data
    assert (front.base_model, front.license, front.license_name) == (None, "other", "same-as-base-model")
    assert [result.metric_type for result in front.eval_results][-2:] == ["kl_divergence", "accuracy"]
    assert len(front.eval_results) == (2 if name == "bert" else 3)
    perplexity = "" if name == "bert" else f"{metrics['student']['perplexity']:.2f}"
    assert f"| student | {perplexity} | {metrics['student']['kl']:.4f} |" in card


def test_the_card_leaves_out_figures_that_are_not_finite(results, sources):
    folder, metrics = results["llama"]
    recipe, model = Recipe.load(folder / "recipe.yaml"), AutoModelForCausalLM.from_pretrained(folder)
    model._auto_class = "AutoModelForCausalLM"
    infinite = metrics | {"student": metrics["student"] | {"perplexity": math.inf}}
    front = ModelCard(export_module.model_card(model, resolve_model(recipe.model), recipe, infinite)).data
    assert [result.metric_type for result in front.eval_results] == ["kl_divergence", "accuracy"]


@every_model
def test_result_loads(results, sources, name):
    folder, _ = results[name]
    model, tokenizer = AUTO[name].from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(feature_maps(model)) == 2
    ids = tokenizer("Line 3: the", return_tensors="pt").input_ids
    original = AutoTokenizer.from_pretrained(sources / name)("Line 3: the", return_tensors="pt").input_ids
    assert torch.equal(ids, original)
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    kernels = kernel_parameters(model).keys()
    before = {n: p for n, p in teacher(name).named_parameters()}
    after = dict(model.named_parameters())
    assert after.keys() - kernels == before.keys()
    assert any(not torch.equal(after[n], before[n]) for n in before)  # the second stage trained them


@every_model
def test_evaluating_the_result_gives_its_metrics(sources, name, tmp_path):
    text = {"evaluation.source": str(sources / "text.txt"), "evaluation.sequence_length": 24}
    recipe = make_recipe(sources, name, **text)
    metrics = convert(recipe, tmp_path / "out")
    again = evaluate_checkpoint(tmp_path / "out", str(sources / name), recipe.evaluation)
    for row, expected in zip(again["rows"], metrics["rows"], strict=True):
        assert row["name"] == expected["name"]
        for figure in ("perplexity", "kl", "top1_agreement"):
            if expected[figure] is None:
                assert row[figure] is None
            else:
                assert row[figure] == pytest.approx(expected[figure], rel=1e-6, abs=1e-9)
    assert again["attention_kl"] == pytest.approx(metrics["attention_kl"], rel=1e-5)
    assert again["evaluated_tokens"] == metrics["evaluated_tokens"] == 96


@every_model
def test_evaluation_loads_the_class_that_was_saved(results, name):
    folder, _ = results[name]
    assert [type(load_converted(folder)).__name__] == json.loads((folder / "config.json").read_text())["architectures"]


@pytest.mark.parametrize("train", ["full", "lora", "kernels"])
def test_teacher_row_is_the_model_before(sources, tmp_path, train):
    recipe = make_recipe(sources, **{"logit_distillation.train": train, "kernel.window": 4})
    metrics = convert(recipe, tmp_path / "out")
    rows = {row["name"]: row for row in metrics["rows"]}
    assert {"teacher", "student", "window only", "no attention"} <= rows.keys()
    untouched = {name: value for name, value in weights(tmp_path / "out").items() if "flexformer" not in name}
    same = all(torch.equal(value, weights(sources / "llama")[name]) for name, value in untouched.items())
    assert same == (train == "kernels")
    evaluation = EvaluationRecipe(source=str(sources / "text.txt"), sequence_length=32, sequences=20)
    again = evaluate_checkpoint(tmp_path / "out", str(sources / "llama"), evaluation)
    # the held-out text is another part of the same kind of text
    assert again["teacher"]["perplexity"] == pytest.approx(rows["teacher"]["perplexity"], rel=0.2)
    assert again["teacher"]["kl"] == pytest.approx(0, abs=1e-6)


def test_teacher_perplexity_is_the_models_own(sources, tmp_path):
    text = {"evaluation.source": str(sources / "text.txt"), "logit_distillation.steps": 0}
    metrics = convert(make_recipe(sources, **text), tmp_path / "out")
    model, tokenizer = teacher("llama"), AutoTokenizer.from_pretrained(sources / "llama")
    ids = tokenizer((sources / "text.txt").read_text(), return_tensors="pt").input_ids[:, : 4 * 32].view(4, 32)
    with torch.no_grad():
        expected = math.exp(model(input_ids=ids, labels=ids).loss)
        student = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        student_perplexity = math.exp(student(input_ids=ids, labels=ids).loss)
    assert metrics["teacher"]["perplexity"] == pytest.approx(expected, rel=1e-5)
    assert metrics["student"]["perplexity"] == pytest.approx(student_perplexity, rel=1e-5)
    assert student_perplexity != expected
    assert not (tmp_path / "out" / "logit_distillation.jsonl").exists() and len(metrics["stages"]) == 1


def test_seeds(sources, tmp_path):
    for folder, seed in (("first", 3), ("second", 3), ("third", 4)):
        convert(make_recipe(sources, seed=seed), tmp_path / folder)
        torch.manual_seed(17)  # whatever happened before in the process
    assert_same_weights(tmp_path / "second", tmp_path / "first")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "third", tmp_path / "first")


def test_no_steps_give_an_untrained_conversion(sources, tmp_path):
    steps = {"attention_transfer.steps": 0, "logit_distillation.steps": 0}
    metrics = convert(make_recipe(sources, **steps), tmp_path / "out")
    assert metrics["stages"] == [] and metrics["tokens"] == 0
    for name, value in weights(sources / "llama").items():
        assert torch.equal(weights(tmp_path / "out")[name], value)


# of 4 + 4 steps, with a checkpoint after every second
@pytest.mark.parametrize("step", [2, 4, 5, 6, 8])
@pytest.mark.parametrize("train", ["full", "lora", "full, one layer softmax"])
def test_resume_is_the_uninterrupted_run(sources, whole_run, tmp_path, interrupt, step, train):
    train, _, hybrid = train.partition(",")
    recipe = make_recipe(sources, **{"logit_distillation.train": train, "kernel.keep_softmax": int(bool(hybrid))})
    whole, expected = whole_run(recipe)
    interrupt(step)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    assert not (tmp_path / "resumed").exists() and (tmp_path / "resumed.partial" / "recipe.yaml").is_file()
    interrupt(None)
    metrics = convert(recipe, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "resumed", whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed"]
    assert metrics["rows"] == expected["rows"] and metrics["attention_kl"] == expected["attention_kl"]
    assert listing(tmp_path / "resumed").keys() == listing(whole).keys()
    for stage in ("attention_transfer", "logit_distillation"):
        logs = [log_entries(folder / f"{stage}.jsonl") for folder in (whole, tmp_path / "resumed")]
        assert logs[0] == logs[1] and len(logs[0]) == 4


@pytest.mark.parametrize("when", ["export", "finish"])
def test_resume_after_the_last_step(sources, whole_run, tmp_path, monkeypatch, when):
    """Everything is trained, and the run dies before the result is written."""
    recipe = make_recipe(sources)
    whole, expected = whole_run(recipe)

    def die(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch:
        if when == "export":
            patch.setattr(pipeline, "export", die)
        else:
            patch.setattr(pipeline.LogitDistillation, "finish", die)
        with pytest.raises(Interrupted):
            convert(recipe, tmp_path / "resumed")
    metrics = convert(recipe, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "resumed", whole)
    assert metrics["rows"] == expected["rows"]


@pytest.mark.parametrize("step", [4, 5, 8])
def test_resume_keeps_the_summaries(sources, whole_run, tmp_path, interrupt, step):
    """A stage's summary covers all of its steps, whether this process ran them or an earlier one."""
    recipe = make_recipe(sources)
    _, expected = whole_run(recipe)
    interrupt(step)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    interrupt(None)
    metrics = convert(recipe, tmp_path / "resumed", resume=True)
    for ours, theirs in zip(metrics["stages"], expected["stages"], strict=True):
        assert (ours["first_loss"], ours["last_loss"]) == (theirs["first_loss"], theirs["last_loss"])


def test_resume_with_another_recipe_is_refused(sources, tmp_path, interrupt):
    interrupt(4)
    with pytest.raises(Interrupted):
        convert(make_recipe(sources), tmp_path / "out")
    interrupt(None)
    before = listing(tmp_path)
    changed = {"logit_distillation.temperature": 2.0, "seed": 1}
    message = r"another recipe: seed \(0, now 1\), logit_distillation.temperature \(1.0, now 2.0\); use the same"
    with pytest.raises(FlexdistillError, match=message):
        convert(make_recipe(sources, **changed), tmp_path / "out", resume=True)
    assert listing(tmp_path) == before


def test_resume_with_other_adapters_is_refused(sources, tmp_path, interrupt):
    adapters = {"logit_distillation.train": "lora"}
    interrupt(4)
    with pytest.raises(Interrupted):
        convert(make_recipe(sources, **adapters, **{"logit_distillation.lora.rank": 4}), tmp_path / "out")
    interrupt(None)
    for settings, message in ((adapters, r"lora.rank \(4, now 8\); use"), ({}, r"lora.rank \(4, now None\)")):
        with pytest.raises(FlexdistillError, match=f"another recipe: .*{message}"):
            convert(make_recipe(sources, **settings), tmp_path / "out", resume=True)


def test_resume_without_a_run_is_refused(sources, tmp_path):
    with pytest.raises(FlexdistillError, match="no unfinished run in .*out.partial to resume; leave --resume out"):
        convert(make_recipe(sources), tmp_path / "out", resume=True)
    assert listing(tmp_path) == {}


def test_a_new_run_forgets_the_unfinished_one(sources, tmp_path, interrupt):
    interrupt(7)
    with pytest.raises(Interrupted):
        convert(make_recipe(sources, seed=5), tmp_path / "out")
    interrupt(None)
    unfinished = listing(tmp_path)
    with pytest.raises(FlexdistillError, match="out.partial holds a run .*--resume .*--overwrite"):
        convert(make_recipe(sources), tmp_path / "out")
    assert listing(tmp_path) == unfinished
    convert(make_recipe(sources), tmp_path / "out", overwrite=True)
    convert(make_recipe(sources), tmp_path / "fresh")
    assert_same_weights(tmp_path / "out", tmp_path / "fresh")


def test_resume_with_other_text_is_refused(sources, tmp_path, interrupt):
    text = tmp_path / "text.txt"
    text.write_text((sources / "text.txt").read_text())
    recipe = make_recipe(sources, **{"data.source": str(text)})
    interrupt(6)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "out")
    interrupt(None)
    text.write_text(text.read_text().replace("with", "from"))
    with pytest.raises(FlexdistillError, match="The data and the evaluation data changed .*--overwrite"):
        convert(recipe, tmp_path / "out", resume=True)


def test_resume_does_not_replace_a_result_unasked(sources, tmp_path, interrupt):
    interrupt(6)
    with pytest.raises(Interrupted):
        convert(make_recipe(sources), tmp_path / "out")
    interrupt(None)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(FlexdistillError, match="not empty.*--overwrite"):
        convert(make_recipe(sources), tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "precious.txt").read_text() == "mine"


def test_inputs_are_not_overwritten(sources, tmp_path):
    shutil.copytree(sources, tmp_path / "mine")
    recipe = make_recipe(tmp_path / "mine")
    before = listing(tmp_path)
    for output in (tmp_path / "mine", tmp_path / "mine" / "llama"):
        with pytest.raises(FlexdistillError, match="would replace the input"):
            convert(recipe, output, overwrite=True)
    assert listing(tmp_path) == before


def test_a_model_without_a_head_is_refused_before_training(sources, tmp_path, tiny_tokenizer):
    save_tiny(tmp_path / "headless", BertModel(teacher("bert").config), tiny_tokenizer)
    with pytest.raises(FlexdistillError, match="BertModel gives no logits"):
        convert(make_recipe(tmp_path, "headless", **{"data.source": str(sources / "text.txt")}), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["headless"]


def test_another_teacher_is_refused(results, sources):
    recipe = EvaluationRecipe(source=str(sources / "text.txt"), sequence_length=16, sequences=2)
    with pytest.raises(FlexdistillError, match="not the model that the checkpoint was made from"):
        evaluate_checkpoint(results["llama"][0], str(sources / "bert"), recipe)


BAD_INPUT = {
    "seed": (-1, "seed: Input should be greater than or equal to 0"),
    "kernel.window": (32, "window of 32 tokens covers sequences of 32"),
    "kernel.variant": ("nonsense", "Unknown variant 'nonsense'"),
    "kernel.matrix": ("orf", "Variant 'nonstationary' has no matrix 'orf'; leave the matrix out."),
    "kernel.horizon": (16, "Variant 'nonstationary' needs no horizon"),
    "kernel.layers": ("7", "the model has layers 0 to 1"),
    "kernel.keep_softmax": (2, "Of the 2 layers that become linear, 2 are to stay softmax, which leaves none"),
    "model": ("./absent", "does not exist"),
    "data.source": ("./absent.txt", "does not exist"),
    "data.sequence_length": (513, "longer than the 512 positions"),
    "evaluation.sequence_length": (16, "set evaluation.source, or remove"),
    "evaluation.sequences": (100_000, "leaves none to train on"),
}


def existing_output(folder):
    (folder / "nested").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "flexformer"}')
    (folder / "model.safetensors").write_bytes(b"precious")
    (folder / "nested" / "notes.txt").write_text("mine")
    return listing(folder.parent)


@pytest.mark.parametrize("key", BAD_INPUT)
def test_bad_input_changes_nothing(sources, tmp_path, key):
    value, message = BAD_INPUT[key]
    before = existing_output(tmp_path / "out")
    with pytest.raises(FlexdistillError, match=re.escape(message)):
        convert(make_recipe(sources, **{key: value}), tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_recipe_without_a_model_is_an_error(tmp_path):
    with pytest.raises(FlexdistillError, match="names no model"):
        convert(Recipe(), tmp_path / "out")


def test_output_that_exists_is_kept(sources, tmp_path):
    before = existing_output(tmp_path / "out")
    with pytest.raises(FlexdistillError, match="not empty; choose another --output, or pass --overwrite"):
        convert(make_recipe(sources), tmp_path / "out")
    with pytest.raises(FlexdistillError, match="is a file; name a folder"):
        convert(make_recipe(sources), tmp_path / "out" / "model.safetensors", overwrite=True)
    assert listing(tmp_path) == before


def fail_in_training(patch):
    def backward(self, sequences):
        raise NonFiniteLossError("the loss is nan")

    patch.setattr(pipeline.LogitDistillation, "backward", backward)


def fail_in_evaluation(patch):
    def compare(*args):
        raise FlexdistillError("no")

    patch.setattr(pipeline, "compare_models", compare)


def fail_in_card(patch):
    def card(*args):
        raise OSError(28, "No space left on device")

    patch.setattr(export_module, "model_card", card)


def fail_in_rename(patch):
    replace = os.replace

    def failing(source, target):
        if Path(target).name == "out" and Path(source).name == "export":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    patch.setattr(export_module.os, "replace", failing)


def fail_in_reload(patch):
    patch.setattr(export_module, "_reload_difference", lambda *args: 1 / 0)


FAILURES = {
    "training": (fail_in_training, NonFiniteLossError),
    "evaluation": (fail_in_evaluation, FlexdistillError),
    "card": (fail_in_card, FlexdistillError),
    "rename": (fail_in_rename, FlexdistillError),
    "reload": (fail_in_reload, ZeroDivisionError),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_failure_leaves_the_output_and_can_be_resumed(sources, tmp_path, monkeypatch, where):
    failure, error = FAILURES[where]
    before = existing_output(tmp_path / "out")
    with monkeypatch.context() as patch, pytest.raises(error):
        failure(patch)
        convert(make_recipe(sources), tmp_path / "out", overwrite=True)
    after = {name: content for name, content in listing(tmp_path).items() if not name.startswith("out.partial/")}
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.partial"]
    convert(make_recipe(sources), tmp_path / "out", overwrite=True, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "nested").exists() and len(weights(tmp_path / "out")) > 10


BAD_KERNELS = [
    ({"variant": "elu", "features": 8}, "as many features as the head size gives; leave kernel.features out"),
    ({"variant": "performer", "tied": False}, "queries and keys have nothing to untie; leave --untied out"),
    ({"variant": "cosformer", "horizon": 16}, "Sequences of 32 tokens are longer than the kernel's horizon of 16"),
    ({"variant": "spectraformer", "component": "saderf"}, "so it cannot serve causal attention; choose another one."),
    ({"variant": "cosformer", "features_by": "freedom"}, "head size gives; leave kernel.features_by out."),
    ({"features": 7, "features_by": "freedom"}, "7 frequencies are too few to be shared out in 8s; set more"),
    ({"variant": "spectraformer", "matrix": "off"}, "choose one of: fastfood_learnable, gaussian, orf"),
    ({"variant": "spectraformer", "matrix": "mm", "features": 8}, "ask for more features, or choose another matrix."),
]


@pytest.mark.parametrize(("kernel", "message"), BAD_KERNELS, ids=lambda x: str(x)[:40])
def test_kernels_that_do_not_fit_change_nothing(sources, tmp_path, kernel, message):
    before = existing_output(tmp_path / "out")
    with pytest.raises(FlexdistillError, match=re.escape(message)):
        settings = {f"kernel.{name}": value for name, value in kernel.items()}
        convert(make_recipe(sources, **settings), tmp_path / "out", overwrite=True)
    assert listing(tmp_path) == before


def test_a_kernel_without_parameters_skips_attention_transfer(sources, tmp_path, capsys):
    recipe = make_recipe(sources, **{"kernel.variant": "performer"})
    metrics = convert(recipe, tmp_path / "out")
    message = "Variant 'performer' has no parameters to train, so attention transfer is left out.\n"
    assert capsys.readouterr().err == message
    assert [stage["name"] for stage in metrics["stages"]] == ["logit_distillation"]
    drawn = {name for name in weights(tmp_path / "out") if name.endswith("flexformer.frequencies")}
    assert len(drawn) == 2
    assert "Performer, arXiv:2009.14794" in (tmp_path / "out" / "README.md").read_text()
    kernels_only = recipe.override({"logit_distillation.train": "kernels"})
    with pytest.raises(FlexdistillError, match="Variant 'performer' has no parameters, so train: kernels has nothing"):
        convert(kernels_only, tmp_path / "none")
    assert not (tmp_path / "none.partial").exists()
    # a window has a gate to train
    windowed = convert(recipe.override({"kernel.window": 4}), tmp_path / "window")
    assert [stage["name"] for stage in windowed["stages"]] == ["attention_transfer", "logit_distillation"]


def test_measured_constants_survive_resuming(sources, tmp_path, interrupt):
    """What OPRF takes from data is no trained parameter, so a checkpoint lacks it: it is measured again."""
    recipe = make_recipe(sources, **{"kernel.variant": "spectraformer", "kernel.matrix": "orf"})
    recipe = recipe.override({"attention_transfer.steps": 0})
    convert(recipe, tmp_path / "whole")
    statistics = {name: x for name, x in weights(tmp_path / "whole").items() if name.endswith("flexformer.statistic")}
    assert len(statistics) == 2
    # 2 sqrt(16) is what the statistic is before it is measured
    assert all((x > 0).all() and (x != 8).all() for x in statistics.values())
    interrupt(3)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    interrupt(None)
    convert(recipe, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")


def test_frequencies_are_shared_out_once(sources, tmp_path, interrupt, monkeypatch):
    recipe = make_recipe(sources, **{"kernel.features_by": "freedom", "kernel.features": 40})
    measured = {}

    def measure(*arguments):
        found = pipeline_measure(*arguments)
        measured.update({name: figure * (1 + 3 * index) for index, (name, figure) in enumerate(found.items())})
        return measured

    pipeline_measure = pipeline.degrees_of_freedom
    monkeypatch.setattr(pipeline, "degrees_of_freedom", measure)
    metrics = convert(recipe, tmp_path / "whole")
    assert min(measured.values()) > 1
    config = json.loads((tmp_path / "whole" / "config.json").read_text())["flexformer"]["layers"]
    sizes = {name: spec["num_frequencies"] for name, spec in config.items()}
    assert metrics["frequencies"] == sizes and list(sizes.values()) == [24, 56]
    interrupt(3)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    interrupt(None)
    monkeypatch.setattr(pipeline, "degrees_of_freedom", lambda *arguments: 1 / 0)  # what was measured is kept
    convert(recipe, tmp_path / "resumed", resume=True)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")
    even = convert(recipe.override({"kernel.features_by": "layer"}), tmp_path / "even")
    assert set(even["frequencies"].values()) == {40}
    assert even["plan"]["state_bytes"] == metrics["plan"]["state_bytes"]


@pytest.mark.parametrize("variant", ["hedgehog", "stationary"])
def test_other_kernels(sources, tmp_path, variant):
    component = "trigonometric" if variant == "stationary" else None
    settings = {"kernel.variant": variant, "kernel.component": component, "kernel.window": 8, "kernel.layers": "1"}
    metrics = convert(make_recipe(sources, **settings), tmp_path / "out")
    assert metrics["plan"]["converted"] == metrics["plan"]["kept"] == 1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    (spec,) = model.config.kernel_specs.values()
    assert (spec.variant, spec.component, spec.window) == (variant, component, 8)
    assert "window only" in [row["name"] for row in metrics["rows"]]


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize("logit_steps", [0, 4])
def test_layers_stay_softmax(sources, tmp_path, name, logit_steps):
    settings = {"kernel.keep_softmax": 1, "logit_distillation.steps": logit_steps}
    metrics = convert(make_recipe(sources, name, **settings), tmp_path / "out")
    ((kept, gain),) = metrics["kept_softmax"].items()
    assert metrics["plan"]["converted"] == metrics["plan"]["kept"] == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())["flexformer"]
    assert config["kept_softmax"] == {kept: gain} and list(config["layers"]) == list(metrics["attention_kl"]) != [kept]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "all tokens; in nats per token, before logit distillation, and each given those before it: " in card
    assert f"before it: `{kept}` ({gain:.4g})" in card
    assert [key for key in weights(tmp_path / "out") if f"{kept}.flexformer" in key] == []
    linear = convert(make_recipe(sources, name, **settings | {"kernel.keep_softmax": 0}), tmp_path / "linear")
    assert linear["kept_softmax"] == {}
    assert 0 < metrics["plan"]["state_bytes"] == linear["plan"]["state_bytes"] / 2 or name == "bert"
    if name != "bert":
        assert metrics["plan"]["kept_kv_bytes_per_token"] == linear["plan"]["kv_bytes_per_token"] / 2
    model = AUTO[name].from_pretrained(tmp_path / "out")
    assert len(feature_maps(model)) == 1


def test_layers_are_chosen_on_text_of_their_own(sources):
    source, tokenizer, model = inputs.load_source(make_recipe(sources))

    def read(**settings):
        sequences = inputs.load_sequences(make_recipe(sources, **settings), model, tokenizer)
        return [sequences.training[:], sequences.evaluation, sequences.selection]

    parts = read(**{"kernel.keep_softmax": 1})
    rows = [{tuple(row) for row in part.tolist()} for part in parts]
    assert [len(part) for part in rows] == [16, 4, inputs.SELECTION_SEQUENCES]
    assert len(set().union(*rows)) == sum(map(len, rows))
    text = {"evaluation.source": str(sources / "text.txt"), "evaluation.sequence_length": 24}
    assert [len(part) for part in read(**{"kernel.keep_softmax": 1} | text)] == [16, 4, inputs.SELECTION_SEQUENCES]
    assert [len(part) for part in read()] == [16, 4, 0]
    repeating = read(**{"kernel.keep_softmax": 1, "data.repeats": 1.0})
    assert [torch.equal(*pair) for pair in zip(parts, repeating, strict=True)] == [False, True, False]


def test_layers_are_chosen_by_recall_where_it_is_trained(sources):
    source, tokenizer, model = inputs.load_source(make_recipe(sources))

    def read(**settings):
        recipe = make_recipe(sources, **{"kernel.keep_softmax": 1} | settings)
        return inputs.load_sequences(recipe, model, tokenizer)

    plain, few = read(), read(**{"data.repeats": 0.01})
    assert plain.recalled is None and few.recalled.shape == few.selection.shape
    assert few.recalled.any(1).all()  # every sequence repeats, however few do in training
    changed = (plain.selection != few.selection).any(1)
    assert changed.all()
    with pytest.raises(FlexdistillError, match="Sequences of 4 tokens are too short"):
        read(**{"data.repeats": 0.5, "data.sequence_length": 4})


def test_mixed_texts(sources, tmp_path):
    numbers = tmp_path / "numbers.txt"
    numbers.write_text("".join(f"{n} " for n in range(3000)))
    mixed = [{"source": str(sources / "text.txt"), "weight": 3}, {"source": str(numbers)}]
    settings = {"data.sources": mixed, "evaluation.sequences": 8, "attention_transfer.steps": 10}
    recipe = Recipe().override({"model": str(sources / "llama")} | SHORT | settings)
    source, tokenizer, model = inputs.load_source(recipe)
    sequences = inputs.load_sequences(recipe, model, tokenizer)
    assert [len(text) for text in sequences.training.texts] == [21, 7]

    def is_numbers(rows):
        return [text.replace(" ", "").isdigit() for text in tokenizer.batch_decode(rows)]

    assert sum(is_numbers(sequences.evaluation)) == 2 and sum(is_numbers(sequences.training[:])) == 7
    rows = torch.cat([sequences.training[:], sequences.evaluation])
    assert len({tuple(row) for row in rows.tolist()}) == 28 + 8
    metrics = convert(recipe, tmp_path / "out")
    assert metrics["tokens"] == 28 * 32
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").data.sources == recipe.data.sources
    assert f"`{sources / 'text.txt'} + {numbers} (held out)`" in (tmp_path / "out" / "README.md").read_text()


def test_documents_are_kept_apart(sources, tmp_path):
    """Training on documents laid end to end is training on each of them alone."""
    rows = tmp_path / "rows.jsonl"
    sentences = (sources / "text.txt").read_text().splitlines()
    rows.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences))
    settings = {"data.source": str(rows), "data.document_masks": True, "logit_distillation.train": "lora"}
    apart = convert(make_recipe(sources, **settings), tmp_path / "apart")
    across = convert(make_recipe(sources, **settings | {"data.document_masks": False}), tmp_path / "across")
    for ours, theirs in zip(apart["stages"], across["stages"], strict=True):
        assert ours["first_loss"] < theirs["first_loss"]  # shorter sequences have less to learn
    with pytest.raises(FlexdistillError, match="BertForMaskedLM lets documents .* see each other"):
        convert(make_recipe(sources, "bert", **settings), tmp_path / "bert")
    assert not (tmp_path / "bert.partial").exists()


def test_overwrite_replaces_results_only(sources, tmp_path):
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    (precious / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(FlexdistillError, match="precious holds something else than a result of flexdistill"):
        convert(make_recipe(sources), precious, overwrite=True)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert not precious.with_name("precious.partial").exists()


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_working_folder_that_is_no_run_stays(sources, tmp_path, overwrite):
    precious = tmp_path / "out.partial"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(FlexdistillError, match="out.partial is in the way of the run"):
        convert(make_recipe(sources), tmp_path / "out", overwrite=overwrite)
    shutil.copytree(sources / "llama", tmp_path / "model.partial")
    (tmp_path / "model.partial" / "lock").touch()
    recipe = make_recipe(sources, model=str(tmp_path / "model.partial"))
    with pytest.raises(FlexdistillError, match="would replace the input .*model.partial; choose another"):
        convert(recipe, tmp_path / "model", overwrite=overwrite)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert (tmp_path / "model.partial" / "config.json").is_file()


def test_an_output_is_not_read_as_text(sources, tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 999)
    recipe = make_recipe(sources, **{"data.source": str(tmp_path)})
    with pytest.raises(FlexdistillError, match="is inside the folder .* that is read"):
        convert(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("targets", ["nothing", [], "("])
def test_adapters_are_tried_before_training(sources, tmp_path, targets):
    settings = {"logit_distillation.train": "lora", "logit_distillation.lora.target_modules": targets}
    with pytest.raises(FlexdistillError, match="Adapters cannot be put on .*; set logit_distillation.lora") as caught:
        convert(make_recipe(sources, **settings), tmp_path / "out")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())
