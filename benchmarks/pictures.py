"""Why the default kernel is what it is, in a picture of the committed results.

python benchmarks/pictures.py --output docs/kernels-h200.svg
"""

import argparse
import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
# rows of the same 1.7M tokens, the worst first, and what to call them
KERNELS = {
    "the paper's trigonometric features": "trigonometric",
    "Hedgehog": "Hedgehog",
    "the same, no decay, learning rates of 1e-4 and 1e-3": "hyperbolic, no decay,\nlow learning rates",
    "Hedgehog with decay": "Hedgehog, decay",
    "stationary": "hyperbolic, decay,\nstationary",
    "Flexformer, purely linear": "hyperbolic, decay,\nnonstationary (default)",
}
# rows of results by position, and what to call them
STUDENTS = {
    "purely linear": "purely linear, 21M tokens",
    "purely linear, 100M tokens, half as usually written": "purely linear, 100M tokens",
    "window 64": "window 64, 21M tokens",
    "4 softmax layers by KL gain": "4 softmax layers by KL gain, 21M tokens",
}


def excesses() -> dict[str, float]:
    """Perplexity over the teacher's, less 1, of each kernel."""
    rows = {row["name"]: row["metrics"]["rows"] for row in read("fidelity-smollm2-h200.json")}
    found = {}
    for name, label in KERNELS.items():
        perplexity = {row["name"]: row["perplexity"] for row in rows[name]}
        found[label] = perplexity["student"] / perplexity["teacher"] - 1
    return found


def perplexities_by_position() -> dict[str, list[tuple[float, float]]]:
    """Of the teacher and its students: (middle of a span of positions, perplexity there)."""
    results = read("quality-smollm2-20m-h200.json")["long_text"]
    spans = {"teacher": results["purely linear"]["spans"]["teacher"]}
    for name, label in STUDENTS.items():
        (spans[label],) = (found for key, found in results[name]["spans"].items() if key != "teacher")
    return {
        name: [((span["from"] + span["to"]) / 2, span["perplexity"]) for span in found] for name, found in spans.items()
    }


def read(name: str):
    return json.loads((RESULTS / name).read_text())


def draw(path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    pyplot.rcParams["svg.hashsalt"] = "kernels"  # equal results give an equal file
    figure, (bars, lines) = pyplot.subplots(1, 2, figsize=(12, 4.5), constrained_layout=True)
    found = excesses()
    bars.barh(list(found), list(found.values()), color=["C0" if "default" in label else "0.7" for label in found])
    for place, value in enumerate(found.values()):
        bars.text(value * 1.05, place, f"{1 + value:.2f} x", va="center")
    bars.set(xscale="log", xlim=(0.1, 8), xlabel="perplexity over the teacher's, less 1")
    bars.set_xticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
    bars.xaxis.set_minor_formatter(NullFormatter())
    bars.set_title("SmolLM2-135M, purely linear, 1.7M tokens of training")
    for (name, points), colour in zip(perplexities_by_position().items(), ("k", "C0", "C3", "C1", "C2"), strict=True):
        lines.plot(*zip(*points, strict=True), "o-", color=colour, label=name)
    lines.axvline(1024, color="0.5", linestyle=":", label="length of training")
    lines.set_xscale("log", base=2)
    lines.set(yscale="log", xlabel="position", ylabel="perplexity", title="War and Peace")
    lines.set_yticks([20, 30, 40, 60, 100], ["20", "30", "40", "60", "100"])
    lines.yaxis.set_minor_formatter(NullFormatter())
    lines.grid(alpha=0.3)
    lines.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="an .svg or .png")
    draw(parser.parse_args().output)


if __name__ == "__main__":
    main()
