"""Pictures of a comparison; matplotlib, an optional extra, is imported when one is drawn."""

from __future__ import annotations

import importlib.util
import re
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def plot_comparison(comparison: dict[str, Any], folder: Path) -> list[Path]:
    """Draws what `comparison.compare` measured.

    Returns:
        the files: perplexity against training tokens (KL to the teacher where the models are not causal), and the
        attention KL of each layer.
    """
    results = [result for result in comparison["results"] if "error" not in result]
    if not results:
        return []
    figure = "kl" if results[0]["teacher"]["perplexity"] is None else "perplexity"
    label = {"kl": "KL to the teacher, nats per token", "perplexity": "perplexity"}[figure]
    curves, layers = folder / f"{figure}.png", folder / "attention_kl.png"
    with _axes(curves, "training tokens", label) as axes:
        for result in results:
            points = result["curve"]
            axes.plot([p["tokens"] for p in points], [p[figure] for p in points], marker=".", label=result["name"])
        if figure == "perplexity":
            axes.axhline(results[0]["teacher"]["perplexity"], color="black", linestyle="--", label="teacher")
    with _axes(layers, "layer", "attention KL, nats per query") as axes:
        for result in results:
            numbers = [layer_number(name, index) for index, name in enumerate(result["attention_kl"])]
            axes.plot(numbers, list(result["attention_kl"].values()), marker=".", label=result["name"])
    return [curves, layers]


def layer_number(name: str, index: int) -> int:
    """The number of a layer, which its name holds unless it is the only one."""
    number = re.search(r"\d+", name)
    return int(number[0]) if number else index


@contextmanager
def _axes(file: Path, x_label: str, y_label: str):
    """Axes with a logarithmic scale, saved to `file` at the end of the context."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, yscale="log")
    yield axes
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=150)
