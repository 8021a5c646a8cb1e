"""Kernels side by side: one teacher, the same batches and the same seeds for all of them, in one run."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers import PreTrainedModel

from .conversion import Plan, resolve_kernel
from .devices import forget_peak_memory, make_accelerator
from .errors import FlexdistillError, NonFiniteLossError, disk_errors
from .evaluation import compare_models, student_row
from .export import export
from .inputs import Sequences, checked_plan, input_hashes, load_sequences, load_source
from .pipeline import make_student, plan_facts, run_facts, run_stages
from .plots import has_matplotlib, plot_comparison
from .recipe import OF_VARIANT, STAGES, KernelRecipe, Recipe
from .recipe_sections import parse_yaml
from .runs import COMPARISON, INDECISIVE, check_output, writing_alone
from .storage import empty, expanded, write_json
from .tables import comparison_table, markdown_table

Variant = str | dict[str, Any]

RESULTS, TABLE = COMPARISON, "compare.md"
# what all entries of a comparison share, whatever a variant says
_SHARED = {
    f"{stage}.{name}" for stage in STAGES for name in ("steps", "batch_size", "sequence_length", "validation_every")
}


@dataclass(frozen=True)
class Entry:
    """One kernel of a comparison, and the recipe that it is trained by."""

    name: str  # as written in front of the variant's settings, with them
    recipe: Recipe


def compare(
    recipe: Recipe,
    variants: Sequence[Variant],
    output: str | Path,
    *,
    windows: Sequence[int] = (0,),
    budget: int | None = None,
    points: int = 8,
    export_models: bool = False,
    overwrite: bool = False,
    resume: bool = False,
) -> dict:
    """Converts `recipe.model` with each variant and each window, and writes the figures to the folder `output`.

    Args:
        recipe: what all entries share.
        variants: kernels such as "nonstationary" or "nonstationary:component=trigonometric", or dicts of kernel
            settings; a setting with a dot is one of a training stage. One that sets its own window is run with that.
        output: folder of compare.json, compare.md, each entry's logs and, with matplotlib, the plots.
        windows: softmax windows that each variant is run with.
        budget: training tokens of each entry, at most; None: as many as the recipe trains on.
        points: how often a student is evaluated while it trains, about; 0: only at the end.
        export_models: also write each student to a folder of its own, as `flexdistill convert` does.
        overwrite: replace what `output` holds.
        resume: keep the entries that `output` holds, if they are of the same settings and inputs.

    Returns:
        what compare.json holds: per entry what `pipeline.convert` measures and the `curve` of its training (tokens,
        perplexity, KL, agreement), or the `error` that ended it.

    Raises:
        FlexdistillError: if anything about the input does not fit; then nothing on disk has changed.
    """
    output = expanded(output).resolve()
    check_output(output, overwrite=overwrite or resume, resume=resume, inputs=recipe.inputs)
    entries = make_entries(recipe if budget is None else recipe.with_budget(budget), variants, windows)
    with disk_errors(output), contextlib.ExitStack() as held:
        return _compare(recipe, entries, output, budget, points, export_models, resume, held)


def _compare(
    recipe: Recipe,
    entries: list[Entry],
    output: Path,
    budget: int | None,
    points: int,
    export_models: bool,
    resume: bool,
    held: contextlib.ExitStack,
) -> dict:
    if recipe.logit_distillation.parallel == "fsdp":
        raise FlexdistillError(
            "A comparison evaluates its students while they train, for which they must be whole; set "
            "logit_distillation.parallel to ddp."
        )
    accelerator = make_accelerator(recipe.precision)
    source, tokenizer, teacher = load_source(recipe)
    plans = {entry.name: checked_plan(entry.recipe, teacher, accelerator) for entry in entries}
    # one that chooses layers holds out text for it, and then all do
    choosing = max((entry.recipe for entry in entries), key=lambda recipe: recipe.kernel.keep_softmax)
    sequences = load_sequences(choosing, teacher, tokenizer)
    inputs = input_hashes(teacher, sequences)
    keys = {entry.name: _key(entry, inputs, points, export_models) for entry in entries}
    kept = _kept_results(output, keys) if resume else {}

    comparison = {
        "model": source.name,
        "budget_tokens": budget,
        "evaluated_on": recipe.evaluation.source or f"{recipe.data.name} (held out)",
        "results": [],
    }

    accelerator.wait_for_everyone()  # all have checked the output before it changes
    if accelerator.is_main_process:
        held.enter_context(writing_alone(output))
        if not resume:
            output.mkdir(parents=True, exist_ok=True)
            # first, so that --overwrite and --resume know the folder wherever the first entry stops
            write_json(output / RESULTS, comparison)
            empty(output, but=RESULTS)
    teacher.to(accelerator.device)
    results = dict(kept)
    for entry in entries:
        if entry.name in kept:
            continue
        folder = output / _folder(entry.name)
        student, result = _run(entry, plans[entry.name], teacher, sequences, folder, points, accelerator)
        if accelerator.is_main_process and export_models and "error" not in result:
            details = {"source": source, "recipe": entry.recipe, "metrics": result, "work": folder}
            export(student, tokenizer, folder / "model", logs=sorted(folder.glob("*.jsonl")), **details)
        del student
        results[entry.name] = {"name": entry.name, "inputs_sha256": keys[entry.name]} | result
        comparison["results"] = [results[known.name] for known in entries if known.name in results]
        if accelerator.is_main_process:
            write_json(output / RESULTS, comparison)
        accelerator.wait_for_everyone()
    comparison["results"] = [results[entry.name] for entry in entries]
    if accelerator.is_main_process:
        write_json(output / RESULTS, comparison)
        (output / TABLE).write_text(markdown_table(*comparison_table(comparison)), encoding="utf-8")
        if has_matplotlib():
            plot_comparison(comparison, output)
    return comparison


def _run(
    entry: Entry,
    plan: Plan,
    teacher: PreTrainedModel,
    sequences: Sequences,
    folder: Path,
    points: int,
    accelerator: Accelerator,
) -> tuple[PreTrainedModel, dict]:
    """Trains and evaluates one student; one that diverges has the message as its `error`."""
    recipe, started = entry.recipe, time.perf_counter()
    set_seed(recipe.seed)
    forget_peak_memory(accelerator.device)
    # converted on CPU as `convert` does, so that kernels start from the same numbers
    student, plan = make_student(recipe, copy.deepcopy(teacher).cpu(), plan, sequences, accelerator)
    curve = []

    def evaluate(tokens: int) -> None:
        row = student_row(teacher, student, sequences.evaluation, recipe.evaluation.batch_size, accelerator)
        if curve and curve[-1]["tokens"] == tokens:  # the weights that a stage ends with replace its last
            curve.pop()
        curve.append({"tokens": tokens, **{name: row[name] for name in ("perplexity", "kl", "top1_agreement")}})

    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    steps = sum(stage.steps for stage in recipe.stages.values())
    pauses = {"pause_every": -(-steps // points), "at_pause": evaluate} if points else {}
    result = {"model": recipe.model, "kernel": recipe.kernel.model_dump()}
    try:
        # a comparison goes on by entries, so the stages write no checkpoints
        stages = run_stages(recipe, student, sequences, accelerator, folder, **pauses)
    except NonFiniteLossError as error:
        return student, result | {"curve": curve, "error": str(error)}
    result |= plan_facts(plan, student)
    result |= compare_models(teacher, student, sequences.evaluation, recipe.evaluation.batch_size, accelerator)
    return student, result | {"curve": curve} | run_facts(stages, started, accelerator)


def make_entries(recipe: Recipe, variants: Sequence[Variant], windows: Sequence[int]) -> list[Entry]:
    """Every variant with every window.

    Raises:
        FlexdistillError: for a variant that cannot be read, is unknown, comes twice or changes what all share.
    """
    entries: dict[str, Entry] = {}
    for variant in variants:
        given = parse_variant(variant) if isinstance(variant, str) else dict(variant)
        for window in [given["window"]] if "window" in given else windows:
            try:
                entry = _entry(recipe, given | {"window": window})
            except FlexdistillError as error:
                named = ("variant", "window")
                name = ":".join([str(given["variant"]), *(f"{k}={v}" for k, v in given.items() if k not in named)])
                raise FlexdistillError(f"{name}, {_sight(window)}: {error}") from error
            if entry.name in entries:
                raise FlexdistillError(f"{entry.name} is compared with itself; name each variant and window once.")
            entries[entry.name] = entry
    if not entries:
        raise FlexdistillError("There is nothing to compare; name kernels with --variants and lengths with --windows.")
    return list(entries.values())


def check_shared(settings: Iterable[str]) -> None:
    """Raises FlexdistillError if a setting of the whole comparison is one that variants and windows replace."""
    for key in settings:
        section, _, name = key.partition(".")
        if section == "kernel" and name in ("variant", "window", "sinks", *OF_VARIANT):
            options = {"variant": "name it with --variants", "window": "name it with --windows"}
            remedy = options.get(name, f"write it behind a variant, as in hedgehog:{name}=VALUE")
            raise FlexdistillError(f"{key} is not the same for all that is compared; {remedy}.")


def parse_variants(text: str) -> list[dict[str, Any]]:
    """`a,b:setting=value:setting=value` as settings of each variant; a comma divides them before a letter only."""
    return [parse_variant(part) for part in re.split(r",(?=\s*[A-Za-z])", text)]


def parse_variant(text: str) -> dict[str, Any]:
    """`NAME[:SETTING=VALUE]...` as kernel settings.

    Raises:
        FlexdistillError: if a setting has no value or one that is not YAML.
    """
    name, *assignments = re.split(r":(?=[\w.]+=)", text.strip())
    settings = {"variant": name}
    for assignment in assignments:
        key, _, value = assignment.partition("=")
        settings[key] = parse_yaml(value, f"Variant {text!r}: the value of {key}")
    if ":" in name or not name:
        raise FlexdistillError(f"Variant {text!r} cannot be read; write NAME or NAME:SETTING=VALUE.")
    return settings


def _entry(recipe: Recipe, given: dict[str, Any]) -> Entry:
    settings = {key if "." in key else f"kernel.{key}": value for key, value in given.items()}
    for key in settings:
        if key in _SHARED or key.partition(".")[0] not in ("kernel", *STAGES):
            raise FlexdistillError(f"{key} is the same for all that is compared; set it for the whole comparison.")
    resolved = recipe.override(settings)
    kernel = resolve_kernel(resolved.kernel)
    return Entry(_name(kernel, given), resolved.model_copy(update={"kernel": kernel}))


def _name(kernel: KernelRecipe, given: dict[str, Any]) -> str:
    named = ("variant", "component", "window")
    parts = [" ".join(part for part in (kernel.variant, kernel.component) if part)]
    parts += [f"{key} {value}" for key, value in given.items() if key not in named]
    return ", ".join([*parts, _sight(kernel.window)])


def _sight(window: int) -> str:
    return f"window {window}" if window else "no window"


def _folder(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _key(entry: Entry, inputs: dict[str, str], points: int, export_models: bool) -> str:
    """A hash of all that decides an entry's result."""
    decisive = [
        entry.recipe.model_dump(exclude=INDECISIVE | {"model": True}),
        inputs,
        points,
        export_models,
    ]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()


def _kept_results(output: Path, keys: dict[str, str]) -> dict[str, dict]:
    """Results by name that an earlier comparison left in `output`; all must be of what is compared now."""
    file = output / RESULTS
    try:
        results = json.loads(file.read_text())["results"]
        found = {result["name"]: result for result in results}
        others = [name for name, result in found.items() if keys.get(name) != result["inputs_sha256"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FlexdistillError(f"{file} is not there to go on with, or damaged; leave --resume out.") from error
    if others:
        raise FlexdistillError(
            f"{file} holds results of other settings or inputs ({'; '.join(others)}); name what it was made with, "
            "choose another --output, or start again with --overwrite."
        )
    return {name: result for name, result in found.items() if "error" not in result}
