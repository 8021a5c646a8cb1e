"""Teacher and student on the same tokens: perplexity, KL, agreement, and the student with parts taken away."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoConfig, PreTrainedModel

from .attention_modes import (
    AttentionCall,
    attention_function,
    in_converted_modules,
    record_attention,
    softmax_mode,
)
from .conversion import check_sequence_length
from .data import read_documents
from .devices import make_accelerator
from .distillation.attention_transfer import softmax_weights
from .distillation.heads import SplitModel
from .distillation.logits import next_tokens, position_pieces
from .distillation.stage import feature_maps
from .errors import FlexdistillError, explained
from .loading import checked_settings, load_weights
from .losses import attention_cross_entropy, attention_entropy, kl_divergence, label_loss, top1_agreement
from .packing import pack
from .recipe import EvaluationRecipe
from .runtime import modeling_flexformer
from .runtime.attention import count_guards
from .runtime.configuration_flexformer import FlexformerConfigMixin
from .runtime.registry import FEATURE_MAPS
from .sources import load_model, load_tokenizer, resolve_model

# attention maps are compared on this many sequences: a map is quadratic in their length
_ATTENTION_SEQUENCES = 2
TEACHER, STUDENT, KERNEL_ONLY, WINDOW_ONLY, NO_ATTENTION = (
    "teacher",
    "student",
    "kernel only",
    "window only",
    "no attention",
)


def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sequences: torch.Tensor,
    batch_size: int,
    accelerator: Accelerator,
) -> dict:
    """Evaluates teacher and student on token sequences (N, T), shared out over the processes.

    The teacher may be the student itself, where its weights are unchanged: it runs with softmax attention.

    Returns:
        `rows`, one dict each for the teacher, the student, the student as its kernel alone and as its window and sinks
        alone (where there is a window), and with no attention in its converted modules: perplexity (None unless
        causal), mean KL per token from the teacher, share of tokens whose most likely successor is the teacher's.
        Beside them the mean KL of each layer's attention rows, the share of rows that the guard changed, and the number
        of tokens.
    """
    modes = {TEACHER: (teacher, lambda: softmax_mode(teacher)), STUDENT: (student, contextlib.nullcontext)}
    if all(feature_map.spec.window for feature_map in feature_maps(student).values()):
        modes[KERNEL_ONLY] = (student, _ablation(student, AttentionCall.kernel_only))
        modes[WINDOW_ONLY] = (student, _ablation(student, AttentionCall.window_only))
    modes[NO_ATTENTION] = (student, _ablation(student, AttentionCall.nothing))
    rows, guarded_rows = _evaluate(modes, sequences, batch_size, accelerator)
    return {
        "rows": rows,
        TEACHER: rows[0],
        STUDENT: rows[1],
        "attention_kl": attention_kl(teacher, student, sequences[:_ATTENTION_SEQUENCES].to(accelerator.device)),
        "guarded_rows": guarded_rows,
        "evaluated_tokens": sequences.numel(),
    }


def student_row(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sequences: torch.Tensor,
    batch_size: int,
    accelerator: Accelerator,
) -> dict:
    """The student's row of `compare_models` alone, for the course of a training."""
    modes = {TEACHER: (teacher, lambda: softmax_mode(teacher)), STUDENT: (student, contextlib.nullcontext)}
    return _evaluate(modes, sequences, batch_size, accelerator)[0][1]


@torch.no_grad()
def perplexity(model: PreTrainedModel, sequences: torch.Tensor, batch_size: int, accelerator: Accelerator) -> float:
    """A causal model's perplexity on token sequences (N, T), shared out over the processes."""
    split, sums = SplitModel(model), torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    with accelerator.autocast():
        for batch in sequences.split(batch_size)[accelerator.process_index :: accelerator.num_processes]:
            batch = batch.to(accelerator.device)
            hidden, labels = split.hidden(batch).flatten(0, 1), next_tokens(batch).flatten()
            for part in position_pieces(model, len(hidden)):
                sums += torch.stack(label_loss(split.logits(hidden[part]), labels[part])).double()
    total, count = accelerator.reduce(sums, reduction="sum").tolist()
    return _exponential(total / count)


def _exponential(nats: float) -> float:
    """Infinite where `math.exp` raises."""
    return float(torch.tensor(nats, dtype=torch.float64).exp())


def _evaluate(modes: dict, sequences: torch.Tensor, batch_size: int, accelerator: Accelerator) -> tuple[list, float]:
    """A row for each mode, name -> (model, context that it runs in), and the share of the student's guarded rows."""
    student, _ = modes[STUDENT]
    causal = all(feature_map.spec.causal for feature_map in feature_maps(student).values())
    batches = sequences.split(batch_size)[accelerator.process_index :: accelerator.num_processes]
    # columns: loss sum and count, KL sum, agreement sum, positions; the last row counts guards
    sums = torch.zeros(len(modes) + 1, 5, dtype=torch.float64, device=accelerator.device)
    with torch.no_grad(), accelerator.autocast():
        for batch in batches:
            batch = batch.to(accelerator.device)
            runs = []
            for name, (model, mode) in modes.items():
                split = SplitModel(model)
                with mode(), count_guards(accelerator.device) as guards:
                    runs.append((split, split.hidden(batch).flatten(0, 1)))
                if name == STUDENT:
                    sums[-1, 0] += guards.guarded
                    sums[-1, 1] += guards.rows
            sums[:-1] += _token_sums(runs, next_tokens(batch).flatten())
    sums = accelerator.reduce(sums, reduction="sum")
    rows = [_row(name, values, causal) for name, values in zip(modes, sums.tolist(), strict=False)]
    guarded, guard_rows = sums[-1, :2].tolist()
    return rows, guarded / max(guard_rows, 1)


def attention_kl(teacher: PreTrainedModel, student: PreTrainedModel, sequences: torch.Tensor) -> dict[str, float]:
    """Mean KL of the student's attention rows from the teacher's, each model's own activations flowing.

    Args:
        sequences: token ids (B, T); memory is that of one layer's maps (B, H, T, T) and all layers' queries and keys.

    Returns:
        name of the converted module relative to the base model -> nats per query.
    """
    theirs = {_name(teacher, call): call for call in record_attention(teacher, AttentionCall.softmax, sequences)}
    result = {}
    with torch.no_grad():
        for call in record_attention(student, AttentionCall.flexformer, sequences):
            if call.feature_map is None:
                continue
            name = _name(student, call)
            expected = softmax_weights(theirs[name])
            actual = call.kernel_weights()
            cross_entropy, count = attention_cross_entropy(expected, actual)
            result[name] = float((cross_entropy - attention_entropy(expected)[0]) / count)
    return result


def evaluate_checkpoint(directory: str | Path, teacher: str, recipe: EvaluationRecipe, precision: str = "auto") -> dict:
    """Evaluates a converted checkpoint against the model it was made from; returns what `compare_models` does.

    Args:
        directory: folder or Hub id of the converted model.
        teacher: as `flexdistill convert` takes it.
        recipe: its source must be set.

    Raises:
        FlexdistillError: if a model or the text cannot be read, or they do not fit each other.
    """
    if recipe.source is None:
        raise FlexdistillError("There is nothing to evaluate on; name a text with --data.")
    accelerator = make_accelerator(precision)
    source = resolve_model(teacher)
    tokenizer, teacher_model = load_tokenizer(source), load_model(source).to(accelerator.device)
    student = load_converted(directory).to(accelerator.device)
    check_same_model(teacher_model, student)
    length = recipe.sequence_length or 512
    check_sequence_length(student, length)  # the kernels' own limits included
    sequences = pack(read_documents(recipe), tokenizer, length, recipe.sequences)
    return compare_models(teacher_model, student, sequences, recipe.batch_size, accelerator)


def teacher_of(directory: str | Path) -> str:
    """The model that a converted one was made from, as its metrics.json names it.

    Raises:
        FlexdistillError: if it names none.
    """
    try:
        teacher = json.loads((Path(directory) / "metrics.json").read_text(encoding="utf-8"))["model"]
        if not isinstance(teacher, str):
            raise TypeError(teacher)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        if not Path(directory).is_dir():
            raise FlexdistillError(
                f"{directory} is no folder here, and only folders of `flexdistill convert` say which model they were "
                "made from; check the name, or name the model with --teacher."
            ) from error
        raise FlexdistillError(
            f"{directory} does not say which model it was made from, as folders of `flexdistill convert` do; name the "
            "model with --teacher."
        ) from error
    return teacher


def check_same_model(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raises FlexdistillError unless the student has all of the teacher's weights, in the same shapes."""
    ours = {name: tensor.shape for name, tensor in student.state_dict().items()}
    for name, tensor in teacher.state_dict().items():
        if ours.get(name) != tensor.shape:
            raise FlexdistillError(
                f"The teacher is not the model that the checkpoint was made from: they differ in {name}; name that "
                "model with --teacher."
            )


def load_converted(directory: str | Path) -> PreTrainedModel:
    """Loads a converted checkpoint with its language-modelling head.

    Raises:
        FlexdistillError: if there is no converted checkpoint, it is damaged, or its kernel is not registered here.
    """
    with explained(f"{directory} is not a converted checkpoint", "give the folder that `flexdistill convert` wrote"):
        checked_settings(directory)
        config = AutoConfig.from_pretrained(directory)
        if not isinstance(config, FlexformerConfigMixin):
            raise ValueError(f"its model type is {config.model_type!r}")
        unknown = sorted({spec.variant for spec in config.kernel_specs.values()} - FEATURE_MAPS.keys())
        if unknown:
            raise FlexdistillError(
                f"The kernel {unknown[0]!r} of {directory} is none of flexdistill's; load it in a Python program that "
                "registers its kernel with flexdistill.register_feature_map first."
            )
    with explained(f"Converted model {directory} cannot be loaded", "check that its files are complete"):
        return load_weights(getattr(modeling_flexformer, config.architectures[0]), directory, config=config)


def _ablation(student: PreTrainedModel, function):
    return lambda: attention_function(student, in_converted_modules(function))


def _name(model: PreTrainedModel, call: AttentionCall) -> str:
    return next(name for name, module in model.base_model.named_modules() if module is call.module)


def _token_sums(runs: list[tuple[SplitModel, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
    """A row of sums for each run, a model and its hidden states (N, E); the first is the teacher's."""
    sums = torch.zeros(len(runs), 5, dtype=torch.float64, device=labels.device)
    for part in position_pieces(runs[0][0].model, len(labels)):
        mask, expected = torch.ones_like(labels[part], dtype=torch.bool), None
        for row, (split, hidden) in enumerate(runs):
            logits = split.logits(hidden[part])
            expected = logits if expected is None else expected
            kl, positions = kl_divergence(logits, expected, mask)
            agreement, _ = top1_agreement(logits, expected, mask)
            sums[row] += torch.stack([*label_loss(logits, labels[part]), kl, agreement, positions]).double()
    return sums


def _row(name: str, sums: list[float], causal: bool) -> dict:
    loss, count, kl, agreement, positions = sums
    return {
        "name": name,
        "perplexity": _exponential(loss / count) if causal else None,
        "kl": kl / positions,
        "top1_agreement": agreement / positions,
    }
