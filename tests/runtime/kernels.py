"""Feature maps for tests: every registered kernel, small, with parameters away from their symmetric initial values."""

import pytest
import torch

from flexdistill.runtime.configuration_flexformer import KernelSpec
from flexdistill.runtime.feature_maps import FeatureMap
from flexdistill.runtime.registry import build_feature_map, feature_map_class, kernels

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
SCALING = HEAD_DIM**-0.5

HORIZON = 8192
CAUSAL_KERNELS = [pair for pair in kernels() if feature_map_class(*pair).causal_safe]
# a variant's name with this at its end is that variant with features that decay
DECAY = "+decay"
# one of each form that attention takes: positive and signed, with log scales and without, decaying or not
FORMS = [pair for pair in kernels() if pair[0] in ("nonstationary", "stationary", "hedgehog")]
FORMS += [("nonstationary+decay", "hyperbolic"), ("hedgehog+decay", None)]
SIGNED_DECAY = ("nonstationary+decay", "trigonometric")


def _over(pairs):
    return pytest.mark.parametrize(
        ("variant", "component"), [pytest.param(*pair, id="-".join(filter(None, pair))) for pair in pairs]
    )


every_kernel, every_causal_kernel = _over(kernels()), _over(CAUSAL_KERNELS)
every_form, every_tiled_form = _over([*FORMS, SIGNED_DECAY]), _over(FORMS)
LEARNED_KERNELS = [pair for pair in kernels() if pair[0] not in ("elu", "performer", "cosformer")]
every_key_heads = pytest.mark.parametrize("key_heads", ["query", "kv"])


def kernel_spec(variant: str, component: str | None, **changes) -> KernelSpec:
    decay, variant = variant.endswith(DECAY), variant.removesuffix(DECAY)
    kind = feature_map_class(variant, component)
    settings = dict(
        num_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_frequencies=HEAD_DIM,
        tied=False,
        causal=kind.causal_safe,
        matrix=next(iter(kind.matrices), None),
        horizon=HORIZON if kind.has_horizon else None,
        decay=decay and changes.get("causal", True),
        rotary_dim=changes.get("head_dim", HEAD_DIM) if changes.get("rotary") else 0,
    )
    return KernelSpec(variant, component, **settings | changes)


def kernel(variant: str, component: str | None, *, noise: float = 0.1, seed: int = 0, **changes) -> FeatureMap:
    """A feature map at its initial values plus Gaussian noise, so that no parameter is idle."""
    torch.manual_seed(seed)
    feature_map = build_feature_map(kernel_spec(variant, component, **changes))
    feature_map.reset_parameters()
    with torch.no_grad():
        for parameter in feature_map.parameters():
            parameter += noise * torch.randn_like(parameter)
        for name, unit in feature_map.named_buffers():
            if name.endswith("unit"):  # tied maps share one
                unit.fill_(0.8) if feature_map.spec.tied else unit.uniform_(0.6, 1.0)
    return feature_map


def query_key_value(length: int, *, batch: int = 2, seed: int = 1, dtype=torch.float32, scale: float = 1.0):
    """Leaves (B, H, T, d), (B, K, T, d) and (B, K, T, D) that ask for gradients; D differs from d."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM), (KV_HEADS, HEAD_DIM - 3)]
    tensors = [torch.randn(batch, heads, length, size, generator=generator) for heads, size in shapes]
    tensors[0] *= scale
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def rotation(length: int, *, size: int = HEAD_DIM, start: int = 0, base: float = 100.0):
    """cos and sin (1, T, size) of rotary embedding in halves, as transformers' models make them."""
    angles = torch.arange(start, start + length)[:, None] * base ** (-torch.arange(size // 2) / (size // 2))
    angles = torch.cat([angles, angles], dim=-1)[None]
    return angles.cos(), angles.sin()


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert actual.shape == expected.shape
    actual, expected = actual.detach(), expected.detach()
    return float((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
