"""What only a GPU shows: the same numbers as on CPU, in float32 and bf16, and a whole conversion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flexdistill.conversion import make_plan
from flexdistill.devices import exact_float32
from flexdistill.distillation.attention_transfer import AttentionTransfer
from flexdistill.doctor import examine
from flexdistill.errors import FlexdistillError
from flexdistill.pipeline import convert
from flexdistill.recipe import STAGES, KernelRecipe, Recipe
from flexdistill.runtime.attention import attend
from flexdistill.runtime.backend import VARIABLE
from flexdistill.runtime.configuration_flexformer import KernelSpec
from flexdistill.runtime.registry import build_feature_map

from .conversions import Interrupted
from .distillation.stages import log_entries, teacher
from .runtime.kernels import every_causal_kernel, kernel_spec, rotation
from .runtime.reference import reference_attention
from .tiny import save_tiny, tiny_llama, tiny_tokenizer

LARGEST_SIZE = {torch.float32: 64, torch.bfloat16: 128}
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.mark.parametrize("window", [0, 64])
@every_causal_kernel
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@exact_float32()
def test_attention_on_gpu_equals_cpu(variant, component, window, dtype, tolerance):
    torch.manual_seed(0)
    sizes = dict(num_heads=8, num_key_value_heads=4, head_dim=64, num_frequencies=64)
    feature_map = build_feature_map(kernel_spec(variant, component, window=window, **sizes))
    feature_map.reset_parameters()
    query, key, value = torch.randn(2, 8, 500, 64), torch.randn(2, 4, 500, 64), torch.randn(2, 4, 500, 64)
    visible = torch.ones(2, 500, dtype=torch.bool)
    visible[1, :77] = False
    inputs = [x.to(dtype) for x in (query, key, value)]
    expected, _ = attend(feature_map, *(x.float() for x in inputs), scaling=64**-0.5, visible=visible)
    feature_map.cuda()
    actual, _ = attend(feature_map, *(x.cuda() for x in inputs), scaling=64**-0.5, visible=visible.cuda())
    assert (actual.float().cpu() - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("near", [{}, {"window": 64}, {"window": 64, "sinks": 4}], ids=["linear", "window", "sinks"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@exact_float32()
def test_rotary_embedding_is_taken_out_on_gpu_as_on_cpu(near, dtype, tolerance):
    torch.manual_seed(0)
    settings = dict(
        num_heads=8, num_key_value_heads=4, head_dim=64, num_frequencies=64, rotary="halves", rotary_pairs=4
    )
    feature_map = build_feature_map(kernel_spec("nonstationary+decay", "hyperbolic", **near, **settings))
    feature_map.reset_parameters()
    shapes = [(2, 8, 500, 64), (2, 4, 500, 64), (2, 4, 500, 64)]
    inputs = [torch.randn(shape).to(dtype).float().requires_grad_() for shape in shapes]
    made, direction = rotation(500, size=64, start=100), torch.randn(2, 8, 500, 64)
    visible = torch.ones(2, 500, dtype=torch.bool)
    visible[1, :77] = False
    results = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        feature_map.to(device)
        leaves = [x.detach().to(device, kind).requires_grad_() for x in inputs]
        turns = tuple(x.to(device) for x in made)
        seen = visible.to(device)
        output, _ = attend(feature_map, *leaves, scaling=64**-0.5, visible=seen, rotation=turns, keep_memory=False)
        loss = (output.float() * direction.to(device)).sum()
        results.append([output, *torch.autograd.grad(loss, leaves)])
    for expected, actual in zip(*results, strict=True):
        assert (actual.float().cpu() - expected).norm() <= tolerance * expected.norm()


def test_plans_do_not_depend_on_the_precision_of_products():
    torch.set_float32_matmul_precision("high")
    try:
        model = tiny_llama().cuda()
        assert len(make_plan(model, KernelRecipe()).converted) == 2
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_doctor_finds_gpu_usable():
    report = examine()
    missing = [problem for problem in report["problems"] if "is not installed" in problem]
    assert report["problems"] == missing and report["devices"][1]["usable"]
    assert report["attention"]["backend"] == "triton"
    assert {check["dtype"] for check in report["attention"]["checks"]} == {"float32", "bfloat16"}


@pytest.mark.parametrize("sinks", [0, 4])
def test_conversion_on_gpu(tmp_path, sinks):
    source = tmp_path / "tiny"
    source.mkdir()
    save_tiny(source, tiny_llama(), tiny_tokenizer())
    recipe = Recipe().override(
        {
            "model": str(source),
            "kernel.window": 8,
            "kernel.sinks": sinks,
            "data.source": "sample",
            "data.sequence_length": 64,
            "attention_transfer.steps": 5,
            "logit_distillation.steps": 5,
            "evaluation.sequences": 8,
        }
    )
    metrics = convert(recipe, tmp_path / "out")
    assert metrics["device"] != "cpu"
    assert metrics["reload_max_logit_difference"] <= 1e-5
    assert metrics["student"]["kl"] < metrics["rows"][-1]["kl"]


def tiny_recipe(folder, model=None, **settings):
    save_tiny(folder, model or tiny_llama(), tiny_tokenizer())
    steps = {"attention_transfer.steps": 5, "logit_distillation.steps": 5, "evaluation.sequences": 8}
    data = {"model": str(folder), "data.source": "sample", "data.sequence_length": 64}
    return Recipe().override(data | steps | settings)


# every step moves the weights far, so that what a step forgets to read or to write shows in the next loss
FAST = {f"{stage}.warmup_steps": 0 for stage in STAGES}
FAST |= {"attention_transfer.steps": 10, "attention_transfer.learning_rate": 0.05}
FAST |= {"logit_distillation.steps": 10, "logit_distillation.kernel_learning_rate": 0.01}
FAST |= {"label_training.learning_rate": 0.003}


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_precisions_on_gpu(tmp_path, precision):
    metrics = convert(tiny_recipe(tmp_path / "tiny", precision=precision), tmp_path / "out")
    expected = convert(tiny_recipe(tmp_path / "tiny", precision="fp32"), tmp_path / "expected")
    for stage, other in zip(metrics["stages"], expected["stages"], strict=True):
        assert stage["first_loss"] == pytest.approx(other["first_loss"], rel=2e-2, abs=1e-5)


def test_max_memory_on_gpu(tmp_path):
    stages = ("attention_transfer", "logit_distillation")
    enough = tiny_recipe(tmp_path / "tiny", **{f"{stage}.max_memory": "8GiB" for stage in stages})
    assert convert(enough, tmp_path / "out")["reload_max_logit_difference"] <= 1e-5
    with pytest.raises(FlexdistillError, match="One sequence of 64 tokens takes"):
        convert(enough.override({f"{stage}.max_memory": "10kB" for stage in stages}), tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "compile"),
    [
        ({"precision": "bf16"}, False),
        ({"precision": "fp16", "logit_distillation.hidden_state_weight": 0.5}, False),
        ({"precision": "bf16", "logit_distillation.gradient_checkpointing": True}, True),
        ({"precision": "fp32", "logit_distillation.train": "lora", "kernel.window": 8}, False),
        ({"precision": "bf16", "kernel.component": "trigonometric", "logit_distillation.validation_every": 3}, False),
        ({"precision": "bf16", "kernel.decay": True, "label_training.steps": 4}, True),
    ],
)
def test_cuda_graphs_train_the_same(tmp_path, settings, compile):
    # 8 sequences are micro-batches of 3, 3 and 2
    shared = {f"{stage}.micro_batch_size": 3 for stage in STAGES} | {f"{stage}.compile": compile for stage in STAGES}
    recipe = tiny_recipe(tmp_path / "tiny", teacher(), **FAST, **settings, **shared)
    convert(recipe, tmp_path / "sent")
    convert(recipe.override({f"{stage}.cuda_graphs": True for stage in STAGES}), tmp_path / "recorded")
    assert_trained_alike(tmp_path / "sent", tmp_path / "recorded")


def assert_trained_alike(folder, other):
    """The same figures of every step, of weights that the steps have moved by far more than what counts as the same."""
    for log in sorted(folder.glob("*.jsonl")):
        expected, found = log_entries(log), log_entries(other / log.name)
        assert len(found) == len(expected) > 3
        moved = "attention_kl" if "attention_kl" in expected[0] else "loss"
        assert min(entry[moved] for entry in expected) < 0.98 * expected[0][moved], log.name
        for entry, wanted in zip(found, expected, strict=True):
            for name in {"loss", "attention_kl", "gradient_norm", "validation_loss"} & set(wanted):
                if wanted[name] is None:  # the scaler skipped the step
                    assert entry[name] is None
                else:
                    assert entry[name] == pytest.approx(wanted[name], rel=5e-3), (log.name, wanted["step"], name)


@pytest.mark.parametrize("step", [6, 17])
def test_recorded_training_resumes(tmp_path, interrupt, step):
    """Interrupted in either stage, after what follows was recorded; resumed, it is recorded anew."""
    settings = FAST | {f"{stage}.cuda_graphs": True for stage in STAGES} | {"checkpoint.every_steps": 2}
    recipe = tiny_recipe(tmp_path / "tiny", teacher(), **settings, **{"logit_distillation.validation_every": 3})
    convert(recipe, tmp_path / "whole")
    interrupt(step)
    with pytest.raises(Interrupted):
        convert(recipe, tmp_path / "resumed")
    interrupt(None)
    convert(recipe, tmp_path / "resumed", resume=True)
    assert_trained_alike(tmp_path / "whole", tmp_path / "resumed")


WAITING = """
import sys
from flexdistill.cli import main
from flexdistill.distillation.attention_transfer import AttentionTransfer

compare = AttentionTransfer._compare_rows

def waiting(stage, call):
    float(call.value.sum())
    return compare(stage, call)

AttentionTransfer._compare_rows = waiting
main()
"""


def test_what_cannot_be_recorded_is_refused(tmp_path):
    recipe = tiny_recipe(tmp_path / "tiny", **{"attention_transfer.cuda_graphs": True})
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    # in a process of its own, which CUDA would leave unfit for other tests
    arguments = ["convert", recipe.model, "--recipe", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "out")]
    run = subprocess.run(
        [sys.executable, "-c", WAITING, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert "attention_transfer cannot be recorded as a CUDA graph" in run.stderr
    assert "operation not permitted when stream is capturing" in run.stderr


def test_memory_runs_out_beside_a_recording(tmp_path, monkeypatch, capsys):
    recipe = tiny_recipe(tmp_path / "tiny", **{"attention_transfer.cuda_graphs": True})
    backward, calls = AttentionTransfer.backward, []

    def scarce(stage, sequences):
        calls.append(len(sequences))
        if len(calls) == 3:  # while the whole batch is recorded
            torch.empty(2**45, dtype=torch.uint8, device="cuda")
        return backward(stage, sequences)

    monkeypatch.setattr(AttentionTransfer, "backward", scarce)
    convert(recipe, tmp_path / "out")
    assert calls[:3] == [8, 8, 8] and set(calls[3:]) == {4}
    assert "micro-batches have 4 sequences" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("cpu_offload", [False, True])
def test_sharded_conversion_on_two_gpus(tmp_path, cpu_offload):
    sharded = {"logit_distillation.parallel": "fsdp", "logit_distillation.cpu_offload": cpu_offload}
    recipe = tiny_recipe(tmp_path / "tiny", precision="fp32", **sharded)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    command = [sys.executable, "-m", "flexdistill", "convert", recipe.model, "--recipe", "recipe.yaml"]
    root = str(Path(__file__).parents[1])
    run = subprocess.run(
        [*command, "--output", "two", "--num-processes", "2"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": root},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    whole = {"logit_distillation.parallel": "ddp", "logit_distillation.cpu_offload": False}
    one = convert(recipe.override(whole), tmp_path / "one")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert two["num_processes"] == 2 and two["student"]["kl"] == pytest.approx(one["student"]["kl"], rel=1e-3)


SHAPES = [  # batch, heads, KV heads, length, size
    (2, 8, 4, 1, 64),
    (2, 4, 2, 1037, 64),
    (1, 4, 4, 700, 128),
    (2, 4, 2, 300, 80),
    (512, 8, 8, 70, 64),
]


@pytest.mark.parametrize(("batch", "heads", "kv_heads", "length", "size"), SHAPES)
@pytest.mark.parametrize(
    ("component", "decay"), [("hyperbolic", True), ("hyperbolic", False), ("trigonometric", False)]
)
@pytest.mark.parametrize(("window", "causal"), [(0, True), (64, True), (0, False)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_fused_kernels_equal_float64(
    batch, heads, kv_heads, length, size, component, decay, window, causal, dtype, tolerance, monkeypatch
):
    if decay and not causal:
        pytest.skip("only causal features decay")
    if size > LARGEST_SIZE[dtype]:
        pytest.skip("too large for the fused kernels in this dtype")
    monkeypatch.setenv(VARIABLE, "triton")
    torch.manual_seed(0)
    spec = KernelSpec(
        "nonstationary", component, heads, kv_heads, size, size, False, window=window, causal=causal, decay=decay
    )
    feature_map = build_feature_map(spec)
    feature_map.reset_parameters()
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    feature_map.cuda()
    query, key, value = (
        torch.randn(batch, n, length, size, device="cuda", dtype=dtype, requires_grad=True)
        for n in (heads, kv_heads, kv_heads)
    )
    visible = torch.ones(batch, length, dtype=torch.bool, device="cuda")
    visible[-1, : length // 3] = False
    parameters = dict(feature_map.named_parameters())
    leaves = [query, key, value, *parameters.values()]
    output, _ = attend(feature_map, query, key, value, scaling=size**-0.5, visible=visible, keep_memory=False)
    few = slice(-2, None)
    direction = torch.zeros_like(output)
    direction[few] = torch.randn_like(direction[few])
    actual = torch.autograd.grad((output * direction).float().sum(), leaves, materialize_grads=True)
    expected, wanted = [], [torch.zeros_like(x, dtype=torch.float64) for x in leaves]
    for row in range(batch)[few]:  # one after the other, as the reference holds every pair times every feature
        one = slice(row, row + 1)
        inputs = (query[one], key[one], value[one])
        rows = reference_attention(feature_map, parameters, *inputs, size**-0.5, visible[one])
        loss = (rows * direction[one].double()).sum()
        for total, gradient in zip(wanted, torch.autograd.grad(loss, leaves, materialize_grads=True), strict=True):
            total += gradient
        expected.append(rows.detach())
    expected = torch.cat(expected)
    assert (output[few].double() - expected).norm() <= tolerance * expected.norm()
    scale = max(float(x.double().norm()) for x in wanted)
    if length == 1:  # one key has weight 1 whatever the kernel says, so only values have a gradient
        actual, wanted = actual[2:3], wanted[2:3]
    names = ["query", "key", "value", *parameters]
    for name, ours, theirs in zip(names, actual, wanted, strict=False):
        error = (ours.double() - theirs.double()).norm()
        # norm factors and gates sum over all tokens with both signs, decays over all tokens times their positions
        factor = 40 if name == "decay" else 6 if theirs.ndim == 1 else 2
        assert error <= factor * tolerance * max(float(theirs.double().norm()), 0.02 * scale)


@pytest.mark.parametrize("decay", [False, True])
def test_fused_state_continues(decay, monkeypatch):
    """Prefill, decoding and prefill again give what one pass gives, in bf16 at 64 sequences."""
    monkeypatch.setenv(VARIABLE, "triton")
    torch.manual_seed(0)
    feature_map = build_feature_map(KernelSpec("nonstationary", "hyperbolic", 8, 4, 64, 64, False, decay=decay))
    feature_map.reset_parameters()
    feature_map.cuda()
    tensors = [torch.randn(64, heads, 700, 64, device="cuda", dtype=torch.bfloat16) for heads in (8, 4, 4)]
    with torch.no_grad():
        expected, _ = attend(feature_map, *tensors, scaling=0.125, keep_memory=False)
        outputs, memory, start = [], None, 0
        for size in (600, 1, 1, 1, 97):
            part = [x[:, :, start : start + size] for x in tensors]
            output, memory = attend(feature_map, *part, scaling=0.125, memory=memory)
            outputs.append(output)
            start += size
    output = torch.cat(outputs, dim=2)
    assert (output.float() - expected.float()).norm() <= 1e-2 * expected.float().norm()


@pytest.mark.parametrize("decay", [False, True])
def test_fused_log_weights_over_120(decay, monkeypatch):
    monkeypatch.setenv(VARIABLE, "triton")
    torch.manual_seed(0)
    feature_map = build_feature_map(KernelSpec("nonstationary", "hyperbolic", 2, 2, 64, 64, False, decay=decay))
    feature_map.reset_parameters()
    feature_map.cuda()
    query, key, value = (torch.randn(2, 2, 300, 64, device="cuda", requires_grad=True) for _ in range(3))
    with torch.no_grad():
        feature_map.norm_factor.fill_(10.0)
        lengths = torch.linspace(0, 120, 100, device="cuda").repeat(3).sqrt()
        key *= lengths[:, None] / key.norm(dim=-1, keepdim=True)
    parameters = dict(feature_map.named_parameters())
    output, _ = attend(feature_map, query, key, value, scaling=0.125, keep_memory=False)
    expected = reference_attention(feature_map, parameters, query, key, value, 0.125)
    assert (output.double() - expected).norm() <= 1e-4 * expected.norm()
    direction = torch.randn_like(output)
    actual = torch.autograd.grad((output * direction).sum(), [query, key, value])
    wanted = torch.autograd.grad((expected * direction).sum(), [query, key, value])
    for ours, theirs in zip(actual, wanted, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm()
