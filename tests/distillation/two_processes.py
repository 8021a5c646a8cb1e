"""Trains in as many processes as it is started in, and writes each process's results to a file."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from flexdistill.distillation import logits
from flexdistill.distillation.averaging import use_final_weights
from flexdistill.distillation.checkpoints import Checkpoints
from tests.distillation.stages import (
    attention_transfer,
    label_training,
    logit_distillation,
    parameters,
    sequences,
    student,
    train,
)
from tests.tiny import VOCABULARY

HELD_OUT = sequences(12)[-4:]
# what sharded distillations are trained with besides
FURTHER = {
    "llama": {"hidden_state_weight": 0.5, "ema_decay": 0.9, "validation_every": 2, "patience": 2},
    "gpt2": {},
}


def all_stages(batch_size: int, micro_batch_size: int | None, poor: int | None = None) -> dict[str, torch.Tensor]:
    """Parameters after attention transfer, full logit distillation and label training, all validated.

    Args:
        poor: the process that has no memory for more than one sequence at a time.
    """
    settings = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    model = student()
    distil = {"train": "full", "learning_rate": 1e-3, "label_weight": 0.2}
    stages = ((attention_transfer, {}), (logit_distillation, distil), (label_training, {"kernel_learning_rate": 1e-4}))
    for make, more in stages:
        stage = make(model, **settings, **more, validation_every=3, patience=2, ema_decay=0.9)
        if PartialState().process_index == poor:
            limit_memory(stage, 1)
        train(stage, validation=sequences(11)[-3:])  # which two processes cannot share out evenly
        use_final_weights(stage.optimizer)
    return parameters(model)


def limit_memory(stage, most: int) -> list[int]:
    """Makes a stage run out of memory, with its gradients half added, on more than `most` sequences; returns sizes."""
    whole, sizes = stage.backward, []

    def backward(batch):
        sizes.append(len(batch))
        losses = whole(batch)
        if len(batch) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses

    stage.backward = backward
    return sizes


def sharded(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Parameters after a distillation that is sharded, stopped, and gone on with from its checkpoint."""
    settings = {"train": "full", "learning_rate": 1e-3, "label_weight": 0.2, "micro_batch_size": 1, "batch_size": 4}
    settings |= {"parallel": "fsdp", "gradient_checkpointing": name == "llama"}
    settings |= FURTHER[name]
    validated = {"validation": HELD_OUT, "log_file": folder / f"{name}.jsonl"}
    checkpoints = Checkpoints(folder / name, 2, writes=PartialState().is_main_process, every_steps=3)
    train(logit_distillation(student(name), **settings), stop_step=3, checkpoints=checkpoints, **validated)
    PartialState().wait_for_everyone()
    model = student(name)
    stage = logit_distillation(model, **settings)
    if PartialState().num_processes > 1:
        local = sum(parameter.to_local().numel() for parameter in stage.trained().values())
        assert local <= 0.6 * sum(parameter.numel() for parameter in model.parameters())
    checkpoint = checkpoints.latest()
    checkpoint.load(stage)
    train(stage, start_step=checkpoint.step, **validated)
    use_final_weights(stage.optimizer)
    stage.finish()
    return parameters(model)


def results(folder: Path) -> dict[str, torch.Tensor]:
    """Every case in turn: case/parameter -> value."""
    logits.LOGITS_PER_PIECE = {"cpu": 10 * VOCABULARY}  # the head in pieces
    cases = {f"batch {size}": lambda size=size: all_stages(size, None) for size in (4, 3, 1)}
    cases["batch 5 in micro-batches of 2"] = lambda: all_stages(5, 2)
    cases["one process short of memory"] = lambda: all_stages(6, None, poor=1)
    cases |= {f"sharded {name}": lambda name=name: sharded(folder, name) for name in ("llama", "gpt2")}
    return {f"{case}/{name}": value for case, run in cases.items() for name, value in run().items()}


def main() -> None:
    folder = Path(sys.argv[1])
    found = results(folder)
    assert PartialState().num_processes == 2
    save_file(found, folder / f"result-{PartialState().process_index}")
    torch.distributed.destroy_process_group()
