"""Training a Flexformer model on labels alone, without a teacher: from scratch, or on."""

from __future__ import annotations

import time
from pathlib import Path

from accelerate.utils import set_seed

from .devices import make_accelerator
from .distillation.model_stage import check_labels
from .errors import FlexdistillError
from .evaluation import load_converted, perplexity
from .export import export, trained_model_card
from .inputs import check_devices, check_embeddings, input_hashes, load_sequences
from .pipeline import run_facts, run_stages
from .recipe import Recipe
from .runs import Run, open_run
from .sources import check_vocabulary, load_tokenizer, resolve_model
from .tracking import check_trackers, tracking


def train(recipe: Recipe, output: str | Path, *, overwrite: bool = False, resume: bool = False) -> dict:
    """Runs `label_training` on the Flexformer model `recipe.model` and writes the result to the folder `output`.

    Checkpoints and `resume` work as in `pipeline.convert`; the recipe's other stages and its kernel are left out.

    Returns:
        the metrics that `metrics.json` holds: `perplexity_before` and `perplexity` on held-out sequences, and more.

    Raises:
        FlexdistillError: if anything about the input does not fit; then nothing on disk has changed.
        NonFiniteLossError: if training diverges.
        LostProcessError, RunInterrupted: as `pipeline.convert` does.
    """
    with open_run(output, overwrite=overwrite, resume=resume, inputs=recipe.inputs) as run:
        return _train(_labels_only(recipe), run)


def _labels_only(recipe: Recipe) -> Recipe:
    if not recipe.label_training.steps:
        raise FlexdistillError("There is nothing to train: label_training.steps is 0; set --steps.")
    return recipe.override({"attention_transfer.steps": 0, "logit_distillation.steps": 0, "kernel.keep_softmax": 0})


def _train(recipe: Recipe, run: Run) -> dict:
    started = time.perf_counter()
    check_trackers(recipe.tracking)
    accelerator = make_accelerator(recipe.precision)
    set_seed(recipe.seed)
    source = resolve_model(recipe.model)
    model, tokenizer = load_converted(recipe.model), load_tokenizer(source, trust_remote_code=recipe.trust_remote_code)
    check_vocabulary(model, tokenizer)
    check_labels(model, model.config.kernel_specs.values(), "train it with transformers' Trainer")
    check_devices(recipe, model, accelerator)
    check_embeddings(recipe, model)
    sequences = load_sequences(recipe, model, tokenizer)

    checkpoints, checkpoint = run.begin(recipe, input_hashes(model, sequences), accelerator)
    model.to(accelerator.device)
    evaluated = (sequences.evaluation, recipe.evaluation.batch_size, accelerator)
    metrics = {"model": source.name, "perplexity_before": perplexity(model, *evaluated)}
    with tracking(recipe, accelerator) as track:
        stages = run_stages(recipe, model, sequences, accelerator, run.work, checkpoints, checkpoint, track=track)
    metrics |= {"perplexity": perplexity(model, *evaluated), "evaluated_tokens": sequences.evaluation.numel()}
    metrics |= run_facts(stages, started, accelerator)
    if accelerator.is_main_process:
        details = {"source": source, "recipe": recipe, "metrics": metrics, "card": trained_model_card}
        export(model, tokenizer, run.output, logs=sorted(run.work.glob("*.jsonl")), work=run.work, **details)
    accelerator.wait_for_everyone()
    return metrics
