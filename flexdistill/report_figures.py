"""Figures of a report as SVG that takes its ink from the page around it, so that one page serves light and dark."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

# written for ink, then replaced by the page's own colour of text
_INK = "#010203"
# legible on white and on black alike
BLUE, ORANGE, GREEN, GREY = "#3b82d6", "#e07b1a", "#17a077", "#8a8f98"
_COLOURS = (BLUE, ORANGE, GREEN, "#b05cc6")
# small, because a phone shows one across its width, and a desktop two
_SIZE = (4.2, 2.8)
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "DejaVu Sans"],
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GREY,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 9,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), _INK),
}
_BINS = 60
_numbers = itertools.count()


def bars(labels: Sequence[str], values: Sequence[float], *, x_label: str, y_label: str) -> str:
    with _figure() as (figure, svg):
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.bar(range(len(values)), values, color=BLUE)
        step = -(-len(labels) // 12)
        axes.set_xticks(range(0, len(labels), step), labels[::step])
        axes.grid(axis="x", visible=False)
    return svg[0]


def lines(
    series: dict[str, tuple[Sequence[float], Sequence[float]]], *, x_label: str, y_label: str, x_base: int | None = None
) -> str:
    """Named lines of (x, y); those named "initial" are dotted, and a y that is None leaves a gap.

    The y axis is logarithmic where values differ by more than a factor of five, the x axis where it has a base.
    """
    with _figure() as (figure, svg):
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        colours = itertools.cycle(_COLOURS)
        shown = []
        for name, (x, y) in series.items():
            style = {"color": GREY, "linestyle": ":"} if name == "initial" else {"color": next(colours)}
            y = [float("nan") if value is None else value for value in y]
            shown += [value for value in y if value == value]
            axes.plot(x, y, label=name, linewidth=1.4, marker="." if len(x) <= 20 else None, **style)
        if shown and min(shown) > 0 and max(shown) > 5 * min(shown):
            axes.set_yscale("log")
        if x_base is None:
            axes.xaxis.get_major_locator().set_params(integer=True)
        else:
            axes.set_xscale("log", base=x_base)
            axes.xaxis.set_major_formatter(lambda value, position: f"{value:,.0f}")
        if len(series) > 1:
            axes.legend()
    return svg[0]


def histogram(groups: dict[str, torch.Tensor], *, x_label: str) -> str:
    """Shares of named groups of values in common bins, all values included; "initial" is filled."""
    groups = {name: values.detach().flatten().double().cpu() for name, values in groups.items()}
    everything = torch.cat(list(groups.values()))
    low, high = float(everything.min()), float(everything.max())
    with _figure() as (figure, svg):
        axes = figure.add_subplot(xlabel=x_label, ylabel="share of all values")
        edges = torch.linspace(low, high if high > low else low + 1, _BINS + 1, dtype=torch.float64)
        colours = itertools.cycle(_COLOURS)
        for name, values in groups.items():
            shares = torch.histogram(values, edges)[0] / len(values)
            fill = name == "initial"
            colour = {"color": GREY, "alpha": 0.5} if fill else {"color": next(colours)}
            axes.stairs(shares.numpy(), edges.numpy(), label=name, fill=fill, linewidth=1.4, **colour)
        axes.locator_params(axis="x", nbins=5)
        axes.legend()
    return svg[0]


def maps(weights: dict[str, torch.Tensor]) -> str:
    """Attention maps (T, T) side by side on one scale: square root of the weight, or linear where some are negative."""
    from matplotlib.colors import Normalize, PowerNorm

    stacked = torch.stack(list(weights.values())).cpu()
    largest = float(stacked.abs().max())
    signed = float(stacked.min()) < 0
    norm = Normalize(-largest, largest) if signed else PowerNorm(0.5, vmin=0, vmax=largest)
    with _figure() as (figure, svg):
        panels = figure.subplots(1, len(weights), sharey=True)
        for axes, name, map_ in zip(panels, weights, stacked, strict=True):
            image = axes.imshow(map_.numpy(), cmap="coolwarm" if signed else "viridis", norm=norm)
            axes.set(title=name, xlabel="key")
            axes.title.set_fontsize(10)
            axes.grid(visible=False)
        panels[0].set_ylabel("query")
        figure.colorbar(image, ax=list(panels), shrink=0.75, pad=0.02)
    return svg[0]


@contextmanager
def _figure() -> Iterator[tuple]:
    """A figure to draw in, and a list that holds its SVG after the context."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # without pyplot, which would look for a display

    drawn: list[str] = []
    with rc_context(_STYLE):
        figure = Figure(figsize=_SIZE, layout="constrained")
        yield figure, drawn
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    drawn.append(_inline(stream.getvalue()))


def _inline(svg: str) -> str:
    """The <svg> element alone, as wide as its place, with names that no other figure of the page has."""
    prefix = f"figure{next(_numbers)}-"
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # browsers know the namespaces of SVG inside HTML
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    return svg.replace(_INK, "currentColor").strip()
