"""From a configuration to a trained model, without a teacher."""

import json
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, Trainer, TrainingArguments

import flexdistill
from flexdistill.distillation import loop
from flexdistill.distillation.stage import feature_maps
from flexdistill.errors import FlexdistillError
from flexdistill.evaluation import load_converted
from flexdistill.recipe import Recipe
from flexdistill.runs import locked
from tests.conversions import Interrupted, assert_same_weights, listing, weights
from tests.tiny import VOCABULARY, save_tiny, tiny_bert, tiny_gpt2, tiny_llama, tiny_tokenizer

MAKERS = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
SETTINGS = {
    "data__sequence_length": 32,
    "evaluation__sequences": 4,
    "label_training__steps": 40,
    "label_training__batch_size": 4,
    "label_training__warmup_steps": 4,
    "label_training__learning_rate": 5e-3,
    "label_training__kernel_learning_rate": 5e-3,
}


@pytest.fixture
def untrained(tmp_path, sources):
    flexdistill.init(str(sources / "llama"), tmp_path / "untrained", kernel__window=4)
    return tmp_path / "untrained"


def train(folder, output, sources, **settings):
    return flexdistill.train(
        str(folder), output, data__source=str(sources / "text.txt"), **SETTINGS | settings, overwrite=True
    )


@pytest.mark.parametrize("name", MAKERS)
def test_init_writes_what_loads(name, tmp_path):
    model = MAKERS[name]()
    save_tiny(tmp_path / "model", model, tiny_tokenizer())
    plan = flexdistill.init(str(tmp_path / "model"), tmp_path / "out", kernel__variant="stationary", seed=3)
    assert len(plan.converted) == 2
    auto = AutoModelForMaskedLM if name == "bert" else AutoModelForCausalLM
    written = auto.from_pretrained(tmp_path / "out")
    maps = feature_maps(written)
    assert len(maps) == 2 and all(feature_map.spec.variant == "stationary" for feature_map in maps.values())
    trained = dict(model.named_parameters())
    ours = {n: p for n, p in written.named_parameters() if n in trained}
    assert ours.keys() == trained.keys()
    assert any(not torch.equal(p, trained[n]) for n, p in ours.items())  # the weights were not read
    for parameter in ours.values():
        assert parameter.dtype == torch.float32 and parameter.isfinite().all()
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "modeling_flexformer.py").is_file()


def test_a_config_file_is_enough(tmp_path, run):
    tiny_llama().config.save_pretrained(tmp_path / "config")
    (tmp_path / "config" / "config.json").rename(tmp_path / "tiny.json")
    result = run("init", "tiny.json", "out", "--variant", "hedgehog", "--seed", "1", "--json")
    assert (result.code, result.err) == (0, ""), result.err
    assert json.loads(result.out)["model_class"] == "LlamaForCausalLM"
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    again = run("init", "tiny.json", "again", "--variant", "hedgehog", "--seed", "1")
    assert again.code == 0 and "Adds 4,096 parameters." in again.out
    other = run("init", "tiny.json", "other", "--variant", "hedgehog", "--seed", "2")
    assert other.code == 0
    assert_same_weights(tmp_path / "again", tmp_path / "out")
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / "other", tmp_path / "out")
    refused = run("init", "tiny.json", "out")
    assert refused.code == 2 and "not empty; choose another --output, or pass --overwrite" in refused.err


def test_init_takes_another_tokenizer_and_explains_bad_input(tmp_path, sources):
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(tiny_llama().config.to_dict() | {"architectures": None}))
    flexdistill.init(str(config), tmp_path / "out", tokenizer=str(sources / "llama"))
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    before = listing(tmp_path)
    settings = tiny_llama().config.to_dict()
    bad = {
        "vocabulary": (settings | {"vocab_size": 20}, "and the model has 20 input embeddings"),
        "architecture": (settings | {"architectures": ["Nonsense"]}, "names the architecture Nonsense, which"),
    }
    for name, (config, message) in bad.items():
        file = tmp_path.parent / f"{tmp_path.name}-{name}.json"
        file.write_text(json.dumps(config))
        with pytest.raises(FlexdistillError, match=message):
            flexdistill.init(str(file), tmp_path / "bad", tokenizer=str(sources / "llama"))
    with pytest.raises(FlexdistillError, match="does not exist"):
        flexdistill.init("./absent.json", tmp_path / "bad")
    assert listing(tmp_path) == before


def test_training_on_labels_lowers_the_loss(untrained, tmp_path, sources):
    metrics = train(untrained, tmp_path / "out", sources)
    assert metrics["perplexity_before"] == pytest.approx(VOCABULARY, rel=0.2)
    assert metrics["perplexity"] < 0.3 * metrics["perplexity_before"]
    (stage,) = metrics["stages"]
    assert (stage["name"], stage["steps"], stage["tokens"]) == ("label_training", 40, 40 * 4 * 32)
    assert stage["last_loss"] < stage["first_loss"] - 1
    model = load_converted(tmp_path / "out")
    assert [feature_map.spec.window for feature_map in feature_maps(model).values()] == [4, 4]
    before = weights(untrained)
    trained = {name: value for name, value in weights(tmp_path / "out").items() if not name.endswith("_unit")}
    assert all(not torch.equal(value, before[name]) for name, value in trained.items())
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{metrics['perplexity']:.2f}, before training {metrics['perplexity_before']:.2f}" in card
    assert Recipe.load(tmp_path / "out" / "recipe.yaml").label_training.steps == 40
    assert not (tmp_path / "out.partial").exists()


def test_training_resumes(untrained, tmp_path, sources, interrupt):
    settings = {"label_training__steps": 6, "checkpoint__every_steps": 2, "label_training__ema_decay": 0.9}
    expected = train(untrained, tmp_path / "whole", sources, **settings)
    interrupt(4)
    with pytest.raises(Interrupted):
        train(untrained, tmp_path / "resumed", sources, **settings)
    interrupt(None)
    metrics = train(untrained, tmp_path / "resumed", sources, **settings, resume=True)
    assert_same_weights(tmp_path / "resumed", tmp_path / "whole")
    assert metrics["perplexity"] == expected["perplexity"]


def test_a_signal_stops_it_and_it_goes_on(untrained, tmp_path, sources, run, monkeypatch):
    command = ["train", "untrained", "out", "--data", str(sources / "text.txt"), "--sequence-length", "32"]
    command += ["--steps", "6", "--batch-size", "2", "--set", "data.cache=false"]
    assert run(*command[:2], "whole", *command[3:]).code == 0
    factor = loop.learning_rate_factor

    def stopping(step, *more):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return factor(step, *more)

    monkeypatch.setattr(loop, "learning_rate_factor", stopping)
    stopped = run(*command)
    message = "Stopped by SIGTERM after step 3 of label_training; give the same command with --resume to go on."
    assert (stopped.code, stopped.err) == (143, f"{message}\n")
    monkeypatch.setattr(loop, "learning_rate_factor", factor)
    with locked(tmp_path / "out.partial"):
        assert "Another process is writing" in run(*command, "--resume").err
        init = run("init", str(sources / "llama"), "out", "--overwrite")
    assert init.code == 2 and "Another process is writing" in init.err
    assert run(*command, "--resume").code == 0
    assert_same_weights(tmp_path / "out", tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_the_command(untrained, tmp_path, sources, run):
    arguments = ["train", "untrained", "out", "--data", str(sources / "text.txt"), "--sequence-length", "32"]
    nothing = run(*arguments)
    assert nothing.code == 2 and "label_training.steps is 0; set --steps" in nothing.err
    result = run(*arguments, "--steps", "2", "--batch-size", "2", "--set", "evaluation.sequences=2")
    assert (result.code, result.err) == (0, ""), result.err
    assert result.out.startswith("Perplexity ")
    assert (tmp_path / "out" / "label_training.jsonl").is_file()


def test_what_cannot_be_trained_on_labels_is_refused(tmp_path, sources):
    flexdistill.init(str(sources / "bert"), tmp_path / "bert")
    with pytest.raises(FlexdistillError, match="does not predict the next token"):
        train(tmp_path / "bert", tmp_path / "out", sources)
    with pytest.raises(FlexdistillError, match="is not a converted checkpoint"):
        train(sources / "llama", tmp_path / "out", sources)
    assert [path.name for path in tmp_path.iterdir()] == ["bert"]


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        tokens = torch.arange(24).add(index).remainder(VOCABULARY)
        return {"input_ids": tokens, "labels": tokens}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_trainer_trains_it(name, tmp_path):
    MAKERS[name]().config.save_pretrained(tmp_path)
    flexdistill.init(str(tmp_path), tmp_path / "untrained")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "untrained")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    arguments = TrainingArguments(
        str(tmp_path / "trainer"),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_steps=2,
    )
    Trainer(model, arguments, train_dataset=Tokens()).train()
    kernels = [n for n in before if "flexformer" in n]
    assert kernels and all(not torch.equal(dict(model.named_parameters())[n], before[n]) for n in kernels)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "trainer" / "checkpoint-2")
    with torch.no_grad():
        tokens = Tokens()[0]["input_ids"][None]
        assert torch.equal(reloaded(input_ids=tokens).logits, model.eval()(input_ids=tokens).logits)


def test_embeddings_that_are_not_tied_cannot_be_untied(untrained, sources, tmp_path):
    with pytest.raises(FlexdistillError, match="no output embeddings that are tied.*leave tied_embeddings out"):
        train(untrained, tmp_path / "out", sources, tied_embeddings="untied")
    assert not list(tmp_path.glob("out*"))
