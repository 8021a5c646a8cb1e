"""Causal attention in the forms that benchmarks/attention.py compares: Flexformer's and what the field uses instead.

Shapes: B batch, H heads, T tokens, d head size, n = d frequencies, F = 2 n features. A method's `build` makes inputs of
a shape and returns the call that attends, with the tensors that a backward pass differentiates.

fla's and mamba-ssm's kernels take features that are in memory already. They get Flexformer's, from a compiled bf16
feature map that lets each key's weight grow without a bound instead of tracking a maximum: less work than ours, and
enough for inputs as tame as a benchmark's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from flexdistill.runtime.attention import attend
from flexdistill.runtime.configuration_flexformer import KernelSpec
from flexdistill.runtime.feature_maps import FeatureMap, log_cosh
from flexdistill.runtime.registry import build_feature_map, feature_map_class

# columns appended to the values: one of ones, whose weighted sum is the denominator, and zeros up to 16 bytes
NORMALISER_COLUMNS = 8

Attention = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    heads: int
    length: int
    head_dim: int
    device: str

    def inputs(self, heads_first: bool = True, length: int | None = None) -> list[torch.Tensor]:
        """Random bf16 query, key and value, (B, H, T, d) or (B, T, H, d)."""
        tokens = (self.heads, length or self.length) if heads_first else (length or self.length, self.heads)
        sizes = (self.batch, *tokens, self.head_dim)
        return [torch.randn(sizes, dtype=torch.bfloat16, device=self.device, requires_grad=True) for _ in range(3)]

    @property
    def labels(self) -> dict:
        return {"batch": self.batch, "heads": self.heads, "length": self.length, "head_dim": self.head_dim}


@dataclass(frozen=True)
class Method:
    name: str
    build: Callable[[Shape], tuple[Attention, list[torch.Tensor]]]
    quadratic: bool = False
    lengths: tuple[int, ...] | None = None  # None: all that are asked for
    forward_only: bool = False
    needs_gpu: bool = True


def flexformer_map(shape: Shape, component: str = "hyperbolic", window: int = 0) -> FeatureMap:
    tied = feature_map_class("nonstationary", component).tied_by_default
    sizes = (shape.heads, shape.heads, shape.head_dim, shape.head_dim)
    feature_map = build_feature_map(KernelSpec("nonstationary", component, *sizes, tied, window=window))
    feature_map.reset_parameters()
    return feature_map.to(shape.device)


def flexformer(feature_map: FeatureMap, query, key, value, *, keep_memory: bool = False, memory=None):
    """Every benchmark's call of ours: (output, memory)."""
    scaling = query.shape[-1] ** -0.5
    return attend(feature_map, query, key, value, scaling=scaling, memory=memory, keep_memory=keep_memory)


def build_flexformer(shape, component="hyperbolic", window=0, keep_memory=False):
    feature_map, inputs = flexformer_map(shape, component, window), shape.inputs()
    return lambda: flexformer(feature_map, *inputs, keep_memory=keep_memory)[0], [*inputs, *feature_map.parameters()]


def build_sdpa(shape, backend):
    inputs = shape.inputs()

    def attention():
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*inputs, is_causal=True)

    return attention, inputs


def build_flex_attention(shape):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    sizes = (None, None, shape.length, shape.length)
    mask = create_block_mask(lambda b, h, q, k: q >= k, *sizes, device=shape.device)
    attention, inputs = torch.compile(flex_attention, dynamic=False), shape.inputs()
    return lambda: attention(*inputs, block_mask=mask), inputs


def spectral_features(x, w1, w2, log_amplitude, norm_factor=None):
    """The hyperbolic features of x (N, H, d), (N, H, F), as `HyperbolicFeatureMap` defines them but unnormalised."""
    frequencies = torch.cat([w1, w2], dim=-1).to(x.dtype)
    phase, envelope = torch.einsum("nhd,hdm->nhm", x, frequencies).float().chunk(2, dim=-1)
    envelope = log_cosh(envelope)
    log_features = torch.cat([envelope + phase, envelope - phase], dim=-1) + log_amplitude
    if norm_factor is not None:
        log_features = log_features + 0.1 * norm_factor[:, None] * x.float().square().sum(-1, keepdim=True)
    return log_features.exp().to(x.dtype)


def features_and_values(query, key, value, query_map, key_map, norm_factor, normaliser: bool):
    """What a kernel takes, from (N, H, d) tensors; `normaliser` appends the column of ones to the values."""
    if normaliser:
        ones = value.new_ones(*value.shape[:-1], 1)
        value = torch.cat([value, ones, value.new_zeros(*value.shape[:-1], NORMALISER_COLUMNS - 1)], dim=-1)
    return spectral_features(query, *query_map), spectral_features(key, *key_map, norm_factor), value


def divide(sums):
    """Weighted sums (..., d + columns) over their denominator, the first column after the values."""
    return (sums[..., :-NORMALISER_COLUMNS] / sums[..., -NORMALISER_COLUMNS, None],)


@cache
def compiled(function):
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.automatic_dynamic_shapes = False
    return torch.compile(function)


def over_tokens(function, tensors, *arguments):
    """A compiled function of (N, ...) tensors applied to (B, T, ...) ones; one compilation serves every N = B T."""
    flat = [x.flatten(0, 1) for x in tensors]
    for x in flat:
        torch._dynamo.maybe_mark_dynamic(x, 0)
    outputs = compiled(function)(*flat, *arguments)
    return [x.unflatten(0, tensors[0].shape[:2]) for x in outputs]


def map_tensors(feature_map: FeatureMap):
    """Arguments of `features_and_values` after the value."""
    names = ("w1", "w2", "log_amplitude")
    maps = ([parameters[name] for name in names] for parameters in feature_map._maps())
    return (*maps, feature_map.norm_factor)


def build_linear(shape, kernel, normaliser=True):
    """Compiled features, then `kernel`, then its normalisation where the kernel has none of its own."""
    feature_map, inputs = flexformer_map(shape), shape.inputs(heads_first=False)
    parameters = map_tensors(feature_map)

    def attention():
        sums = kernel(*over_tokens(features_and_values, inputs, *parameters, normaliser))
        return over_tokens(divide, [sums])[0] if normaliser else sums

    return attention, [*inputs, *feature_map.parameters()]


def chunk_linear_attn(query, key, value):
    from fla.ops.linear_attn import chunk_linear_attn

    return chunk_linear_attn(query, key, value, scale=1.0, normalize=True)[0]


def chunk_simple_gla(query, key, value):
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla(query, key, value, scale=1.0)[0]


def fused_chunk_simple_gla(query, key, value):
    from fla.ops.simple_gla import fused_chunk_simple_gla

    return fused_chunk_simple_gla(query, key, value, scale=1.0)[0]


def chunk_retention(query, key, value):
    from fla.ops.retention import chunk_retention

    return chunk_retention(query, key, value, scale=1.0)[0]


def state_space_duality(query, key, value):
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    # no decay: steps of one and A = 0
    steps = torch.ones(value.shape[:3], device=value.device)
    decay = torch.zeros(value.shape[2], device=value.device)
    return mamba_chunk_scan_combined(value, steps, decay, key, query, chunk_size=256)


OURS, OURS_PREFILL = "flexformer", "flexformer, state kept"
FLASH, CUDNN = "SDPA FlashAttention", "SDPA cuDNN"
FLA_NORMALISED = ("fla chunk_linear_attn", "fla chunk_simple_gla", "fla fused_chunk_simple_gla")
COMPARED = (4096, 8192, 16384, 32768)


METHODS = (
    Method(OURS, build_flexformer, needs_gpu=False),
    Method(OURS_PREFILL, partial(build_flexformer, keep_memory=True), forward_only=True, needs_gpu=False),
    Method(
        "flexformer, trigonometric",
        partial(build_flexformer, component="trigonometric"),
        lengths=(8192,),
        needs_gpu=False,
    ),
    Method("flexformer, window 64", partial(build_flexformer, window=64), lengths=(8192,), needs_gpu=False),
    Method(FLASH, partial(build_sdpa, backend=SDPBackend.FLASH_ATTENTION), quadratic=True, needs_gpu=False),
    Method(CUDNN, partial(build_sdpa, backend=SDPBackend.CUDNN_ATTENTION), quadratic=True),
    # compiled anew for each length
    Method("FlexAttention", build_flex_attention, quadratic=True, lengths=(8192,)),
    Method("fla chunk_linear_attn", partial(build_linear, kernel=chunk_linear_attn, normaliser=False)),
    Method("fla chunk_simple_gla", partial(build_linear, kernel=chunk_simple_gla)),
    Method("fla fused_chunk_simple_gla", partial(build_linear, kernel=fused_chunk_simple_gla), lengths=COMPARED),
    # its decay is fixed and it has no denominator: another function, as fast as its kernel
    Method("fla chunk_retention", partial(build_linear, kernel=chunk_retention, normaliser=False), lengths=COMPARED),
    Method("mamba-ssm SSD", partial(build_linear, kernel=state_space_duality), lengths=COMPARED),
)
