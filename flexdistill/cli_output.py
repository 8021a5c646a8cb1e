"""What commands print: tables for people or JSON, from the main process only."""

from __future__ import annotations

from typing import Any

from .progress import is_main_process
from .storage import to_json


def show_plan(recipe: Any, as_json: bool) -> None:
    from .conversion import make_plan, resolve_kernel
    from .sources import load_model, resolve_model

    kernel = resolve_kernel(recipe.kernel)  # a misspelt variant is told before a large model is read
    model = load_model(resolve_model(recipe.model), trust_remote_code=recipe.trust_remote_code)
    plan = make_plan(model, kernel)
    if as_json:
        print_json(plan.to_dict())
    elif is_main_process():
        from .tables import print_plan

        print_plan(plan)


def show_metrics(metrics: dict[str, Any], title: str, as_json: bool) -> None:
    if as_json:
        print_json(metrics)
    elif is_main_process():
        from .tables import print_metrics

        print_metrics(metrics, title)


def show_positions(spans: dict[str, list[dict]], as_json: bool) -> None:
    if as_json:
        print_json(spans)
    elif is_main_process():
        from .tables import positions_table, print_table

        print_table(*positions_table(spans))


def show_tasks(rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(rows)
    elif is_main_process():
        from .tables import print_table, tasks_table

        print_table(*tasks_table(rows))


def print_json(value: Any) -> None:
    if is_main_process():
        print(to_json(value))
