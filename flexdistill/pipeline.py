"""A conversion from beginning to end: the file to read first.

recipe -> teacher -> plan -> converted student -> attention transfer -> logit distillation -> metrics -> checkpoint
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from .conversion import Plan, apply_plan, make_plan, resolve_kernel, restore_softmax
from .devices import make_accelerator, peak_memory_bytes
from .distillation.attention_transfer import AttentionTransfer
from .distillation.averaging import use_final_weights
from .distillation.checkpoints import Checkpoint, Checkpoints
from .distillation.documents import DocumentMasks
from .distillation.embeddings import retie, untie
from .distillation.freedom import degrees_of_freedom, shared_frequencies
from .distillation.labels import LabelTraining
from .distillation.layer_selection import choose_layers
from .distillation.logits import LogitDistillation
from .distillation.loop import run_stage
from .distillation.measurement import measure_kernels
from .distillation.stage import kernel_parameters
from .evaluation import compare_models
from .export import export
from .inputs import Sequences, checked_plan, input_hashes, load_sequences, load_source
from .mixture import TokenRows
from .packing import cut
from .progress import stage_progress
from .recipe import STAGES, Recipe, StageRecipe
from .runs import Run, open_run, read_json
from .sources import load_model
from .storage import write_json
from .tracking import Track, check_trackers, tracking

STAGE_CLASSES = dict(zip(STAGES, (AttentionTransfer, LogitDistillation, LabelTraining), strict=True))
# sequences that kernels take their constants from
MEASURED_SEQUENCES = 8


def convert(recipe: Recipe, output: str | Path, *, overwrite: bool = False, resume: bool = False) -> dict:
    """Converts `recipe.model` and writes the result to the folder `output`.

    Until the result is whole, the run lives in `OUTPUT.partial` beside it, where `resume` finds its checkpoints.

    Returns:
        the metrics that `metrics.json` holds.

    Raises:
        FlexdistillError: if anything about the input does not fit; then nothing on disk has changed.
        NonFiniteLossError: if training diverges.
        LostProcessError: if another process of the run dies.
        RunInterrupted: on SIGTERM or SIGINT, after the step under way and its checkpoint.
    """
    with open_run(output, overwrite=overwrite, resume=resume, inputs=recipe.inputs) as run:
        return _convert(recipe, run)


def _convert(recipe: Recipe, run: Run) -> dict:
    started = time.perf_counter()
    check_trackers(recipe.tracking)
    recipe = recipe.model_copy(update={"kernel": resolve_kernel(recipe.kernel)})
    accelerator = make_accelerator(recipe.precision, cpu_offload=recipe.logit_distillation.cpu_offload)
    set_seed(recipe.seed)

    source, tokenizer, model = load_source(recipe)
    plan = checked_plan(recipe, model, accelerator)
    sequences = load_sequences(recipe, model, tokenizer)

    checkpoints, checkpoint = run.begin(recipe, input_hashes(model, sequences), accelerator)
    student, plan = make_student(recipe, model, plan, sequences, accelerator, run.work)
    with tracking(recipe, accelerator) as track:
        stages = run_stages(recipe, student, sequences, accelerator, run.work, checkpoints, checkpoint, track=track)

    teacher = student
    logits = recipe.logit_distillation
    if (logits.steps and logits.train != "kernels") or recipe.label_training.steps:
        teacher = load_model(source, trust_remote_code=recipe.trust_remote_code).to(accelerator.device)
    metrics = {"model": source.name, "kernel": recipe.kernel.model_dump()} | plan_facts(plan, student)
    metrics |= compare_models(teacher, student, sequences.evaluation, recipe.evaluation.batch_size, accelerator)
    metrics |= run_facts(stages, started, accelerator)
    if accelerator.is_main_process:
        details = {"source": source, "recipe": recipe, "metrics": metrics, "work": run.work}
        export(student, tokenizer, run.output, logs=sorted(run.work.glob("*.jsonl")), **details)
    accelerator.wait_for_everyone()
    return metrics


def make_student(
    recipe: Recipe,
    model: PreTrainedModel,
    plan: Plan,
    sequences: Sequences,
    accelerator: Accelerator,
    work: Path | None = None,
) -> tuple[PreTrainedModel, Plan]:
    """The converted model on the accelerator's device, its kernels calibrated to the training text.

    Args:
        work: folder of a run; a resumed one takes from there what was measured before.

    Returns:
        the student; and the plan that it follows, with frequencies as they were shared out.
    """
    measured = sequences.training[:MEASURED_SEQUENCES]
    if plan.shares_frequencies:
        shared = work / "frequencies.json" if work else None
        if shared is not None and shared.is_file():
            frequencies = read_json(shared)
        else:
            frequencies = _shared_frequencies(model, plan, measured, accelerator)
            if shared is not None and accelerator.is_main_process:
                write_json(shared, frequencies)
        plan = make_plan(model, recipe.kernel, frequencies)
    student = apply_plan(model, plan).to(accelerator.device)
    measure_kernels(student, measured.to(accelerator.device), accelerator)
    return student, plan


def _shared_frequencies(
    model: PreTrainedModel, plan: Plan, sequences: torch.Tensor, accelerator: Accelerator
) -> dict[str, int]:
    freedom = degrees_of_freedom(model.to(accelerator.device), list(plan.frequencies), sequences, accelerator)
    model.cpu()  # kernels start from the numbers that they would have without
    return shared_frequencies(freedom, plan.frequencies)


def run_stages(
    recipe: Recipe,
    student: PreTrainedModel,
    sequences: Sequences,
    accelerator: Accelerator,
    work: Path,
    checkpoints: Checkpoints | None = None,
    checkpoint: Checkpoint | None = None,
    *,
    track: Track = lambda figures, step: None,
    pause_every: int = 0,
    at_pause: Callable[[int], None] = lambda tokens: None,
) -> list[dict]:
    """Trains `student` through every stage, from the checkpoint on if there is one.

    Between the stages, `student` gets softmax attention back in as many modules as the recipe says.

    Args:
        work: folder of the logs and summaries.
        track: called with the figures of each log entry, named STAGE/FIGURE, and the step counted over all stages.
        pause_every: steps between pauses, outside of which a stage holds the model; 0: no pauses.
        at_pause: called with the number of tokens trained on, before the first step, at each pause and after each
            stage, once it has the weights that it ends with; its time does not count as training.

    Returns:
        the stages' summaries.
    """
    recipes = recipe.stages
    order = _orders(recipes, sequences, recipe.seed)
    tied = untie(student) if recipe.tied_embeddings != "tied" else {}
    masks = DocumentMasks(student, sequences.separator) if recipe.data.document_masks else None
    if "attention_transfer" in recipes and not kernel_parameters(student):
        del recipes["attention_transfer"]
        if accelerator.is_main_process:
            variant = recipe.kernel.variant
            print(
                f"Variant {variant!r} has no parameters to train, so attention transfer is left out.", file=sys.stderr
            )
    reached = list(STAGES).index(checkpoint.stage) if checkpoint else -1
    summaries = []
    if pause_every:
        at_pause(0)
    for number, name in enumerate(STAGES):
        if STAGE_CLASSES[name] is LogitDistillation and recipe.kernel.keep_softmax:
            chosen = work / "kept_softmax.json"
            if number <= reached:
                kl_gains = read_json(chosen)
            else:
                kl_gains = choose_layers(
                    student,
                    recipe.kernel.keep_softmax,
                    sequences.selection,
                    recipe.evaluation.batch_size,
                    accelerator,
                    sequences.recalled,
                )
                if accelerator.is_main_process:
                    write_json(chosen, kl_gains)
            restore_softmax(student, kl_gains)
        if name not in recipes:
            continue
        summary = work / f"{name}.json"
        if number < reached:
            summaries.append(read_json(summary))
            continue
        stage = STAGE_CLASSES[name](student, recipes[name], accelerator)
        rows, validation = _rows_of(name, recipe, sequences)
        start_step = 0
        if number == reached:
            checkpoint.load(stage)
            start_step = checkpoint.step
        steps_before = sum(recipes[earlier].steps for earlier in STAGES[:number] if earlier in recipes)
        tokens_before = sum(summary["tokens"] for summary in summaries)
        with stage_progress(name, recipes[name].steps, start_step, enabled=accelerator.is_main_process) as update:
            for start, stop in _spans(start_step, recipes[name].steps, pause_every):
                with masks.active() if masks else contextlib.nullcontext():
                    result = run_stage(
                        stage,
                        recipes[name],
                        rows,
                        order[name],
                        accelerator,
                        validation=validation,
                        start_step=start,
                        stop_step=stop,
                        checkpoints=checkpoints,
                        checkpoint_number=number,
                        log_file=work / f"{name}.jsonl",
                        update=update,
                        track=functools.partial(_track, track, name, steps_before),
                    )
                if result["steps"] < stop:  # a validation has ended the stage
                    break
                if stop < recipes[name].steps:
                    at_pause(tokens_before + result["tokens"])
        use_final_weights(stage.optimizer)
        stage.finish()
        if pause_every:
            at_pause(tokens_before + result["tokens"])
        summaries.append(result)
        if accelerator.is_main_process:
            write_json(summary, result)
    if masks:
        masks.remove()
    if recipe.tied_embeddings == "retied":
        retie(student, tied)
    return summaries


def _track(track: Track, stage: str, steps_before: int, entry: dict) -> None:
    figures = {f"{stage}/{name}": value for name, value in entry.items() if name != "step"}
    track(figures, steps_before + entry["step"])


def _rows_of(stage: str, recipe: Recipe, sequences: Sequences) -> tuple[TokenRows, torch.Tensor]:
    """What a stage trains and validates on, in sequences of its length."""
    if stage != LabelTraining.name:
        return sequences.training, sequences.validation
    validates = recipe.label_training.validation_every
    length = recipe.sequence_length(stage)
    return sequences.labels, cut(sequences.validation.flatten(), length) if validates else sequences.validation


def _orders(stages: dict[str, StageRecipe], sequences: Sequences, seed: int) -> dict[str, torch.Tensor]:
    """Which rows each stage's steps train on, those of `_rows_of`.

    Stages that share rows cut one order into parts, so that they share an epoch before any row repeats.
    """
    sizes = {name: stage.steps * stage.batch_size for name, stage in stages.items()}
    labels = sizes.pop(LabelTraining.name, 0)
    order = sequences.training.order(sum(sizes.values()), seed)
    parts = dict(zip(sizes, order.split(list(sizes.values())) if sizes else (), strict=True))
    if labels:
        parts[LabelTraining.name] = sequences.labels.order(labels, seed)
    return {name: part.view(-1, stages[name].batch_size) for name, part in parts.items()}


def _spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Steps from `start` to `stop` cut at the multiples of `size`; 0 cuts nowhere."""
    cuts = [cut for cut in range(0, stop, size or stop) if cut > start]
    return list(pairwise([start, *cuts, stop]))


def run_facts(stages: list[dict], started: float, accelerator: Accelerator) -> dict:
    """What metrics say of a run beside its evaluation; `started` is a time of `time.perf_counter`."""
    return {
        "stages": stages,
        "tokens": sum(stage["tokens"] for stage in stages),
        "elapsed_s": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory_bytes(accelerator.device),
        "num_processes": accelerator.num_processes,
        "device": torch.cuda.get_device_name() if accelerator.device.type == "cuda" else "cpu",
    }


def plan_facts(plan: Plan, student: PreTrainedModel) -> dict:
    """What metrics say of a student's modules: plan in numbers, frequencies, and which got softmax attention back."""
    kl_gains = student.config.flexformer.get("kept_softmax", {})
    plan = plan.keeping(kl_gains)
    totals = plan.to_dict()
    del totals["modules"]
    totals |= {"converted": len(plan.converted), "kept": len(plan.modules) - len(plan.converted)}
    return {"plan": totals, "frequencies": plan.frequencies, "kept_softmax": kl_gains}
