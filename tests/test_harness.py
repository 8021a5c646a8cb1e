"""Tasks of lm-evaluation-harness, on local questions; needs the extra `eval`."""

import json
import math
import statistics
from pathlib import Path

import pytest
from accelerate import Accelerator

import flexdistill
from flexdistill import harness
from flexdistill.evaluation import load_converted
from flexdistill.harness import evaluate_tasks
from flexdistill.scoring import score_continuations, tokenize
from flexdistill.sources import load_model, load_tokenizer, resolve_model
from tests import tiny

QUESTIONS = [
    {"query": f"Question: What follows {number}?\n", "choices": [f"It is {number + 1}.", "Nothing " * (number % 4 + 1)]}
    | {"gold": number % 2}
    for number in range(20)
]
SHORT = {f"{stage}__{name}": 3 for stage in ("attention_transfer", "logit_distillation") for name in ("steps",)}

has_harness = pytest.mark.skipif(harness.find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny.save_tiny(folder / "llama", tiny.tiny_llama(), tiny.tiny_tokenizer())
    settings = {"data__source": "sample", "data__sequence_length": 16, "evaluation__sequences": 2}
    settings |= {"logit_distillation__learning_rate": 1e-2, "data__cache": False}
    flexdistill.convert(str(folder / "llama"), folder / "out", **settings, **SHORT)
    (folder / "piqa.jsonl").write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return folder


@has_harness
def test_figures_are_those_of_our_own_scoring(models, run):
    """Of `benchmarks/piqa.py`, that is: same prompt, same likelihoods, same choices."""
    arguments = ["evaluate", str(models / "out"), "--tasks", "piqa", "--task-data", f"piqa={models}/piqa.jsonl"]
    result = run(*arguments, "--json")
    assert result.code == 0, result.err
    rows = {row["metric"]: row for row in json.loads(result.out)}
    assert set(rows) == {"acc", "acc_norm"}
    tokenizer = load_tokenizer(resolve_model(str(models / "llama")))
    pairs = [
        tokenize(tokenizer, f"{question['query'].rstrip()}\nAnswer:", f" {choice}")
        for question in QUESTIONS
        for choice in question["choices"]
    ]
    right = {}
    for name, model in {
        "teacher": load_model(resolve_model(str(models / "llama"))),
        "student": load_converted(models / "out"),
    }.items():
        scores = [score.log_likelihood for score in score_continuations(model, pairs, Accelerator())]
        for metric, lengths in {"acc": lambda text: 1, "acc_norm": len}.items():
            right[metric, name] = [
                (scores[2 * n] / lengths(a) < scores[2 * n + 1] / lengths(b)) == question["gold"]
                for n, question in enumerate(QUESTIONS)
                for a, b in [question["choices"]]
            ]
    for metric, row in rows.items():
        teacher, student = right[metric, "teacher"], right[metric, "student"]
        assert (row["task"], row["questions"]) == ("piqa", 20)
        assert row["teacher"] == statistics.fmean(teacher) and row["student"] == statistics.fmean(student)
        differences = [int(own) - int(other) for own, other in zip(student, teacher, strict=True)]
        assert math.isclose(row["difference"], statistics.fmean(differences), abs_tol=1e-12)
        assert math.isclose(row["difference_error"], statistics.stdev(differences) / 20**0.5)
    assert right["acc", "teacher"] != right["acc_norm", "teacher"]
    table = run(*arguments, "--limit", "3")
    assert table.err == "" and table.out.splitlines()[0].split()[:3] == ["task", "metric", "teacher"]
    assert table.out.splitlines()[1].split()[-1] == "3"


@has_harness
def test_a_task_of_the_users_own(models, tmp_path):
    task = tmp_path / "own.yaml"
    task.write_text(
        "task: own\ndataset_path: json\noutput_type: loglikelihood_rolling\ntest_split: test\ndoc_to_text: ''\n"
        f"dataset_kwargs: {{data_files: {{test: {models}/piqa.jsonl}}}}\ndoc_to_target: '{{{{query}}}}'\n"
        "metric_list: [{metric: bits_per_byte}]\n"
    )
    (row,) = evaluate_tasks(models / "out", str(models / "llama"), [str(task)], limit=4)
    assert (row["task"], row["metric"], row["questions"]) == ("own", "bits_per_byte", 4)
    assert row["teacher"] != row["student"] and row["difference_error"] is None


@has_harness
def test_tasks_that_cannot_be_loaded(models):
    with pytest.raises(flexdistill.FlexdistillError, match="nonesuch cannot be loaded .*; check its name"):
        evaluate_tasks(models / "out", str(models / "llama"), ["nonesuch"])


def test_each_filter_has_its_own_error():
    def result(first, whole):
        samples = [
            {"doc_id": doc, "filter": name, "exact_match": value}
            for name, values in (("first", first), ("whole", whole))
            for doc, value in enumerate(values)
        ]
        figures = {f"exact_match,{name}": statistics.mean(v) for name, v in (("first", first), ("whole", whole))}
        return {"results": {"sums": figures}, "samples": {"sums": samples}}

    first, whole = harness._rows(result([0, 0, 0, 0], [1, 1, 0, 0]), result([1, 0, 1, 0], [1, 1, 0, 0]))
    assert (first["metric"], first["difference"], first["questions"]) == ("exact_match,first", 0.5, 4)
    assert first["difference_error"] == pytest.approx(statistics.stdev([1, 0, 1, 0]) / 2)
    assert (whole["difference"], whole["difference_error"]) == (0, 0)


def test_questions_may_hold_any_line_separator_but_newlines(tmp_path):
    file = tmp_path / "q.jsonl"
    row = {"query": "a\u2028b\x85", "choices": ["c"], "gold": 0}
    file.write_text("\ufeff\n" + json.dumps(row, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert harness._spec("own", {"own": str(file)})["task"] == "own"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"query": "a", "choices": ["b"], "gold": 1}', "row 1 is no question"),
        ('{"query": "a"}', "row 1 is no question"),
        ("[", "Expecting value"),
        (None, "No such file"),
    ],
)
def test_damaged_questions(run, monkeypatch, content, words):
    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    if content is not None:
        Path("q.jsonl").write_text(content)
    result = run("evaluate", "out", "--teacher", "gpt2", "--tasks", "a", "--task-data", "a=q.jsonl")
    assert result.code == 2 and words in result.err and result.err.count("\n") == 1


def test_data_of_no_task(run, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: True)
    result = run("evaluate", "out", "--teacher", "gpt2", "--tasks", "a", "--task-data", "b=q.jsonl")
    assert result.code == 2 and "'b', which is not among the tasks" in result.err


def test_the_harness_is_missing(run, monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    result = run("evaluate", "out", "--teacher", "gpt2", "--tasks", "piqa")
    assert result.code == 2 and "install the extra [eval]" in result.err and result.err.count("\n") == 1
