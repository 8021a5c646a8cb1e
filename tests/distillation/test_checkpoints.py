"""What a checkpoint holds, and what is noticed when it does not hold it any more."""

import itertools
import json
import random
import re
import time

import numpy as np
import pytest
import torch

from flexdistill.distillation import checkpoints as checkpoints_module
from flexdistill.distillation.checkpoints import Checkpoints
from flexdistill.distillation.random_state import random_state, set_random_state
from flexdistill.errors import FlexdistillError, NonFiniteLossError
from tests.distillation.stages import assert_equal, make_stage, parameters, train

FILES = ("counters.json", "random.json", "parameters.safetensors", "optimizer.safetensors", "states.safetensors")


@pytest.fixture
def two(tmp_path):
    """Checkpoints of the first and the second step."""
    checkpoints = Checkpoints(tmp_path, keep=2, every_steps=1)
    train(make_stage("kernels"), steps=2, checkpoints=checkpoints)
    return checkpoints


def tear(file):
    file.write_bytes(file.read_bytes()[:-1])
    return rf"{file.name} has [\d,]+ of [\d,]+ bytes"


def corrupt(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    return f"{file.name} does not match its checksum"


def remove(file):
    file.unlink()
    return f"{file.name} is missing"


DAMAGES = [(damage, file) for damage in (tear, corrupt, remove) for file in FILES]


@pytest.mark.parametrize(("damage", "file"), DAMAGES, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_checkpoint_is_passed_over(two, tmp_path, capsys, damage, file):
    reason = damage(tmp_path / "0-00000002" / file)
    assert two.latest().step == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.fullmatch(
        rf"Checkpoint {tmp_path}/0-00000002 is damaged \({reason}\); going on from 0-00000001\.\n", message
    )
    two.forget_after(two.latest())
    assert [folder.name for folder in tmp_path.iterdir()] == ["0-00000001"]


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"counters.json": 1}'])
def test_a_damaged_manifest_is_noticed(two, tmp_path, content):
    manifest = tmp_path / "0-00000002" / "manifest.json"
    if content is None:
        manifest.unlink()
    else:
        manifest.write_text(content)
    assert two.latest().step == 1


def test_each_bit_of_the_manifest_counts(two, tmp_path):
    manifest = tmp_path / "0-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    for name, key in itertools.product(content, ("bytes", "sha256")):
        changed = json.loads(manifest.read_text())
        changed[name][key] = 1 if key == "bytes" else changed[name][key][:-1] + "x"
        manifest.write_text(json.dumps(changed))
        assert two.latest().step == 1, (name, key)
        manifest.write_text(json.dumps(content))
        assert two.latest().step == 2


def test_no_whole_checkpoint_is_an_error(two, tmp_path):
    remove(tmp_path / "0-00000001" / "optimizer.safetensors")
    corrupt(tmp_path / "0-00000002" / "parameters.safetensors")
    with pytest.raises(FlexdistillError) as caught:
        two.latest()
    assert str(caught.value) == (
        f"No checkpoint in {tmp_path} is whole (0-00000002: parameters.safetensors does not match its checksum; "
        "0-00000001: optimizer.safetensors is missing); start again with --overwrite."
    )


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3), torch.randn(2)


def test_random_generators_go_on():
    for seed in range(3):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        random.gauss(0, 1), np.random.randn()  # both keep the second of a pair
        state = json.loads(json.dumps(random_state(torch.device("cpu"))))
        expected = draws()
        random.seed(9), np.random.seed(9), torch.manual_seed(9)
        assert draws()[0] != expected[0]
        set_random_state(state, torch.device("cpu"))
        for actual, before in zip(draws(), expected, strict=True):
            assert torch.equal(torch.as_tensor(actual), torch.as_tensor(before))


def test_loading_puts_random_generators_back(tmp_path):
    checkpoints, stage = Checkpoints(tmp_path, keep=1), make_stage("kernels")
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    checkpoints.save(stage, 0, 1)
    expected = random.random(), float(np.random.rand()), float(torch.rand(()))
    checkpoints.latest().load(make_stage("kernels"))
    assert (random.random(), float(np.random.rand()), float(torch.rand(()))) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_random_generator_of_a_gpu_goes_on():
    device = torch.device("cuda", torch.cuda.current_device())
    state = json.loads(json.dumps(random_state(device)))
    expected = torch.rand(3, device=device)
    set_random_state(state, device)
    assert torch.equal(torch.rand(3, device=device), expected)


class Counter:
    """State of tensors and plain values, as a gradient scaler's or a moving average's."""

    def __init__(self, count, mean):
        self.count, self.mean = count, mean

    def state_dict(self):
        return {"count": self.count, "mean": self.mean}

    def load_state_dict(self, state):
        self.count, self.mean = state["count"], state["mean"]


def test_further_states_are_kept(tmp_path):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    counter = Counter(3, torch.randn(2, 2))
    checkpoints, stage, other = Checkpoints(tmp_path, keep=1), make_stage("kernels"), make_stage("kernels")
    stage.states = {"scaler": scaler, "counter": counter}
    checkpoints.save(stage, 0, 1)
    other.states = loaded = {"scaler": torch.amp.GradScaler("cpu"), "counter": Counter(0, None)}
    assert loaded["scaler"].state_dict() != scaler.state_dict()
    checkpoints.latest().load(other)
    assert loaded["scaler"].state_dict() == scaler.state_dict()
    assert loaded["counter"].count == 3 and torch.equal(loaded["counter"].mean, counter.mean)


def test_a_state_that_the_checkpoint_lacks_is_refused(two):
    stage = make_stage("kernels")
    stage.states = {"average": Counter(0, None)}
    with pytest.raises(FlexdistillError, match=r"differs in average, .*--overwrite"):
        two.latest().load(stage)


def test_parameters_that_are_not_finite_are_not_saved(two, tmp_path):
    stage = make_stage("kernels")
    name, parameter = list(stage.trained().items())[-1]
    with torch.no_grad():
        parameter.view(-1)[-1] = torch.inf
    with pytest.raises(NonFiniteLossError, match=f"stopped after step 3: {name} is not finite .* --resume"):
        two.save(stage, 0, 3)
    assert two.latest().step == 2 and len(list(tmp_path.iterdir())) == 2


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """Also where the wall clock goes backwards, which no duration is measured by."""
    backwards = itertools.count(1e9, -1000)
    monkeypatch.setattr(time, "time", lambda: next(backwards))
    ticks = itertools.count(0, 25)
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: float(next(ticks)))
    checkpoints = Checkpoints(tmp_path, keep=9, every_minutes=1)
    stage = make_stage("kernels")
    summary = train(stage, checkpoints=checkpoints, log_file=tmp_path / "log.jsonl")
    # 25 s a step and as many for each checkpoint
    assert sorted(folder.name for folder in tmp_path.glob("0-*")) == ["0-00000003", "0-00000006"]
    elapsed = [json.loads(line)["elapsed_s"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert elapsed == sorted(elapsed) and elapsed[0] >= 0 and elapsed[-1] <= summary["elapsed_s"] < 600
    whole = make_stage("kernels")
    train(whole)
    assert_equal(parameters(stage.model), parameters(whole.model))
