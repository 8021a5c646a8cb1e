"""The public functions: what the command line does, in Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .comparison import Variant
from .comparison import compare as run_comparison
from .conversion import Plan, make_plan
from .evaluation import evaluate_checkpoint
from .initialisation import initialise
from .pipeline import convert as run_conversion
from .recipe import Recipe
from .sources import load_model, resolve_model
from .training import train as run_training


def convert(
    model: str,
    output: str | Path,
    *,
    recipe: Recipe | str | Path = "default",
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> dict:
    """Converts a pretrained model and writes the result to a folder that AutoModel loads.

    Args:
        model: Hub id, folder, .gguf file or package:NAME.
        output: folder to write.
        recipe: a recipe, a file, or the name of a shipped one.
        overwrite: replace what `output` holds.
        resume: go on with the unfinished run beside `output`.
        settings: recipe settings, sections divided by two underscores: `kernel__window=64`.

    Returns:
        the metrics that metrics.json holds.

    Raises:
        FlexdistillError: if the input does not fit; nothing on disk has changed then.
        RunInterrupted: on SIGTERM or SIGINT, once `resume` can go on from the step under way.
    """
    return run_conversion(_with_settings(recipe, model, settings), output, overwrite=overwrite, resume=resume)


def compare(
    model: str,
    output: str | Path,
    *,
    variants: Sequence[Variant],
    windows: Sequence[int] = (0,),
    budget: int | None = None,
    recipe: Recipe | str | Path = "default",
    points: int = 8,
    export_models: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> dict:
    """Converts a model with several kernels on the same batches, and writes figures, table and plots to a folder.

    Args:
        model, output, recipe, settings: as in `convert`.
        variants, windows, budget, points, export_models, overwrite, resume: as in `comparison.compare`, which also says
            what is returned and raised.
    """
    return run_comparison(
        _with_settings(recipe, model, settings),
        variants,
        output,
        windows=windows,
        budget=budget,
        points=points,
        export_models=export_models,
        overwrite=overwrite,
        resume=resume,
    )


def evaluate(directory: str | Path, *, teacher: str, data: str, **settings: Any) -> dict:
    """Compares a converted model with its teacher on a text; returns what `compare_models` does.

    Args:
        directory: folder or Hub id of the converted model.
        teacher: the model it was made from.
        data: text, jsonl or parquet file or folder, or a `datasets` name.
        settings: fields of the recipe's evaluation section, such as `sequence_length`.
    """
    dotted = {f"evaluation.{name}": value for name, value in settings.items()}
    recipe = Recipe().override({"evaluation.source": str(data)} | dotted)
    return evaluate_checkpoint(directory, teacher, recipe.evaluation)


def init(
    config: str,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    recipe: Recipe | str | Path = "default",
    overwrite: bool = False,
    **settings: Any,
) -> Plan:
    """Writes an untrained Flexformer model of a configuration; as `initialisation.initialise` says."""
    resolved = _with_settings(recipe, config, settings)
    return initialise(config, output, resolved, tokenizer=tokenizer, overwrite=overwrite)


def train(
    model: str,
    output: str | Path,
    *,
    recipe: Recipe | str | Path = "default",
    overwrite: bool = False,
    resume: bool = False,
    **settings: Any,
) -> dict:
    """Trains a Flexformer model on text alone; arguments as in `convert`, returns what `training.train` does."""
    return run_training(_with_settings(recipe, model, settings), output, overwrite=overwrite, resume=resume)


def plan(model: str, *, recipe: Recipe | str | Path = "default", **settings: Any) -> Plan:
    """What would become of each attention module of a model; arguments as in `convert`."""
    resolved = _with_settings(recipe, model, settings)
    loaded = load_model(resolve_model(model), trust_remote_code=resolved.trust_remote_code)
    return make_plan(loaded, resolved.kernel)


def _with_settings(recipe: Recipe | str | Path, model: str, settings: dict[str, Any]) -> Recipe:
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    return recipe.override({"model": model} | {name.replace("__", "."): value for name, value in settings.items()})
