"""Tasks of GLUE as their files give them: examples, token rows and metrics."""

from __future__ import annotations

import lzma
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

# of the training examples, which settings are chosen on
HELD_OUT = slice(0, None, 10)
# columns of token rows
MULTIPLE = 16

Labels = Sequence[int]


def accuracy(predicted: Labels, labels: Labels) -> float:
    """Share of labels that are predicted."""
    return statistics.fmean(p == label for p, label in zip(predicted, labels, strict=True))


def f1(predicted: Labels, labels: Labels) -> float:
    """Harmonic mean of precision and recall of label 1; 0 where it is neither predicted nor right."""
    both = sum(p and label for p, label in zip(predicted, labels, strict=True))
    return 2 * both / max(1, sum(predicted) + sum(labels))


def matthews(predicted: Labels, labels: Labels) -> float:
    """Correlation of two binary variables; 0 where one of them is constant."""
    count, ones, right_ones = len(labels), sum(predicted), sum(labels)
    both = sum(p and label for p, label in zip(predicted, labels, strict=True))
    spread = ones * (count - ones) * right_ones * (count - right_ones)
    return (count * both - ones * right_ones) / spread**0.5 if spread else 0.0


@dataclass(frozen=True)
class Task:
    """Where a task's files keep labels and texts, and how a classifier of it is fine-tuned and measured."""

    name: str  # of its folder
    texts: tuple[int, ...]  # columns
    label: int
    header: bool
    metrics: dict[str, Callable[[Labels, Labels], float]]
    batch_size: int
    epochs: float  # of the model with softmax attention
    converted_epochs: float  # of the converted model, which starts where that one ended


TASKS = {
    task.name: task
    for task in (
        Task("CoLA", (3,), 1, False, {"Matthews": matthews}, 64, 5, 3),
        Task("SST-2", (0,), 1, True, {"accuracy": accuracy}, 128, 2, 1),
        Task("MRPC", (3, 4), 0, True, {"F1": f1, "accuracy": accuracy}, 64, 5, 3),
    )
}


def read_examples(folder: Path, task: Task, split: str) -> tuple[list[list[str]], list[int]]:
    """Texts (a list of one or two) and label of each line of FOLDER/TASK/SPLIT.tsv, or of that file as .tsv.xz."""
    file = folder / task.name / f"{split}.tsv"
    content = file.read_bytes() if file.is_file() else lzma.decompress(file.with_suffix(".tsv.xz").read_bytes())
    # quotation marks are text here, so this is no csv
    lines = [line.split("\t") for line in content.decode("utf-8-sig").strip("\r\n").replace("\r", "").split("\n")]
    lines = lines[task.header :]
    return [[line[column] for column in task.texts] for line in lines], [int(line[task.label]) for line in lines]


def token_rows(examples: tuple[list[list[str]], list[int]], tokenizer: PreTrainedTokenizerBase, longest: int):
    """Examples as rows (N, 1 + T) int64: the label, then tokens, padded to equal length.

    Args:
        longest: tokens after which a text or pair is cut; a multiple of 16, as T is.
    """
    texts, labels = examples
    columns = [list(column) for column in zip(*texts, strict=True)]
    inputs = tokenizer(
        *columns, padding=True, pad_to_multiple_of=MULTIPLE, truncation=True, max_length=longest, return_tensors="pt"
    )
    return torch.cat([torch.tensor(labels)[:, None], inputs["input_ids"]], dim=1)


def load_rows(
    folder: Path, task: Task, tokenizer: PreTrainedTokenizerBase, longest: int, *, held_out: bool
) -> dict[str, torch.Tensor]:
    """Rows of the training set, as `train`, and of the development set, as `dev`.

    Args:
        held_out: takes a tenth of the training set apart, as `held_out`.
    """
    splits = {split: token_rows(read_examples(folder, task, split), tokenizer, longest) for split in ("train", "dev")}
    if held_out:
        rows = splits["train"]
        kept = torch.ones(len(rows), dtype=torch.bool)
        kept[HELD_OUT] = False
        splits |= {"train": rows[kept], "held_out": rows[~kept]}
    return splits
