"""The kernels that `--variant`, `--component` and `--matrix` choose from. Adding one is a class and a line here."""

import re

from .baselines import (
    CosformerFeatureMap,
    EluFeatureMap,
    HedgehogFeatureMap,
    LunaFeatureMap,
    PolaformerFeatureMap,
    T2RFeatureMap,
)
from .configuration_flexformer import KernelSpec
from .feature_maps import FeatureMap
from .flexformer_maps import HyperbolicFeatureMap, TrigonometricFeatureMap
from .random_features import (
    DarkformerFeatureMap,
    GeneralisedExponentialFeatureMap,
    OptimalPositiveFeatureMap,
    PerformerFeatureMap,
    PositiveRandomFeatureMap,
    RandomFeatureAttentionMap,
    SequenceAwareFeatureMap,
    TrigonometricRandomFeatureMap,
)
from .rotary import check_rotary

_FLEXFORMER: dict[str | None, type[FeatureMap]] = {
    "hyperbolic": HyperbolicFeatureMap,
    "trigonometric": TrigonometricFeatureMap,
}

# variant -> component -> feature map; the first component is the default, None is that of a variant without a choice
FEATURE_MAPS: dict[str, dict[str | None, type[FeatureMap]]] = {
    "nonstationary": _FLEXFORMER,
    "stationary": _FLEXFORMER,
    "hedgehog": {None: HedgehogFeatureMap},
    "t2r": {None: T2RFeatureMap},
    "elu": {None: EluFeatureMap},
    "performer": {None: PerformerFeatureMap},
    "rfa": {None: RandomFeatureAttentionMap},
    "cosformer": {None: CosformerFeatureMap},
    "polaformer": {None: PolaformerFeatureMap},
    "darkformer": {None: DarkformerFeatureMap},
    "luna": {None: LunaFeatureMap},
    "spectraformer": {
        "oprf": OptimalPositiveFeatureMap,
        "posrf": PositiveRandomFeatureMap,
        "gerf": GeneralisedExponentialFeatureMap,
        "saderf": SequenceAwareFeatureMap,
        "trigrf": TrigonometricRandomFeatureMap,
    },
}


def register_feature_map(variant: str, feature_map: type[FeatureMap], component: str | None = None) -> None:
    """Adds a kernel, which every command and function then finds by its name in this process.

    A checkpoint of it holds its name and its parameters, not its class: register it before loading one.

    Args:
        variant: what `--variant` names it; lower case letters, digits and underscores.
        feature_map: its class, a subclass of `FeatureMap`: queries (B, H, T, d) and keys (B, K, T, d) become features
            (B, H, T, F) and logarithmic weights (B, H, T), all float32, so that k(x, y) = <phi(x), phi(y)> e^(weights).
        component: what `--component` names it; None for a variant with one kernel.

    Raises:
        ValueError: if the class is no feature map, the name is of another form, or another class has it.
    """
    if not (isinstance(feature_map, type) and issubclass(feature_map, FeatureMap)):
        raise ValueError(f"{feature_map!r} is not a subclass of FeatureMap; derive the kernel's class from it")
    for name in (variant, component):
        if name is not None and not re.fullmatch("[a-z0-9_]+", name):
            raise ValueError(f"{name!r} is no name of a kernel; use lower case letters, digits and underscores")
    components = FEATURE_MAPS.get(variant, {})
    if components.get(component, feature_map) is not feature_map:
        raise ValueError(f"{components[component].__name__} is registered under this name already; choose another one")
    if components and (None in components or component is None) and component not in components:
        raise ValueError(f"Variant {variant!r} is registered already; choose another name")
    FEATURE_MAPS[variant] = components | {component: feature_map}


def kernels() -> list[tuple[str, str | None]]:
    """Every (variant, component) pair."""
    return [(variant, component) for variant, components in FEATURE_MAPS.items() for component in components]


def feature_map_class(variant: str, component: str | None) -> type[FeatureMap]:
    """The class behind a name.

    Raises:
        ValueError: for an unknown variant or component; the message lists the valid ones.
    """
    if variant not in FEATURE_MAPS:
        raise ValueError(f"Unknown variant {variant!r}; choose one of: {', '.join(FEATURE_MAPS)}")
    components = FEATURE_MAPS[variant]
    if component not in components:
        names = ", ".join(name for name in components if name)
        remedy = f"choose one of: {names}" if names else "leave the component out"
        raise ValueError(f"Variant {variant!r} has no component {component!r}; {remedy}")
    return components[component]


def check_matrix(variant: str, component: str | None, matrix: str | None) -> None:
    """Raises ValueError if the kernel does not know the matrix; the message lists the valid ones."""
    matrices = feature_map_class(variant, component).matrices
    if matrix not in (matrices or (None,)):
        remedy = f"choose one of: {', '.join(matrices)}" if matrices else "leave the matrix out"
        raise ValueError(f"Variant {variant!r} has no matrix {matrix!r}; {remedy}")


def build_feature_map(spec: KernelSpec) -> FeatureMap:
    """The feature map of a spec, its parameters not yet filled.

    Raises:
        ValueError: if the kernel is unknown, or does not fit the other numbers of the spec.
    """
    kernel = feature_map_class(spec.variant, spec.component)
    check_matrix(spec.variant, spec.component, spec.matrix)
    if spec.causal and not kernel.causal_safe:
        name = f"Component {spec.component!r}" if spec.component else f"Variant {spec.variant!r}"
        raise ValueError(f"{name} looks at the whole sequence, so it cannot serve causal attention; choose another one")
    if spec.decay and not spec.causal:
        raise ValueError(
            f"Variant {spec.variant!r} serves attention in both directions here, which cannot decay; set kernel.decay "
            "to false"
        )
    if kernel.has_horizon != (spec.horizon is not None):
        remedy = "set kernel.horizon" if kernel.has_horizon else "leave kernel.horizon out"
        number = "a" if kernel.has_horizon else "no"
        raise ValueError(f"Variant {spec.variant!r} needs {number} horizon; {remedy}")
    if spec.rotary is not None:
        check_rotary(spec)
    return kernel(spec)
