"""What becomes of each attention module: a plan that can be printed, then its application."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

import torch
import transformers
from transformers import PreTrainedModel

from .attention_modes import AttentionCall
from .attention_search import attention_calls, evaluating, reason_to_keep
from .devices import exact_float32
from .errors import FlexdistillError
from .layer_expressions import select_layers
from .recipe import KernelRecipe
from .rotary_search import RotaryEmbedding, rotary_embeddings
from .runtime.configuration_flexformer import FlexformerConfigMixin, KernelSpec
from .runtime.interface import NAME
from .runtime.modeling_flexformer import convert_model
from .runtime.registry import FEATURE_MAPS, build_feature_map, check_matrix, feature_map_class

CONVERT, KEEP = "convert", "keep"


@dataclass(frozen=True)
class ModulePlan:
    """What becomes of one attention module, and why."""

    name: str  # relative to the base model
    action: str  # "convert" or "keep"
    reason: str
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    causal: bool
    spec: KernelSpec | None  # None where the module stays softmax
    parameters: int  # added
    state_bytes: int  # per sequence, of any length
    kv_bytes_per_token: int  # of the softmax module


@dataclass(frozen=True)
class Plan:
    """What becomes of a model; pure, so it can be printed, compared and applied later."""

    model_class: str
    modules: tuple[ModulePlan, ...]
    keep_softmax: int = 0  # of the converted modules, those that will get softmax back after attention transfer
    shares_frequencies: bool = False  # they will have as many in all, but not each

    @property
    def converted(self) -> tuple[ModulePlan, ...]:
        return tuple(module for module in self.modules if module.action == CONVERT)

    @property
    def frequencies(self) -> dict[str, int]:
        """Of each converted module, by name."""
        return {module.name: module.spec.num_frequencies for module in self.converted if module.spec}

    @property
    def parameters(self) -> int:
        """Parameters added."""
        return sum(module.parameters for module in self.converted)

    @property
    def state_bytes(self) -> int:
        """Bytes per sequence that the converted modules keep, whatever its length."""
        return sum(module.state_bytes for module in self.converted)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes per token that the converted modules kept before."""
        return sum(module.kv_bytes_per_token for module in self.converted)

    @property
    def kept_kv_bytes_per_token(self) -> int:
        """Bytes per token that the modules which stay softmax go on to keep."""
        return sum(module.kv_bytes_per_token for module in self.modules if module.action == KEEP)

    @property
    def break_even_tokens(self) -> int | None:
        """Sequence length from which the state is smaller than the KV cache was; None if there was no cache."""
        return -(-self.state_bytes // self.kv_bytes_per_token) if self.kv_bytes_per_token else None

    def keeping(self, kl_gains: dict[str, float]) -> Plan:
        """The plan in which the named modules stay softmax for what they gain, in nats per token."""
        modules = tuple(_kept(m, kl_gains[m.name]) if m.name in kl_gains else m for m in self.modules)
        return replace(self, modules=modules, keep_softmax=self.keep_softmax - len(kl_gains))

    def to_dict(self) -> dict:
        """Everything in the plan and its totals, ready for JSON."""
        totals = ("parameters", "state_bytes", "kv_bytes_per_token", "kept_kv_bytes_per_token", "break_even_tokens")
        return asdict(self) | {name: getattr(self, name) for name in totals}


def resolve_kernel(kernel: KernelRecipe) -> KernelRecipe:
    """The kernel with its variant's defaults filled in.

    Raises:
        FlexdistillError: for an unknown variant, component or matrix, or a number of features that is not to choose.
    """
    component = kernel.component or next(iter(FEATURE_MAPS.get(kernel.variant, [None])))
    try:
        feature_map = feature_map_class(kernel.variant, component)
        matrix = kernel.matrix or next(iter(feature_map.matrices), None)
        check_matrix(kernel.variant, component, matrix)
    except ValueError as error:
        raise FlexdistillError(f"{error}.") from error
    if kernel.features and not feature_map.takes_frequencies:
        raise FlexdistillError(
            f"Variant {kernel.variant!r} has as many features as the head size gives; leave kernel.features out."
        )
    if kernel.features_by != "layer" and not feature_map.takes_frequencies:
        raise FlexdistillError(
            f"Variant {kernel.variant!r} has as many features as the head size gives; leave kernel.features_by out."
        )
    if kernel.frequency_scale and feature_map.frequency_scale is None:
        name = f"Component {component!r}" if component else f"Variant {kernel.variant!r}"
        raise FlexdistillError(f"{name} starts with frequencies of one size; leave kernel.frequency_scale out.")
    scale = kernel.frequency_scale or feature_map.frequency_scale
    tied = feature_map.tied_by_default if kernel.tied is None else kernel.tied
    sinks = kernel.num_sinks if kernel.window else None  # one recipe, however it was written
    return kernel.model_copy(
        update={"component": component, "matrix": matrix, "frequency_scale": scale, "tied": tied, "sinks": sinks}
    )


def make_plan(model: PreTrainedModel, kernel: KernelRecipe, frequencies: Mapping[str, int] | None = None) -> Plan:
    """Finds every attention module by running a tiny forward pass, and decides what becomes of it. Changes nothing.

    Args:
        frequencies: name of a module -> its number, in the place of the kernel's.

    Raises:
        FlexdistillError: if nothing can be converted, or the kernel does not fit the model.
    """
    kernel = resolve_kernel(kernel)
    _check_architecture(model)
    if feature_map_class(kernel.variant, kernel.component).has_horizon and kernel.horizon is None:
        kernel = kernel.model_copy(update={"horizon": max_positions(model)})
    with evaluating(model), exact_float32():
        calls = attention_calls(model)
        reasons = {module: reason_to_keep(model, each) for module, each in calls.items()}
        rotary = rotary_embeddings(model, [module for module, reason in reasons.items() if reason is None])
    names = {module: name for name, module in model.base_model.named_modules()}
    convertible = {names[module]: module for module, reason in reasons.items() if reason is None}
    if not convertible:
        raise FlexdistillError(
            f"{type(model).__name__} has no attention module that can become linear: "
            f"{'; '.join(sorted(set(filter(None, reasons.values()))))}."
        )
    chosen = _chosen(kernel, list(convertible))
    for name, module in convertible.items():
        reasons[module] = chosen[name]
    linear = [module for module, reason in reasons.items() if reason is None]
    if kernel.longest_wavelength is not None and not any(rotary.get(module) for module in linear):
        raise FlexdistillError(
            f"No layer of {type(model).__name__} that becomes linear has rotary embedding that can be taken out; leave "
            "--longest-wavelength out."
        )
    modules = []
    for module, (call, *_) in calls.items():
        name = names.get(module, "")
        own = kernel.model_copy(update={"features": (frequencies or {}).get(name, kernel.features)})
        modules.append(_module_plan(name, call, own, reasons[module], rotary.get(module), module in rotary))
    if kernel.keep_softmax >= len(linear):
        raise FlexdistillError(
            f"Of the {len(linear)} layers that become linear, {kernel.keep_softmax} are to stay softmax, which leaves "
            "none; set a smaller --keep-softmax."
        )
    shares = kernel.features_by == "freedom" and frequencies is None
    return Plan(type(model).__name__, tuple(modules), kernel.keep_softmax, shares)


def _chosen(kernel: KernelRecipe, names: list[str]) -> dict[str, str | None]:
    """Name of each convertible module -> why it is not to become linear all the same; None if it is."""
    chosen = {names[index] for index in select_layers(kernel.layers, names)}
    kept = {names[index] for index in select_layers(kernel.keep_layers, names)} if kernel.keep_layers else set()
    if not chosen - kept:
        raise FlexdistillError(
            f"Of the layers {kernel.layers} none is left to become linear without {kernel.keep_layers}; set another "
            "--keep-layers."
        )
    reasons: dict[str, str | None] = dict.fromkeys(names, f"not among the layers {kernel.layers}")
    reasons |= dict.fromkeys(chosen)
    return reasons | dict.fromkeys(kept, f"among the layers {kernel.keep_layers} that stay")


def apply_plan(model: PreTrainedModel, plan: Plan) -> PreTrainedModel:
    """The converted model; it takes over the weights of `model`, which must not be used again."""
    return convert_model(model, {module.name: module.spec for module in plan.converted if module.spec})


def restore_softmax(model: PreTrainedModel, kl_gains: dict[str, float]) -> None:
    """Takes the kernels of the named modules out of a converted model; config.json keeps what each gained."""
    layers = dict(model.config.flexformer["layers"])
    for name in kl_gains:
        delattr(model.base_model.get_submodule(name), NAME)
        del layers[name]
    model.config.flexformer = {"layers": layers, "kept_softmax": dict(kl_gains)}


def max_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model and its kernels have positions for; None if there is no limit."""
    limits = [getattr(model.config.get_text_config(), "max_position_embeddings", None)]
    if isinstance(model.config, FlexformerConfigMixin):
        limits += [spec.horizon for spec in model.config.kernel_specs.values()]
    return min((limit for limit in limits if limit is not None), default=None)


def check_sequence_length(model: PreTrainedModel, length: int) -> None:
    """Raises FlexdistillError if the model has fewer positions than a sequence has tokens."""
    positions = max_positions(model)
    if positions is not None and length > positions:
        raise FlexdistillError(
            f"Sequences of {length} tokens are longer than the {positions} positions of the model; "
            "set a smaller --sequence-length."
        )


def _check_architecture(model: PreTrainedModel) -> None:
    name = type(model).__name__
    if not hasattr(transformers, name):
        raise FlexdistillError(
            f"{name} is not a class of transformers {transformers.__version__}, so its exports could not be loaded "
            "elsewhere; convert a model that transformers implements."
        )


def _decays(kernel: KernelRecipe, causal: bool) -> bool:
    if kernel.decay is not None:
        return kernel.decay
    return causal and feature_map_class(kernel.variant, kernel.component).decays_by_default


def _longest_wavelength(kernel: KernelRecipe, decays: bool) -> float:
    """Of the rotary embedding that a kernel sees, in tokens."""
    if kernel.longest_wavelength is not None:
        return kernel.longest_wavelength
    if not decays:
        return math.inf
    longest = feature_map_class(kernel.variant, kernel.component).longest_wavelength
    # pairs that turn once within a window say nothing of the keys behind it
    return 0 if longest <= kernel.window else longest


def _module_plan(
    name: str,
    call: AttentionCall,
    kernel: KernelRecipe,
    reason: str | None,
    rotary: RotaryEmbedding | None,
    is_rotary: bool,
) -> ModulePlan:
    num_heads, num_key_value_heads, head_dim = call.query.shape[1], call.key.shape[1], call.query.shape[-1]
    value_dim = call.value.shape[-1]
    kv_bytes = num_key_value_heads * (head_dim + value_dim) * call.key.element_size()
    shape = (num_heads, num_key_value_heads, head_dim, call.causal)
    if reason is not None:
        return ModulePlan(name, KEEP, reason, *shape, None, 0, 0, kv_bytes)
    if kernel.window and not call.causal:
        raise FlexdistillError(
            f"A softmax window needs causal attention, and {name} attends in both directions; leave --window out."
        )
    decays = _decays(kernel, call.causal)
    longest = _longest_wavelength(kernel, decays)
    pairs = rotary.pairs_within(longest) if rotary is not None else 0
    reason = "softmax attention"
    if is_rotary and rotary is None and longest < math.inf:
        reason += "; kernel sees all rotary embedding, which is of an unknown form"
    if rotary is not None:
        reason += f"; kernel sees {pairs} of {len(rotary.wavelengths)} rotary pairs"
        if pairs == len(rotary.wavelengths):
            rotary, pairs = None, 0
    spec = KernelSpec(
        variant=kernel.variant,
        component=kernel.component,
        num_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        num_frequencies=kernel.features or head_dim,
        tied=bool(kernel.tied),
        key_heads=kernel.key_heads,
        window=kernel.window,
        causal=call.causal,
        matrix=kernel.matrix,
        horizon=kernel.horizon,
        decay=decays,
        sinks=kernel.num_sinks,
        rotary=None if rotary is None else rotary.layout,
        rotary_dim=0 if rotary is None else 2 * len(rotary.wavelengths),
        rotary_pairs=pairs,
        frequency_scale=kernel.frequency_scale,
    )
    try:
        with torch.device("meta"):
            feature_map = build_feature_map(spec)
    except ValueError as error:
        raise FlexdistillError(f"{error}.") from error
    if not spec.tied and not feature_map.key_parameters:
        raise FlexdistillError(
            f"Variant {spec.variant!r} learns no map, so queries and keys have nothing to untie; leave --untied out."
        )
    # S, its normaliser column, norms and maximum in float32; those of window and sinks in the model's dtype
    state = 4 * spec.num_state_heads * (feature_map.num_features * (value_dim + 1) + 2) if call.causal else 0
    per_token = kv_bytes + 1  # in the window, whose keys have a second side where the kernel sees them otherwise
    if rotary is not None:
        per_token += num_key_value_heads * head_dim * call.key.element_size()
    return ModulePlan(
        name,
        CONVERT,
        reason,
        *shape,
        spec,
        _count(feature_map.parameters()),
        state + spec.window * per_token + (spec.sinks * kv_bytes + 8 if spec.sinks else 0),
        kv_bytes if call.causal else 0,
    )


def _kept(module: ModulePlan, kl_gain: float) -> ModulePlan:
    reason = f"softmax gains {kl_gain:.4g} nats per token here"
    return replace(module, action=KEEP, reason=reason, spec=None, parameters=0, state_bytes=0)


def _count(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
