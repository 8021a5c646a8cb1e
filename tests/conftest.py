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
from tests import tiny


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture(scope="session", autouse=True)
def _no_cache_of_the_user(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        _set_home(patch, tmp_path_factory)
        yield


@pytest.fixture(autouse=True)
def _no_cache_of_another_test(monkeypatch, tmp_path_factory):
    _set_home(monkeypatch, tmp_path_factory)


def _set_home(patch, tmp_path_factory):
    home = str(tmp_path_factory.mktemp("home"))
    patch.setenv("HF_HOME", home)
    patch.setattr("huggingface_hub.constants.HF_HOME", home)


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
