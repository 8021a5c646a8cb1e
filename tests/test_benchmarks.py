"""The benchmarks of trained models run on tiny ones, and their arithmetic is right."""

import json
import runpy
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from flexdistill import pipeline
from flexdistill.devices import make_accelerator
from flexdistill.errors import RunInterrupted
from flexdistill.evaluation import load_converted
from flexdistill.inputs import checked_plan
from flexdistill.recipe import Recipe
from tests.distillation.stages import student, teacher
from tests.tiny import save_tiny

FOLDER = Path(__file__).parents[1] / "benchmarks"
QUESTIONS = [
    {"query": f"Question: how does one {verb} a {thing}?\n", "choices": choices, "gold": gold}
    for verb, thing, choices, gold in [
        ("open", "door", ["Push it, slowly.", "Eat"], 0),
        ("cook", "egg", ["Ask the neighbour to paint the fence", "Boil it in water"], 1),
        ("mend", "sock", ["Sew", "Throw the sock far away from the house"], 0),
        ("read", "book", ["Close both eyes", "Open it, and look at the words"], 1),
        ("feed", "cat", ["Give it fish", "Give it stones"], 0),
    ]
]


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "teacher", teacher("llama"), tiny_tokenizer)
    for name, window in (("linear", 0), ("windowed", 8)):
        save_tiny(folder / name / "model", student("llama", window=window), tiny_tokenizer)
    (folder / "piqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return folder


@pytest.fixture
def benchmark(models, monkeypatch, tmp_path, capsys):
    """Runs a script with the teacher and both students; gives its JSON and what it printed."""

    def run(name, *arguments):
        output = tmp_path / "out.json"
        students = [str(models / "linear" / "model"), f"hybrid={models / 'windowed' / 'model'}"]
        fixed = ["--teacher", str(models / "teacher"), "--output", str(output), *students]
        monkeypatch.setattr(sys, "argv", [name, *fixed, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(FOLDER))
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return json.loads(output.read_text()), capsys.readouterr().out

    return run


def test_piqa(benchmark, models, tiny_tokenizer):
    results, printed = benchmark("piqa.py", "--data", models / "piqa.jsonl", "--batch-tokens", "100")
    loaded = {"teacher": teacher("llama"), "linear": load_converted(models / "linear" / "model")}
    right = {}
    for name, model in loaded.items():
        right[name] = []
        for question in QUESTIONS:
            values = []
            for choice in question["choices"]:
                prompt = tiny_tokenizer(f"{question['query']}Answer:")["input_ids"]
                tokens = torch.tensor([tiny_tokenizer(f"{question['query']}Answer: {choice}")["input_ids"]])
                with torch.no_grad():
                    rows = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
                rows = rows.gather(-1, tokens[0, 1:, None])[len(prompt) - 1 :]
                values.append((float(rows.sum()), float(rows.sum()) / len(choice)))
            right[name].append(
                [values[0][i] < values[1][i] if question["gold"] else values[0][i] > values[1][i] for i in (0, 1)]
            )
    assert {name: results["right"][name] for name in right} == right
    assert list(results["results"]) == ["teacher", "linear", "hybrid"] and results["questions"] == 5
    for index, measure in enumerate(("accuracy", "normalised_accuracy")):
        own = [float(row[index]) for row in right["linear"]]
        found = results["results"]["linear"]
        assert found[measure] == pytest.approx(sum(own) / 5)
        differences = [mine - row[index] for mine, row in zip(own, right["teacher"], strict=True)]
        assert found[f"{measure}_difference"] == pytest.approx(sum(differences) / 5)
        assert found[f"{measure}_difference_error"] == pytest.approx(statistics.stdev(differences) / 5**0.5)
    assert f"{results['results']['hybrid']['accuracy']:.1%}" in printed


def test_recall(benchmark):
    arguments = ["--data", "sample", "--lengths", "300", "--questions", "2"]
    results, printed = benchmark("recall.py", *arguments)
    assert benchmark("recall.py", *arguments)[0] == results
    assert list(results["results"]) == ["teacher", "linear", "hybrid"]
    tasks = [row["task"] for row in results["results"]["hybrid"]]
    assert tasks == ["associative recall", "needle in text"] and all(task in printed for task in tasks)


def test_long_text(benchmark):
    arguments = ["--data", "sample", "--length", "512", "--sequences", "2", "--chunk", "100", "--batch-size", "2"]
    results, printed = benchmark("long_text.py", *arguments)
    assert {name: len(spans) for name, spans in results["spans"].items()} == {"teacher": 1, "linear": 1, "hybrid": 1}
    assert results["positions"] == 512 and results["sequences"] == 2 and "0 to 511" in printed


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("piqa.py", ["--data", "nowhere.jsonl"], "nowhere.jsonl"),
        ("recall.py", ["--data", "nowhere.txt", "--lengths", "300"], "nowhere.txt"),
    ],
)
def test_errors_are_one_sentence(benchmark, name, arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark(name, *arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.splitlines()[-1].startswith("Error: ") and message in error


def test_long_text_refuses_more_than_learned_positions(models, monkeypatch, capsys, tmp_path, tiny_tokenizer):
    save_tiny(tmp_path / "gpt2", teacher("gpt2"), tiny_tokenizer)
    arguments = ["--teacher", tmp_path / "gpt2", "--data", "sample", "--length", 4096, "--output", tmp_path / "o.json"]
    with pytest.raises(SystemExit) as stop:
        run_script("long_text.py", monkeypatch, capsys, *arguments)
    assert stop.value.code == 2 and "set --length to that or less" in capsys.readouterr().err


def test_hybrid(models, monkeypatch, tmp_path, capsys):
    arguments = [str(models / "teacher"), "--data", "sample", "--evaluate", "sample", "--output", str(tmp_path / "out")]
    arguments += ["--keep", "1", "--budget", "600"]
    sizes = {"attention_transfer.batch_size": 2, "logit_distillation.batch_size": 2}
    for key, value in ({"data.sequence_length": 16, "evaluation.sequences": 2} | sizes).items():
        arguments += ["--set", f"{key}={value}"]
    printed = run_script("hybrid.py", monkeypatch, capsys, *arguments)
    results = json.loads((tmp_path / "out" / "compare.json").read_text())["results"]
    assert [result["plan"]["kept"] for result in results] == [0, 1, 1]
    assert [len(result["kept_softmax"]) for result in results] == [0, 1, 0]
    assert "keep_softmax 1" in printed


def test_uniform_placement(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    place = runpy.run_path(str(FOLDER / "hybrid.py"))["all_but_uniform"]
    assert place(8, 2) == "0,1,3,4,5,7" and place(2, 1) == "0"
    for keep in range(1, 30):
        assert len(place(30, keep).split(",")) == 30 - keep


def test_parallel(monkeypatch, tmp_path, capsys):
    """One process in the place of each launched one, on this process's CPU; launches end before the last way."""
    output, launches = tmp_path / "parallel.json", []
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(FOLDER / "parallel.py"))
    transfer, ddp, fsdp, checkpointing = script["WAYS"]

    def launch(case, number, result):
        launches.append((number, case["ways"]))
        if (number, case["ways"][0]) == (2, fsdp):
            return {"ways": {fsdp: {"error": "FlexdistillError: It does not fit."}}}
        script["work"](case | {"ways": case["ways"][:number]}, result)
        return json.loads(result.read_text())

    monkeypatch.setitem(script["main"].__globals__, "launch", launch)
    arguments = ["--tiny", "--steps", "2", "--warmup", "1", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["parallel.py", *arguments])
    script["main"]()
    # what is left is launched anew
    left = [[transfer, ddp, fsdp, checkpointing], [fsdp, checkpointing], [checkpointing]]
    assert launches == [(1, [transfer, ddp]), (1, [ddp]), *((2, ways) for ways in left)]
    tiny = json.loads(output.read_text())["models"]["tiny"]
    one, two = (run["ways"] for run in tiny["runs"])
    assert two.pop(fsdp) == {"error": "FlexdistillError: It does not fit."} and two.keys() == {*one, checkpointing}
    for way, measured in two.items():
        base = one[way if way in one else ddp]
        assert len(measured["step_s"]) == 2
        assert measured["tokens_per_s"] == pytest.approx(4 * 64 / statistics.median(measured["step_s"]))
        assert measured["efficiency"] == pytest.approx(measured["tokens_per_s"] / (2 * base["tokens_per_s"]))
        assert measured["loss_difference"] == 0.0 and measured["curve"] == base["curve"]
        assert len(measured["curve"]) == 3 and measured["curve"][-1] > 1e-3
        assert len(measured["peak_memory_bytes"]) == 1 and measured["peak_memory_bytes"][0] > 1e6
    assert one[transfer]["efficiency"] == 1.0
    two[ddp]["curve"][1] *= 1.5
    script["compare"](tiny["runs"])
    assert two[ddp]["loss_difference"] == pytest.approx(0.5)
    printed = capsys.readouterr().out
    assert "FSDP2: FlexdistillError: It does not fit." in printed
    monkeypatch.setattr(sys, "argv", ["parallel.py", "--table", str(output)])
    script["main"]()
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize("told", [True, False])
def test_parallel_goes_on_behind_a_failure(told, monkeypatch, tmp_path):
    """The first error that a process wrote is that of the way under way; where none did, all ways have failed."""
    monkeypatch.syspath_prepend(str(FOLDER))
    script = runpy.run_path(str(FOLDER / "parallel.py"))

    def run(command, **settings):
        result = Path(command[-1])
        result.write_text(json.dumps({"device": "cpu", "ways": {"a": {}}}))
        if told:
            result.with_suffix(".errors").write_text("ValueError: no\nRuntimeError: connection closed\n")
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", run)
    found = script["launch"]({"model": "tiny", "ways": ["a", "b", "c"]}, 2, tmp_path / "result.json")["ways"]
    unknown = {"error": "exit code 1"}
    assert found == {"a": {}} | ({"b": {"error": "ValueError: no"}} if told else {"b": unknown, "c": unknown})
    assert not list(tmp_path.iterdir())


def run_script(name, monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.syspath_prepend(str(FOLDER))
    runpy.run_path(str(FOLDER / name), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("file", ["fidelity.yaml", "levers.yaml"])
def test_rows_can_be_run(file):
    heads = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
    sizes = {"vocab_size": 96, "hidden_size": 36, "intermediate_size": 64, "max_position_embeddings": 8192}
    model = LlamaForCausalLM(LlamaConfig(**heads, **sizes, tie_word_embeddings=True))  # SmolLM2-135M, but narrow
    accelerator = make_accelerator("fp32")
    for recipe, rows in yaml.safe_load((FOLDER / file).read_text()).items():
        for settings in rows.values():
            plan = checked_plan(Recipe.load(recipe).override(settings), model, accelerator)
            assert len(plan.converted) >= 26


def test_fidelity(models, monkeypatch, capsys, tmp_path):
    rows, output = tmp_path / "rows.yaml", tmp_path / "fidelity.json"
    rows.write_text("default:\n  linear: {}\n  hybrid: {kernel.window: 4}\n")
    settings = {
        "data.sequence_length": 16,
        "attention_transfer.steps": 2,
        "logit_distillation.steps": 1,
        "evaluation.sequences": 2,
    }
    arguments = ["--model", models / "teacher", "--recipe", "default", "--rows-file", rows, "--output", output]
    arguments += ["--train", "sample", "--evaluate", "sample"]
    for key, value in settings.items():
        arguments += ["--set", f"{key}={value}"]
    printed = run_script("fidelity.py", monkeypatch, capsys, *arguments)
    results = json.loads(output.read_text())
    assert [(result["name"], result["settings"]) for result in results] == [
        ("linear", {}),
        ("hybrid", {"kernel.window": 4}),
    ]
    table = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    assert [line[0] for line in table] == ["model", "---", "teacher (softmax)", "linear", "hybrid"]
    for result, line in zip(results, table[3:], strict=True):
        found = {row["name"]: row["perplexity"] for row in result["metrics"]["rows"]}
        assert float(line[2]) == pytest.approx(found["student"] / found["teacher"], abs=1e-3)
        assert ("window only" in found) == (result["name"] == "hybrid")
    again = run_script("fidelity.py", monkeypatch, capsys, *arguments)  # rows that are there are not run again
    assert again == printed and json.loads(output.read_text()) == results
    assert run_script("fidelity.py", monkeypatch, capsys, "--table", output) == printed
    output.unlink()
    calls = []

    def stop_once(recipe, folder, *, resume):
        calls.append((Path(folder), resume))
        if not resume:
            (tmp_path / "students" / "linear.partial").mkdir(parents=True)
            raise RunInterrupted("stopped", 15)
        return results[0]["metrics"]

    monkeypatch.setattr(pipeline, "convert", stop_once)
    arguments += ["--students", tmp_path / "students", "--rows", "linear"]
    with pytest.raises(RunInterrupted):
        run_script("fidelity.py", monkeypatch, capsys, *arguments)
    run_script("fidelity.py", monkeypatch, capsys, *arguments)
    assert calls == [(tmp_path / "students" / "linear", False), (tmp_path / "students" / "linear", True)]
    assert json.loads(output.read_text())[0]["metrics"] == results[0]["metrics"]
    results[0] = {"name": "linear", "settings": {}, "error": "it diverged"}
    output.write_text(json.dumps(results))
    assert "| linear | it diverged |" in run_script("fidelity.py", monkeypatch, capsys, "--table", output)


def test_throughput(monkeypatch, capsys, tmp_path):
    output = tmp_path / "throughput.json"
    arguments = ["--tiny", "--batch-size", 1, "--length", 8, "--steps", 1, "--ways", "plain", "decay"]
    arguments += ["--set", "kernel.component=trigonometric"]
    arguments += ["--output", output]
    printed = run_script("throughput.py", monkeypatch, capsys, *arguments)
    results = json.loads(output.read_text())
    assert [result["decay"] for result in results] == [False, True]
    assert results[0]["settings"] == ["kernel.component=trigonometric"]
    for result in results:
        assert [stage["name"] for stage in result["stages"]] == ["attention_transfer", "logit_distillation"]
        for stage in result["stages"]:
            assert stage["tokens_per_s"] == pytest.approx(8e3 / stage["ms"], rel=0.1)
    assert "over the teacher's layers" in printed


def test_picture_of_the_committed_results(tmp_path, monkeypatch):
    picture = tmp_path / "kernels.svg"
    monkeypatch.setattr(sys, "argv", ["pictures.py", "--output", str(picture)])
    found = runpy.run_path(str(FOLDER / "pictures.py"), run_name="__main__")
    assert picture.read_text().startswith("<?xml")
    excesses = found["excesses"]()
    assert min(excesses, key=excesses.get).endswith("(default)") and round(excesses["Hedgehog"], 3) == 0.819
    lines = found["perplexities_by_position"]()
    assert len(lines) == 5 and lines["teacher"][-1] == pytest.approx((12288, 104.3), rel=1e-3)
