"""The command line. torch is imported inside the commands that need it, so that help and usage errors come at once."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer

from . import __version__, cli_reports
from .cli_options import (
    AttentionSteps,
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
    GradientCheckpointing,
    Json,
    KeepLayers,
    KeepSoftmax,
    KeyHeads,
    Layers,
    LongestWavelength,
    Matrix,
    MaxMemory,
    MicroBatchSize,
    Model,
    NumProcesses,
    Overwrite,
    Parallel,
    Precision,
    Private,
    Seed,
    SequenceLength,
    Settings,
    Sinks,
    Tied,
    Trackers,
    Train,
    TrustRemoteCode,
    Variant,
    Window,
    default_output,
    integers,
    is_launched,
    make_recipe,
    option,
    training_option,
)
from .cli_output import print_json, show_metrics, show_plan
from .cli_scratch import init, train
from .errors import FlexdistillError, RunInterrupted, long_names, too_little_memory
from .progress import is_main_process

app = typer.Typer(
    help="Converts pretrained Hugging Face transformers to Flexformer linear attention.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"flexdistill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    context: typer.Context,
    model: Model,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a file.")] = "default",
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
    keep_softmax: KeepSoftmax = None,
    data: Data = None,
    sequence_length: SequenceLength = None,
    attention_steps: AttentionSteps = None,
    logit_steps: Annotated[int | None, training_option(help="Steps of logit distillation.")] = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    max_memory: MaxMemory = None,
    compile: Compile = None,
    cuda_graphs: CudaGraphs = None,
    train: Train = None,
    parallel: Parallel = None,
    gradient_checkpointing: GradientCheckpointing = None,
    num_processes: NumProcesses = None,
    eval_data: EvalData = None,
    seed: Seed = None,
    precision: Precision = None,
    trackers: Trackers = None,
    settings: Settings = None,
    output: Annotated[Path | None, option(help="Folder of the result; else NAME-flexformer.")] = None,
    overwrite: Overwrite = False,
    resume: Annotated[bool, option("--resume", help="Go on from the output folder's newest checkpoint.")] = False,
    push_to_hub: Annotated[
        str | None, option("--push-to-hub", metavar="USER/NAME", help="Upload the result to this repository.")
    ] = None,
    private: Private = None,
    dry_run: Annotated[bool, option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = None,
    debug: Debug = False,
) -> None:
    """Convert MODEL, distil it and write a checkpoint."""
    if private and push_to_hub is None:
        raise typer.BadParameter("--private is for --push-to-hub.")
    resolved = make_recipe(context.params)
    if dry_run:
        show_plan(resolved, as_json)
        return
    if is_launched(num_processes):
        return
    from .pipeline import convert as run

    output = output or default_output(model)
    pushes = push_to_hub is not None and is_main_process()
    if pushes:
        from . import hub

        hub.check_owner(push_to_hub)  # before hours of training
    metrics = run(resolved, output, overwrite=overwrite, resume=resume)
    show_metrics(metrics, model, as_json)
    if is_main_process() and not as_json:
        print(f"\nWritten to {output}")
    if pushes:
        print(f"Pushed to {hub.push(output, push_to_hub, private=private)}", file=sys.stderr)


app.command()(init)
app.command()(train)


@app.command()
def inspect(
    context: typer.Context,
    model: Model,
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
    keep_softmax: KeepSoftmax = None,
    rank_layers: Annotated[
        bool, option("--rank-layers", help="Train kernels, and show what softmax would gain in each layer.")
    ] = False,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a file.")] = "default",
    data: Data = None,
    sequence_length: SequenceLength = None,
    attention_steps: AttentionSteps = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    precision: Precision = None,
    settings: Settings = None,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = None,
    debug: Debug = False,
) -> None:
    """Show what would become of each attention module of MODEL."""
    resolved = make_recipe(context.params)
    if not rank_layers:
        training = ("data", "sequence_length", "attention_steps", "batch_size", "seed", "precision")
        unused = next((name for name in training if context.params[name] is not None), None)
        if unused:
            raise typer.BadParameter(f"--{unused.replace('_', '-')} is for --rank-layers; nothing is trained without.")
        show_plan(resolved, as_json)
        return
    from .ranking import rank_layers as run
    from .tables import print_ranking

    ranking = run(resolved)
    if as_json:
        print_json(ranking)
    elif is_main_process():
        print_ranking(ranking)


app.command()(cli_reports.evaluate)


@app.command()
def compare(
    context: typer.Context,
    model: Model,
    variants: Annotated[
        str, typer.Option(help="Kernels, such as nonstationary,stationary:component=trigonometric,hedgehog.")
    ],
    windows: Annotated[str, typer.Option(help="Softmax windows that each is run with, such as 0,64.")] = "0",
    budget: Annotated[int | None, training_option(min=1, help="Training tokens of each, at most.")] = None,
    recipe: Annotated[str, typer.Option(help="A shipped recipe's name, or a file.")] = "default",
    data: Data = None,
    sequence_length: SequenceLength = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = None,
    train: Train = None,
    eval_data: EvalData = None,
    seed: Seed = None,
    precision: Precision = None,
    settings: Settings = None,
    points: Annotated[int, typer.Option(min=0, help="Evaluations of each during its training, about.")] = 8,
    output: Annotated[Path | None, option(help="Folder of the results; else NAME-comparison.")] = None,
    export: Annotated[bool, option("--export", help="Also write each converted model.")] = False,
    overwrite: Overwrite = False,
    resume: Annotated[bool, option("--resume", help="Keep the results that the output folder holds.")] = False,
    as_json: Json = False,
    trust_remote_code: TrustRemoteCode = None,
    debug: Debug = False,
) -> None:
    """Convert MODEL with several kernels on the same batches and compare them."""
    from .comparison import check_shared, parse_variants
    from .comparison import compare as run
    from .plots import has_matplotlib
    from .tables import comparison_table, print_table

    check_shared(setting.partition("=")[0].strip() for setting in settings or ())
    resolved = make_recipe(context.params)
    comparison = run(
        resolved,
        parse_variants(variants),
        output or default_output(model, "comparison"),
        windows=integers("--windows", windows),
        budget=budget,
        points=points,
        export_models=export,
        overwrite=overwrite,
        resume=resume,
    )
    if as_json:
        print_json(comparison)
    elif is_main_process():
        print_table(*comparison_table(comparison), title=model)
    if is_main_process() and not has_matplotlib():
        print("There are no plots, which need matplotlib: install flexdistill with its extra [plots].", file=sys.stderr)


@app.command()
def generate(
    directory: Checkpoint,
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy.")] = 0.0,
    top_p: Annotated[float | None, option(min=0, max=1, help="Mass of the likely tokens to sample from.")] = None,
    seed: Annotated[int | None, option(help="Fixes what is sampled.", min=0, max=2**32 - 1)] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Continue PROMPT with a converted model."""
    if temperature == 0 and (top_p is not None or seed is not None):
        raise typer.BadParameter("--top-p and --seed need a --temperature above 0.")
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    from .generation import generate as run

    generation = run(directory, prompt, seed=seed, max_new_tokens=max_new_tokens, **sampling)
    if as_json:
        print_json(generation)
    elif is_main_process():
        from .tables import format_bytes

        print(generation["text"])
        state = format_bytes(generation["state_bytes"])
        print(f"{generation['tokens_per_s']:.1f} tokens/s, {state} of state", file=sys.stderr)


@app.command()
def push(
    directory: Annotated[str, typer.Argument(help="Folder of a converted model.")],
    repository: Annotated[str, typer.Argument(metavar="USER/NAME", help="Made if it is not there.")],
    private: Private = None,
    revision: Annotated[str | None, option(help="Branch, or an open pull request as refs/pr/1; else main.")] = None,
    create_pr: Annotated[bool, option("--create-pr", help="Open a pull request.")] = False,
    debug: Debug = False,
) -> None:
    """Upload a converted model to the Hugging Face Hub, or go on with an upload that broke off."""
    from .hub import push as run

    print(run(directory, repository, private=private, revision=revision, create_pr=create_pr))


cli_reports.register(app)


def main() -> None:
    """The console script: errors that a user can act on are one line on stderr and exit code 2.

    A run that a signal stopped says how to go on and exits with 128 + the signal's number.
    """
    try:
        with too_little_memory(), long_names():
            app(prog_name="flexdistill")
    except Exception as error:
        if not _is_for_users(error):
            raise
        if os.environ.get("FLEXDISTILL_DEBUG") == "1":
            traceback.print_exc()
        elif "RANK" in os.environ:
            from .launcher import report

            report(error)
        else:
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunInterrupted as stop:
        if is_main_process():
            print(stop, file=sys.stderr)
        sys.exit(stop.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_for_users(error: Exception) -> bool:
    backend = sys.modules.get("flexdistill.runtime.backend")  # it imports torch, which not every command does
    return isinstance(error, FlexdistillError) or (backend is not None and isinstance(error, backend.BackendError))
