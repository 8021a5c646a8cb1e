import json

import accelerate.tracking
import pytest

from flexdistill.errors import FlexdistillError
from flexdistill.pipeline import convert
from flexdistill.recipe_sections import TrackingRecipe
from flexdistill.tracking import check_trackers
from tests.conversions import Interrupted, make_recipe


@pytest.fixture
def memory(monkeypatch):
    """A tracker that remembers what it is told, registered as any other."""
    told = {"figures": {}, "finished": 0}

    class Memory(accelerate.tracking.GeneralTracker):
        name, requires_logging_directory = "memory", False

        def __init__(self, run_name, **settings):
            super().__init__()
            told["project"] = run_name

        tracker = property(lambda self: told)

        def store_init_configuration(self, values):
            told["settings"] = values

        def log(self, values, step=None, **settings):
            assert step not in told["figures"]
            told["figures"][step] = values

        def finish(self):
            told["finished"] += 1

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "memory", Memory)
    return told


def entries(folder, stage):
    return [json.loads(line) for line in (folder / f"{stage}.jsonl").read_text().splitlines()]


def test_trackers_are_told_what_the_logs_hold(sources, tmp_path, memory):
    settings = {"tracking.trackers": "memory", "tracking.project": "mine", "kernel.component": "trigonometric"}
    recipe = make_recipe(sources, **settings)
    convert(recipe, tmp_path / "out")
    assert memory["project"] == "mine" and memory["finished"] == 1
    assert memory["settings"]["kernel.variant"] == "nonstationary" and memory["settings"]["data.sequence_length"] == 32
    assert list(memory["figures"]) == list(range(1, 9))
    for stage, start in (("attention_transfer", 0), ("logit_distillation", 4)):
        for entry in entries(tmp_path / "out", stage):
            step = entry.pop("step")
            expected = {f"{stage}/{name}": value for name, value in entry.items()}
            assert memory["figures"][start + step] == expected


def test_logs_hold_what_training_is_watched_by(sources, tmp_path):
    convert(make_recipe(sources, **{"kernel.component": "trigonometric"}), tmp_path / "out")
    common = {"loss", "gradient_norm", "learning_rate_factor", "guarded_rows", "tokens_per_s", "peak_memory_bytes"}
    layers = [f"attention_kl/layers.{layer}.self_attn" for layer in (0, 1)]
    for entry in entries(tmp_path / "out", "attention_transfer"):
        assert common | {"attention_kl", "output_error", "negative_mass", *layers} <= entry.keys()
        assert entry["attention_kl"] == pytest.approx(sum(entry[layer] for layer in layers) / 2, rel=1e-5)
        assert entry[layers[0]] != entry[layers[1]]
        assert entry["negative_mass"] >= 0 and 0 <= entry["guarded_rows"] <= 1
        assert entry["peak_memory_bytes"] > 10**7
    for entry in entries(tmp_path / "out", "logit_distillation"):
        assert common | {"kl"} <= entry.keys()


def test_a_resumed_run_may_be_tracked_elsewhere(sources, tmp_path, memory, interrupt):
    interrupt(6)
    with pytest.raises(Interrupted):
        convert(make_recipe(sources), tmp_path / "out")
    interrupt(None)
    convert(make_recipe(sources, **{"tracking.trackers": ["memory"]}), tmp_path / "out", resume=True)
    # the checkpoint is that after the fourth of eight steps
    assert list(memory["figures"]) == [5, 6, 7, 8]


def test_a_tracker_is_finished_when_training_fails(sources, tmp_path, memory, interrupt):
    interrupt(3)
    with pytest.raises(Interrupted):
        convert(make_recipe(sources, **{"tracking.trackers": "memory"}), tmp_path / "out")
    assert memory["finished"] == 1


def test_tensorboard(sources, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    settings = {"tracking.trackers": "tensorboard", "tracking.folder": str(tmp_path / "runs")}
    convert(make_recipe(sources, **settings), tmp_path / "out")
    events = EventAccumulator(str(tmp_path / "runs" / "flexdistill")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("logit_distillation/loss")]
    expected = [(4 + entry["step"], entry["loss"]) for entry in entries(tmp_path / "out", "logit_distillation")]
    assert found == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in expected]


def test_trackers_that_are_not_there_are_told_first(sources, tmp_path, monkeypatch):
    monkeypatch.setattr("flexdistill.tracking.get_available_trackers", lambda: [])
    message = r"^Tracker 'wandb' needs the package wandb; run `pip install wandb`, or leave it out\.$"
    with pytest.raises(FlexdistillError, match=message):
        convert(make_recipe(sources, **{"tracking.trackers": "wandb"}), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FlexdistillError, match="Tracker 'tensorbord' is unknown; choose among: .*tensorboard.*wandb"):
        check_trackers(TrackingRecipe(trackers=["tensorbord"]))
    assert TrackingRecipe(trackers="trackio,wandb").trackers == ["trackio", "wandb"]
