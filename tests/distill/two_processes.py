"""Trains both stages in as many processes as it is started in, and writes what the main process has to a file."""

import sys

import torch
from accelerate import PartialState
from safetensors.torch import save_file

from tests.distill.stages import attention_transfer, logit_distillation, parameters, student, train


def final_parameters(batch_size: int, micro_batch_size: int | None) -> dict[str, torch.Tensor]:
    """Parameters of a model after attention transfer and then logit distillation."""
    settings = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    model = student()
    train(attention_transfer(model, **settings))
    train(logit_distillation(model, train="full", learning_rate=1e-3, label_weight=0.2, **settings))
    return parameters(model)


if __name__ == "__main__":
    file, *batch_sizes = sys.argv[1:]
    results = {}
    for batch_size in batch_sizes:
        found = final_parameters(int(batch_size), None)
        results |= {f"{batch_size}/{name}": value for name, value in found.items()}
    assert PartialState().num_processes == 2
    save_file(results, f"{file}-{PartialState().process_index}")
    torch.distributed.destroy_process_group()
