"""The one typed configuration of a conversion: from YAML, overridden on the command line, kept with the weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BeforeValidator, ByteSize, Field, TypeAdapter, ValidationError, model_validator

from .errors import FlexdistillError, first_sentence
from .recipe_sections import (
    CheckpointRecipe,
    DataRecipe,
    EvaluationRecipe,
    KernelRecipe,
    Section,
    TextRecipe,
    TrackingRecipe,
    parse_yaml,
    section_of,
)

_PACKAGE = Path(__file__).parent
# the wheel carries recipes/ inside the package; a checkout keeps it at the top level
RECIPES_FOLDER = next(
    (f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir()), _PACKAGE / "recipes"
)


# such as 20GiB; a plain int afterwards, which YAML can hold
Bytes = Annotated[int, BeforeValidator(lambda value: int(TypeAdapter(ByteSize).validate_python(value)))]


class StageRecipe(Section):
    """What all training stages have in common."""

    steps: int = Field(ge=0, description="optimiser steps; 0 skips the stage")
    batch_size: int = Field(8, ge=1, description="sequences per optimiser step, over all processes")
    micro_batch_size: int | None = Field(
        None, ge=1, description="sequences per forward pass and process; null: as many as the batch gives"
    )
    max_memory: Bytes | None = Field(
        None, gt=0, description="bytes of a GPU, such as 20GiB, that micro-batches are made to fit; null: no trial"
    )
    compile: bool = Field(
        False, description="compile the model's layers with Inductor: steps are shorter, the first by far longer"
    )
    optimizer: Literal["adam", "adamw"]
    learning_rate: float = Field(gt=0, description="of what the stage trains, at its highest")
    schedule: Literal["cosine", "linear", "constant"] = Field("cosine", description="what follows the warm-up")
    warmup_steps: int = Field(ge=0, description="steps in which the learning rate rises from 0")
    final_learning_rate_ratio: float = Field(
        0.05, ge=0, le=1, description="where cosine and linear schedules end, as a share of learning_rate"
    )
    clip_norm: float = Field(1.0, gt=0, description="gradient norm above which gradients are scaled down")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="the stage ends with an exponential average of its weights; null: with the last"
    )
    validation_every: int = Field(0, ge=0, description="steps between losses on held-out sequences; 0: never")
    patience: int | None = Field(
        None, ge=1, description="validations without a new best after which the stage ends, with its best weights"
    )

    @model_validator(mode="after")
    def _used_stage_settings_only(self) -> StageRecipe:
        if self.schedule == "constant" and "final_learning_rate_ratio" in self.model_fields_set:
            raise ValueError("final_learning_rate_ratio is ignored with schedule: constant; remove it")
        if self.patience is not None and not self.validation_every:
            raise ValueError("patience is ignored without validation; set validation_every or remove patience")
        return self

    @model_validator(mode="after")
    def _one_micro_batch_size(self) -> StageRecipe:
        if self.max_memory is not None and self.micro_batch_size is not None:
            raise ValueError("max_memory picks the micro_batch_size that is set too; set one of them")
        return self


class AttentionTransferRecipe(StageRecipe):
    """Stage 1: each kernel learns the softmax attention of its own layer; the model is frozen."""

    steps: int = Field(260, ge=0)
    optimizer: Literal["adam", "adamw"] = "adam"
    learning_rate: float = Field(5e-3, gt=0)
    warmup_steps: int = Field(30, ge=0)
    cross_entropy_weight: float = Field(1.0, ge=0, description="weight of the cross-entropy between attention rows")
    output_mse_weight: float = Field(1.0, ge=0, description="weight of the relative error of the attention output")
    negative_mass_weight: float | None = Field(
        None, ge=0, description="weight of the negative mass of a signed kernel; null: 2 where the kernel is signed"
    )


class LoraRecipe(Section):
    """Adapters of `train: lora`, merged into the weights before export."""

    rank: int = Field(8, ge=1)
    alpha: int = Field(16, ge=1)
    target_modules: str | list[str] = "all-linear"


class ModelStageRecipe(StageRecipe):
    """What the stages that train more than kernels have in common."""

    optimizer: Literal["adam", "adamw"] = "adamw"
    learning_rate: float = Field(1e-4, gt=0, description="for the model's weights or adapters")
    norm_learning_rate: float | None = Field(None, gt=0, description="for the weights of norms; null: learning_rate")
    kernel_learning_rate: float = Field(1e-3, gt=0, description="for the kernels")
    weight_decay: float = Field(
        0.0, ge=0, description="of the weights, not of kernels and norms; only with optimizer: adamw"
    )
    warmup_steps: int = Field(20, ge=0)

    @model_validator(mode="after")
    def _used_optimizer_settings_only(self) -> ModelStageRecipe:
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError("weight_decay is ignored with optimizer: adam; set optimizer: adamw or remove it")
        return self


class LogitDistillationRecipe(ModelStageRecipe):
    """Stage 2: the converted model learns the teacher's distribution over the next token."""

    steps: int = Field(150, ge=0)
    train: Literal["full", "lora", "kernels"] = Field("full", description="what is trained beside the kernels")
    temperature: float = Field(1.0, gt=0, description="that teacher's and student's logits are divided by")
    label_weight: float = Field(
        0.0, ge=0, le=1, description="share of the label loss; the rest is the KL to the teacher"
    )
    hidden_state_weight: float = Field(
        0.0, ge=0, description="weight of the relative error of each layer's hidden states, added to the loss"
    )
    lora: LoraRecipe | None = Field(None, description="only with train: lora")
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="whole models in every process, or (only with train: full) sharded over them by FSDP2"
    )
    cpu_offload: bool = Field(False, description="with fsdp, keep shards and the optimiser's state in host memory")
    gradient_checkpointing: bool = Field(
        False, description="keep layers' inputs only, and run layers again in the backward pass"
    )

    @model_validator(mode="after")
    def _used_settings_only(self) -> LogitDistillationRecipe:
        if self.lora is not None and self.train != "lora":
            raise ValueError(
                f"lora is set but train is {self.train!r}, which would ignore it; set train: lora or remove lora"
            )
        if self.parallel == "fsdp" and self.train != "full":
            raise ValueError(f"parallel: fsdp shards what train: full trains, and train is {self.train!r}; set ddp")
        if self.cpu_offload and self.parallel != "fsdp":
            raise ValueError("cpu_offload is ignored with parallel: ddp; set parallel: fsdp or remove cpu_offload")
        for name in _IGNORED_BY_TRAIN[self.train]:
            if name in self.model_fields_set:
                raise ValueError(f"{name} is ignored with train: {self.train}; set kernel_learning_rate or remove it")
        return self


# what means nothing where only adapters or kernels are trained
_IGNORED_BY_TRAIN = {
    "full": (),
    "lora": ("norm_learning_rate",),
    "kernels": ("learning_rate", "norm_learning_rate", "weight_decay"),
}


class LabelTrainingRecipe(ModelStageRecipe):
    """Stage 3, or training from scratch: all weights learn the next token of the text itself, without a teacher."""

    steps: int = Field(0, ge=0)
    sequence_length: int | None = Field(None, ge=2, description="tokens per sequence; null: data.sequence_length")


# in the order in which they run
STAGES = ("attention_transfer", "logit_distillation", "label_training")


class Recipe(Section):
    """Everything that decides the result of a conversion.

    Raises:
        FlexdistillError: from `load` and `override`, for an unknown key, a bad value or an ignored setting.
    """

    model: str | None = Field(None, description="Hub id, folder, .gguf file or package:NAME")
    seed: int = Field(0, ge=0, lt=2**32, description="fixes the data order and the initial kernels")
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU, fp32 on CPU; fp16: with a gradient scaler"
    )
    trust_remote_code: bool = Field(False, description="run code that the source model ships")
    tied_embeddings: Literal["tied", "untied", "retied"] = Field(
        "tied", description="untied: tied embeddings are trained and stay apart; retied: their mean is tied in the end"
    )
    kernel: KernelRecipe = KernelRecipe()
    data: DataRecipe = DataRecipe()
    attention_transfer: AttentionTransferRecipe = AttentionTransferRecipe()
    logit_distillation: LogitDistillationRecipe = LogitDistillationRecipe()
    label_training: LabelTrainingRecipe = LabelTrainingRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    tracking: TrackingRecipe = TrackingRecipe()

    @classmethod
    def load(cls, name_or_file: str | Path) -> Recipe:
        """Reads a recipe file, or a recipe shipped with the package by its name."""
        path = Path(name_or_file)
        if not path.is_file():
            path = RECIPES_FOLDER / f"{name_or_file}.yaml"
        if not path.is_file():
            raise FlexdistillError(
                f"Recipe {str(name_or_file)!r} is neither a file nor a shipped recipe; "
                f"shipped are: {', '.join(shipped_recipes())}."
            )
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FlexdistillError(
                f"Recipe {path} cannot be read ({first_sentence(error)}); see that it is UTF-8 text that you may read."
            ) from error
        settings = parse_yaml(text, f"Recipe {path}") or {}
        if not isinstance(settings, dict):
            raise FlexdistillError(f"Recipe {path} must hold settings by name, not a {type(settings).__name__}.")
        return cls._checked(settings, f"Recipe {path}")

    def override(self, settings: dict[str, Any]) -> Recipe:
        """A copy with settings replaced; keys are dotted paths such as `kernel.window`.

        Where a replaced setting makes others of this recipe meaningless (another data source its column, another
        variant its component), those go back to their defaults unless they are given too.
        """
        nested = self.model_dump(exclude_unset=True)
        for dotted, value in settings.items():
            section = nested
            *parents, name = dotted.split(".")
            for parent in parents:
                section = section.setdefault(parent, {})
                if not isinstance(section, dict):
                    raise FlexdistillError(f"Setting {dotted!r} is unknown: {parent!r} has no settings below it.")
            section[name] = value
        for key in settings:
            _forget_ignored(nested, key, settings)
        return self._checked(nested, "The settings")

    @property
    def stages(self) -> dict[str, StageRecipe]:
        """The stages that have steps, by name and in order."""
        stages = {name: getattr(self, name) for name in STAGES}
        return {name: stage for name, stage in stages.items() if stage.steps}

    @property
    def inputs(self) -> tuple[str | None, ...]:
        """What a run reads, by name; None where that is left out."""
        return (self.model, *(text.source for text in self.data.texts), self.evaluation.source)

    def sequence_length(self, stage: str) -> int:
        """Tokens per sequence of a stage."""
        return getattr(getattr(self, stage), "sequence_length", None) or self.data.sequence_length

    def with_budget(self, tokens: int) -> Recipe:
        """A copy that trains on at most `tokens` tokens, shared out to the stages as this recipe's steps share them.

        Steps and warm-up scale alike; batches and sequences stay as long as they are.
        """
        stages = self.stages
        if not stages:
            raise FlexdistillError("The recipe has no training steps, so a budget cannot be shared out; leave it out.")
        planned = sum(s.steps * s.batch_size * self.sequence_length(name) for name, s in stages.items())
        least = -(-planned // min(stage.steps for stage in stages.values()))
        if tokens < least:
            raise FlexdistillError(
                f"A budget of {tokens:,} tokens is less than a step of each stage, shared out as in the recipe; give "
                f"{least:,} or more, or a smaller --batch-size or --sequence-length."
            )
        return self.override(
            {
                f"{name}.{setting}": getattr(stage, setting) * tokens // planned
                for name, stage in stages.items()
                for setting in ("steps", "warmup_steps")
            }
        )

    def to_yaml(self) -> str:
        """The complete recipe, defaults included; `load` gives back an equal one."""
        return yaml.safe_dump(_without_ignored(self.model_dump()), sort_keys=False, allow_unicode=True)

    @classmethod
    def _checked(cls, settings: dict[str, Any], where: str) -> Recipe:
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            raise FlexdistillError(f"{where}: {_explain(error.errors()[0])}") from error


def shipped_recipes() -> list[str]:
    return sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml"))


# setting -> the settings of its section that are about it, and whether they mean nothing once it has a new value
_ABOUT: dict[str, tuple[tuple[str, ...], Callable[[Any], bool]]] = {
    "data.source": (("config", "split", "column", "sources"), lambda source: True),
    "data.sources": (tuple(TextRecipe.model_fields), lambda sources: sources is not None),
    "evaluation.source": (("config", "split", "column"), lambda source: True),
    "kernel.window": (("sinks",), lambda window: not window),
    "kernel.variant": (
        ("component", "matrix", "horizon", "tied", "decay", "longest_wavelength"),
        lambda variant: True,
    ),
    **{
        f"{stage}.{name}": ((other,), lambda value: value is not None)
        for stage in STAGES
        for name, other in (("max_memory", "micro_batch_size"), ("micro_batch_size", "max_memory"))
    },
    "logit_distillation.train": (_IGNORED_BY_TRAIN["kernels"], lambda train: train == "kernels"),
    **{
        f"{stage}.schedule": (("final_learning_rate_ratio",), lambda schedule: schedule == "constant")
        for stage in STAGES
    },
}


def _forget_ignored(nested: dict[str, Any], key: str, settings: dict[str, Any]) -> None:
    names, ignored = _ABOUT.get(key, ((), bool))
    section = key.rpartition(".")[0]
    for name in names:
        if ignored(settings[key]) and f"{section}.{name}" not in settings:
            nested[section].pop(name, None)


def _without_ignored(settings: dict[str, Any]) -> dict[str, Any]:
    ignored = {"logit_distillation": [*_IGNORED_BY_TRAIN[settings["logit_distillation"]["train"]]]}
    ignored["data"] = [] if settings["data"]["sources"] is None else [*TextRecipe.model_fields]
    for stage in STAGES:
        if settings[stage]["schedule"] == "constant":
            ignored.setdefault(stage, []).append("final_learning_rate_ratio")
    for section, names in ignored.items():
        for name in names:
            del settings[section][name]
    return settings


def _explain(error: Mapping[str, Any]) -> str:
    location = [str(part) for part in error["loc"]]
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        return f"{'.'.join(location) or 'recipe'}: {message}."
    section: Any = Recipe
    for name in location[:-1]:
        section = section if name.isdigit() else section_of(section.model_fields[name].annotation)
    known = list(section.model_fields)
    close = difflib.get_close_matches(location[-1], known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(known)}."
    return f"unknown key {'.'.join(location)!r}; {hint}"
