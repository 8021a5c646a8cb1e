"""The kernels that `--variant` and `--component` choose from. Adding one is a class and a line here."""

from .baselines import HedgehogFeatureMap
from .configuration_flexformer import KernelSpec
from .feature_maps import FeatureMap, HyperbolicFeatureMap, TrigonometricFeatureMap

_FLEXFORMER = {"hyperbolic": HyperbolicFeatureMap, "trigonometric": TrigonometricFeatureMap}

# variant -> component -> feature map; the first component is the default, None is that of a variant without a choice
FEATURE_MAPS: dict[str, dict[str | None, type[FeatureMap]]] = {
    "nonstationary": _FLEXFORMER,
    "stationary": _FLEXFORMER,
    "hedgehog": {None: HedgehogFeatureMap},
}


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


def build_feature_map(spec: KernelSpec) -> FeatureMap:
    """The feature map of a spec, its parameters not yet filled."""
    return feature_map_class(spec.variant, spec.component)(spec)
