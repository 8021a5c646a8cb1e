"""The commands that look at an installation, at what it offers and at results, and make nothing but a page."""

from __future__ import annotations

from itertools import takewhile
from pathlib import Path
from typing import Annotated

import typer

from .cli_options import SOURCE_HELP, Checkpoint, Debug, Json, Overwrite, assignments, integers, option, source_settings
from .cli_output import print_json, show_metrics, show_positions, show_tasks
from .errors import FlexdistillError


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this installation and machine can do, and what is broken."""
    from .doctor import main

    raise typer.Exit(main(as_json))


def evaluate(
    directory: Checkpoint,
    teacher: Annotated[str | None, option(help="The model it came from, if it moved.", metavar="MODEL")] = None,
    data: Annotated[str | None, option(help=SOURCE_HELP, metavar="SOURCE")] = None,
    tasks: Annotated[
        str | None, option(help="Instead, tasks of lm-evaluation-harness, such as piqa,arc_easy or task.yaml.")
    ] = None,
    task_data: Annotated[
        list[str] | None,
        option(metavar="TASK=FILE", help="A task's questions, as JSON lines of query, choices, gold; repeatable."),
    ] = None,
    limit: Annotated[int | None, option(min=1, help="Questions of each task, from the first.")] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens per sequence.")] = 512,
    sequences: Annotated[int, typer.Option(help="Sequences evaluated, taken in order.")] = 48,
    batch_size: Annotated[int, typer.Option(help="Sequences per forward pass.")] = 8,
    by_position: Annotated[
        bool, option("--by-position", help="Only perplexity, by how many tokens stand before.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare a converted model with its teacher, on text or on tasks."""
    if (data is None) == (tasks is None):
        raise typer.BadParameter("Give --data for perplexity, or --tasks.")
    unused = {"--task-data": task_data, "--limit": limit} if data else {"--by-position": by_position}
    if name := next((name for name, value in unused.items() if value), None):
        raise typer.BadParameter(f"{name} is for {'--tasks' if data else '--data'}.")
    from .evaluation import teacher_of

    teacher = teacher or teacher_of(directory)
    if tasks is not None:
        from .harness import evaluate_tasks

        files = assignments("--task-data", task_data or [])
        names = [name.strip() for name in tasks.split(",")]
        show_tasks(evaluate_tasks(directory, teacher, names, data=files, limit=limit, batch_size=batch_size), as_json)
        return
    from .recipe import Recipe

    settings = source_settings("evaluation", data) | {
        "evaluation.sequence_length": sequence_length,
        "evaluation.sequences": sequences,
        "evaluation.batch_size": batch_size,
    }
    evaluation = Recipe().override(settings).evaluation
    if by_position:
        from .positions import evaluate_by_position

        show_positions(evaluate_by_position(directory, teacher, evaluation), as_json)
        return
    from .evaluation import evaluate_checkpoint

    show_metrics(evaluate_checkpoint(directory, teacher, evaluation), directory, as_json)


def report(
    directory: Annotated[str, typer.Argument(help="Folder that `flexdistill convert` wrote.")],
    output: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
    data: Annotated[
        str | None, option(metavar="SOURCE", help=f"Also show attention maps and perplexity by position. {SOURCE_HELP}")
    ] = None,
    teacher: Annotated[str | None, option(metavar="MODEL", help="The model it came from, if it moved.")] = None,
    layers: Annotated[str | None, option(help="Converted layers whose maps are shown, such as 0,5.")] = None,
    heads: Annotated[str | None, option(help="Heads whose maps are shown, such as 0,1.")] = None,
    sequence_length: Annotated[int | None, option(min=2, help="Tokens per sequence of --data; else 512.")] = None,
    sequences: Annotated[int | None, option(min=1, help="Sequences of --data; else 8.")] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write one HTML page about a converted model, with all figures inside."""
    for_data = dict(teacher=teacher, layers=layers, heads=heads, sequence_length=sequence_length, sequences=sequences)
    unused = next((name for name, value in for_data.items() if value is not None), None)
    if data is None and unused:
        raise typer.BadParameter(f"--{unused.replace('_', '-')} is for --data.")
    shown = {"layers": layers and integers("--layers", layers), "heads": heads and integers("--heads", heads)}
    from .recipe import Recipe
    from .report_page import Text, write_report

    text = None
    if data is not None:
        lengths = {"evaluation.sequence_length": sequence_length or 512, "evaluation.sequences": sequences or 8}
        source = Recipe().override(source_settings("evaluation", data) | lengths).evaluation
        text = Text(source, teacher, **shown)
    print(write_report(directory, output, text=text, overwrite=overwrite))


def variants(as_json: Json = False, debug: Debug = False) -> None:
    """List the kernels that --variant, --component and --matrix choose from."""
    from .runtime.registry import feature_map_class, kernels

    rows = []
    for variant, component in kernels():
        kernel = feature_map_class(variant, component)
        row = dict(variant=variant, component=component, signed=kernel.signed, causal=kernel.causal_safe)
        row |= dict(tied=kernel.tied_by_default, decay=kernel.decays_by_default)
        rows.append(row | dict(paper=kernel.paper, matrices=list(kernel.matrices)))
    if as_json:
        print_json(rows)
    else:
        from .tables import print_table

        columns = [name for name in rows[0] if name != "matrices"]
        print_table(columns, [[row[name] for name in columns] for row in rows])
        for variant, matrices in {row["variant"]: row["matrices"] for row in rows if row["matrices"]}.items():
            print(f"Matrices of {variant}, the default first: {', '.join(matrices)}")


def recipes(
    name: Annotated[str | None, typer.Argument(help="Print this one.")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the shipped recipes, or print one."""
    from .recipe import RECIPES_FOLDER, Recipe, shipped_recipes

    if name and name not in shipped_recipes():
        raise FlexdistillError(f"Recipe {name!r} is not shipped; shipped are: {', '.join(shipped_recipes())}.")
    texts = {known: (RECIPES_FOLDER / f"{known}.yaml").read_text(encoding="utf-8") for known in shipped_recipes()}
    described = [{"recipe": known, "description": _first_comment(text)} for known, text in texts.items()]
    if as_json:
        print_json(Recipe.load(name).model_dump() if name else described)
    elif name:
        print(texts[name], end="")
    else:
        from .tables import print_table

        print_table(list(described[0]), [list(row.values()) for row in described])


def _first_comment(text: str) -> str:
    """The lines of YAML that begin with # before any other, as one."""
    return " ".join(line[2:] for line in takewhile(lambda line: line.startswith("# "), text.splitlines()))


def register(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    for command in (variants, recipes, report, doctor):
        app.command()(command)
