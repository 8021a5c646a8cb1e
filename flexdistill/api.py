"""The public functions: what the command line does, in Python.

Bad input raises FlexdistillError in all of them, and nothing on disk has changed then. Perplexities are exp of nats per
token, KL is in nats, sizes are in bytes and times in seconds. Flexformer attention is that of arXiv:2606.27748.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .comparison import Variant, check_shared
from .comparison import compare as run_comparison
from .conversion import Plan, make_plan
from .errors import FlexdistillError
from .evaluation import evaluate_checkpoint
from .in_memory import distill_model
from .initialisation import initialise
from .pipeline import convert as run_conversion
from .recipe import Recipe
from .report_page import Text, write_report
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
) -> dict[str, Any]:
    """Converts a pretrained model and writes the result to a folder that AutoModel loads.

    Args:
        model: Hub id, folder, .gguf file or package:NAME.
        output: folder to write.
        recipe: a recipe, a file, or the name of a shipped one.
        overwrite: replace what `output` holds.
        resume: go on with the unfinished run beside `output`.
        settings: recipe settings, sections divided by two underscores: `kernel__window=64`.

    Returns:
        the metrics that metrics.json holds: what `evaluate` returns, and `model`, `kernel`, `plan` (totals),
        `frequencies` (by module), `kept_softmax` (nats per token that softmax gains, by module), `stages` (a summary
        each), `tokens`, `elapsed_s` (of a resumed run, since it was resumed), `peak_memory_bytes`, `num_processes` and
        `device`.

    Raises:
        FlexdistillError: if the input does not fit; nothing on disk has changed then.
        NonFiniteLossError: if training diverges.
        LostProcessError: if another process of the run dies.
        RunInterrupted: on SIGTERM or SIGINT, once `resume` can go on from the step under way.
    """
    return run_conversion(_with_settings(recipe, model, settings), output, overwrite=overwrite, resume=resume)


def distill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    recipe: Recipe | str | Path = "default",
    **settings: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Converts a model that is loaded already and distils it, in memory: nothing is written, so nothing can resume.

    Args:
        model: a softmax model of transformers with a language-modelling head; it stays as it is and is the teacher.
        tokenizer: the model's.
        recipe, settings: as in `convert`.

    Returns:
        the student, in eval mode on the device that it was trained on, which `save_pretrained` writes; and the metrics
        that `convert` returns, without `model`.

    Raises:
        FlexdistillError: if model, tokenizer and recipe do not fit each other.
        NonFiniteLossError: if training diverges.
    """
    return distill_model(_with_settings(recipe, None, settings), model, tokenizer)


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
) -> dict[str, Any]:
    """Converts a model with several kernels on the same batches, and writes figures, table and plots to a folder.

    Args:
        model, output, recipe, settings: as in `convert`.
        variants: kernels such as "nonstationary:component=trigonometric", or dicts of kernel settings.
        windows: softmax windows, in tokens, that each variant is run with.
        budget: training tokens of each, at most; None: as many as the recipe trains on.
        points: evaluations of each during its training, about; 0: only at the end.
        export_models: also write each student to a folder of its own.
        overwrite: replace what `output` holds.
        resume: keep the entries that `output` holds, if they are of the same settings and inputs.

    Returns:
        what compare.json holds: `results`, in which each entry has what `convert` returns, its `name` and the `curve`
        of its training, or the `error` that ended it; `model`, `budget_tokens` and `evaluated_on`.

    Raises:
        FlexdistillError: if the input does not fit; nothing on disk has changed then.
        LostProcessError: if another process of the run dies.
    """
    check_shared(name.replace("__", ".") for name in settings)
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


def evaluate(directory: str | Path, *, teacher: str, data: str, **settings: Any) -> dict[str, Any]:
    """Compares a converted model with its teacher on a text.

    Args:
        directory: folder or Hub id of the converted model.
        teacher: the model it was made from.
        data: text, jsonl or parquet file or folder, or a `datasets` name.
        settings: fields of the recipe's evaluation section, such as `sequence_length` (tokens).

    Returns:
        `rows`, for the teacher, the student, and the student with parts of its attention taken away: `name`,
        `perplexity` (None unless causal), `kl` from the teacher per token, `top1_agreement` (share of tokens);
        `teacher` and `student`, the first two of them; `attention_kl`, per query, by module; `guarded_rows`, the share
        of attention rows that the guard of signed kernels changed; `evaluated_tokens`.

    Raises:
        FlexdistillError: if a model or the text cannot be read, or they do not fit each other.
    """
    dotted = {f"evaluation.{name}": value for name, value in settings.items()}
    recipe = Recipe().override({"evaluation.source": str(data)} | dotted)
    return evaluate_checkpoint(directory, teacher, recipe.evaluation)


def report(
    directory: str | Path,
    output: str | Path = "report.html",
    *,
    data: str | None = None,
    teacher: str | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    overwrite: bool = False,
    **settings: Any,
) -> Path:
    """Writes one HTML page about a converted model, with all figures inside; returns its path.

    Args:
        directory: folder that `convert` wrote.
        output: the page.
        data: also show attention maps and perplexity by position on this text, named as in `evaluate`.
        teacher: with `data`, the model it was made from, if it is not where it was.
        layers, heads: with `data`, the converted layers and query heads whose maps are shown; None: some of each.
        overwrite: replace `output`.
        settings: with `data`, as in `evaluate`.

    Raises:
        FlexdistillError: if matplotlib is missing, the folder or the text does not fit, settings would be ignored for
            lack of `data`, or the page is there already.
    """
    given = {"teacher": teacher, "layers": layers, "heads": heads} | settings
    if data is not None:
        lengths = {"sequence_length": 512, "sequences": 8} | settings
        dotted = {f"evaluation.{name}": value for name, value in lengths.items()}
        source = Recipe().override({"evaluation.source": data} | dotted).evaluation
        text = Text(source, teacher, layers, heads)
    elif unused := next((name for name, value in given.items() if value is not None), None):
        raise FlexdistillError(f"{unused} is for data; name a text with data, or leave {unused} out.")
    else:
        text = None
    return write_report(directory, output, text=text, overwrite=overwrite)


def init(
    config: str,
    output: str | Path,
    *,
    tokenizer: str | None = None,
    recipe: Recipe | str | Path = "default",
    overwrite: bool = False,
    **settings: Any,
) -> Plan:
    """Writes an untrained Flexformer model of a configuration to a folder.

    Args:
        config: a config.json, or what `convert` takes as a model; its weights are not read.
        output, recipe, overwrite, settings: as in `convert`; the recipe's kernel and seed are used.
        tokenizer: a model whose tokenizer it gets; None: the configuration's own, if it has one.

    Returns:
        the plan by which attention became linear.

    Raises:
        FlexdistillError: if the configuration cannot be read or converted.
        RunInterrupted: on SIGTERM or SIGINT.
    """
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
) -> dict[str, Any]:
    """Trains a Flexformer model on text alone, without a teacher; arguments as in `convert`.

    Returns:
        the metrics that metrics.json holds: `perplexity_before` and `perplexity` on held-out text, `evaluated_tokens`,
        and `stages`, `tokens`, `elapsed_s` and the like as in `convert`.

    Raises:
        FlexdistillError, NonFiniteLossError, LostProcessError, RunInterrupted: as `convert` does.
    """
    return run_training(_with_settings(recipe, model, settings), output, overwrite=overwrite, resume=resume)


def plan(model: str | PreTrainedModel, *, recipe: Recipe | str | Path = "default", **settings: Any) -> Plan:
    """What would become of each attention module of a model, named as in `convert` or loaded already.

    Returns:
        the plan: `modules`, with the reason for each that stays softmax; `parameters` added; `state_bytes` per sequence
        of any length, `kv_bytes_per_token` before, and `break_even_tokens`, from which length on the state is smaller.

    Raises:
        FlexdistillError: if the model cannot be read, or nothing in it can be converted.
    """
    if isinstance(model, PreTrainedModel):
        return make_plan(model, _with_settings(recipe, None, settings).kernel)
    resolved = _with_settings(recipe, model, settings)
    loaded = load_model(resolve_model(model), trust_remote_code=resolved.trust_remote_code)
    return make_plan(loaded, resolved.kernel)


def _with_settings(recipe: Recipe | str | Path, model: str | None, settings: dict[str, Any]) -> Recipe:
    if not isinstance(recipe, Recipe):
        recipe = Recipe.load(recipe)
    named = {} if model is None else {"model": model}
    return recipe.override(named | {name.replace("__", "."): value for name, value in settings.items()})
