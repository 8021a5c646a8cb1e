"""The models that benchmarks/glue.py compares: fine-tuned, converted, with kernels of their own task or of another."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import set_seed
from glue_tasks import MULTIPLE, TASKS, Task, load_rows
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from flexdistill.conversion import apply_plan, make_plan
from flexdistill.devices import make_accelerator, to_device
from flexdistill.distillation.attention_transfer import AttentionTransfer
from flexdistill.distillation.loop import run_stage
from flexdistill.distillation.measurement import measure_kernels
from flexdistill.distillation.optimizers import make_optimizer, model_groups
from flexdistill.distillation.stage import StepLosses, first_non_finite_module, kernel_parameters, trainable
from flexdistill.distillation.throughput import kernel_flops, weight_flops
from flexdistill.packing import train_order
from flexdistill.progress import progress_bars_on_terminals_only
from flexdistill.recipe import AttentionTransferRecipe, KernelRecipe, ModelStageRecipe
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
# what is fine-tuned as often as converted models are, softmax attention kept, tells what that alone gives
SOFTMAX, SOFTMAX_AGAIN = "softmax", "softmax-again"
METHODS = (SOFTMAX, SOFTMAX_AGAIN, *KERNELS)
MEASURED_ROWS, EVALUATION_BATCH, LAST_STEPS = 64, 256, 20


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
    transfer_steps: int
    transfer_batch: int
    transfer_rate: float

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


class Classification:
    """A stage: the label of rows (B, 1 + T) is learned from their tokens."""

    name = "classification"

    def __init__(
        self, model: PreTrainedModel, recipe: ModelStageRecipe, accelerator: Accelerator, *, train_kernels: bool
    ):
        self.model, self.accelerator = model, accelerator
        kept = {} if train_kernels else kernel_parameters(model)
        self._trained = {name: p for name, p in model.named_parameters() if name not in kept}
        self.optimizer = make_optimizer(recipe, model_groups(model, self._trained, recipe), (0.9, 0.999))
        self.clip_groups = [list(self._trained.values())]
        self.scaler, self.states = torch.amp.GradScaler(enabled=False), {}

    def trained(self) -> dict:
        return self._trained

    def active(self):
        return trainable(self.model, set(self._trained))

    def backward(self, sequences: torch.Tensor) -> StepLosses:
        with self.accelerator.autocast():
            logits = self.model(input_ids=sequences[:, 1:]).logits
        loss = torch.nn.functional.cross_entropy(logits.float(), sequences[:, 0], reduction="sum")
        loss.backward()
        return StepLosses(loss.detach(), loss.new_full((), len(sequences)))

    def flops_per_token(self, length: int) -> float:
        return 3 * (weight_flops(self.model) + kernel_flops(self.model))

    def blame(self, sequences: torch.Tensor) -> str:
        return first_non_finite_module(self.model, lambda: self.model(input_ids=sequences[:, 1:]))

    def finish(self) -> None:
        """Nothing is left to do."""


class Benchmark:
    """Makes models and kernels, or reads those that the folder has, and measures runs."""

    def __init__(self, settings: Settings):
        transformers.logging.set_verbosity_error()
        self.settings, self.folder = settings, settings.folder
        self.accelerator = make_accelerator(settings.precision)
        self.source = resolve_model(settings.model)
        self.tokenizer = load_tokenizer(self.source)
        self.rows = functools.cache(self._rows)

    def measure(self, run: Run) -> dict:
        """The run's figures: metrics before and after the last fine-tuning."""
        started, task = time.perf_counter(), TASKS[run.task]
        model, facts = self.fine_tuned(task, run.seed), {}
        if run.method in KERNELS:
            kernel, facts = self.kernel(run.kernel_task or run.task, run.method, run.seed)
            model = self.converted(model, run.method)
            put_kernel(model, kernel)
        result = asdict(run) | facts | {"before": self.metrics(model, task)}
        if run.method != SOFTMAX:
            self.tune(model, task, task.converted_epochs, run.seed, train_kernels=run.kernel_task is None)
        result["metrics"] = self.metrics(model, task)
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
        return apply_plan(model, make_plan(model, KERNELS[method])).to(self.accelerator.device)

    def learn_kernel(self, model: PreTrainedModel, task: str, seed: int, log: Path) -> dict:
        """Attention transfer on the task's texts; a kernel that has nothing to learn stays as it was drawn."""
        tokens = self.rows(task)[0][:, 1:]
        lengths = (tokens != self.tokenizer.pad_token_id).sum(1)
        longest = tokens[lengths.argsort(descending=True)[:MEASURED_ROWS]]
        measure_kernels(model, longest.to(self.accelerator.device), self.accelerator)
        if not kernel_parameters(model):
            return {"transfer_steps": 0}
        recipe = AttentionTransferRecipe(
            steps=self.settings.transfer_steps,
            batch_size=self.settings.transfer_batch,
            learning_rate=self.settings.transfer_rate,
        )
        order = train_order(len(tokens), recipe.steps, recipe.batch_size, seed)
        stage = AttentionTransfer(model, recipe, self.accelerator)
        run_stage(stage, recipe, tokens, order, self.accelerator, log_file=log)
        kls = [json.loads(line)["attention_kl"] for line in log.read_text().splitlines()]
        return {
            "transfer_steps": recipe.steps,
            "attention_kl": {"first": kls[0], "last": statistics.fmean(kls[-LAST_STEPS:])},
        }

    def tune(self, model: PreTrainedModel, task: Task, epochs: float, seed: int, *, train_kernels: bool = True) -> None:
        rows = self.rows(task.name)[0]
        steps = max(1, round(self.settings.epochs * epochs * len(rows) / task.batch_size))
        recipe = ModelStageRecipe(
            steps=steps,
            batch_size=task.batch_size,
            learning_rate=self.settings.learning_rate,
            kernel_learning_rate=self.settings.kernel_learning_rate,
            weight_decay=0.01,
            schedule="linear",
            final_learning_rate_ratio=0.0,
            warmup_steps=steps // 10,
        )
        set_seed(seed)
        stage = Classification(model.train(), recipe, self.accelerator, train_kernels=train_kernels)
        order = train_order(len(rows), steps, task.batch_size, seed)
        with padding_by_tokens(model, self.tokenizer):
            run_stage(stage, recipe, rows, order, self.accelerator)
        model.eval()

    @torch.no_grad()
    def metrics(self, model: PreTrainedModel, task: Task) -> dict[str, float]:
        rows = self.rows(task.name)[1]
        rows = rows[(rows != self.tokenizer.pad_token_id).sum(1).argsort()]
        predicted = []
        with self.accelerator.autocast(), padding_by_tokens(model, self.tokenizer):
            for batch in rows.split(EVALUATION_BATCH):
                tokens = to_device(batch[:, 1:].contiguous(), self.accelerator.device)
                predicted += model(input_ids=tokens).logits.argmax(-1).tolist()
        return {name: metric(predicted, rows[:, 0].tolist()) for name, metric in task.metrics.items()}

    def _rows(self, task: str) -> tuple[torch.Tensor, torch.Tensor]:
        settings = self.settings
        return load_rows(settings.data, TASKS[task], self.tokenizer, settings.longest, held_out=settings.held_out)


@contextlib.contextmanager
def padding_by_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """The base model tells padding and the second text by the tokens alone, and cuts columns of padding off.

    What is left has a multiple of 16 columns, for matrix units and so that Triton compiles kernels of one kind.
    """

    def read(base_model, args, kwargs):
        tokens = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
        mask = tokens != tokenizer.pad_token_id
        longest = -(-int(mask.sum(1).max()) // MULTIPLE) * MULTIPLE
        tokens, mask = tokens[:, :longest], mask[:, :longest]
        ends = tokens == tokenizer.sep_token_id
        second = (ends.cumsum(1) - ends.long()).clamp_max(1) * mask
        return (), kwargs | {"input_ids": tokens, "attention_mask": mask.long(), "token_type_ids": second}

    handle = model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
