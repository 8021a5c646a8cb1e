"""One HTML page about a converted model, with all that it shows inside: it opens anywhere, also without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from .attention_modes import AttentionCall, record_attention
from .conversion import check_sequence_length
from .data import read_documents
from .devices import make_accelerator
from .distillation.attention_transfer import softmax_weights
from .distillation.stage import feature_maps
from .errors import FlexdistillError, disk_errors, first_sentence
from .evaluation import check_same_model, load_converted
from .packing import pack
from .plots import has_matplotlib, layer_number
from .positions import perplexity_by_position
from .recipe import EvaluationRecipe, KernelRecipe
from .report_figures import bars, histogram, lines, maps
from .report_html import figure_grid, page, section, table
from .runtime.feature_maps import FeatureMap
from .runtime.registry import build_feature_map
from .sources import load_model, load_tokenizer, resolve_model
from .storage import expanded, write_whole
from .tables import ratio, summary_lines

# of a map, which a phone shows in half its width
_MAP_TOKENS = 64
_TITLES = {
    "loss": "loss",
    "attention_kl": "attention KL",
    "output_error": "output error",
    "negative_mass": "negative mass",
}


@dataclass(frozen=True)
class Text:
    """What attention maps and perplexity by position are shown of.

    Args:
        source: as `flexdistill evaluate --data` takes it.
        teacher: the model that was converted; None for the one that the metrics name.
        layers: numbers of the converted modules whose maps are shown, from 0; None for the first, middle and last.
        heads: query heads whose maps are shown; None for the first and the last.
    """

    source: EvaluationRecipe
    teacher: str | None = None
    layers: Sequence[int] | None = None
    heads: Sequence[int] | None = None


def write_report(
    directory: str | Path, output: str | Path, *, text: Text | None = None, overwrite: bool = False
) -> Path:
    """Writes the page of a folder that `flexdistill convert` wrote; returns its path.

    Args:
        directory: the folder, with its metrics and logs.
        output: the page.
        text: for attention maps, and perplexity by position where the model is causal.
        overwrite: replace `output`.

    Raises:
        FlexdistillError: if matplotlib is missing, the folder is not such a one, the text does not fit, or the page is
            there already or cannot be written; then nothing on disk has changed.
    """
    folder, output = expanded(directory), expanded(output)
    if output.is_dir():
        raise FlexdistillError(f"{output} is a folder; name a file for the page.")
    if not has_matplotlib():
        raise FlexdistillError("A report draws with matplotlib, which is missing; install the extra [report].")
    if output.exists() and not overwrite:
        raise FlexdistillError(f"{output} exists; choose another --output or pass --overwrite.")
    if not output.parent.is_dir():
        raise FlexdistillError(f"Folder {output.parent} does not exist; make it or choose another --output.")
    metrics, logs = _metrics(folder), {log.stem: _log(log) for log in sorted(folder.glob("*.jsonl"))}
    model = load_converted(folder)
    sections = [_summary(metrics), _layers(metrics), _training(logs), _spectra(model), _memories(model)]
    if text is not None:
        sections += _of_text(model, metrics, text)
    with disk_errors(output):
        write_whole(output, _page(metrics, "".join(sections)))
    return output


def _metrics(folder: Path) -> dict[str, Any]:
    try:
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        missing = {"model", "kernel", "rows", "attention_kl"} - set(metrics)
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or first_sentence(error)
        raise FlexdistillError(
            f"{folder / 'metrics.json'} is not the metrics of a conversion ({reason}); give the folder that "
            "`flexdistill convert` wrote."
        ) from error
    return metrics


def _log(file: Path) -> list[dict[str, Any]]:
    """The steps of a stage."""
    try:
        entries = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if any(not {"step", "loss"} <= set(entry) for entry in entries):
            raise ValueError("a line has no step or no loss")
    except (OSError, ValueError, TypeError) as error:
        raise FlexdistillError(
            f"{file} is no training log ({first_sentence(error)}); take it out of the folder."
        ) from error
    return entries


def _summary(metrics: dict[str, Any]) -> str:
    teacher = metrics["rows"][0]["perplexity"]
    columns = ["model", "perplexity", "over teacher", "KL to teacher", "same top-1"]
    rows = []
    for row in metrics["rows"]:
        over = ratio(row["perplexity"], teacher)
        rows.append([row["name"], row["perplexity"], over, row["kl"], row["top1_agreement"]])
    lines_ = "".join(f"<p>{html.escape(line)}</p>" for line in summary_lines(metrics))
    note = "Rows below the student are the student with parts of its attention taken away."
    return section("Teacher, student and ablations", f"{table(columns, rows)}<p class=quiet>{note}</p>{lines_}")


def _layers(metrics: dict[str, Any]) -> str:
    divergence = metrics["attention_kl"]
    labels = [str(layer_number(name, index)) for index, name in enumerate(divergence)]
    figure = bars(labels, list(divergence.values()), x_label="layer", y_label="nats per query")
    caption = "KL of each layer's attention rows from the teacher's softmax, 0 if they are equal."
    return section("Attention per layer", figure_grid({caption: figure}))


def _training(logs: dict[str, list[dict[str, Any]]]) -> str:
    figures = {}
    for name, entries in logs.items():
        parts = [key for key in _TITLES if entries and key in entries[0]]
        steps = [entry["step"] for entry in entries]
        series = {_TITLES[key]: (steps, [entry[key] for entry in entries]) for key in parts}
        if series:
            title = name.replace("_", " ")
            figures[f"{title.capitalize()}, {len(entries):,} steps."] = lines(
                series, x_label="step", y_label="nats" if len(series) == 1 else "nats, shares"
            )
    return section("Training", figure_grid(figures) if figures else "<p>The folder holds no training logs.</p>")


def _spectra(model: PreTrainedModel) -> str:
    """Learned frequencies of all layers against fresh ones."""
    kernels = {name: kernel for name, kernel in feature_maps(model).items() if kernel.has_spectrum}
    if not kernels:
        return section("Frequencies", "<p>This kernel has no learned frequencies.</p>")
    fresh = {name: _fresh(kernel) for name, kernel in kernels.items()}
    matrices = [name for name in ("w1", "w2") if name in next(iter(kernels.values())).query_parameters]
    figures = {}
    for matrix in matrices:
        initial = [kernel.query_parameters[matrix].detach().flatten() for kernel in fresh.values()]
        groups, by_layer = {"initial": torch.cat(initial)}, {}
        numbers = [layer_number(name, index) for index, name in enumerate(kernels)]
        by_layer["initial"] = (numbers, [float(x.square().mean().sqrt()) for x in initial])
        for side, part in (("queries", "query_parameters"), ("keys", "key_parameters")):
            found = [getattr(kernel, part) for kernel in kernels.values()]
            if not all(matrix in parameters for parameters in found):
                continue  # one map for both
            side = side if len(next(iter(kernels.values())).key_parameters) else "queries and keys"
            learned = [parameters[matrix].detach().flatten().float() for parameters in found]
            groups[side] = torch.cat(learned)
            by_layer[side] = (numbers, [float(x.square().mean().sqrt()) for x in learned])
        title = matrix.upper()
        figures[f"Frequencies {title} of all layers: learned, and the Gaussian that they started from."] = histogram(
            groups, x_label=f"entries of {title}"
        )
        figures[f"Root mean square of {title} by layer."] = lines(by_layer, x_label="layer", y_label=f"rms of {title}")
    return section("Frequencies", figure_grid(figures))


def _memories(model: PreTrainedModel) -> str:
    """Tokens after which features that decay have forgotten all but 1/e."""
    kernels = {name: kernel for name, kernel in feature_maps(model).items() if kernel.decay is not None}
    if not kernels:
        return ""
    with torch.no_grad():
        learned = [1 / kernel.decay_rates() for kernel in kernels.values()]
        initial = [1 / _fresh(kernel).decay_rates() for kernel in kernels.values()]
    numbers = [layer_number(name, index) for index, name in enumerate(kernels)]
    shares = {"shortest tenth": 0.1, "median": 0.5, "longest tenth": 0.9}
    by_layer = {name: (numbers, [float(x.quantile(share)) for x in learned]) for name, share in shares.items()}
    grid = torch.linspace(0, 1, 101)
    sizes = {"initial": torch.cat(initial).flatten(), "learned": torch.cat(learned).flatten()}
    places = (grid * (len(sizes["learned"]) - 1)).long()
    curves = {name: (size.sort().values[places].tolist(), grid.tolist()) for name, size in sizes.items()}
    figures = {
        "Memory of the features of all layers: tokens after which a feature has forgotten all but 1/e.": lines(
            curves, x_label="memory, tokens", y_label="share of features below", x_base=10
        ),
        "Memory by layer.": lines(by_layer, x_label="layer", y_label="tokens"),
    }
    return section("Memory", figure_grid(figures))


@torch.no_grad()
def _fresh(kernel: FeatureMap) -> FeatureMap:
    """A kernel of the same spec at initial values, on CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        fresh = build_feature_map(kernel.spec)
        fresh.reset_parameters()
    return fresh


def _of_text(student: PreTrainedModel, metrics: dict[str, Any], text: Text) -> list[str]:
    """Sections that need the teacher and a text."""
    source = resolve_model(text.teacher or metrics["model"])
    tokenizer, teacher = load_tokenizer(source), load_model(source)
    check_same_model(teacher, student)
    check_sequence_length(student, text.source.sequence_length)
    accelerator = make_accelerator("auto")
    sequences = pack(read_documents(text.source), tokenizer, text.source.sequence_length, text.source.sequences)
    teacher, student = (model.to(accelerator.device).eval() for model in (teacher, student))
    chosen, heads = _chosen(student, text)
    shown = sequences[:1, :_MAP_TOKENS].to(accelerator.device)
    sections = [_maps(teacher, student, shown, chosen, heads)]
    if all(kernel.spec.causal for kernel in feature_maps(student).values()):
        sections.append(_positions({"teacher": teacher, "student": student}, sequences, accelerator, text.source))
    return sections


def _chosen(student: PreTrainedModel, text: Text) -> tuple[list[str], list[int]]:
    names = [name.removeprefix(f"{student.base_model_prefix}.") for name in feature_maps(student)]
    last = len(names) - 1
    numbers = sorted({0, last // 2, last}) if text.layers is None else list(text.layers)
    heads_of = min(kernel.spec.num_heads for kernel in feature_maps(student).values())
    heads = sorted({0, heads_of - 1}) if text.heads is None else list(text.heads)
    for option, wanted, count in (("--layers", numbers, len(names)), ("--heads", heads, heads_of)):
        wrong = next((number for number in wanted if not 0 <= number < count), None)
        if wrong is not None:
            raise FlexdistillError(f"{option} names {wrong}, and there are 0 to {count - 1}; choose among those.")
    return [names[number] for number in numbers], heads


def _maps(teacher, student, tokens: torch.Tensor, chosen: list[str], heads: list[int]) -> str:
    figures = {}
    theirs = _calls(teacher, AttentionCall.softmax, tokens)
    ours = _calls(student, AttentionCall.flexformer, tokens)
    for name in chosen:
        call = ours[name]
        with torch.no_grad():
            actual = call.kernel_weights()[0]
        expected = softmax_weights(theirs[name])[0]
        for head in heads:
            figures[f"{name}, head {head}"] = maps({"teacher": expected[head], "student": actual[head]})
    note = f"<p class=quiet>Of the text's first {tokens.shape[1]} tokens; a row is a query's weights over the keys.</p>"
    return section("Attention maps", note + figure_grid(figures))


def _calls(model: PreTrainedModel, function, tokens: torch.Tensor) -> dict[str, AttentionCall]:
    """The first call of each attention module, by its name in the base model."""
    names = {module: name for name, module in model.base_model.named_modules()}
    calls: dict[str, AttentionCall] = {}
    for call in record_attention(model, function, tokens):
        calls.setdefault(names[call.module], call)
    return calls


def _positions(models: dict[str, PreTrainedModel], sequences, accelerator, recipe: EvaluationRecipe) -> str:
    """Perplexity in spans of tokens that double in length."""
    series = {}
    for name, model in models.items():
        spans = perplexity_by_position(model, sequences, accelerator, recipe.batch_size, first=1)
        series[name] = ([span["from"] for span in spans], [span["perplexity"] for span in spans])
    figure = lines(series, x_label="tokens before, from", y_label="perplexity", x_base=2)
    caption = (
        f"Perplexity of tokens by how many stand before them, in spans that double, over {sequences.numel():,} tokens."
    )
    return section("Perplexity by position", figure_grid({caption: figure}))


def _page(metrics: dict[str, Any], sections: str) -> str:
    kernel = KernelRecipe.model_construct(**metrics["kernel"])
    name = " ".join(filter(None, (kernel.variant, kernel.component, kernel.matrix)))
    title = f"{metrics['model'].removeprefix('package:')} with linear attention"
    return page(title, f"Kernel: {name}, {kernel.near}.", sections)
