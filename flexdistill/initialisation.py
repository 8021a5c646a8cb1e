"""An untrained Flexformer model of any configuration, for training from scratch."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from accelerate.utils import set_seed
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .conversion import Plan, apply_plan, make_plan
from .errors import FlexdistillError, explained
from .export import written_aside
from .progress import progress_bars_on_terminals_only
from .recipe import Recipe
from .runs import Run, open_run
from .sources import ModelSource, check_vocabulary, load_config, load_tokenizer, resolve_model
from .storage import expanded


def initialise(
    config: str, output: str | Path, recipe: Recipe, *, tokenizer: str | None = None, overwrite: bool = False
) -> Plan:
    """Writes an untrained Flexformer model, weights and kernels drawn by the recipe's seed, to the folder `output`.

    Args:
        config: a config.json, or what `convert` takes as a model; its weights are not read.
        recipe: its kernel, seed and trust_remote_code are used.
        tokenizer: where the tokenizer comes from, named as a model; None: from the configuration's folder or
            repository, if it has one.

    Returns:
        the plan by which attention became linear.

    Raises:
        FlexdistillError: if the configuration cannot be read or converted; nothing on disk has changed then.
        RunInterrupted: on SIGTERM or SIGINT.
    """
    with open_run(output, overwrite=overwrite, resume=False, inputs=(config, tokenizer)) as run:
        return _initialise(config, recipe, tokenizer, run)


def _initialise(config: str, recipe: Recipe, tokenizer: str | None, run: Run) -> Plan:
    source = _config_source(config)
    settings = load_config(source, trust_remote_code=recipe.trust_remote_code)
    loaded = _tokenizer(source if tokenizer is None else resolve_model(tokenizer), recipe, asked=tokenizer is not None)
    set_seed(recipe.seed)
    with explained(f"No model can be built of configuration {source.name!r}", "check its settings"):
        model = _untrained(settings, source)
    if loaded is not None:
        check_vocabulary(model, loaded)
    plan = make_plan(model, recipe.kernel)
    model = apply_plan(model, plan)
    run.take()
    with written_aside(run.output, run.work) as aside, progress_bars_on_terminals_only():
        model.save_pretrained(aside)
        if loaded is not None:
            loaded.save_pretrained(aside)
    return plan


def _config_source(config: str) -> ModelSource:
    path = expanded(config)
    if path.suffix == ".json" and path.is_file():
        return ModelSource(config, str(path))
    return resolve_model(config)


def _untrained(config: PreTrainedConfig, source: ModelSource) -> PreTrainedModel:
    """A model of the architecture that the configuration names, else of its language model."""
    names = config.architectures or []
    found = getattr(transformers, names[0], None) if names else None
    if names and found is None:
        raise FlexdistillError(
            f"Configuration {source.name!r} names the architecture {names[0]}, which transformers "
            f"{transformers.__version__} lacks; name one that it has under `architectures`."
        )
    # whatever dtype trained weights were stored in, training starts in float32
    config.dtype = torch.float32
    if found is not None:
        return found(config).eval()
    for auto in (AutoModelForCausalLM, AutoModelForMaskedLM, AutoModel):
        if type(config) in auto._model_mapping:
            return auto.from_config(config).eval()
    raise FlexdistillError(f"Configuration {source.name!r} is of no model that transformers builds; give another one.")


def _tokenizer(source: ModelSource, recipe: Recipe, *, asked: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a source; one that was not asked for may be missing."""
    folder = Path(source.path_or_id)
    if not asked and folder.exists() and not any((folder.parent if folder.is_file() else folder).glob("tokenizer*")):
        return None
    if folder.is_file():
        source = ModelSource(source.name, str(folder.parent))
    return load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
