"""Hyperbolic features for attention transfer as torch operators, with fake kernels and autograd."""

from __future__ import annotations

import torch

from ..runtime.feature_maps import FeatureMap, Features
from . import transfer_operators

# tokens of a program, which loads its head's frequencies once
_SPAN = 256


def are_fused(feature_map: FeatureMap, dtype: torch.dtype) -> bool:
    """Whether `fused_features` can make a map's features in `dtype`, where the fused kernels run at all."""
    from ..runtime.fused import LARGEST_SIZE

    if not feature_map.has_spectrum or feature_map.signed:
        return False
    size = max(feature_map.spec.head_dim, feature_map.spec.num_frequencies)
    return size <= LARGEST_SIZE[dtype]


def fused_features(
    feature_map: FeatureMap,
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    window: int,
    dtype: torch.dtype,
    visible: torch.Tensor | None,
) -> Features:
    """What `transfer_op` takes of queries and keys as the kernel sees them: features in `dtype`, logarithms in float32.

    Phases are products of numbers in `dtype` with float32 sums, as the fused attention of bf16 inputs computes them.

    Features that decay are relative to blocks, and the decay's gradient is all `transfer_op`'s. Other arguments are as
    in `tiled_rows`, and get no gradient.
    """
    spectrum = feature_map.spectrum()
    block = transfer_operators.DECAY_BLOCK
    scale = scaling * query.shape[-1] ** 0.5
    q_features, log_scale = features_op(query, *spectrum.query, spectrum.decay, scale, False, 0, block, dtype)
    k_features, log_weight = features_op(key, *spectrum.key, spectrum.decay, 1.0, True, window, block, dtype)
    if visible is not None:
        log_weight = log_weight.masked_fill(~visible[:, None], -torch.inf)
    return Features(q_features, log_scale, k_features, log_weight, spectrum.decay)


@torch.library.custom_op("flexdistill::transfer_features", mutates_args=())
def features_op(
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor | None,
    log_amplitude: torch.Tensor,
    norm_factor: torch.Tensor,
    decay: torch.Tensor | None,
    scale: float,
    keys: bool,
    delay: int,
    block: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (B, M, T, 2 n) in `dtype` and log scales (B, M, T), float32, of queries or keys.

    What a log scale has is factored out of its token's features: the largest but for the bracket (see
    `triton_features.features`), so that they are in (0, 1] before the decay, and exp(norm factor |x|^2).

    The backward pass takes for granted that the loss depends on exp(log scale) * features only. Then the gradient of a
    feature's logarithm is that feature times its gradient, that of the norm factor is the sum of these times |x|^2, and
    what is factored out has none. x and the decay get none either.

    Args:
        x: (B, K, T, d), float32, bf16 or fp16, which `scale` multiplies; M is a multiple of K.
        w1, w2: (M, d, n), log_amplitude: (M, 2 n), norm_factor: (M,): as in `Spectrum`.
        decay: (S, 2 n) float32. Queries shrink by it with their place after the middle of their block of positions;
            `keys` grow with theirs, where they stand `delay` positions later.
    """
    from ..runtime.launch import blocks_of, dtypes, key_map_tensors, power, row_major, token_strides
    from .triton_transfer_features import features_kernel

    x = row_major(x)
    outputs = _outputs(x, w1, dtype)
    batch, heads, length, _ = outputs[0].shape
    size, frequencies = w1.shape[1:]
    features_kernel[(-(-length // _SPAN), batch * heads)](
        x, *key_map_tensors(decay, w1, w2, log_amplitude, norm_factor), *outputs, *token_strides(x), heads, x.shape[1],
        heads if decay is None else decay.shape[0], length, delay, _SPAN, size, frequencies, scale,
        BLOCK_D=power(size), BLOCK_N=power(frequencies), CHUNK=blocks_of(dtype).chunk, NONSTATIONARY=w2 is not None,
        DECAY=decay is not None, DECAY_BLOCK=block, KEYS=keys, STAGES=2,
        num_warps=_warps(max(size, frequencies), dtype), num_stages=2,
        **dtypes(dtype),
    )  # fmt: skip
    return outputs


@features_op.register_fake
def _(x, w1, w2, log_amplitude, norm_factor, decay, scale, keys, delay, block, dtype):
    return _outputs(x, w1, dtype)


@torch.library.custom_op("flexdistill::transfer_features_backward", mutates_args=())
def features_backward_op(
    d_features: torch.Tensor,
    features: torch.Tensor,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor | None,
    log_amplitude: torch.Tensor,
    norm_factor: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Gradients of a map as flat rows per head (see `split_map`), from those of its features (B, M, T, 2 n)."""
    from ..runtime.fused_backward import map_gradients
    from ..runtime.launch import kernel_settings, map_tensors, row_major

    _, d_map = map_gradients(
        row_major(x), map_tensors(w1, w2, log_amplitude, norm_factor), d_features.contiguous()[None], scale,
        kernel_settings(w2, log_amplitude, None, None, None, features), features=features,
    )  # fmt: skip
    return d_map


@features_backward_op.register_fake
def _(d_features, features, x, w1, *rest):
    from ..runtime.fused_backward import flat_size

    return w1.new_empty(w1.shape[0], flat_size(*w1.shape[1:], False))


def _setup_context(ctx, inputs, output) -> None:
    x, w1, w2, log_amplitude, norm_factor, _, ctx.scale, *_ = inputs
    ctx.save_for_backward(output[0], x, w1, w2, log_amplitude, norm_factor)


def _backward(ctx, d_features, _):
    from ..runtime.fused_backward import split_map

    saved = ctx.saved_tensors
    _, _, w1, w2, log_amplitude, _ = saved
    *d_map, _, _ = split_map(features_backward_op(d_features, *saved, ctx.scale), w1, w2, log_amplitude)
    return None, *d_map, *(None,) * 6


features_op.register_autograd(_backward, setup_context=_setup_context)


def _warps(size: int, dtype: torch.dtype) -> int:
    # four are a fifth faster where a program's registers suffice
    return 4 if size <= 64 and dtype != torch.float32 else 8


def _outputs(x, w1, dtype):
    batch, _, length, _ = x.shape
    heads, _, frequencies = w1.shape
    features = x.new_empty(batch, heads, length, 2 * frequencies, dtype=dtype)
    return features, x.new_empty(batch, heads, length, dtype=torch.float32)
