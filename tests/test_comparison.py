import json
import math
import re

import pytest
import torch

from flexdistill import comparison as comparison_module
from flexdistill import pipeline
from flexdistill.comparison import compare, make_entries, parse_variants
from flexdistill.distillation.logits import LogitDistillation
from flexdistill.errors import FlexdistillError, NonFiniteLossError
from flexdistill.pipeline import convert
from flexdistill.plots import plot_comparison
from flexdistill.tables import comparison_table
from tests import conversions

VARIANTS = ["nonstationary", "hedgehog"]


def make_recipe(sources, name="llama", **settings):
    return conversions.make_recipe(sources, name, **{"logit_distillation.steps": 2} | settings)


def without_times(result):
    if isinstance(result, dict):
        skipped = ("elapsed_s", "peak_memory_bytes", "reload_max_logit_difference")
        return {key: without_times(value) for key, value in result.items() if key not in skipped}
    return [without_times(value) for value in result] if isinstance(result, list) else result


@pytest.fixture(scope="module")
def result(sources, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results") / "comparison"
    return folder, compare(make_recipe(sources), VARIANTS, folder, windows=(0, 4), points=3)


def test_files(result):
    folder, comparison = result
    assert json.loads((folder / "compare.json").read_text()) == comparison
    names = ["nonstationary hyperbolic, no window", "nonstationary hyperbolic, window 4"]
    names += ["hedgehog, no window", "hedgehog, window 4"]
    assert [entry["name"] for entry in comparison["results"]] == names
    assert (folder / "hedgehog-window-4" / "logit_distillation.jsonl").is_file()
    assert not list(folder.rglob("*.safetensors"))
    for plot in ("perplexity.png", "attention_kl.png"):
        assert (folder / plot).read_bytes().startswith(b"\x89PNG")


def test_every_entry_is_what_convert_measures(result, sources, tmp_path):
    """So all entries see the same batches in the same order, from kernels of the same seed."""
    for number, (variant, window) in enumerate([("nonstationary", 4), ("hedgehog", 0)]):
        recipe = make_recipe(sources, **{"kernel.variant": variant, "kernel.window": window})
        expected = without_times(convert(recipe, tmp_path / str(number)))
        actual = without_times(result[1]["results"][1 + number])
        assert {key: actual[key] for key in expected} == expected


def test_curve(result):
    for entry in result[1]["results"]:
        # 6 steps in 3 parts of 2; the first stage has 4 of them
        assert [point["tokens"] for point in entry["curve"]] == [0, 2 * 64, 4 * 64, 6 * 64]
        assert {key: entry["curve"][-1][key] for key in ("perplexity", "kl")} == {
            key: entry["student"][key] for key in ("perplexity", "kl")
        }
        assert entry["curve"][0]["perplexity"] != entry["curve"][1]["perplexity"]


def test_table(result):
    folder, comparison = result
    columns, rows = comparison_table(comparison)
    cells = {row[0]: dict(zip(columns, row, strict=True)) for row in rows}
    hybrid = ["", ": kernel only", ": window only", ": no attention"]
    linear = ["", ": no attention"]
    names = [entry["name"] for entry in comparison["results"]]
    expected = [name + part for name, parts in zip(names, [linear, hybrid] * 2, strict=True) for part in parts]
    assert list(cells) == ["teacher", *expected]
    row, entry = cells["hedgehog, window 4"], comparison["results"][3]
    assert row["perplexity"] == entry["student"]["perplexity"]
    assert row["over teacher"] == pytest.approx(row["perplexity"] / cells["teacher"]["perplexity"])
    assert row["attention KL"] == pytest.approx(sum(entry["attention_kl"].values()) / 2)
    assert row["tokens"] == 6 * 64
    lines = (folder / "compare.md").read_text().splitlines()
    assert len(lines) == 2 + len(rows) and lines[0].startswith("| model | perplexity |")
    assert all(line.count("|") == len(columns) + 1 for line in lines)


def test_resume_keeps_what_is_there(result, sources, tmp_path, monkeypatch):
    folder, comparison = result
    first = compare(make_recipe(sources), VARIANTS, tmp_path / "out", windows=[4], points=3)
    before = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]
    trained = []
    run = comparison_module._run
    monkeypatch.setattr(comparison_module, "_run", lambda entry, *args: trained.append(entry.name) or run(entry, *args))
    whole = compare(make_recipe(sources), VARIANTS, tmp_path / "out", windows=(0, 4), points=3, resume=True)
    assert trained == ["nonstationary hyperbolic, no window", "hedgehog, no window"]
    assert [whole["results"][1], whole["results"][3]] == first["results"] == before
    assert without_times(whole) == without_times(comparison)


class Interrupted(BaseException):
    pass


def test_an_interrupted_comparison_loses_nothing(sources, tmp_path, monkeypatch):
    """Also not what stood behind the entry that was being trained."""
    compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0)

    def interrupted(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(comparison_module, "run_stages", interrupted)
        with pytest.raises(Interrupted):
            compare(make_recipe(sources), VARIANTS, tmp_path / "out", points=0, resume=True)
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]
    assert [entry["name"] for entry in kept] == ["hedgehog, no window"]


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_one_that_stopped_in_its_first_entry_is_no_obstacle(sources, tmp_path, monkeypatch, how):
    def interrupted(*args, **kwargs):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(comparison_module, "run_stages", interrupted)
        with pytest.raises(Interrupted):
            compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0)
    with pytest.raises(FlexdistillError, match="not empty; choose another --output, or pass --overwrite"):
        compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0)
    assert len(compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0, **{how: True})["results"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_two_comparisons_do_not_write_one_folder(sources, tmp_path, monkeypatch):
    run = comparison_module._run

    def meanwhile(*args):
        monkeypatch.setattr(comparison_module, "_run", run)
        for flag in ("overwrite", "resume"):
            with pytest.raises(FlexdistillError, match="Another process is writing"):
                compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0, **{flag: True})
        return run(*args)

    monkeypatch.setattr(comparison_module, "_run", meanwhile)
    assert len(compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0)["results"]) == 1


def test_results_of_other_settings_are_refused(sources, tmp_path):
    compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", points=0)
    before = (tmp_path / "out" / "compare.json").read_bytes()
    for recipe, variants in ((make_recipe(sources, seed=1), ["hedgehog"]), (make_recipe(sources), ["stationary"])):
        with pytest.raises(FlexdistillError, match=r"other settings or inputs \(hedgehog, no window\); .*--overwrite"):
            compare(recipe, variants, tmp_path / "out", points=0, resume=True)
    with pytest.raises(FlexdistillError, match="not empty; choose another --output, or pass --overwrite"):
        compare(make_recipe(sources), ["hedgehog"], tmp_path / "out")
    assert (tmp_path / "out" / "compare.json").read_bytes() == before
    again = compare(make_recipe(sources, seed=1), ["hedgehog"], tmp_path / "out", points=0, overwrite=True)
    assert again["results"][0]["curve"] == []
    with pytest.raises(FlexdistillError, match="not there to go on with"):
        compare(make_recipe(sources), ["hedgehog"], tmp_path / "other", resume=True)


def test_one_that_diverges_does_not_stop_the_others(sources, tmp_path, monkeypatch):
    backward = LogitDistillation.backward

    def diverging(self, sequences):
        if any("nonstationary" in str(spec) for spec in self.model.config.kernel_specs.values()):
            raise NonFiniteLossError("the loss is nan")
        return backward(self, sequences)

    with monkeypatch.context() as patch:
        patch.setattr(LogitDistillation, "backward", diverging)
        comparison = compare(make_recipe(sources), VARIANTS, tmp_path / "out")
    assert [entry.get("error") for entry in comparison["results"]] == ["the loss is nan", None]
    assert "the loss is nan" in (tmp_path / "out" / "compare.md").read_text()
    again = compare(make_recipe(sources), VARIANTS, tmp_path / "out", resume=True)
    assert ["error" in entry for entry in again["results"]] == [False, False]
    assert again["results"][1] == comparison["results"][1]


def test_models_are_exported(sources, tmp_path):
    from transformers import AutoModelForCausalLM

    comparison = compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", export_models=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "hedgehog-no-window" / "model")
    assert {spec.variant for spec in model.config.kernel_specs.values()} == {"hedgehog"}
    assert comparison["results"][0]["reload_max_logit_difference"] <= 1e-5


def test_an_encoder_is_compared_by_its_kl(sources, tmp_path):
    comparison = compare(make_recipe(sources, "bert"), ["stationary"], tmp_path / "out")
    assert comparison["results"][0]["student"]["perplexity"] is None
    assert all(math.isfinite(point["kl"]) for point in comparison["results"][0]["curve"])
    assert (tmp_path / "out" / "kl.png").is_file()


def test_a_kernel_without_parameters_learns_on_the_same_rows(sources, tmp_path, monkeypatch):
    rows = {}
    train = pipeline.run_stage

    def recorded(stage, recipe, sequences, order, *args, **kwargs):
        rows.setdefault(stage.name, []).append(order)
        return train(stage, recipe, sequences, order, *args, **kwargs)

    monkeypatch.setattr(pipeline, "run_stage", recorded)
    compared = compare(make_recipe(sources), ["stationary", "elu"], tmp_path / "out", points=0)
    names = [[stage["name"] for stage in result["stages"]] for result in compared["results"]]
    assert names == [["attention_transfer", "logit_distillation"], ["logit_distillation"]]
    assert torch.equal(*rows["logit_distillation"])


def test_nothing_to_plot(tmp_path):
    assert plot_comparison({"results": [{"name": "hedgehog", "error": "the loss is nan"}]}, tmp_path) == []


def test_variants_are_read():
    text = "nonstationary:component=trigonometric:features=8,hedgehog:layers=every:4:tied=true, stationary:layers=0-2,5"
    assert parse_variants(text) == [
        {"variant": "nonstationary", "component": "trigonometric", "features": 8},
        {"variant": "hedgehog", "layers": "every:4", "tied": True},
        {"variant": "stationary", "layers": "0-2,5"},
    ]


def test_entries(sources):
    variants = ["nonstationary", {"variant": "nonstationary", "window": 8}]
    variants.append({"variant": "hedgehog", "attention_transfer.learning_rate": 0.5})
    entries = make_entries(make_recipe(sources), variants, (0, 4))
    assert [entry.name for entry in entries] == [
        "nonstationary hyperbolic, no window",
        "nonstationary hyperbolic, window 4",
        "nonstationary hyperbolic, window 8",
        "hedgehog, attention_transfer.learning_rate 0.5, no window",
        "hedgehog, attention_transfer.learning_rate 0.5, window 4",
    ]
    assert [entry.recipe.kernel.window for entry in entries] == [0, 4, 8, 0, 4]
    assert [entry.recipe.attention_transfer.learning_rate for entry in entries] == [5e-3] * 3 + [0.5] * 2


BAD_INPUT = {
    "nonsense": "Unknown variant 'nonsense'",
    "hedgehog,hedgehog": "hedgehog, no window is compared with itself",
    "hedgehog:window=32": "window of 32 tokens covers sequences of 32",
    "hedgehog:windw=3": "did you mean 'window'?",
    "hedgehog:sinks=2": "hedgehog:sinks=2, no window: ",
    "hedgehog:tied=[": "the value of tied is not valid YAML",
    "hedgehog:tied": "write NAME or NAME:SETTING=VALUE",
    "hedgehog:data.source=other": "data.source is the same for all",
    "hedgehog:logit_distillation.steps=3": "logit_distillation.steps is the same for all",
    "hedgehog:layers=every:3,stationary:layers=5-9": "the model has layers 0 to 1",
    "": "cannot be read",
}


@pytest.mark.parametrize("variants", BAD_INPUT)
def test_bad_input_changes_nothing(sources, tmp_path, variants):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "compare.json").write_text("mine")
    with pytest.raises(FlexdistillError, match=re.escape(BAD_INPUT[variants])):
        compare(make_recipe(sources), parse_variants(variants), tmp_path / "out", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "compare.json"]


def test_students_that_are_evaluated_are_whole(sources, tmp_path):
    recipe = make_recipe(sources).override({"logit_distillation.parallel": "fsdp"})
    with pytest.raises(FlexdistillError, match="must be whole; set logit_distillation.parallel to ddp"):
        compare(recipe, parse_variants("hedgehog"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_to_compare(sources, tmp_path):
    with pytest.raises(FlexdistillError, match="nothing to compare"):
        compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", windows=())


def test_the_budget_is_what_is_trained(sources, tmp_path):
    comparison = compare(make_recipe(sources), ["hedgehog"], tmp_path / "out", budget=3 * 64 + 10, points=0)
    (entry,) = comparison["results"]
    assert [stage["steps"] for stage in entry["stages"]] == [2, 1] and entry["tokens"] == 3 * 64
    with pytest.raises(
        FlexdistillError, match="A budget of 191 tokens is less than a step of each stage.* 192 or more"
    ):
        compare(make_recipe(sources), ["hedgehog"], tmp_path / "less", budget=191)


def test_random_state_outside_does_not_matter(sources, tmp_path):
    figures = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        comparison = compare(make_recipe(sources), ["nonstationary"], tmp_path / str(seed), points=0)
        figures.append(comparison["results"][0]["rows"])
    assert figures[0] == figures[1]
