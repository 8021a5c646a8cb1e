"""The folder that comes out: weights, runtime, tokenizer, model card, recipe, metrics and logs; whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from .conversion import max_positions
from .data import dataset_name
from .distillation.stage import feature_maps
from .errors import FlexdistillError
from .progress import progress_bars_on_terminals_only
from .recipe import Recipe
from .runs import ASIDE, REPLACED, put_back
from .runtime.linear_attention import CHUNK
from .runtime.modeling_flexformer import MODEL_TAGS
from .sources import ModelSource, load_card
from .storage import sync, write_json


def export(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: Path,
    *,
    source: ModelSource,
    recipe: Recipe,
    metrics: dict,
    logs: list[Path],
    work: Path,
    card: Callable[[PreTrainedModel, ModelSource, Recipe, dict], str] | None = None,
) -> None:
    """Writes everything aside in `work`, checks that it reloads to the same logits, and only then puts it in place.

    `metrics` gains `reload_max_logit_difference`. Another `card` than `model_card` is for what is no conversion.

    Raises:
        FlexdistillError: if the disk is full or not writable, or the reloaded model differs.
    """
    with written_aside(output, work) as aside:
        with progress_bars_on_terminals_only():
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
            for weights in aside.glob("*.safetensors"):  # written for their owner alone
                weights.chmod((aside / "config.json").stat().st_mode)
            metrics["reload_max_logit_difference"] = _reload_difference(model, aside)
        (aside / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
        write_json(aside / "metrics.json", metrics)
        (aside / "README.md").write_text((card or model_card)(model, source, recipe, metrics), encoding="utf-8")
        for log in logs:
            shutil.copyfile(log, aside / log.name)


@contextlib.contextmanager
def written_aside(output: Path, work: Path) -> Iterator[Path]:
    """A folder in `work` to write to, which takes the place of `output` once the context ends without an error."""
    aside = work / ASIDE
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        _put_in_place(aside, output, work / REPLACED)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def model_card(model: PreTrainedModel, source: ModelSource, recipe: Recipe, metrics: dict) -> str:
    """The README.md of an exported model."""
    kernel = recipe.kernel
    training_s = sum(stage["elapsed_s"] for stage in metrics["stages"])
    paper = next(iter(feature_maps(model).values())).paper
    name = " ".join(filter(None, (kernel.variant, kernel.component, kernel.matrix)))
    return "\n".join(
        [
            "---",
            _front_matter(model, source, recipe, metrics).to_yaml(),
            "---",
            "",
            f"# {_title(source)}",
            "",
            f"Converted from `{source.name}` by flexdistill: softmax attention became linear attention",
            f"({paper}), whose state has a constant size.",
            f"Kernel: {name}, {kernel.near}.",
            *_kept_softmax(metrics["kept_softmax"], recipe),
            "",
            "## Results",
            "",
            f"On {metrics['evaluated_tokens']:,} tokens of `{_evaluated_on(recipe)}`.",
            "",
            "| model | perplexity | KL to teacher | same top-1 token |",
            "|---|---|---|---|",
            *(_table_row(row) for row in metrics["rows"]),
            "",
            f"Trained on {metrics['tokens']:,} tokens in {training_s:.0f} s.",
            "",
            *_use(model),
            *_recipe(recipe),
        ]
    )


def trained_model_card(model: PreTrainedModel, source: ModelSource, recipe: Recipe, metrics: dict) -> str:
    """The README.md of a model that was trained on labels alone."""
    data = ModelCardData(
        datasets=sorted(set(filter(None, (dataset_name(text.source) for text in recipe.data.texts)))) or None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*MODEL_TAGS, "flexdistill"],
    )
    kernel = next(iter(model.config.kernel_specs.values()))
    name = " ".join(filter(None, (kernel.variant, kernel.component, kernel.matrix)))
    return "\n".join(
        [
            "---",
            data.to_yaml(),
            "---",
            "",
            f"# {Path(source.name).name}, trained",
            "",
            f"`{source.name}`, a model with linear attention (kernel {name}), trained by flexdistill to predict the",
            f"next token on {metrics['tokens']:,} tokens of `{recipe.data.name}`.",
            "",
            f"Perplexity on {metrics['evaluated_tokens']:,} tokens of `{_evaluated_on(recipe)}`: "
            f"{metrics['perplexity']:.2f}, before training {metrics['perplexity_before']:.2f}.",
            "",
            *_use(model),
            *_recipe(recipe),
        ]
    )


def _use(model: PreTrainedModel) -> list[str]:
    auto = type(model)._auto_class
    return [
        "## Use",
        "",
        "```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        "# `import flexdistill` beforehand makes trust_remote_code unnecessary",
        'name = "path/to/this/folder"  # or the name of its repository on the Hub',
        f"model = {auto}.from_pretrained(name, trust_remote_code=True)",
        "tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)",
        "```",
        "",
    ]


def _recipe(recipe: Recipe) -> list[str]:
    return ["## Recipe", "", "```yaml", recipe.to_yaml().rstrip(), "```", ""]


def _front_matter(model: PreTrainedModel, source: ModelSource, recipe: Recipe, metrics: dict) -> ModelCardData:
    base = load_card(source)
    # the licence of the base model binds its conversion too, and only its owner can state it
    licence = (base.license, base.license_name) if base.license else ("other", "same-as-base-model")
    task = "text-generation" if model.can_generate() else "fill-mask"
    text = recipe.evaluation if recipe.evaluation.source else recipe.data.texts[0]
    sources = [text.source for text in (*recipe.data.texts, recipe.evaluation) if text.source]
    student = metrics["student"]
    figures = {
        "perplexity": ("Perplexity", student["perplexity"]),
        "kl_divergence": ("KL divergence from the base model, nats per token", student["kl"]),
        "accuracy": ("Same most likely token as the base model", student["top1_agreement"]),
    }
    return ModelCardData(
        base_model=source.hub_id,
        datasets=sorted(set(filter(None, map(dataset_name, sources)))) or None,
        language=base.language,
        library_name="transformers",
        license=licence[0],
        license_name=licence[1],
        license_link=base.license_link if "://" in (base.license_link or "") else None,  # others are in its repository
        pipeline_tag=task,
        tags=[*MODEL_TAGS, "flexdistill"],
        model_name=_title(source),
        eval_results=[
            EvalResult(
                task_type=task,
                dataset_type=dataset_name(text.source) or "text",
                dataset_name=_evaluated_on(recipe),
                dataset_config=text.config,
                dataset_split=text.split,
                metric_type=metric,
                metric_name=name,
                metric_value=value,
            )
            for metric, (name, value) in figures.items()
            if value is not None and math.isfinite(value)
        ],
    )


def _title(source: ModelSource) -> str:
    return f"{source.name.removeprefix('package:')} with linear attention"


def _evaluated_on(recipe: Recipe) -> str:
    return recipe.evaluation.source or f"{recipe.data.name} (held out)"


def _kept_softmax(kl_gains: dict[str, float], recipe: Recipe) -> list[str]:
    if not kl_gains:
        return []
    layers = ", ".join(f"`{name}` ({gain:.4g})" for name, gain in kl_gains.items())
    tokens = "tokens that repeat earlier ones" if recipe.data.repeats else "all tokens"
    return [
        "Softmax attention and its KV cache stay where they lower the KL to the teacher most (arXiv:2512.20569), of",
        f"{tokens}; in nats per token, before logit distillation, and each given those before it: {layers}.",
    ]


def _table_row(row: dict) -> str:
    perplexity = "" if row["perplexity"] is None else f"{row['perplexity']:.2f}"
    return f"| {row['name']} | {perplexity} | {row['kl']:.4f} | {row['top1_agreement']:.1%} |"


@torch.no_grad()
def _reload_difference(model: PreTrainedModel, folder: Path) -> float:
    auto = getattr(modeling_auto, type(model)._auto_class)
    reloaded = auto.from_pretrained(folder, dtype=model.dtype).to(model.device).eval()
    # long enough for keys to leave the window and for a second chunk
    windows = [feature_map.spec.window for feature_map in feature_maps(model).values()]
    length = max(windows) + 2 * CHUNK
    length = min(length, max_positions(model) or length)
    tokens = torch.arange(length, device=model.device)[None] % model.get_input_embeddings().num_embeddings
    difference = float((reloaded(input_ids=tokens).logits - model(input_ids=tokens).logits).abs().max())
    if not difference <= 1e-5:
        raise FlexdistillError(
            f"The saved model's logits differ from the trained model's by {difference:.2e}; nothing was exported, "
            "please report this with the model's name."
        )
    return difference


def _put_in_place(aside: Path, output: Path, replaced: Path) -> None:
    for path in sorted(aside.iterdir()):
        sync(path)
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        if output.exists():
            os.replace(output, replaced)
        os.replace(aside, output)
    except BaseException:  # a signal too
        put_back(replaced, output)
        raise
    shutil.rmtree(replaced, ignore_errors=True)
