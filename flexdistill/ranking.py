"""What each layer's softmax attention is worth: the ranking behind `keep_softmax`, without a conversion."""

from __future__ import annotations

import tempfile
from pathlib import Path

from accelerate.utils import set_seed

from .devices import make_accelerator
from .distillation.layer_selection import choose_layers, kl_with_softmax_in
from .inputs import checked_plan, load_sequences, load_source
from .pipeline import make_student, run_stages
from .recipe import Recipe


def rank_layers(recipe: Recipe) -> dict:
    """Trains kernels by the recipe's attention transfer, and measures what softmax gains in each layer; writes nothing.

    Returns:
        `kl`: from the teacher to the student that is linear in all layers, in nats per token; `layers`: name, `kl` with
        softmax in that layer alone and `gain`, the largest first; `kept_softmax`: names and gains of those that
        `flexdistill convert` would choose.

    Raises:
        FlexdistillError: as `convert` does.
    """
    accelerator = make_accelerator(recipe.precision)
    set_seed(recipe.seed)
    _, tokenizer, model = load_source(recipe)
    kernels_only = recipe.override({"logit_distillation.steps": 0, "label_training.steps": 0})
    plan = checked_plan(kernels_only, model, accelerator)
    all_linear = kernels_only.override({"kernel.keep_softmax": 0})
    choosing = recipe.override({"kernel.keep_softmax": recipe.kernel.keep_softmax or 1})
    sequences = load_sequences(choosing, model, tokenizer)
    student, _ = make_student(recipe, model, plan, sequences, accelerator)
    with tempfile.TemporaryDirectory() as work:
        run_stages(all_linear, student, sequences, accelerator, Path(work))
    arguments = (sequences.selection, recipe.evaluation.batch_size, accelerator, sequences.recalled)
    names = [module.name for module in plan.converted]
    kl, *figures = kl_with_softmax_in(student, [[], *([name] for name in names)], *arguments)
    layers = [{"name": name, "kl": figure, "gain": kl - figure} for name, figure in zip(names, figures, strict=True)]
    return {
        "kl": kl,
        "layers": sorted(layers, key=lambda layer: -layer["gain"]),
        "kept_softmax": choose_layers(student, recipe.kernel.keep_softmax, *arguments),
    }
