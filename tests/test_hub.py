import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import flexdistill
from flexdistill.errors import FlexdistillError
from tests import tiny
from tests.distillation.stages import teacher
from tests.hub_server import Hub

TOKEN = "hf_aSecretThatNobodyMayRead"
RECIPE = """
data: {source: notes.txt, sequence_length: 80}
evaluation: {sequences: 2}
attention_transfer: {steps: 1, batch_size: 2}
logit_distillation: {steps: 1, batch_size: 2}
"""
OUTSIDE = """
import sys
sys.modules["flexdistill"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
AutoTokenizer.from_pretrained("user/gpt2-linear", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("user/gpt2-linear", trust_remote_code=True)
with torch.no_grad():
    save_file({"logits": model(input_ids=torch.arange(2, 80)[None]).logits}, "logits.safetensors")
model.push_to_hub("user/again")
"""


def contents(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def logits(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 80)[None]).logits


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """`gpt2` from a Hub, converted and pushed by the command line, then loaded and pushed again without flexdistill."""
    folder = tmp_path_factory.mktemp("hub")
    source = tiny.save_tiny(folder / "source", teacher("gpt2"), tiny.tiny_tokenizer())
    card = "---\nlicense: mit\nlanguage: en\n---\n# GPT-2\n"
    run_folder = folder / "run"
    run_folder.mkdir()
    (run_folder / "short.yaml").write_text(RECIPE)
    (run_folder / "notes.txt").write_text("".join(f"Line {n}: the {n % 7} of {n * n % 101}.\n" for n in range(900)))
    with Hub(TOKEN) as hub:
        hub.models["gpt2"] = {"main": contents(source) | {"README.md": card.encode()}}
        home = {"HF_HOME": str(folder / "home"), "HF_HUB_CACHE": str(folder / "home" / "hub")}
        address = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        here = {"PYTHONPATH": str(Path(flexdistill.__file__).parents[1]), "HF_TOKEN": TOKEN}
        command = ["-m", "flexdistill", "convert", "gpt2", "--variant", "nonstationary"]
        output = ""
        for arguments in (
            [*command, "--recipe", "short.yaml", "--push-to-hub", "user/gpt2-linear", "--private"],
            ["-c", OUTSIDE],
        ):
            environment = {**os.environ, **home, **address, **here}
            run = subprocess.run(
                [sys.executable, *arguments], cwd=run_folder, env=environment, capture_output=True, text=True
            )
            output += run.stdout + run.stderr
            assert run.returncode == 0, output
        yield SimpleNamespace(hub=hub, root=folder, folder=run_folder / "gpt2-flexformer", output=output)


@pytest.fixture
def hub(pushed, monkeypatch):
    """The same Hub for huggingface_hub in this process."""
    monkeypatch.setattr(constants, "ENDPOINT", pushed.hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    pushed.hub.requests.clear()
    pushed.hub.stored.clear()
    return pushed.hub


def test_convert_pushes_what_it_wrote(pushed):
    assert pushed.hub.models["user/gpt2-linear"] == {"main": {".gitattributes": b""} | contents(pushed.folder)}
    assert pushed.hub.private == {"user/gpt2-linear"}
    assert f"Pushed to {pushed.hub.url}/user/gpt2-linear/commit/" in pushed.output


def test_pushed_model_loads_without_flexdistill(pushed):
    elsewhere = load_file(pushed.folder.parent / "logits.safetensors")["logits"]
    assert torch.equal(elsewhere, logits(pushed.folder))
    assert (elsewhere - logits(pushed.root / "source")).abs().max() > 0.01


def test_push_to_hub_of_the_model(pushed, tmp_path):
    files = pushed.hub.models["user/again"]["main"]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert torch.equal(logits(tmp_path), logits(pushed.folder))
    assert {"flexformer", "linear-attention"} <= set(ModelCard(files["README.md"].decode()).data.tags)
    assert {"modeling_flexformer.py", "config.json", "model.safetensors"} <= files.keys()


def test_card(pushed):
    card = ModelCard(pushed.hub.models["user/gpt2-linear"]["main"]["README.md"].decode()).data
    assert (card.base_model, card.license, card.language) == ("gpt2", "mit", "en")
    assert card.license_name is None and card.datasets is None  # a file is no dataset of the Hub
    assert (card.pipeline_tag, card.library_name) == ("text-generation", "transformers")
    assert {"flexformer", "linear-attention"} <= set(card.tags)
    student = json.loads((pushed.folder / "metrics.json").read_text())["student"]
    measured = {result.metric_type: result.metric_value for result in card.eval_results}
    assert measured == {
        "perplexity": student["perplexity"],
        "kl_divergence": student["kl"],
        "accuracy": student["top1_agreement"],
    }
    assert {(result.dataset_name, result.dataset_type) for result in card.eval_results} == {
        ("notes.txt (held out)", "text")
    }


def test_token_is_nowhere(pushed):
    assert "whoami" in pushed.hub.requests and TOKEN not in pushed.output
    for files in (contents(pushed.root), *(files for model in pushed.hub.models.values() for files in model.values())):
        assert files and not [name for name, content in files.items() if TOKEN.encode() in content]


def test_broken_push_goes_on(pushed, hub):
    hub.breaks.add("commit")
    with pytest.raises(FlexdistillError, match="`flexdistill push` goes on with"):
        flexdistill.push(pushed.folder, "user/broken")
    assert hub.requests.count("upload") == 2 and hub.models["user/broken"]["main"].keys() == {".gitattributes"}
    hub.requests.clear()
    address = flexdistill.push(pushed.folder, "user/broken")
    assert address.startswith(f"{hub.url}/user/broken/commit/")
    assert hub.requests.count("upload") == 0 and hub.requests.count("commit") == 1
    assert hub.models["user/broken"]["main"] == hub.models["user/gpt2-linear"]["main"]


def test_pull_request(pushed, hub, run):
    theirs = hub.models["someone/theirs"] = {"main": {"README.md": b"mine"}}
    opened = run("push", str(pushed.folder), "someone/theirs", "--create-pr")
    assert (opened.code, opened.out) == (0, f"{hub.url}/someone/theirs/discussions/1\n")
    assert theirs["main"] == {"README.md": b"mine"} and theirs["refs/pr/1"] == contents(pushed.folder)
    del theirs["refs/pr/1"]["metrics.json"]
    assert run("push", str(pushed.folder), "someone/theirs", "--revision", "refs/pr/1").code == 0
    assert theirs.keys() == {"main", "refs/pr/1"} and "metrics.json" in theirs["refs/pr/1"]


def test_branch(pushed, hub):
    for _ in range(2):
        flexdistill.push(pushed.folder, "user/branched", revision="v2")
    assert hub.models["user/branched"]["main"].keys() == {".gitattributes"}
    assert contents(pushed.folder).items() <= hub.models["user/branched"]["v2"].items()
    assert hub.requests.count("branch") == 1


def test_weights_of_an_earlier_push_go(pushed, hub):
    old = {"model-00001-of-00002.safetensors": b"old", "model.safetensors.index.json": b"{}", "notes.md": b"kept"}
    hub.models["user/old"] = {"main": old}
    flexdistill.push(pushed.folder, "user/old")
    assert hub.models["user/old"]["main"] == contents(pushed.folder) | {"notes.md": b"kept"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing", "user/new"], "Folder missing does not exist"),
        (["{root}/source", "user/new"], "holds no converted model"),
        (["{root}/run", "user/new"], "holds no converted model"),
        (["{folder}", "new"], "names no owner"),
        (["{folder}", "user/no spaces"], "check the repository's name"),
        (["{folder}", "someone/theirs"], "HTTP 403"),
        (["{folder}", "someone/new"], "HTTP 403"),
        (["{folder}", "user/gpt2-linear", "--revision", "refs/pr/7"], "HTTP 404"),
        (["{folder}", "user/public", "--private"], "exists and is public"),
        (["{folder}", "user/new", "--create-pr", "--revision", "v2"], "A new pull request is for the main branch"),
    ],
)
def test_bad_input(pushed, hub, run, arguments, message):
    hub.models |= {"someone/theirs": {"main": {}}, "user/public": {"main": {}}}
    before = {model: dict(revisions) for model, revisions in hub.models.items()}
    result = run("push", *(argument.format(root=pushed.root, folder=pushed.folder) for argument in arguments))
    assert_one_sentence(result, message)
    assert hub.models == before


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"HF_TOKEN": None}, "There is no Hugging Face token"),
        ({"HF_TOKEN": TOKEN + "\x01"}, "holds characters that no token has"),
        ({"HF_TOKEN": TOKEN + "2"}, "HTTP 401"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, "check the network"),
        ({"HF_HUB_OFFLINE": True}, "unset HF_HUB_OFFLINE"),
    ],
)
@pytest.mark.parametrize("command", ["push {folder} user/new", "convert gpt2 --push-to-hub user/new"])
def test_without_access(pushed, hub, run, monkeypatch, tmp_path, setting, message, command):
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in setting.items():
        if name != "HF_TOKEN":
            monkeypatch.setattr(constants, name, value)
        elif value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    assert_one_sentence(run(*command.format(folder=pushed.folder).split()), message)
    assert "user/new" not in hub.models and not any(tmp_path.iterdir())


def test_convert_to_anothers_name(hub, run):
    assert_one_sentence(
        run("convert", "gpt2", "--push-to-hub", "someone/new"), "does not own 'someone'; name a repository of user."
    )
    assert "--private is for --push-to-hub" in run("convert", "gpt2", "--private").err


def assert_one_sentence(result, message):
    assert result.code == 2 and result.out == ""
    assert message in result.err and result.err.count("\n") == 1 and result.err.startswith("Error: ")
    assert "Traceback" not in result.err and TOKEN not in result.err
