"""The only training loop: any stage, any number of processes, any split of a batch into micro-batches."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from ..devices import peak_memory_bytes, to_device
from ..errors import FlexdistillError, NonFiniteLossError
from ..recipe_stages import StageRecipe
from ..storage import write_whole
from .averaging import copies_kept, has_stepped, update_average
from .checkpoints import Checkpoints
from .micro_batches import MicroBatches
from .optimizers import learning_rate_factor
from .reduction import Gradients, LossReduction
from .stage import Stage
from .throughput import Throughput
from .validation import VALIDATION_LOSS, Validation


def run_stage(
    stage: Stage,
    recipe: StageRecipe,
    sequences: torch.Tensor,
    order: torch.Tensor,
    accelerator: Accelerator,
    *,
    validation: torch.Tensor | None = None,
    start_step: int = 0,
    stop_step: int | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_number: int = 0,
    log_file: Path | None = None,
    update: Callable[..., None] = lambda *args, **kwargs: None,
    track: Callable[[dict], None] = lambda entry: None,
) -> dict:
    """Trains a stage from `start_step` to `stop_step`, to the end, or until its validation ends it.

    Gradients of loss sums are added up over micro-batches and processes and divided once by the global count, so the
    result does not depend on how a batch was split.

    Args:
        sequences: token ids (N, T); order: row indices (steps, batch), the same in every process.
        validation: held-out token ids (M, T), where the recipe validates.
        update: called with (step, loss=, tokens_per_s=) after each step.
        track: called with each entry of the log, by the process that writes it.

    Returns:
        the stage's summary: name, steps, tokens, elapsed_s, first_loss and last_loss; with a log, of all its calls.

    Raises:
        NonFiniteLossError: at the first loss or gradient that is NaN or infinite.
        RunInterrupted: by a signal, after the step under way and its checkpoint.
    """
    optimizer = stage.optimizer
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
    gradients = Gradients(stage.trained().values(), accelerator, stay=recipe.cuda_graphs)
    reduce_losses = LossReduction(accelerator)
    micro_batches = MicroBatches(
        stage,
        recipe.micro_batch_size,
        accelerator,
        gradients.zero,
        sharded=gradients.are_sharded,
        recorded=recipe.cuda_graphs,
        copies=copies_kept(recipe),
    )
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    log = []
    if log_file is not None and accelerator.is_main_process:
        log = _forget_after(log_file, start_step)
    losses, elapsed_before = [entry["loss"] for entry in log], log[-1]["elapsed_s"] if log else 0.0
    validations = Validation(recipe, validation, accelerator, log) if recipe.validation_every else None
    throughput = Throughput(stage, sequences.shape[1], accelerator)
    started, done = time.perf_counter(), start_step
    whole_steps = checkpoints.interruption.deferred() if checkpoints is not None else contextlib.nullcontext()
    with stage.active(), whole_steps:
        if recipe.max_memory is not None:
            largest_share = sequences[order[0][:: accelerator.num_processes]]
            micro_batches.fit(recipe.max_memory, to_device(largest_share, accelerator.device))
        for step in range(start_step, recipe.steps if stop_step is None else stop_step):
            if validations and validations.ended_at:
                done = validations.ended_at
                break
            factor = learning_rate_factor(
                step, recipe.steps, recipe.warmup_steps, recipe.final_learning_rate_ratio, recipe.schedule
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            gradients.zero()
            batch = to_device(sequences[order[step][share]], accelerator.device)
            step_losses = reduce_losses(micro_batches.backward(batch))
            gradients.average(step_losses.count)
            stage.scaler.unscale_(optimizer)
            norm = gradients.clip(stage.clip_groups, recipe.clip_norm)
            if checkpoints is not None:
                checkpoints.agree()
            # the step's one wait for the device
            figures = torch.stack([step_losses.total, *step_losses.parts.values()]) / step_losses.count
            numbers = torch.stack([norm.double(), micro_batches.agree().double()])
            loss, *parts, norm, size = torch.cat([figures, numbers]).tolist()
            micro_batches.follow(int(size))
            overflowed = stage.scaler.is_enabled() and not math.isfinite(norm) and stage.scaler.get_scale() > 1
            if not math.isfinite(loss) or not (math.isfinite(norm) or overflowed):
                _stop(stage, step, loss, micro_batches.split(batch), checkpoints)
            stage.scaler.step(optimizer)  # not after an overflow, which makes the scale smaller
            stage.scaler.update()
            losses.append(loss)

            done, validated, moved = step + 1, {}, has_stepped(optimizer)
            if recipe.ema_decay is not None and moved:
                update_average(optimizer, recipe.ema_decay, done)
            if validations and validations.is_due(done) and moved:
                validated = {VALIDATION_LOSS: validations.measure(done, micro_batches, reduce_losses)}
            elapsed = time.perf_counter() - started
            tokens_per_s = (done - start_step) * order.shape[1] * sequences.shape[1] / elapsed
            if log_file is not None and accelerator.is_main_process:
                entry = {"step": done, "loss": loss, **dict(zip(step_losses.parts, parts, strict=True)), **validated}
                entry |= {"gradient_norm": None if overflowed else norm, "learning_rate_factor": factor}
                entry |= {"tokens_per_s": round(tokens_per_s, 1), **throughput.utilisation(tokens_per_s)}
                entry |= {"peak_memory_bytes": peak_memory_bytes(accelerator.device)}
                entry |= {"elapsed_s": round(elapsed_before + elapsed, 3)}
                with log_file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                track(entry)
            update(done, loss=loss, tokens_per_s=tokens_per_s)
            if checkpoints is not None:
                is_last = done == recipe.steps or bool(validations and validations.ended_at)
                checkpoints.after_step(stage, checkpoint_number, done, last=is_last)
    gradients.release()
    return {
        "name": stage.name,
        "steps": done,
        "tokens": done * order.shape[1] * sequences.shape[1],
        "elapsed_s": elapsed_before + time.perf_counter() - started,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }


def _forget_after(log_file: Path, step: int) -> list[dict]:
    """Drops log lines of steps that will be run again, and one that was cut off; returns those that stay."""
    entries = []
    for line in log_file.read_text().splitlines() if log_file.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            entries.append(json.loads(line))
    kept = [entry for entry in entries if entry["step"] <= step]
    write_whole(log_file, "".join(json.dumps(entry) + "\n" for entry in kept))
    return kept


def _stop(stage: Stage, step: int, loss: float, micro_batches, checkpoints: Checkpoints | None) -> None:
    where = next((stage.blame(micro) for micro in micro_batches), "another process's sequences")
    latest = None
    if checkpoints is not None:
        with contextlib.suppress(FlexdistillError):  # none is whole, which --resume will say
            latest = checkpoints.latest()
    kept = "there is no earlier checkpoint; "
    if latest is not None:
        kept = f"the last good checkpoint is {latest.folder}; go on from it with --resume, "
    raise NonFiniteLossError(
        f"{stage.name} stopped at step {step + 1}: the loss is {loss} and the first value that is not finite is in "
        f"{where}; {kept}check the data, or start again with --overwrite and a lower learning rate."
    )
