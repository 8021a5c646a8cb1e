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

from ..devices import peak_memory_bytes
from ..errors import NonFiniteLossError
from ..recipe import StageRecipe
from .averaging import update_average
from .checkpoints import Checkpoints
from .optimizers import learning_rate_factor
from .stage import Stage, StepLosses, backward_counting_guards
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
    checkpoint_every: int = 0,
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
    """
    optimizer = stage.optimizer
    for group in optimizer.param_groups:
        group.setdefault("peak_lr", group["lr"])
    parameters = list(stage.trained().values())
    log = []
    if log_file is not None and accelerator.is_main_process:
        log = _forget_after(log_file, start_step)
    losses, elapsed_before = [entry["loss"] for entry in log], log[-1]["elapsed_s"] if log else 0.0
    validations = Validation(stage, recipe, validation, accelerator, log) if recipe.validation_every else None
    throughput = Throughput(stage, sequences.shape[1], accelerator)
    started, done = time.perf_counter(), start_step
    with stage.active():
        for step in range(start_step, recipe.steps if stop_step is None else stop_step):
            if validations and validations.ended_at:
                done = validations.ended_at
                break
            factor = learning_rate_factor(
                step, recipe.steps, recipe.warmup_steps, recipe.final_learning_rate_ratio, recipe.schedule
            )
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            optimizer.zero_grad(set_to_none=True)
            rows = order[step][accelerator.process_index :: accelerator.num_processes]
            batch = sequences[rows].to(accelerator.device)
            micro_batches = batch.split(recipe.micro_batch_size or max(len(batch), 1)) if len(batch) else ()
            step_losses = _reduce(
                _sum([backward_counting_guards(stage, micro) for micro in micro_batches]), accelerator
            )
            _reduce_gradients(parameters, step_losses.count, accelerator)
            norms = [torch.nn.utils.clip_grad_norm_(group, recipe.clip_norm) for group in stage.clip_groups]
            loss = float(step_losses.total / step_losses.count)
            norm = float(torch.stack(norms).square().sum().sqrt())
            if not math.isfinite(loss) or not math.isfinite(norm):
                _stop(stage, step, loss, micro_batches, checkpoints)
            optimizer.step()
            losses.append(loss)

            done, validated = step + 1, {}
            if recipe.ema_decay is not None:
                update_average(optimizer, recipe.ema_decay, done)
            if validations and validations.is_due(done):
                validated = {VALIDATION_LOSS: validations.measure(done)}
            elapsed = time.perf_counter() - started
            tokens_per_s = (done - start_step) * order.shape[1] * sequences.shape[1] / elapsed
            if log_file is not None and accelerator.is_main_process:
                entry = {"step": done, "loss": loss, **step_losses.means(), **validated}
                entry |= {"gradient_norm": norm, "learning_rate_factor": factor}
                entry |= {"tokens_per_s": round(tokens_per_s, 1), **throughput.utilisation(tokens_per_s)}
                entry |= {"peak_memory_bytes": peak_memory_bytes(accelerator.device)}
                entry |= {"elapsed_s": round(elapsed_before + elapsed, 3)}
                with log_file.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
                track(entry)
            update(done, loss=loss, tokens_per_s=tokens_per_s)
            is_last = done == recipe.steps or (validations and validations.ended_at)
            if checkpoints is not None and (is_last or done % checkpoint_every == 0):
                checkpoints.save(stage, checkpoint_number, done)
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
    log_file.write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    return kept


def _sum(losses: list[StepLosses]) -> StepLosses | None:
    total = None
    for loss in losses:
        total = loss if total is None else total + loss
    return total


def _reduce(losses: StepLosses | None, accelerator: Accelerator) -> StepLosses:
    """Sums over processes; one that had no rows of this batch adds nothing."""
    if accelerator.num_processes == 1:
        return losses
    gathered = [None] * accelerator.num_processes
    mine = None if losses is None else (float(losses.total), float(losses.count), _floats(losses.parts))
    torch.distributed.all_gather_object(gathered, mine)
    present = [entry for entry in gathered if entry is not None]
    as_losses = [StepLosses(torch.tensor(t), torch.tensor(c), p) for t, c, p in present]
    return _sum(as_losses)


def _floats(parts: dict) -> dict[str, float]:
    return {name: float(part) for name, part in parts.items()}


def _reduce_gradients(parameters: list, count: torch.Tensor, accelerator: Accelerator) -> None:
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters]
    if accelerator.num_processes > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))
    torch._foreach_div_(gradients, float(count))


def _stop(stage: Stage, step: int, loss: float, micro_batches, checkpoints: Checkpoints | None) -> None:
    where = next((stage.blame(micro) for micro in micro_batches), "another process's sequences")
    latest = checkpoints.latest() if checkpoints is not None else None
    kept = f"the last good checkpoint is {latest.folder}" if latest else "there is no earlier checkpoint"
    raise NonFiniteLossError(
        f"{stage.name} stopped at step {step + 1}: the loss is {loss} and the first value that is not finite is in "
        f"{where}; {kept}; check the data, or start again with --overwrite and a lower learning rate."
    )
