"""Tasks of lm-evaluation-harness (arXiv:2405.14782) for a teacher and its student, in this process."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import json_lines
from .devices import make_accelerator
from .errors import FlexdistillError, explained
from .evaluation import check_same_model, load_converted
from .progress import progress_bars_on_terminals_only
from .scoring import check_causal
from .sources import load_model, load_tokenizer, resolve_model

_COLUMNS = {"query", "choices", "gold"}
# of rows that hold a query, its choices and the index of the right one; the prompt is that of the harness's PIQA
_MULTIPLE_CHOICE = {
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "validation_split": "validation",
    "doc_to_text": "{{query.rstrip()}}\nAnswer:",
    "doc_to_choice": "choices",
    "doc_to_target": "gold",
    "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")],
}
_SEED, _BOOTSTRAPS = 1234, 1000


def evaluate_tasks(
    directory: str | Path,
    teacher: str,
    tasks: Sequence[str],
    *,
    data: dict[str, str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    precision: str = "auto",
) -> list[dict[str, Any]]:
    """Evaluates a converted model and the model it was made from on the same questions.

    Args:
        directory: folder or Hub id of the converted model.
        teacher: as `flexdistill convert` takes it.
        tasks: the harness's names, YAML files of tasks, or names in `data`.
        data: name of a task -> JSON-lines file whose rows hold `query`, `choices` and the right one's index, `gold`.
        limit: questions of each task, from the first; None: all.
        batch_size: sequences per forward pass.

    Returns:
        a row per task and metric: `task`, `metric`, `teacher`, `student`, their standard errors `teacher_error` and
        `student_error` (None where the harness gives none), `difference`, student less teacher, its standard error
        `difference_error` over the questions, paired (None where the metric is not a mean over them), `questions`.

    Raises:
        FlexdistillError: if the harness is missing, or a task, model or file cannot be read.
    """
    if find_spec("lm_eval") is None:
        raise FlexdistillError("Tasks need lm-evaluation-harness, which is missing; install the extra [eval].")
    specs = [_spec(task, data or {}) for task in tasks]
    if unused := next((name for name in data or {} if name not in tasks), None):
        raise FlexdistillError(f"There is data for {unused!r}, which is not among the tasks; name it in --tasks.")
    accelerator = make_accelerator(precision)
    source = resolve_model(teacher)
    tokenizer, models = load_tokenizer(source), [load_model(source), load_converted(directory)]
    check_same_model(*models)
    check_causal(models[1])
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what is meant here
    with progress_bars_on_terminals_only():
        remedy = "check its name and the network, or give its questions with --task-data"
        with explained(f"Tasks {', '.join(tasks)} cannot be loaded", remedy):
            # reading the harness's own thousands of tasks takes seconds
            manager = TaskManager(include_defaults=any(task not in (data or {}) for task in tasks))
            loaded = manager.load(specs)
        results = []
        while models:
            with accelerator.autocast():
                results.append(_evaluate(models.pop(0).to(accelerator.device), tokenizer, loaded, limit, batch_size))
            gc.collect()
    return list(_rows(*results))


def _spec(task: str, data: dict[str, str]) -> str | dict[str, Any]:
    """What the harness loads a task by."""
    if task not in data:
        return task
    file = Path(data[task])
    with explained(f"{file} holds no questions", "give JSON lines with query, choices and gold"):
        for number, row in enumerate(json_lines(file), start=1):
            if not row.keys() >= _COLUMNS or not 0 <= row["gold"] < len(row["choices"]):
                raise ValueError(f"row {number} is no question with choices and the index of the right one")
    return _MULTIPLE_CHOICE | {"task": task, "dataset_kwargs": {"data_files": {"validation": str(file)}}}


def _evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: Any, limit: int | None, batch_size: int
) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
    with explained(f"{type(model).__name__} cannot be evaluated on these tasks", "choose others"):
        for task in loaded["tasks"].values():  # as the harness's own command does; both models get the same examples
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
        return evaluate(harness_model, loaded, limit=limit, bootstrap_iters=_BOOTSTRAPS)


def _rows(teacher: dict[str, Any], student: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for task, figures in teacher["results"].items():
        for key, value in figures.items():
            metric, comma, filter_ = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            own, error = student["results"][task], key.replace(",", "_stderr,", 1)
            # a task with several filters has a sample of each for every question
            samples = [
                {s["doc_id"]: s for s in result.get("samples", {}).get(task, []) if s.get("filter", filter_) == filter_}
                for result in (teacher, student)
            ]
            differences = _differences(*samples, metric)
            yield {
                "task": task,
                "metric": key.removesuffix(",none"),
                "teacher": value,
                "teacher_error": _number(figures.get(error)),
                "student": own[key],
                "student_error": _number(own.get(error)),
                "difference": own[key] - value,
                "difference_error": statistics.stdev(differences) / len(differences) ** 0.5
                if len(differences) > 1
                else None,
                "questions": len(samples[0]) or None,
            }


def _differences(teacher: dict[int, dict], student: dict[int, dict], metric: str) -> list[float]:
    """Student less teacher on each question; empty where the metric is not a number of each."""
    pairs = [(teacher[doc].get(metric), student[doc].get(metric)) for doc in teacher]
    if not all(isinstance(value, (int, float)) for pair in pairs for value in pair):
        return []
    return [own - value for value, own in pairs]


def _number(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) else None
