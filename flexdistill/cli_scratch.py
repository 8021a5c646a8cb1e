"""The commands that make models without a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import (
    BatchSize,
    Checkpoint,
    Compile,
    Component,
    CudaGraphs,
    Data,
    Debug,
    Decay,
    EvalData,
    Features,
    Json,
    KeepLayers,
    KeyHeads,
    Layers,
    LongestWavelength,
    Matrix,
    MaxMemory,
    MicroBatchSize,
    NumProcesses,
    Overwrite,
    Precision,
    Seed,
    SequenceLength,
    Settings,
    Sinks,
    Tied,
    Trackers,
    TrustRemoteCode,
    Variant,
    Window,
    is_launched,
    make_recipe,
    option,
    training_option,
)
from .cli_output import print_json
from .progress import is_main_process


def init(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="CONFIG", help="A config.json, or a model; weights are not read.")],
    output: Annotated[Path, typer.Argument(help="Folder of the result.")],
    variant: Variant = None,
    component: Component = None,
    matrix: Matrix = None,
    features: Features = None,
    window: Window = None,
    sinks: Sinks = None,
    decay: Decay = None,
    longest_wavelength: LongestWavelength = None,
    tied: Tied = None,
    key_heads: KeyHeads = None,
    layers: Layers = None,
    keep_layers: KeepLayers = None,
    tokenizer: Annotated[str | None, option(help="A model whose tokenizer it gets; else CONFIG's own.")] = None,
    seed: Seed = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = None,
    debug: Debug = False,
) -> None:
    """Write an untrained Flexformer model of CONFIG to OUTPUT."""
    from .initialisation import initialise

    plan = initialise(model, output, make_recipe(context.params), tokenizer=tokenizer, overwrite=overwrite)
    if as_json:
        print_json(plan.to_dict())
    else:
        from .tables import print_plan

        print_plan(plan)


def train(
    context: typer.Context,
    model: Checkpoint,
    output: Annotated[Path, typer.Argument(help="Folder of the result.")],
    label_steps: Annotated[int | None, training_option("--steps", help="Optimiser steps.")] = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a file.")] = "default",
    data: Data = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    max_memory: MaxMemory = None,
    compile: Compile = None,
    cuda_graphs: CudaGraphs = None,
    num_processes: NumProcesses = None,
    eval_data: EvalData = None,
    seed: Seed = None,
    precision: Precision = None,
    trackers: Trackers = None,
    settings: Settings = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, option("--resume", help="Go on from the output folder's newest checkpoint.")] = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = None,
    debug: Debug = False,
) -> None:
    """Train a Flexformer model on text alone, without a teacher, and write it to OUTPUT."""
    resolved = make_recipe(context.params)
    if is_launched(num_processes):
        return
    from .training import train as run

    metrics = run(resolved, output, overwrite=overwrite, resume=resume)
    if as_json:
        print_json(metrics)
    elif is_main_process():
        before, after = metrics["perplexity_before"], metrics["perplexity"]
        print(f"Perplexity {after:.2f}, before training {before:.2f}")
