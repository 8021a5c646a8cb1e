from types import SimpleNamespace

import pytest
import torch

from flexdistill.distillation import throughput
from flexdistill.distillation.throughput import Throughput, kernel_flops, peak_flops, softmax_flops, weight_flops
from tests.distillation.stages import attention_transfer, label_training, logit_distillation, student

LENGTH = 24


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_are_multiplied_once_per_token(name):
    """Against a count of what the matrix products of a forward pass do."""
    from torch.utils.flop_counter import FlopCounterMode

    model = student(name, layers="0")
    tokens = torch.zeros(1, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=tokens)
    counts = counter.get_flop_counts()["Global"]
    linear = counts.get(torch.ops.aten.addmm, 0) + counts.get(torch.ops.aten.mm, 0)
    embedded = model.get_input_embeddings().weight.numel()
    # what the model adds up in the products of activations with weights
    assert weight_flops(model) == pytest.approx(linear / LENGTH, rel=0.02)
    output = model.get_output_embeddings().weight.numel()
    assert output == embedded
    assert weight_flops(model) - weight_flops(model, head=False) == pytest.approx(2 * output)


def test_attention():
    model = student("llama", window=8, sinks=0)  # 2 layers, 4 heads of size 16, 32 features
    assert softmax_flops(model, LENGTH) == 2 * 4 * 16 * 4 * LENGTH / 2
    assert kernel_flops(model) == 2 * 4 * (4 * 16 * 32 + 4 * 32 * 16 + 4 * 8 * 16)
    assert kernel_flops(student("llama", window=8, sinks=3)) == kernel_flops(student("llama", window=11, sinks=0))
    assert softmax_flops(student("bert"), LENGTH) == 2 * 4 * 16 * 4 * LENGTH


def test_stages():
    model = student("llama")
    weights, softmax, kernel = weight_flops(model), softmax_flops(model, LENGTH), kernel_flops(model)
    head = weights - weight_flops(model, head=False)
    assert attention_transfer(model).flops_per_token(LENGTH) == weights - head + softmax + 3 * kernel
    assert logit_distillation(model).flops_per_token(LENGTH) == 4 * weights + softmax + 3 * kernel
    kernels_only = logit_distillation(model, train="kernels")
    assert kernels_only.flops_per_token(LENGTH) == 3 * weights + softmax + 3 * kernel
    assert label_training(model).flops_per_token(LENGTH) == 3 * (weights + kernel)


def test_utilisation_is_of_the_devices_peak(monkeypatch):
    names = {"NVIDIA H200": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "Unheard of": None}
    for name, peak in names.items():
        monkeypatch.setattr(throughput.torch.cuda, "get_device_name", lambda device, name=name: name)
        device = torch.device("cuda")
        assert peak_flops(device, "bf16") == peak
        assert peak_flops(device, "no") == (peak and peak / 2)
        stage = label_training(student())
        accelerator = SimpleNamespace(device=device, mixed_precision="bf16", num_processes=2)
        figures = Throughput(stage, LENGTH, accelerator).utilisation(1000.0)
        expected = {} if peak is None else {"model_flop_utilisation": 1000 * stage.flops_per_token(LENGTH) / peak / 2}
        assert figures == pytest.approx(expected)
    cpu = SimpleNamespace(device=torch.device("cpu"), mixed_precision="no", num_processes=1)
    assert Throughput(stage, LENGTH, cpu).utilisation(1000.0) == {}
