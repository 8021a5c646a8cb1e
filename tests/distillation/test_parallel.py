"""One, two and four processes, whole or sharded, and any split of a batch give the same training."""

import re
import sys

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from flexdistill.attention_modes import run_base_model
from flexdistill.devices import make_accelerator
from flexdistill.distillation.averaging import use_final_weights
from flexdistill.distillation.memory import gradient_checkpointing, round_linear_weights
from flexdistill.distillation.micro_batches import MicroBatches
from flexdistill.errors import FlexdistillError
from tests.distillation import two_processes
from tests.distillation.stages import (
    assert_equal,
    logit_distillation,
    make_stage,
    parameters,
    sequences,
    student,
    teacher,
    train,
)
from tests.forked import together

every_stage = pytest.mark.parametrize("name", ["attention transfer", "full", "lora"])


def assert_close(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert (actual[name] - value).norm() <= tolerance * value.norm().clamp_min(1), name


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The results of one process and of each of two."""
    folder = tmp_path_factory.mktemp("two")
    processes = together([str(folder)], folder, program=two_processes.main)
    assert [process.wait(300) for process in processes] == [0, 0], processes[0].stderr + processes[1].stderr
    stderr = "".join(process.stderr for process in processes)
    told = "A step ran out of memory; micro-batches have 1 sequences from now on."
    assert stderr.count(told) == 3, stderr  # once per stage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(two_processes.logits, "LOGITS_PER_PIECE", 0)  # put back what `results` sets
        one = two_processes.results(tmp_path_factory.mktemp("one"))
    return one, *(load_file(folder / f"result-{index}") for index in range(2))


def test_two_processes_train_as_one(results):
    """Batches that divide evenly, unevenly, and leave one process without a sequence; whole and sharded models."""
    one, first, second = results
    assert_equal(first, second)
    assert_close(first, one, tolerance=3e-5)  # rounding, after three stages of Adam's steps
    initial = parameters(student())
    for key, value in first.items():
        case, name = key.split("/")
        if "flexformer" in name and "gpt2" not in case:
            assert not torch.equal(value, initial[name]), key


def test_sharding_is_not_seen_in_the_result(results):
    settings = {"train": "full", "learning_rate": 1e-3, "label_weight": 0.2, "micro_batch_size": 1}
    for name in ("llama", "gpt2"):
        model = student(name)
        stage = logit_distillation(model, **settings, **two_processes.FURTHER[name])
        train(stage, validation=two_processes.HELD_OUT)
        use_final_weights(stage.optimizer)
        actual = {n.split("/")[1]: value for n, value in results[1].items() if n.startswith(f"sharded {name}/")}
        assert_close(actual, parameters(model))


@every_stage
@pytest.mark.parametrize("batch_size", [4, 5])
def test_accumulation_is_one_batch(name, batch_size):
    expected, actual = make_stage(name, batch_size=batch_size), make_stage(name, batch_size=batch_size)
    train(expected)
    actual.recipe = actual.recipe.model_copy(update={"micro_batch_size": 1})
    train(actual)
    assert_close(parameters(actual.model), parameters(expected.model))


@every_stage
def test_a_step_out_of_memory_is_an_untroubled_step(name, capsys):
    """The step's gradients are those of the size that it ends with, and later steps keep that size."""
    expected, actual = make_stage(name, batch_size=5, micro_batch_size=1), make_stage(name, batch_size=5)
    sizes = two_processes.limit_memory(actual, 1)
    train(expected, steps=2)
    train(actual, steps=2)
    assert_equal(parameters(actual.model), parameters(expected.model))
    assert sizes == [5, 2] + [1] * 10
    assert capsys.readouterr().err == "A step ran out of memory; micro-batches have 1 sequences from now on.\n"


def test_one_sequence_out_of_memory_is_explained():
    stage = make_stage("full", batch_size=2)
    two_processes.limit_memory(stage, 0)
    with pytest.raises(FlexdistillError, match="One sequence of 24 tokens does not fit .*--gradient-checkpointing"):
        train(stage)


def test_other_errors_pass():
    stage = make_stage("full", batch_size=2)

    def backward(batch):
        raise RuntimeError("shapes do not match")

    stage.backward = backward
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train(stage)


def trial(peaks, rows=6):
    """Micro-batches of a stage whose trial steps peak at given bytes by their size."""
    stage = make_stage("attention transfer")
    discarded = []
    micro_batches = MicroBatches(stage, None, Accelerator(cpu=True), lambda: discarded.append(1))
    micro_batches._trial = lambda batch: peaks[len(batch)]
    return micro_batches, sequences()[:rows]


@pytest.mark.parametrize(
    ("limit", "sizes"), [(10, [1, 1, 1, 1, 1, 1]), (25, [2, 2, 2]), (40, [4, 2]), (60, [6]), (999, [6])]
)
def test_max_memory_picks_the_largest_size_that_fits(limit, sizes):
    micro_batches, batch = trial({size: 10 * size for size in range(1, 7)})
    micro_batches.fit(limit, batch)
    assert [len(part) for part in micro_batches.split(batch)] == sizes


def test_max_memory_below_one_sequence_is_explained():
    micro_batches, batch = trial({1: 3 * 2**30})
    with pytest.raises(FlexdistillError, match=r"One sequence of 24 tokens takes 3.0 GiB, and --max-memory allows 2.0"):
        micro_batches.fit(2 * 2**30, batch)


def test_a_trial_leaves_no_gradients_and_counts_the_optimizer(monkeypatch):
    from flexdistill.distillation import micro_batches as module

    stage = make_stage("full")
    discarded = []
    tried = MicroBatches(stage, None, Accelerator(cpu=True), lambda: discarded.append(1))
    monkeypatch.setattr(module, "peak_memory_bytes", lambda device: 1000)
    moments = 8 * sum(parameter.numel() for parameter in stage.trained().values())
    with stage.active():
        assert tried._trial(sequences()[:1]) == 1000 + moments
    train(stage, steps=1)
    with stage.active():
        assert tried._trial(sequences()[:1]) == 1000
    assert len(discarded) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_nothing(name):
    settings = {"train": "full", "learning_rate": 1e-3}
    expected, actual = student(name), student(name)
    train(logit_distillation(expected, **settings))
    stage = logit_distillation(actual, gradient_checkpointing=True, **settings)
    runs = []
    layers = [module for module in actual.modules() if type(module).__name__.endswith(("DecoderLayer", "Block"))]
    layers[0].register_forward_hook(lambda *args: runs.append("outside"))
    handle = next(layers[0].children()).register_forward_hook(lambda *args: runs.append("inside"))
    train(stage)
    handle.remove()
    assert_equal(parameters(actual), parameters(expected))
    assert runs.count("inside") == 2 * runs.count("outside") > 0  # run again in the backward pass
    assert "forward" not in vars(layers[0])


def test_gradient_checkpointing_of_unmarked_layers_is_refused():
    unmarked = gradient_checkpointing(torch.nn.Linear(2, 2))
    with pytest.raises(FlexdistillError, match="does not mark the layers of Linear.*leave --gradient-checkpointing"):
        unmarked.__enter__()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_rounded_teacher_is_the_teacher_under_autocast(name):
    expected, rounded = teacher(name), teacher(name)
    round_linear_weights(rounded, torch.bfloat16)
    kept = [p.numel() for p in rounded.parameters() if p.dtype == torch.float32]
    assert sum(kept) < 0.6 * sum(p.numel() for p in rounded.parameters())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run_base_model(rounded, sequences())[0], run_base_model(expected, sequences())[0])
        assert torch.equal(rounded(input_ids=sequences()).logits, expected(input_ids=sequences()).logits)


def test_full_training_rounds_its_teacher_and_nothing_else():
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision = "bf16"
    try:
        stage = logit_distillation(student(), train="full")
    finally:
        accelerator.state._mixed_precision = "no"
    assert stage._own_teacher.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in stage.trained().values()} == {torch.float32}


@pytest.mark.parametrize("train_mode", ["lora", "kernels"])
def test_frozen_weights_are_held_once(train_mode):
    model = student()
    stage = logit_distillation(model, train=train_mode)
    assert stage._own_teacher is None and stage._teacher.model is stage._student.model is model


@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_scaled_loss_gives_the_same_training(name):
    """Powers of two scale without rounding; the growth after 2,000 steps is far away."""
    expected, actual = make_stage(name), make_stage(name)
    actual.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    train(expected)
    train(actual)
    assert_close(parameters(actual.model), parameters(expected.model), 1e-6)


def test_an_overflow_skips_its_step(tmp_path):
    """The scale halves until the gradients are finite, and no step is taken before."""
    stage = make_stage("full")
    stage.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before, seen = parameters(stage.model), []
    train(stage, update=lambda *args, **figures: seen.append(parameters(stage.model)), log_file=tmp_path / "log")
    assert_equal(seen[0], before)
    assert stage.scaler.get_scale() < 2.0**127
    assert '"gradient_norm": null' in (tmp_path / "log").read_text().splitlines()[0]


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_precisions_of_a_gpu_are_refused_without(precision, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(FlexdistillError, match=f"Precision {precision} needs a GPU; set --precision"):
        make_accelerator(precision)


def test_sharding_by_accelerates_configuration_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(FlexdistillError, match="Accelerate is configured for FSDP.*pass --parallel fsdp"):
        make_accelerator("fp32")


def test_one_wait_for_the_device_per_step(monkeypatch):
    """What a step reads from the device it reads at once: tensors become numbers nowhere else."""
    stage, reads = make_stage("full", label_weight=0.2, micro_batch_size=1), []
    for read in ("item", "tolist", "__float__", "__int__", "__bool__"):
        original = getattr(torch.Tensor, read)

        def counted(self, *args, original=original, read=read):
            caller = sys._getframe(1).f_code.co_filename
            if re.search(r"flexdistill/(distillation|losses)", caller):
                reads.append((read, caller))
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, read, counted)
    train(stage, steps=3)
    assert [read for read, _ in reads] == ["tolist"] * 3, reads
