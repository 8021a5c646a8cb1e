import importlib.util
import os
import sys
from types import SimpleNamespace

# before any import of transformers, datasets or tokenizers, which read them once
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# tiny tensors on many threads, in many test processes, are fifty times slower than on one
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # kernels read it when they are imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from flexdistill.cli import main
from flexdistill.distillation import loop
from flexdistill.pipeline import convert
from tests import tiny
from tests.conversions import Interrupted
from tests.distillation.stages import teacher


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        _set_home(patch, tmp_path_factory)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick_interpreter():
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
            from tests import interpreter

            interpreter.patch_once(patch)
        yield


@pytest.fixture(autouse=True)
def _no_cache_of_another_test(monkeypatch, tmp_path_factory):
    _set_home(monkeypatch, tmp_path_factory)


def _set_home(patch, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    patch.setenv("HF_HOME", home)
    patch.setattr("huggingface_hub.constants.HF_HOME", home)


@pytest.fixture(scope="session")
def sources(tmp_path_factory, tiny_tokenizer):
    """A folder with two models and a text, only to be read."""
    folder = tmp_path_factory.mktemp("sources")
    for name in ("llama", "bert"):
        tiny.save_tiny(folder / name, teacher(name), tiny_tokenizer)
    sentences = (f"Line {n}: the {n % 7} of {n * n % 101} went to {n % 13} with {n % 5} more.\n" for n in range(900))
    (folder / "text.txt").write_text("".join(sentences))
    return folder


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """Gives the folder and the metrics of a conversion that nothing interrupts; equal recipes are converted once."""
    runs = {}

    def converted(recipe):
        key = recipe.to_yaml()
        if key not in runs:
            folder = tmp_path_factory.mktemp("whole") / "out"
            runs[key] = folder, convert(recipe, folder)
        return runs[key]

    return converted


@pytest.fixture
def interrupt(monkeypatch):
    """Stops the training loop at the n-th step of the run from now on, counted over both stages."""

    def arm(step):
        calls = []

        def factor(*args):
            calls.append(args)
            if len(calls) == step:
                raise Interrupted
            return learning_rate_factor(*args)

        monkeypatch.setattr(loop, "learning_rate_factor", factor)

    learning_rate_factor = loop.learning_rate_factor
    return arm


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in an empty folder; gives its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLEXDISTILL_DEBUG", "0")
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["flexdistill", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run
