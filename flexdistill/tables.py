"""Plans, results and lists as tables: drawn on a terminal, plain columns in a pipe."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from .conversion import ModulePlan, Plan

_NUMBER = re.compile(r"\d+")
_PIPE_WIDTH = 200


def print_table(columns: list[str], rows: list[list[Any]], *, title: str | None = None) -> None:
    """Prints rows to stdout; numbers stand on the right."""
    console = _console()
    table = Table(title=title, title_justify="left", box=box.SIMPLE if console.is_terminal else None)
    for index, column in enumerate(columns):
        is_number = bool(rows) and all(isinstance(row[index], int | float | None) for row in rows)
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(format_cell(value) for value in row))
    console.print(table)


def markdown_table(columns: list[str], rows: list[list[Any]]) -> str:
    """The table that `print_table` would print, in Markdown."""
    cells = [columns, ["---"] * len(columns), *([format_cell(value) for value in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def print_plan(plan: Plan) -> None:
    """Prints a conversion plan, a row for each run of modules that differ in their number only, and its totals."""
    columns = [
        "module",
        "action",
        "heads",
        "KV heads",
        "head size",
        "causal",
        "parameters",
        "state",
        "KV/token",
        "reason",
    ]
    rows = []
    for group in _collapse(plan.modules):
        first = group[0]
        rows.append(
            [
                _group_name(group),
                first.action,
                first.num_heads,
                first.num_key_value_heads,
                first.head_dim,
                first.causal,
                sum(module.parameters for module in group),
                format_bytes(sum(module.state_bytes for module in group)),
                format_bytes(sum(module.kv_bytes_per_token for module in group)),
                first.reason,
            ]
        )
    print_table(columns, rows)
    line = f"Adds {plan.parameters:,} parameters."
    if plan.converted:
        from .recipe_sections import near_in_words  # pydantic takes a while, and few tables need it

        spec = plan.converted[0].spec
        kernel = " ".join(filter(None, (spec.variant, spec.component)))
        fading = "features that decay" if spec.decay else "no decay"
        line = f"Kernel: {kernel}, {fading}, {near_in_words(spec.window, spec.sinks)}. {line}"
    if plan.kv_bytes_per_token:
        line += (
            f" A sequence keeps {format_bytes(plan.state_bytes)} of state instead of "
            f"{format_bytes(plan.kv_bytes_per_token)} per token: smaller from {plan.break_even_tokens:,} tokens on."
        )
    if plan.shares_frequencies:
        line += " Frequencies will be shared out by degrees of freedom before training."
    if plan.keep_softmax:
        line += f" Of these modules, {plan.keep_softmax} will stay softmax, chosen after attention transfer."
    _console().print(line, soft_wrap=True)


def print_ranking(ranking: dict[str, Any]) -> None:
    """Prints what `pipeline.rank_layers` measured."""
    rows = [[layer["name"], layer["kl"], layer["gain"]] for layer in ranking["layers"]]
    print_table(["softmax in", "KL to teacher", "gain"], rows)
    lines = [f"Linear in all layers, the KL is {ranking['kl']:.4g} nats per token."]
    if ranking["kept_softmax"]:
        chosen = ", ".join(f"{name} ({gain:.4g})" for name, gain in ranking["kept_softmax"].items())
        lines.append(f"Chosen one after the other, with the gain of each: {chosen}.")
    for line in lines:
        _console().print(line, soft_wrap=True)


def print_metrics(metrics: dict[str, Any], title: str) -> None:
    """Prints what `pipeline.convert` or `evaluation.evaluate_checkpoint` measured."""
    rows = [[row["name"], row["perplexity"], row["kl"], row["top1_agreement"]] for row in metrics["rows"]]
    print_table(["model", "perplexity", "KL to teacher", "top-1 agreement"], rows, title=title)
    stages = [
        [stage[key] for key in ("name", "steps", "tokens", "elapsed_s", "first_loss", "last_loss")]
        for stage in metrics.get("stages", [])
    ]
    if stages:
        print()
        print_table(["stage", "steps", "tokens", "seconds", "first loss", "last loss"], stages)
    print()
    for line in summary_lines(metrics):
        _console().print(line, soft_wrap=True)


def comparison_table(comparison: dict[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of what `comparison.compare` measured: the teacher once, every student with its ablations."""
    columns = [
        "model",
        "perplexity",
        "over teacher",
        "KL",
        "top-1 agreement",
        "attention KL",
        "state",
        "tokens",
        "seconds",
    ]
    rows: list[list[Any]] = []
    for result in comparison["results"]:
        if "error" in result:
            rows.append([f"{result['name']}: {result['error']}", *[None] * (len(columns) - 1)])
            continue
        teacher = result["teacher"]["perplexity"]
        for row in result["rows"]:
            if row["name"] == "teacher" and any(known[0] == "teacher" for known in rows):
                continue
            own = row["name"] in ("teacher", "student")
            name = row["name"] if row["name"] == "teacher" else result["name"]
            figures = [row["perplexity"], ratio(row["perplexity"], teacher), row["kl"], row["top1_agreement"]]
            details = [None] * 4
            if row["name"] == "student":
                layers = result["attention_kl"].values()
                seconds = sum(stage["elapsed_s"] for stage in result["stages"])
                state = format_bytes(result["plan"]["state_bytes"])
                if result["plan"]["kept_kv_bytes_per_token"]:
                    state += f" + {format_bytes(result['plan']['kept_kv_bytes_per_token'])} per token"
                details = [sum(layers) / len(layers), state, result["tokens"], seconds]
            rows.append([name if own else f"{name}: {row['name']}", *figures, *details])
    return columns, rows


def ratio(figure: float | None, teacher: float | None) -> float | None:
    """None where one of them is not known or was not finite."""
    return figure / teacher if figure is not None and teacher else None


def positions_table(spans: dict[str, list[dict]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of `positions.perplexity_by_position`, by the name of the model; the first is the teacher."""
    teacher, *students = spans
    columns = ["tokens before", *spans, *(f"{student} over {teacher}" for student in students)]
    rows = []
    for group in zip(*spans.values(), strict=True):
        expected, *others = (span["perplexity"] for span in group)
        ratios = [ratio(perplexity, expected) for perplexity in others]
        rows.append([f"{group[0]['from']:,} to {group[0]['to'] - 1:,}", expected, *others, *ratios])
    return columns, rows


def tasks_table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of `harness.evaluate_tasks`, each figure with its standard error."""
    figures = ("teacher", "student", "difference")
    columns = ["task", "metric", *figures, "questions"]
    return columns, [
        [
            row["task"],
            row["metric"],
            *(_with_error(row[name], row[f"{name}_error"]) for name in figures),
            row["questions"],
        ]
        for row in rows
    ]


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"


def format_bytes(count: int) -> str:
    """A number of bytes in the largest decimal unit that leaves at least one."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.1f} {unit}"
    return f"{count} B"


def summary_lines(metrics: dict[str, Any]) -> list[str]:
    """Sentences on what `print_metrics` prints beside its tables."""
    lines = []
    attention_kl = metrics.get("attention_kl")
    if attention_kl:
        worst = max(attention_kl, key=attention_kl.get)
        mean = sum(attention_kl.values()) / len(attention_kl)
        lines.append(f"Attention KL: {mean:.4g} on average, {attention_kl[worst]:.4g} in the worst layer, {worst}.")
    if metrics.get("kept_softmax"):
        kept = (f"{name} ({gain:.3g})" for name, gain in metrics["kept_softmax"].items())
        lines.append(f"Softmax attention is back in {', '.join(kept)}; in brackets what that lowered the KL by.")
    if metrics.get("guarded_rows"):
        lines.append(f"The normaliser's guard fired in {metrics['guarded_rows']:.2%} of the attention rows.")
    if metrics.get("stages"):
        seconds = sum(stage["elapsed_s"] for stage in metrics["stages"])
        line = f"{metrics['tokens']:,} tokens in {seconds:,.0f} s of training"
        if metrics.get("peak_memory_bytes"):
            line += f", at most {format_bytes(metrics['peak_memory_bytes'])} of memory"
        lines.append(f"{line}.")
    return lines


def _collapse(modules: tuple[ModulePlan, ...]) -> list[list[ModulePlan]]:
    groups: list[list[ModulePlan]] = []
    for module in modules:
        if groups and _unnumbered(groups[-1][-1]) == _unnumbered(module):
            groups[-1].append(module)
        else:
            groups.append([module])
    return groups


def _unnumbered(module: ModulePlan) -> ModulePlan:
    return replace(module, name=_NUMBER.sub("#", module.name))


def _group_name(group: list[ModulePlan]) -> str:
    columns = zip(*(map(int, _NUMBER.findall(module.name)) for module in group), strict=True)
    labels = iter([_span(sorted(set(numbers))) for numbers in columns])
    return _NUMBER.sub(lambda _: next(labels), group[0].name)


def _span(numbers: list[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{{{numbers[0]}..{numbers[-1]}}}"
    return f"{{{','.join(map(str, numbers))}}}"


def format_cell(value: Any) -> str:
    """A value as it stands in a table."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = _PIPE_WIDTH
    return console
