"""What the benchmarks of trained models share: a teacher and its students, one on the device at a time."""

import argparse
import gc
import json
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import transformers
import yaml
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexdistill.devices import make_accelerator
from flexdistill.errors import FlexdistillError
from flexdistill.evaluation import load_converted
from flexdistill.sources import load_model, load_tokenizer, resolve_model

TEACHER = "teacher"


def parser(description: str) -> argparse.ArgumentParser:
    """Arguments that name the models and the file of results."""
    found = argparse.ArgumentParser(description=description)
    found.add_argument("students", nargs="*", metavar="DIR", help="folders of converted models, or NAME=DIR")
    found.add_argument("--teacher", required=True, metavar="MODEL", help="the model that they were converted from")
    found.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    found.add_argument("--output", type=Path, required=True, help="JSON file of the results")
    return found


def run(main: Callable[[], None]) -> None:
    """Calls a benchmark's `main`; what its user can mend is one sentence and exit code 2, as of the command line."""
    try:
        main()
    except (FlexdistillError, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)


def settings(assignments: list[str]) -> dict:
    """A recipe's settings as KEY=VALUE, values as YAML has them."""
    return {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in assignments)}


def tokenizer_of(arguments: argparse.Namespace) -> PreTrainedTokenizerBase:
    return load_tokenizer(resolve_model(arguments.teacher))


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel, Accelerator]]:
    """The teacher, then each student by its name, on the device; the one before is gone by then."""
    folders = dict(_named(student) for student in arguments.students)
    if len(folders | {TEACHER: ""}) <= len(arguments.students):
        raise SystemExit("Error: students have the same name; write NAME=DIR for each.")
    accelerator = make_accelerator(arguments.precision)
    yield TEACHER, load_model(resolve_model(arguments.teacher)).to(accelerator.device), accelerator
    for name, folder in folders.items():
        gc.collect()
        yield name, load_converted(folder).to(accelerator.device), accelerator


def _named(student: str) -> tuple[str, str]:
    """NAME=DIR, or DIR by its own name; `flexdistill compare --export` writes to NAME/model."""
    name, equals, folder = student.partition("=")
    if equals:
        return name, folder
    path = Path(student).absolute()
    return path.parent.name if path.name == "model" else path.name, student


def write(output: Path, **results) -> None:
    """Writes the results with what they were measured on."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    output.write_text(json.dumps({"device": device, "versions": versions, **results}, indent=1) + "\n")
