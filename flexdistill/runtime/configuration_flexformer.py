"""Configuration of a converted model: the base model's own, plus which attention modules carry which kernel."""

import json
from dataclasses import asdict, dataclass

MODEL_TYPE = "flexformer"


@dataclass(frozen=True)
class KernelSpec:
    """The kernel of one attention module; `config.json` holds one per converted module.

    Args:
        variant: registered kernel, such as "nonstationary".
        component: component function of the variant, such as "hyperbolic"; None where a variant has only one.
        num_heads: query heads H.
        num_key_value_heads: key and value heads; H is a multiple of it.
        head_dim: size d of one head's queries and keys.
        num_frequencies: frequencies n per head; feature maps return 2 n features, except those that work on each
            coordinate, whose number follows from the head size.
        tied: one map serves queries and keys.
        key_heads: "query" for a key map and a state per query head, "kv" for one per KV head.
        window: tokens that keep exact softmax attention; 0 for a purely linear layer.
        causal: whether a query sees earlier positions only.
        matrix: frequencies of random features, such as "orf"; None where a variant has no choice.
        horizon: tokens after which a kernel of distances ends; None where it has none.
        frequency_scale: size of frequencies as a fresh kernel draws them, over that at which features estimate the
            softmax kernel; None where a variant has no choice, and for its default.
        decay: each feature forgets at a learned rate, so that some serve near keys and some distant ones.
        sinks: first tokens of a sequence that keep exact softmax attention beside the window; 0 where there is none.
        rotary: how the module's rotary embedding pairs coordinates, where the kernel sees queries and keys without it
            (see `rotary`); None where it sees them as they come.
        rotary_dim: coordinates of a head that the rotary embedding turns; the rest follow them.
        rotary_pairs: the first pairs, those of the shortest wavelengths, that the kernel sees turned all the same.
    """

    variant: str
    component: str | None
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    num_frequencies: int
    tied: bool
    key_heads: str = "query"
    window: int = 0
    causal: bool = True
    matrix: str | None = None
    horizon: int | None = None
    decay: bool = False
    sinks: int = 0
    rotary: str | None = None
    rotary_dim: int = 0
    rotary_pairs: int = 0
    frequency_scale: float | None = None

    @property
    def num_state_heads(self) -> int:
        """Heads that keep a state of their own."""
        return self.num_heads if self.key_heads == "query" else self.num_key_value_heads

    def to_dict(self) -> dict:
        return asdict(self)


class FlexformerConfigMixin:
    """Mixed into a subclass of the base model's configuration.

    In memory `model_type` stays the base model's, which PEFT and the tables of weight conversions look up;
    `config.json` says "flexformer" and keeps the base model's as `base_model_type`.
    """

    def to_json_string(self, use_diff: bool = True) -> str:
        settings = json.loads(super().to_json_string(use_diff=use_diff))
        settings["base_model_type"], settings["model_type"] = type(self).model_type, MODEL_TYPE
        return json.dumps(settings, indent=2, sort_keys=True) + "\n"

    @property
    def kernel_specs(self) -> dict[str, KernelSpec]:
        """Module name relative to the base model -> its kernel."""
        return {name: KernelSpec(**spec) for name, spec in self.flexformer["layers"].items()}
