"""`flexdistill doctor`: what it finds, and that each broken thing is named with a remedy."""

import importlib.metadata
import json
import subprocess
import sys
import threading
import time
from collections import namedtuple
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from flexdistill import doctor, self_test
from flexdistill.runtime import backend

SECRET = "hf_secretsecretsecret"


@pytest.fixture
def hub(monkeypatch):
    """Starts a server that answers with a status; gives its address, and what it was sent."""
    servers = []

    def start(status: int, wait: threading.Event | None = None):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.server.seen.append((self.path, dict(self.headers)))
                if wait is not None:
                    wait.wait()
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *arguments):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.seen = True, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_usable_machine(run):
    result = run("doctor", "--json")
    report = json.loads(result.out)
    assert (result.code, report["problems"]) == (0, [])
    versions = {row["name"]: row for row in report["versions"]}
    assert set(doctor.PACKAGES) < set(versions)
    assert versions["torch"]["version"] == importlib.metadata.version("torch")
    assert versions["torch"]["supported"] == ">=2.8" and versions["python"]["supported"] == ">=3.10"
    assert report["devices"][0]["device"] == "cpu" and report["devices"][0]["memory_bytes"] > 10**8
    checks = report["attention"]["checks"]
    assert {(check["form"], check["window"]) for check in checks} >= {("parallel", 0), ("decoding", 16)}
    assert all(0 < check["error"] <= check["tolerance"] for check in checks)
    assert report["hub"]["offline"] and report["hub"]["reachable"] is None
    assert [disk["name"] for disk in report["disks"]] == ["Hub cache", "working folder"]


def test_text(run):
    result = run("doctor")
    assert result.code == 0 and "Everything is usable." in result.out
    assert "parallel" in result.out and "HF_HUB_OFFLINE" in result.out


def test_help_does_not_import_torch():
    code = (
        "import sys; from flexdistill.cli import app; app(['doctor', '--help'], standalone_mode=False); "
        "print({'torch', 'transformers', 'matplotlib'} & set(sys.modules))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "set()"


def problems(report: dict, *words: str) -> list[str]:
    return [problem for problem in report["problems"] if all(word in problem for word in words)]


def test_old_and_missing_packages(monkeypatch, run):
    versions = {"torch": "2.1.0", "triton": "2.0"}
    real = importlib.metadata.version

    def version(name):
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = run("doctor", "--json")
    report = json.loads(result.out)
    assert result.code == 1
    assert problems(report, "torch", "outside >=2.8", "pip install 'torch>=2.8'")
    assert problems(report, "peft", "not installed", "pip install 'peft>=0.18'")
    assert not problems(report, "triton")  # nobody needs it on a CPU
    assert {row["name"]: row["remark"] for row in report["versions"]}["triton"] == "outside >=3.6"


def test_installed_metadata_is_read_without_a_checkout(monkeypatch, tmp_path):
    class Metadata(dict):
        def get_all(self, name):
            return ["torch>=2.8", "triton>=3.6; sys_platform == 'linux' and extra == 'dev'"]

    monkeypatch.setattr(doctor, "_PYPROJECT", tmp_path / "none")
    monkeypatch.setattr(importlib.metadata, "metadata", lambda name: Metadata({"Requires-Python": ">=3.10"}))
    supported = {name: (str(versions), needed) for name, (versions, needed) in doctor._supported().items()}
    assert supported == {"python": (">=3.10", True), "torch": (">=2.8", True), "triton": (">=3.6", False)}


def test_package_that_cannot_be_imported(monkeypatch):
    real = doctor.importlib.import_module

    def import_module(name, *arguments):
        if name == "datasets":
            raise OSError("libarrow.so: cannot open shared object file")
        return real(name, *arguments)

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)
    assert problems(doctor.examine(), "datasets", "libarrow.so", "install it again")


def test_missing_torch_is_one_problem():
    """In a process that cannot import torch, everything else is still told."""
    code = (
        "import sys; sys.modules['torch'] = None; from flexdistill.doctor import examine; import json; "
        "print(json.dumps(examine()))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    report = json.loads(output)
    assert report["devices"] is None and report["attention"] is None and report["disks"]
    assert problems(report, "torch", "cannot be imported")


@pytest.mark.parametrize("kind", ["wrong", "nan"])
def test_wrong_attention_is_found(monkeypatch, kind):
    real = self_test.attend
    factor = {"wrong": 1.001, "nan": float("nan")}[kind]

    def attend(*arguments, **settings):
        output, memory = real(*arguments, **settings)
        return output * factor, memory

    monkeypatch.setattr(self_test, "attend", attend)
    (problem,) = doctor.examine()["problems"]
    assert "wrong in 6 of 6" in problem and "install torch again" in problem


def test_attention_that_does_not_run(monkeypatch):
    def attend(*arguments, **settings):
        raise RuntimeError("Failed to find C compiler. Please specify via CC")

    monkeypatch.setattr(self_test, "attend", attend)
    assert problems(doctor.examine(), "does not run", "Failed to find C compiler")


@pytest.mark.parametrize("value", ["cuda", "triton"])
def test_backend_that_cannot_run(monkeypatch, value):
    monkeypatch.setenv(backend.VARIABLE, value)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value == "triton" and torch.cuda.is_available():
        pytest.skip("triton runs here")
    backend._fused_operators.cache_clear()  # the interpreter may have served before
    report = doctor.examine()
    assert report["attention"]["backend"] is None and problems(report, backend.VARIABLE, value)


def test_hidden_gpu(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("torch uses it")
    monkeypatch.setattr(doctor, "_NVIDIA_DEVICE", Path("/dev/null"))
    assert problems(doctor.examine(), "NVIDIA GPU", "CUDA build")


def test_hub_is_asked_without_the_token(hub, monkeypatch, run):
    server = hub(200)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    result = run("doctor")
    assert result.code == 0, result.out
    assert "a token is set" in result.out and "answers in" in result.out
    ((path, headers),) = server.seen
    assert SECRET not in result.out + result.err + path + str(headers)


def test_hub_that_refuses(hub):
    hub(503)
    assert problems(doctor.examine(), "HTTP 503", "HF_HUB_OFFLINE")


def test_hub_that_does_not_answer(hub, monkeypatch):
    wait = threading.Event()
    hub(200, wait)
    monkeypatch.setattr(doctor, "HUB_TIMEOUT_S", 0.3)
    started = time.perf_counter()
    found = []
    doctor._hub(found)
    wait.set()
    assert len(found) == 1 and time.perf_counter() - started < 3


def test_password_of_the_endpoint_stays_hidden(hub, monkeypatch, run):
    hub(200)
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:geheim@127.0.0.1:9")
    result = run("doctor")
    assert result.code == 1 and "http://127.0.0.1:9 does not serve" in result.out
    assert "geheim" not in result.out + result.err


def test_damaged_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_\nx")
    (problem,) = doctor.examine()["problems"]
    assert "HF_TOKEN" in problem and "hf_\nx" not in problem


def test_full_disk(monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10**12, 10**12, 10**8))
    report = doctor.examine()
    assert len(problems(report, "0.1 GB of free space")) == 2 and problems(report, "HF_HOME")
