"""A conversion that reads and writes no model: from one that is loaded to its student."""

from __future__ import annotations

import copy
import tempfile
import time
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .conversion import resolve_kernel
from .devices import make_accelerator
from .distillation.heads import SplitModel
from .evaluation import compare_models
from .inputs import checked_plan, load_sequences
from .pipeline import make_student, plan_facts, run_facts, run_stages
from .recipe import Recipe
from .sources import check_vocabulary
from .tracking import check_trackers, tracking


def distill_model(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """As `api.distill` says, by the recipe, whose `model` is not read."""
    started = time.perf_counter()
    check_trackers(recipe.tracking)
    recipe = recipe.model_copy(update={"kernel": resolve_kernel(recipe.kernel)})
    accelerator = make_accelerator(recipe.precision, cpu_offload=recipe.logit_distillation.cpu_offload)
    set_seed(recipe.seed)
    check_vocabulary(model, tokenizer)
    SplitModel(model)
    # as `convert` loads it: float32, and without the dropout of a model that is being trained
    original = copy.deepcopy(model).float().eval()
    plan = checked_plan(recipe, original, accelerator)
    sequences = load_sequences(recipe, original, tokenizer)
    student, plan = make_student(recipe, original, plan, sequences, accelerator)
    with tracking(recipe, accelerator) as track, tempfile.TemporaryDirectory() as work:
        stages = run_stages(recipe, student, sequences, accelerator, Path(work), track=track)
    teacher = copy.deepcopy(model).float().eval().to(accelerator.device)
    metrics = {"kernel": recipe.kernel.model_dump()} | plan_facts(plan, student)
    metrics |= compare_models(teacher, student, sequences.evaluation, recipe.evaluation.batch_size, accelerator)
    return student, metrics | run_facts(stages, started, accelerator)
