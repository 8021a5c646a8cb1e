"""The models that benchmarks/glue.py compares: fine-tuned, converted, with kernels of their own task or of another."""

from __future__ import annotations

import functools
import json
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed
from glue_stage import Classification, padding_by_tokens
from glue_tasks import TASKS, Task, load_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.devices import make_accelerator, to_device
from flexdistill.distillation.attention_transfer import AttentionTransfer
from flexdistill.distillation.loop import run_stage
from flexdistill.distillation.measurement import measure_kernels
from flexdistill.distillation.stage import kernel_parameters
from flexdistill.packing import train_order
from flexdistill.progress import progress_bars_on_terminals_only
from flexdistill.recipe import AttentionTransferRecipe, KernelRecipe, LogitDistillationRecipe
from flexdistill.runtime.interface import NAME
from flexdistill.sources import load_tokenizer, resolve_model
from flexdistill.storage import write_json

KERNELS = {
    "nonstationary": KernelRecipe(variant="nonstationary", component="hyperbolic"),
    "trigonometric": KernelRecipe(variant="nonstationary", component="trigonometric"),
    "hedgehog": KernelRecipe(variant="hedgehog"),
    "rfa": KernelRecipe(variant="rfa"),
    "performer": KernelRecipe(variant="performer"),
}
# what learns from the fine-tuned model and labels as converted models do, softmax attention kept, tells what that gives
SOFTMAX, SOFTMAX_AGAIN = "softmax", "softmax-again"
METHODS = (SOFTMAX, SOFTMAX_AGAIN, *KERNELS)
MEASURED_ROWS, EVALUATION_BATCH, LAST_STEPS = 64, 256, 20
# sequences of about equal length that run at once where padding takes time; a GPU has them all at once
MICRO_BATCH = {"cpu": 16}


@dataclass(frozen=True)
class Settings:
    """What all runs of a folder share."""

    model: str
    data: Path
    folder: Path
    precision: str
    held_out: bool
    longest: int
    epochs: float
    learning_rate: float
    kernel_learning_rate: float
    features: int | None
    transfer_steps: int
    transfer_batch: int
    transfer_rate: float
    label_weight: float
    hidden_state_weight: float

    @property
    def distils(self) -> bool:
        """Whether the last stage needs the fine-tuned model, or labels alone."""
        return self.label_weight < 1 or self.hidden_state_weight > 0

    def begin(self) -> None:
        """Makes the folder, or checks that its runs had these settings."""
        for name in ("weights", "kernels", "runs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        file = self.folder / "settings.json"
        if not file.is_file():
            write_json(file, self.to_dict())
        elif json.loads(file.read_text()) != self.to_dict():
            sys.exit(f"Runs in {self.folder} had other settings, which {file} lists; give another --folder.")

    def to_dict(self) -> dict:
        """What decides results, ready for JSON."""
        own = asdict(self) | {"model": Path(self.model).name}
        return {name: value for name, value in own.items() if name not in ("data", "folder")}

    def result(self, run: Run) -> Path:
        return self.folder / "runs" / f"{run.name}.json"


@dataclass(frozen=True)
class Run:
    task: str
    method: str
    seed: int
    kernel_task: str | None = None  # the other task that the kernel was learned on

    @property
    def name(self) -> str:
        return "-".join([self.task, self.method, *filter(None, [self.kernel_task]), str(self.seed)])


class Benchmark:
    """Makes models and kernels, or reads those that the folder has, and measures runs."""

    def __init__(self, settings: Settings):
        transformers.logging.set_verbosity_error()
        self.settings, self.folder = settings, settings.folder
        self.accelerator = make_accelerator(settings.precision)
        self.source = resolve_model(settings.model)
        self.tokenizer = load_tokenizer(self.source)
        self.rows = functools.cache(self._rows)
        self.micro_batch_size = MICRO_BATCH.get(self.accelerator.device.type)

    def measure(self, run: Run) -> dict:
        """The run's figures: metrics before and after the distillation."""
        started, task = time.perf_counter(), TASKS[run.task]
        model, facts = self.fine_tuned(task, run.seed), {}
        if run.method in KERNELS:
            kernel, facts = self.kernel(run.kernel_task or run.task, run.method, run.seed)
            model = self.converted(model, run.method)
            put_kernel(model, kernel)
        result = asdict(run) | facts | {"before": self.metrics(model, task)}
        if run.method != SOFTMAX:
            teacher = self.fine_tuned(task, run.seed) if self.settings.distils else None
            self.tune(model, task, task.converted_epochs, run.seed, teacher, train_kernels=run.kernel_task is None)
        result["metrics"] = self.metrics(model, task)
        if self.settings.held_out:
            result["held_out"] = self.metrics(model, task, "held_out")
        return result | {"elapsed_s": round(time.perf_counter() - started, 1)}

    def fine_tuned(self, task: Task, seed: int) -> PreTrainedModel:
        """The model with softmax attention, fine-tuned on a task."""
        file = self.folder / "weights" / f"{task.name}-{seed}.safetensors"
        set_seed(seed)
        with progress_bars_on_terminals_only():
            model = AutoModelForSequenceClassification.from_pretrained(
                self.source.path_or_id, num_labels=2, dtype=torch.float32, use_safetensors=True
            ).to(self.accelerator.device)
        if file.is_file():
            model.load_state_dict(load_file(file))
            return model.eval()
        self.tune(model, task, task.epochs, seed)
        save_whole(model.state_dict(), file)
        return model

    def kernel(self, task: str, method: str, seed: int) -> tuple[dict[str, torch.Tensor], dict]:
        """Weights of the kernels that imitate the model fine-tuned on a task, and the course of their training."""
        file = self.folder / "kernels" / f"{task}-{method}-{seed}.safetensors"
        facts = file.with_suffix(".json")
        if not facts.is_file():
            model = self.converted(self.fine_tuned(TASKS[task], seed), method)
            with padding_by_tokens(model, self.tokenizer):
                figures = self.learn_kernel(model, task, seed, file.with_suffix(".jsonl"))
            save_whole(kernel_state(model), file)
            write_json(facts, figures)
        return load_file(file), json.loads(facts.read_text())

    def converted(self, model: PreTrainedModel, method: str) -> PreTrainedModel:
        kernel = KERNELS[method].model_copy(update={"features": self.settings.features})
        return apply_plan(model, make_plan(model, kernel)).to(self.accelerator.device)

    def learn_kernel(self, model: PreTrainedModel, task: str, seed: int, log: Path) -> dict:
        """Attention transfer on the task's texts; a kernel that has nothing to learn stays as it was drawn."""
        tokens = self.rows(task)["train"][:, 1:]
        lengths = (tokens != self.tokenizer.pad_token_id).sum(1)
        longest = tokens[lengths.argsort(descending=True)[:MEASURED_ROWS]]
        measure_kernels(model, longest.to(self.accelerator.device), self.accelerator)
        if not kernel_parameters(model):
            return {"transfer_steps": 0}
        recipe = AttentionTransferRecipe(
            steps=self.settings.transfer_steps,
            batch_size=self.settings.transfer_batch,
            learning_rate=self.settings.transfer_rate,
            micro_batch_size=self.micro_batch_size,
        )
        order = by_length(train_order(len(tokens), recipe.steps, recipe.batch_size, seed), lengths)
        stage = AttentionTransfer(model, recipe, self.accelerator)
        run_stage(stage, recipe, tokens, order, self.accelerator, log_file=log)
        kls = [json.loads(line)["attention_kl"] for line in log.read_text().splitlines()]
        return {
            "transfer_steps": recipe.steps,
            "attention_kl": {"first": kls[0], "last": statistics.fmean(kls[-LAST_STEPS:])},
        }

    def tune(
        self,
        model: PreTrainedModel,
        task: Task,
        epochs: float,
        seed: int,
        teacher: PreTrainedModel | None = None,
        *,
        train_kernels: bool = True,
    ) -> None:
        """Trains a model on a task: on its labels, or where a teacher is given on what the settings weigh."""
        rows = self.rows(task.name)["train"]
        steps = max(1, round(self.settings.epochs * epochs * len(rows) / task.batch_size))
        recipe = LogitDistillationRecipe(
            steps=steps,
            batch_size=task.batch_size,
            learning_rate=self.settings.learning_rate,
            kernel_learning_rate=self.settings.kernel_learning_rate,
            weight_decay=0.01,
            schedule="linear",
            final_learning_rate_ratio=0.0,
            warmup_steps=steps // 10,
            micro_batch_size=self.micro_batch_size,
            label_weight=self.settings.label_weight if teacher else 1.0,
            hidden_state_weight=self.settings.hidden_state_weight if teacher else 0.0,
        )
        set_seed(seed)
        stage = Classification(model, recipe, self.accelerator, self.tokenizer, teacher, train_kernels=train_kernels)
        lengths = (rows[:, 1:] != self.tokenizer.pad_token_id).sum(1)
        order = by_length(train_order(len(rows), steps, task.batch_size, seed), lengths)
        run_stage(stage, recipe, rows, order, self.accelerator)

    @torch.no_grad()
    def metrics(self, model: PreTrainedModel, task: Task, split: str = "dev") -> dict[str, float]:
        rows = self.rows(task.name)[split]
        rows = rows[(rows != self.tokenizer.pad_token_id).sum(1).argsort()]
        predicted = []
        with self.accelerator.autocast(), padding_by_tokens(model, self.tokenizer):
            for batch in rows.split(EVALUATION_BATCH):
                tokens = to_device(batch[:, 1:].contiguous(), self.accelerator.device)
                predicted += model(input_ids=tokens).logits.argmax(-1).tolist()
        return {name: metric(predicted, rows[:, 0].tolist()) for name, metric in task.metrics.items()}

    def _rows(self, task: str) -> dict[str, torch.Tensor]:
        settings = self.settings
        return load_rows(settings.data, TASKS[task], self.tokenizer, settings.longest, held_out=settings.held_out)


def by_length(order: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """An order (steps, batch) whose batches have short sequences first, so that micro-batches have little padding."""
    return order.gather(1, lengths[order].argsort(1))


def kernel_state(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers of all kernels."""
    return {name: tensor for name, tensor in model.state_dict().items() if NAME in name.split(".")}


def put_kernel(model: PreTrainedModel, kernel: dict[str, torch.Tensor]) -> None:
    if kernel.keys() != kernel_state(model).keys():
        raise ValueError("The kernel is of another kind than the model's.")
    model.load_state_dict(kernel, strict=False)


def save_whole(tensors: dict[str, torch.Tensor], file: Path) -> None:
    """Other processes find the file whole or not at all."""
    aside = file.with_suffix(f".{os.getpid()}")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, aside)
    aside.replace(file)


@functools.cache
def benchmark(settings: Settings) -> Benchmark:
    """One for all the runs of a process."""
    return Benchmark(settings)


def measure(settings: Settings, run: Run) -> dict:
    """Measures a run and leaves its figures in the folder."""
    result = benchmark(settings).measure(run)
    write_json(settings.result(run), result)
    return result
