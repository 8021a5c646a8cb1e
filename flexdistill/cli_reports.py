"""The commands that look at an installation and at results, and make nothing but a page."""

from __future__ import annotations

import typer

from .cli_options import Debug, Json


def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Say what this installation and machine can do, and what is broken."""
    from .doctor import main

    raise typer.Exit(main(as_json))


def register(app: typer.Typer) -> None:
    """Adds the commands of this file."""
    app.command()(doctor)
