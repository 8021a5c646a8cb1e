"""The options that several commands share, and the recipe that they make."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import FlexdistillError

# option -> settings of the recipe that it replaces
_KERNEL = (
    "variant",
    "component",
    "matrix",
    "features",
    "window",
    "sinks",
    "decay",
    "longest_wavelength",
    "tied",
    "key_heads",
    "layers",
    "keep_layers",
    "keep_softmax",
)
_STAGE_SETTINGS = ("batch_size", "micro_batch_size", "max_memory", "compile", "cuda_graphs")
_STAGES = ("attention_transfer", "logit_distillation", "label_training")
RECIPE_SETTINGS = {
    **{name: [f"kernel.{name}"] for name in _KERNEL},
    **{name: [f"{stage}.{name}" for stage in _STAGES] for name in _STAGE_SETTINGS},
    **{name: [name] for name in ("seed", "precision", "trust_remote_code")},
    "sequence_length": ["data.sequence_length"],
    "attention_steps": ["attention_transfer.steps"],
    "logit_steps": ["logit_distillation.steps"],
    **{name: [f"logit_distillation.{name}"] for name in ("train", "parallel", "gradient_checkpointing")},
    "label_steps": ["label_training.steps"],
    "trackers": ["tracking.trackers"],
}

SOURCE_HELP = "A file or folder of text, `sample`, or a `datasets` name as NAME[:CONFIG[:SPLIT[:COLUMN]]]."


def _set_debug(debug: bool) -> None:
    if debug:
        os.environ["FLEXDISTILL_DEBUG"] = "1"


def option(*names: str, panel: str | None = None, **settings: Any) -> Any:
    return typer.Option(*names, rich_help_panel=panel, show_default=False, **settings)


kernel_option = partial(option, panel="Kernel")
training_option = partial(option, panel="Training")

Model = Annotated[str, typer.Argument(help="Hub id, folder, .gguf file or package:NAME.")]
Checkpoint = Annotated[str, typer.Argument(help="Folder or Hub id of a converted model.")]
Json = Annotated[bool, option("--json", help="Print JSON to stdout.")]
Debug = Annotated[bool, option("--debug", callback=_set_debug, help="Show the traceback of an error.")]
TrustRemoteCode = Annotated[bool | None, option("--trust-remote-code", help="Run code that the source model ships.")]

Variant = Annotated[str | None, kernel_option(help="Kernel; `flexdistill variants` lists them.")]
Component = Annotated[str | None, kernel_option(help="Component function; `flexdistill variants` lists them.")]
Matrix = Annotated[str | None, kernel_option(help="Frequencies of spectraformer, such as orf.")]
Features = Annotated[int | None, kernel_option(help="Frequencies n per head; a map has 2 n features.")]
Window = Annotated[int | None, kernel_option(help="Tokens that keep exact softmax attention; 0: none.")]
Sinks = Annotated[int | None, kernel_option(help="First tokens that stay exact beside --window; else none.")]
Decay = Annotated[bool | None, kernel_option("--decay/--no-decay", help="Features forget at learned rates, or never.")]
LongestWavelength = Annotated[
    int | None, kernel_option(metavar="TOKENS", help="Of the rotary embedding that kernels see; 0: none of it.")
]
Tied = Annotated[bool | None, kernel_option("--tied/--untied", help="One map for queries and keys, or two.")]
KeyHeads = Annotated[str | None, kernel_option(metavar="query|kv", help="A key map per query or KV head.")]
Layers = Annotated[str | None, kernel_option(help="all, indices such as 0-5,9, every:4, or name patterns.")]
KeepLayers = Annotated[str | None, kernel_option(help="Layers that stay softmax, written as --layers.")]
KeepSoftmax = Annotated[int | None, kernel_option(help="Of these, layers that stay softmax, chosen by their KL gain.")]

Data = Annotated[str | None, training_option(metavar="SOURCE", help=SOURCE_HELP)]
SequenceLength = Annotated[int | None, training_option(help="Tokens per sequence.")]
AttentionSteps = Annotated[int | None, training_option(help="Steps of attention transfer.")]
BatchSize = Annotated[int | None, training_option(help="Sequences per step, in all stages.")]
MicroBatchSize = Annotated[int | None, training_option(help="Sequences per forward pass.")]
Train = Annotated[str | None, training_option(metavar="full|lora|kernels", help="What is trained beside the kernels.")]
EvalData = Annotated[str | None, training_option(metavar="SOURCE", help="As --data; else held out of it.")]
Seed = Annotated[int | None, training_option(help="Fixes the data order and the initial kernels.")]
Precision = Annotated[str | None, training_option(metavar="auto|fp32|tf32|bf16|fp16")]
Parallel = Annotated[str | None, training_option(metavar="ddp|fsdp", help="Whole models in each process, or sharded.")]
GradientCheckpointing = Annotated[
    bool | None, training_option("--gradient-checkpointing", help="Run layers twice, and keep their inputs only.")
]
Compile = Annotated[bool | None, training_option("--compile", help="Compile the model's layers, on a GPU.")]
CudaGraphs = Annotated[bool | None, training_option("--cuda-graphs", help="Replay steps that Python has sent once.")]
MaxMemory = Annotated[str | None, training_option(metavar="20GiB", help="Picks --micro-batch-size by a GPU's memory.")]
NumProcesses = Annotated[int | None, training_option(metavar="N", help="Processes to launch, one per GPU.")]
Trackers = Annotated[str | None, training_option(metavar="NAMES", help="tensorboard, trackio, wandb, beside the logs.")]
Settings = Annotated[
    list[str] | None, option("--set", metavar="KEY=VALUE", help="Any other setting of the recipe; repeatable.")
]
Private = Annotated[bool | None, option("--private", help="Make the repository private, if it is not there yet.")]
Overwrite = Annotated[bool, option("--overwrite", help="Replace what is in the output folder.")]


def make_recipe(options: dict[str, Any]) -> Any:
    """The recipe that a command's options name, with what they replace in it."""
    from .recipe import Recipe

    settings: dict[str, Any] = {"model": options["model"]}
    for option, keys in RECIPE_SETTINGS.items():
        if options.get(option) is not None:
            settings.update(dict.fromkeys(keys, options[option]))
    for section, source in (("data", options.get("data")), ("evaluation", options.get("eval_data"))):
        if source is not None:
            settings.update(source_settings(section, source))
    for assignment in options.get("settings") or []:
        key, value = _parse_assignment(assignment)
        if key == "model":
            raise FlexdistillError(f"--set model would replace the MODEL {options['model']!r}; give one of them.")
        settings[key] = value
    return Recipe.load(options.get("recipe", "default")).override(settings)


def is_launched(num_processes: int | None) -> bool:
    """Whether this command line ran in processes of its own, which have ended."""
    if num_processes is None:
        return False
    from .launcher import launch

    return launch(num_processes)


def source_settings(section: str, source: str) -> dict[str, str]:
    """NAME[:CONFIG[:SPLIT[:COLUMN]]] as settings; a path that exists is never split."""
    parts = [source] if Path(source).exists() else source.split(":")
    names = ("source", "config", "split", "column")
    if len(parts) > len(names):
        raise FlexdistillError(f"Source {source!r} has too many parts; write NAME[:CONFIG[:SPLIT[:COLUMN]]].")
    return {f"{section}.{name}": part for name, part in zip(names, parts, strict=False) if part}


def _parse_assignment(assignment: str) -> tuple[str, Any]:
    from .recipe_sections import parse_yaml

    key, equals, value = assignment.partition("=")
    if not equals:
        raise FlexdistillError(f"--set {assignment!r} has no value; write KEY=VALUE, such as kernel.window=64.")
    return key, parse_yaml(value, f"The value of --set {assignment!r}")


def assignments(name: str, given: list[str]) -> dict[str, str]:
    """The values of a repeatable option such as `piqa=piqa.jsonl`, by their names."""
    pairs = [text.partition("=") for text in given]
    if wrong := next(("".join(pair) for pair in pairs if not all(pair)), None):
        raise FlexdistillError(f"{name} {wrong!r} has no name or no value; write NAME=VALUE.")
    return {key: value for key, _, value in pairs}


def integers(name: str, text: str) -> list[int]:
    """The numbers of an option such as `0,64`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise FlexdistillError(f"{name} {text!r} must be whole numbers divided by commas, such as 0,64.") from error


def default_output(model: str, kind: str = "flexformer") -> Path:
    """Where a result goes that was given no folder: beside, by the last part of the model's name."""
    name = Path(model).absolute().name.removeprefix("package:").removesuffix(".gguf")
    return Path(f"{name}-{kind}")
