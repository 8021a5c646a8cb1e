"""The commands that look at an installation and at results, and make nothing but a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .cli_options import SOURCE_HELP, Debug, Json, Overwrite, integers, option, source_settings


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this installation and machine can do, and what is broken."""
    from .doctor import main

    raise typer.Exit(main(as_json))


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


def register(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    app.command()(doctor)
    app.command()(report)
