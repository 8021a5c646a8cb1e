"""What this machine and installation can do: versions, devices, attention, the Hub and disks, and what is broken.

torch and the other packages are imported inside the checks, because one that cannot be imported is a finding.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from . import __version__
from .errors import first_sentence

PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "triton")
HUB_TIMEOUT_S = 5.0
# less than one checkpoint of a model of 100 million parameters and its optimiser
LEAST_FREE_BYTES = 2 * 10**9
_PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
_NVIDIA_DEVICE = Path("/dev/nvidia0")


def examine() -> dict[str, Any]:
    """Looks at everything once; nothing on disk changes, and no token is sent or shown.

    Returns:
        `versions`, `devices`, `attention`, `hub` and `disks`, and `problems`: a sentence for each thing that is broken,
        with its remedy. All of it JSON.
    """
    problems: list[str] = []
    report: dict[str, Any] = {}
    sections = {"versions": _versions, "devices": _devices, "attention": _attention, "hub": _hub, "disks": _disks}
    for name, check in sections.items():
        try:
            report[name] = check(problems)
        except ImportError as error:  # named among the versions' problems, unless it is a part of a package
            report[name] = None
            if not any(f" {error.name} " in f" {problem} " for problem in problems):
                problems.append(f"The {name} cannot be checked ({first_sentence(error)}); install that package again.")
    return report | {"problems": problems}


def _versions(problems: list[str]) -> list[dict]:
    """A row for Python and each package: its version, the supported ones, and a remark where it is not among them."""
    supported = _supported()
    rows = [_version_row("python", platform.python_version(), supported, problems)]
    for name in PACKAGES:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        row = _version_row(name, version, supported, problems)
        if version is not None and row["remark"] is None:
            try:
                importlib.import_module(name)
            except Exception as error:  # a broken shared library raises what it likes
                row["remark"] = "cannot be imported"
                problems.append(f"Package {name} cannot be imported ({first_sentence(error)}); install it again.")
        rows.append(row)
    remark = None if supported else "not installed by pip, so the supported versions are not known"
    return [*rows, {"name": "flexdistill", "version": __version__, "supported": None, "remark": remark}]


def _version_row(name: str, version: str | None, supported: dict, problems: list[str]) -> dict:
    specifier, needed = supported.get(name, (None, name != "triton"))
    remark = None
    if version is None:
        remark = "not installed" if needed else "not installed; only the fused kernels need it"
    elif specifier is not None and not specifier.contains(version, prereleases=True):
        remark = f"outside {specifier}"
    if remark and needed:
        # Python itself does not come from pip
        remedy = f"use Python {specifier}" if name == "python" else f"pip install '{name}{specifier or ''}'"
        problems.append(f"{'Python' if name == 'python' else 'Package ' + name} is {remark}; {remedy}.")
    return {"name": name, "version": version, "supported": str(specifier or "") or None, "remark": remark}


def _supported() -> dict[str, tuple[Any, bool]]:
    """Name -> supported versions and whether it is needed; empty where neither pip nor a checkout tells."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    python, requirements = _declared()
    found: dict[str, tuple[Any, bool]] = {"python": (SpecifierSet(python), True)} if python else {}
    for requirement in map(Requirement, requirements):
        needed = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if needed or requirement.name not in found:
            found[requirement.name] = (requirement.specifier, needed)
    return found


def _declared() -> tuple[str | None, list[str]]:
    """Supported versions of Python, and requirements, those of extras marked; a checkout's, else the installed."""
    if _PYPROJECT.exists() and sys.version_info >= (3, 11):
        import tomllib

        project = tomllib.loads(_PYPROJECT.read_text(encoding="utf-8"))["project"]
        requirements = list(project["dependencies"])
        for name, extra in project["optional-dependencies"].items():
            requirements += [f"{text.partition(';')[0]}; extra == '{name}'" for text in extra]
        return project["requires-python"], requirements
    try:
        metadata = importlib.metadata.metadata("flexdistill")
    except importlib.metadata.PackageNotFoundError:
        return None, []
    return metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []


def _devices(problems: list[str]) -> list[dict]:
    """The CPU and each GPU; one that cannot add two numbers is a problem."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    cpu = {"device": "cpu", "name": _processor(), "memory_bytes": pages, "compute_capability": None}
    rows = [cpu | {"bf16": True, "usable": True}]  # torch computes bf16 on any processor
    with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver that it cannot use
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available and _NVIDIA_DEVICE.exists():
        reason = first_sentence(caught[0].message) if caught else f"torch {torch.__version__} finds no GPU"
        problems.append(
            f"There is an NVIDIA GPU that torch cannot use ({reason}); install a CUDA build of torch that fits its "
            "driver, and see that CUDA_VISIBLE_DEVICES does not hide it."
        )
    for index in range(torch.cuda.device_count() if available else 0):
        device, usable = f"cuda:{index}", True
        properties = torch.cuda.get_device_properties(index)
        try:
            torch.ones(2, device=device).sum().item()
        except Exception as error:
            usable = False
            problems.append(
                f"GPU {device} ({properties.name}) cannot compute ({first_sentence(error)}); leave it out with "
                "CUDA_VISIBLE_DEVICES, or install a build of torch that supports it."
            )
        rows.append(
            {
                "device": device,
                "name": properties.name,
                "memory_bytes": properties.total_memory,
                "compute_capability": f"{properties.major}.{properties.minor}",
                "bf16": properties.major >= 8,  # below, torch emulates it
                "usable": usable,
            }
        )
    return rows


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _attention(problems: list[str]) -> dict:
    """The backend of attention, and the comparisons of `self_test`."""
    import torch

    from .runtime.backend import VARIABLE
    from .self_test import backend_name, self_test

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    result: dict[str, Any] = {"device": str(device), "backend": None, VARIABLE: os.environ.get(VARIABLE), "checks": []}
    try:
        result["backend"] = backend_name(device)
    except RuntimeError as error:  # names cause and remedy
        problems.append(str(error))
        return result
    remedy = "install torch again"
    if result["backend"] == "triton":
        remedy = f"set {VARIABLE}=torch to do without the fused kernels"
    try:
        result["checks"] = self_test(device)
    except Exception as error:  # Triton needs a compiler and a driver, and raises what they say
        problems.append(
            f"Attention by {result['backend']} on {device} does not run "
            f"({type(error).__name__}: {first_sentence(error)}); {remedy}."
        )
    failed = [check for check in result["checks"] if not check["ok"]]
    if failed:
        worst = failed[0]
        problems.append(
            f"Attention by {result['backend']} on {device} is wrong in {len(failed)} of {len(result['checks'])} "
            f"comparisons, first in {worst['form']} ({worst['dtype']}, window {worst['window']}): error "
            f"{worst['error']:.1e}, allowed {worst['tolerance']:.0e}; {remedy}."
        )
    return result


def _hub(problems: list[str]) -> dict:
    """Whether the Hub answers, asked without a token; not asked in offline mode."""
    from huggingface_hub import constants, get_token

    endpoint = _without_password(constants.ENDPOINT)
    token = get_token()
    result: dict[str, Any] = {"endpoint": endpoint, "offline": constants.HF_HUB_OFFLINE, "token": token is not None}
    if token is not None and not (token.isascii() and token.isprintable()):
        problems.append("The Hugging Face token holds characters that no token has; set HF_TOKEN anew.")
    if constants.HF_HUB_OFFLINE:
        return result | {"reachable": None, "elapsed_s": None}
    started = time.perf_counter()
    reason = _hub_refusal(constants.ENDPOINT)
    elapsed_s = round(time.perf_counter() - started, 3)
    if reason is not None:
        problems.append(
            f"The Hub at {endpoint} does not serve ({reason}); check the network, HF_ENDPOINT and the proxy, or set "
            "HF_HUB_OFFLINE=1 to work with what is on disk."
        )
    return result | {"reachable": reason is None, "elapsed_s": elapsed_s}


def _hub_refusal(endpoint: str) -> str | None:
    """Why the Hub does not serve a list of one model; None if it does."""
    from huggingface_hub.utils import get_session

    answer: list[str | None] = []

    def ask() -> None:
        try:
            response = get_session().get(f"{endpoint}/api/models?limit=1", timeout=HUB_TIMEOUT_S, follow_redirects=True)
            answer.append(None if response.is_success else f"HTTP {response.status_code}")
        except Exception as error:  # huggingface_hub's HTTP library has its own; their messages may hold a password
            answer.append(type(error).__name__)

    # a name server that does not answer knows no timeout
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answer[0] if answer else f"no answer within {HUB_TIMEOUT_S:.0f} s"


def _without_password(address: str) -> str:
    parts = urlsplit(address)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _disks(problems: list[str]) -> list[dict]:
    """Free space where models are downloaded to and where results go."""
    from huggingface_hub import constants

    rows = []
    for name, path in (("Hub cache", Path(constants.HF_HUB_CACHE)), ("working folder", Path.cwd())):
        existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        free, writable = shutil.disk_usage(existing).free, os.access(existing, os.W_OK)
        rows.append({"name": name, "path": str(path), "free_bytes": free, "writable": writable})
        remedy = "set HF_HOME to another folder" if name == "Hub cache" else "work in another folder"
        if not writable:
            problems.append(f"The {name} {path} is not writable; {remedy}.")
        elif free < LEAST_FREE_BYTES:
            problems.append(f"The {name} {path} has {free / 1e9:.1f} GB of free space; make room, or {remedy}.")
    return rows


def show(report: dict[str, Any]) -> None:
    """Prints what `examine` found as tables and lines."""
    from .tables import format_bytes, print_table

    if report["versions"] is not None:
        columns = ["name", "version", "supported", "remark"]
        print_table(columns, [[row[column] for column in columns] for row in report["versions"]])
        print()
    if report["devices"] is not None:
        rows = [
            [d["device"], d["name"], format_bytes(d["memory_bytes"]), d["compute_capability"], d["bf16"], d["usable"]]
            for d in report["devices"]
        ]
        print_table(["device", "name", "memory", "compute capability", "bf16", "usable"], rows)
        print()
    if report["attention"] is not None and report["attention"]["checks"]:
        attention = report["attention"]
        columns = ["form", "window", "dtype", "error", "tolerance", "ok"]
        rows = [[check[column] for column in columns] for check in attention["checks"]]
        print_table(columns, rows, title=f"Attention by {attention['backend']} on {attention['device']}")
        print()
    if report["hub"] is not None:
        print(_hub_line(report["hub"]))
    for disk in report["disks"] or []:
        print(f"The {disk['name']} {disk['path']} has {format_bytes(disk['free_bytes'])} of free space.")
    print()
    for problem in report["problems"]:
        print(f"Problem: {problem}")
    if not report["problems"]:
        print("Everything is usable.")


def _hub_line(hub: dict[str, Any]) -> str:
    token = "a token is set" if hub["token"] else "no token is set"
    if hub["offline"]:
        return f"The Hub is not asked, as HF_HUB_OFFLINE is set; {token}."
    state = f"answers in {hub['elapsed_s']:.2f} s" if hub["reachable"] else "does not serve"
    return f"The Hub at {hub['endpoint']} {state}; {token}."


def main(as_json: bool) -> int:
    """Examines, prints, and returns the exit code: 1 if something is broken."""
    if as_json:
        # what libraries say while they are imported must not stand between the JSON
        stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            report = examine()
        finally:
            sys.stdout = stdout
        from .cli_output import print_json

        print_json(report)
    else:
        report = examine()
        show(report)
    return 1 if report["problems"] else 0
