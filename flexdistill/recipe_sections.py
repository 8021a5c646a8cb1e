"""Sections of the recipe beside the training stages: the kernel, what is read, what is kept, where figures go."""

from __future__ import annotations

from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .errors import FlexdistillError


def parse_yaml(text: str, what: str) -> Any:
    """The value of a YAML text.

    Raises:
        FlexdistillError: if it is not valid; `what` begins the sentence.
    """
    try:
        return yaml.safe_load(text)
    # impossible dates and numbers are ValueErrors, deep nesting is a RecursionError
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FlexdistillError(f"{what} is not valid YAML: {' '.join(str(error).split())}.") from error


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True, frozen=True)


def section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also where it may be None or is one of a list."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_of, get_args(annotation))), None)


def flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted paths."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return found


def near_in_words(window: int, sinks: int) -> str:
    """What keeps exact softmax attention beside a kernel."""
    if not window:
        return "no softmax window"
    return f"softmax window of {window} tokens" + (f" and {sinks} sinks" if sinks else "")


class KernelRecipe(Section):
    """Which kernel replaces softmax attention."""

    variant: str = Field("nonstationary", description="registered kernel; `flexdistill variants` lists them")
    component: str | None = Field(None, description="component function; null: the variant's first, if it has any")
    matrix: str | None = Field(None, description="frequencies of Spectraformer's grid; null: fastfood_learnable")
    features: int | None = Field(
        None, ge=1, description="frequencies per head; the map has twice as many features; null: head size"
    )
    features_by: Literal["layer", "freedom"] = Field(
        "layer",
        description="layer: as many frequencies in every layer; freedom: as many in all, shared out by the degrees of "
        "freedom of each layer's softmax attention",
    )
    horizon: int | None = Field(
        None, ge=1, description="tokens after which cosFormer's kernel ends; null: the model's positions"
    )
    frequency_scale: float | None = Field(
        None,
        gt=0,
        le=10,
        allow_inf_nan=False,
        description="size of hyperbolic frequencies at first, 1 where they estimate softmax; null: 0.25",
    )
    decay: bool | None = Field(
        None,
        description="features of causal layers forget at learned rates; null: only where the variant's default says so",
    )
    longest_wavelength: int | None = Field(
        None,
        ge=0,
        description="tokens; rotary embedding that takes longer to turn once is taken out of what kernels see, 0 takes "
        "out all; null: the variant's default in layers that decay, 0 where the window is as long",
    )
    tied: bool | None = Field(None, description="one map for queries and keys; null: the variant's default")
    key_heads: Literal["query", "kv"] = Field(
        "query", description="a key map and a state per query head, or per KV head"
    )
    window: int = Field(0, ge=0, description="tokens that keep exact softmax attention; 0: purely linear")
    sinks: int | None = Field(
        None, ge=0, description="first tokens of a sequence that keep it beside the window; null: none"
    )
    layers: str = Field("all", description="layers to convert: all, indices such as 0-5,9, every:4, or name patterns")
    keep_layers: str | None = Field(None, description="layers that stay softmax, written as `layers`")
    keep_softmax: int = Field(
        0, ge=0, description="of these, layers that stay softmax, chosen by their KL gain after attention transfer"
    )

    @property
    def num_sinks(self) -> int:
        """Sinks beside the window."""
        return self.sinks or 0

    @property
    def near(self) -> str:
        """What keeps exact softmax attention, in words."""
        return near_in_words(self.window, self.num_sinks)

    @model_validator(mode="after")
    def _sinks_beside_a_window(self) -> KernelRecipe:
        if self.sinks and not self.window:
            raise ValueError("sinks are tokens beside a softmax window; set a window or remove sinks")
        return self


class TextRecipe(Section):
    """Where text comes from."""

    source: str = Field(
        description="file or folder of text, jsonl or parquet (also .xz .gz .zst), a `datasets` name, or `sample`"
    )
    config: str | None = Field(None, description="configuration of a `datasets` name")
    split: str | None = Field(None, description="split of a `datasets` name; null: train")
    column: str | None = Field(None, description="column that holds the text; null: text")


class WeightedTextRecipe(TextRecipe):
    """One text of a mixture."""

    weight: float = Field(1.0, gt=0, le=1e6, description="its share of the sequences, over the sum of all weights")


class DataRecipe(TextRecipe):
    """Text to train on, cut into sequences of equal length in an order fixed by the seed."""

    source: str = "Salesforce/wikitext"
    sources: list[WeightedTextRecipe] | None = Field(
        None, min_length=1, description="texts to mix, in the place of source"
    )
    sequence_length: int = Field(512, ge=2, description="tokens per sequence")
    validation_sequences: int = Field(16, ge=1, description="held out where a stage validates")
    repeats: float = Field(
        0.0, ge=0, le=1, description="share of training sequences in which spans come again, as practice in recall"
    )
    document_masks: bool = Field(
        False, description="while training, attention and positions begin anew after each end-of-text token"
    )
    cache: bool | str = Field(
        True, description="folder of the token cache; true: flexdistill/tokens under HF_HOME; false: no cache"
    )

    @property
    def texts(self) -> list[WeightedTextRecipe]:
        """The texts that are mixed: one, unless `sources` names several."""
        return self.sources or [WeightedTextRecipe(**{name: getattr(self, name) for name in TextRecipe.model_fields})]

    @property
    def name(self) -> str:
        return " + ".join(text.source for text in self.texts)

    @model_validator(mode="after")
    def _used_settings_only(self) -> DataRecipe:
        given = next((name for name in TextRecipe.model_fields if name in self.model_fields_set), None)
        if self.sources is not None and given is not None:
            raise ValueError(f"{given} is set but sources would replace it; give it inside sources or remove one")
        return self


class EvaluationRecipe(Section):
    """What teacher and student are compared on."""

    source: str | None = Field(None, description="as data.source; null: sequences held out from the training data")
    config: str | None = Field(None, description="as data.config")
    split: str | None = Field(None, description="as data.split")
    column: str | None = Field(None, description="as data.column")
    sequence_length: int | None = Field(None, ge=2, description="tokens per sequence; null: data.sequence_length")
    sequences: int = Field(48, ge=1, description="sequences evaluated, taken in order")
    batch_size: int = Field(8, ge=1, description="sequences per forward pass")

    @model_validator(mode="after")
    def _used_settings_only(self) -> EvaluationRecipe:
        given = next((name for name in ("config", "split", "column") if getattr(self, name) is not None), None)
        if self.source is None and given is not None:
            raise ValueError(f"{given} is set but source is not, so it would be ignored; set source or remove {given}")
        return self


class CheckpointRecipe(Section):
    """Where an interrupted run goes on."""

    every_steps: int | None = Field(100, ge=1, description="null: not by steps")
    every_minutes: float | None = Field(None, gt=0, description="whichever comes first; null: not by time")
    keep: int = Field(2, ge=1, description="newest checkpoints kept")


class TrackingRecipe(Section):
    """Where figures go beside the logs, which are always written."""

    trackers: list[str] = Field([], description="Accelerate's trackers by name: tensorboard, trackio, wandb and others")
    project: str = Field("flexdistill", min_length=1, description="name of the project there")
    folder: str = Field("runs", min_length=1, description="of trackers that write files, such as tensorboard")

    @field_validator("trackers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else value
