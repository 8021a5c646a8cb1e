"""The one typed configuration of a conversion: from YAML, overridden on the command line, kept with the weights."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

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
from .recipe_stages import (
    IGNORED_BY_TRAIN,
    STAGES,
    AttentionTransferRecipe,
    LabelTrainingRecipe,
    LogitDistillationRecipe,
    StageRecipe,
)

_PACKAGE = Path(__file__).parent
# the wheel carries recipes/ inside the package; a checkout keeps it at the top level
RECIPES_FOLDER = next(
    (f for f in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if f.is_dir()), _PACKAGE / "recipes"
)


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


# settings of a kernel that belong to its variant
OF_VARIANT = ("component", "matrix", "horizon", "frequency_scale", "tied", "decay", "longest_wavelength")


def _if(ignores: Callable[[Any], bool], *names: str) -> Callable[[Any], tuple[str, ...]]:
    return lambda value: names if ignores(value) else ()


# setting -> the settings of its section that mean nothing once it has a new value
_IGNORED: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "data.source": lambda source: ("config", "split", "column", "sources"),
    "data.sources": _if(lambda sources: sources is not None, *TextRecipe.model_fields),
    "evaluation.source": lambda source: ("config", "split", "column"),
    "kernel.window": _if(lambda window: not window, "sinks"),
    "kernel.variant": lambda variant: OF_VARIANT,
    "kernel.component": _if(lambda component: component not in (None, "hyperbolic"), "frequency_scale"),
    **{
        f"{stage}.{name}": _if(lambda value: value is not None, other)
        for stage in STAGES
        for name, other in (("max_memory", "micro_batch_size"), ("micro_batch_size", "max_memory"))
    },
    "logit_distillation.train": lambda train: IGNORED_BY_TRAIN.get(str(train), ()),
    **{
        f"{stage}.schedule": _if(lambda schedule: schedule == "constant", "final_learning_rate_ratio")
        for stage in STAGES
    },
}


def _forget_ignored(nested: dict[str, Any], key: str, settings: dict[str, Any]) -> None:
    section = key.rpartition(".")[0]
    for name in _IGNORED.get(key, lambda value: ())(settings[key]):
        given = any(f"{other}.".startswith(f"{section}.{name}.") for other in settings)
        if not given and isinstance(nested.get(section), dict):
            nested[section].pop(name, None)


def _without_ignored(settings: dict[str, Any]) -> dict[str, Any]:
    ignored = {"logit_distillation": [*IGNORED_BY_TRAIN[settings["logit_distillation"]["train"]]]}
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
