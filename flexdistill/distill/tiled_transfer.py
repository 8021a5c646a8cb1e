"""Attention transfer in linear memory: the teacher's and the student's rows tile by tile, never a T x T map.

Features are made in torch, by any registered feature map, so autograd carries their gradients on to its parameters;
what is quadratic runs in the kernels of `triton_transfer`. Time stays quadratic in T, because the teacher's softmax is.
"""

from __future__ import annotations

import torch

from ..losses import LEAST_WEIGHT, AttentionRows, over_queries, relative_output_error
from ..runtime.attention import _features, count_guarded
from ..runtime.backend import fused_operators
from ..runtime.feature_maps import GATE_UNIT, POSITIVE_GUARD, SIGNED_GUARD, Context, FeatureMap

# statistics and losses are kept as rows of one tensor: how many of each
_ROWS, _STATISTICS = 3, 5
_LOG2E = 1.4426950408889634
# tokens of the tile that a program keeps and of those that it walks along, largest first
_TILES = (64, 32), (32, 32), (16, 16)
# of a GPU with the largest on-chip memory; what Triton's interpreter is given, so that tests see its tiles
_INTERPRETED_BYTES = 227 * 1024


def can_run(feature_map: FeatureMap, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `tiled_rows` can run on these inputs: where the fused kernels do, in at most single precision."""
    return (
        fused_operators(query.device) is not None
        and max(x.dtype.itemsize for x in (query, key, value)) <= 4
        and _tiles(feature_map.num_features, query, key, value) is not None
    )


def tiled_rows(
    feature_map: FeatureMap,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    visible: torch.Tensor | None = None,
) -> AttentionRows:
    """What attention transfer compares, in memory linear in T.

    Products of features are in tf32 where values are half precision and in three-pass tf32 where all is float32; logits
    and outputs are in the inputs' own dtype (bf16 for fp16 values).

    With p = softmax(scaling q k^T) and a = `attention_weights(feature_map, ...)`, row i has the cross-entropy
    -sum_j p_ij log max(a_ij, 1e-8), the entropy -sum_j p_ij log p_ij, the negative mass sum_j max(-a_ij, 0) and the
    outputs sum_j p_ij v_j and sum_j a_ij v_j. The teacher sees the keys that the feature map's spec lets a query see.

    Args:
        feature_map: the layer's kernel; gradients flow to its parameters only.
        query: (B, H, T, d), any floating dtype; key: (B, K, T, d); value: (B, K, T, D). None may ask for a gradient.
        scaling: what softmax attention multiplies q.k with.
        visible: (B, T) bool, False at padding.

    Returns:
        float32 rows. One that sees no key has zeros as its outputs, and losses that mean nothing.

    Raises:
        ValueError: if the query, key or value asks for a gradient.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError("Attention transfer trains kernels only: detach queries, keys and values.")
    with torch.autocast(query.device.type, enabled=False):
        return feature_map(query, key, _tiled_rows, value=value, scaling=scaling, visible=visible)


def _tiled_rows(feature_map, query, key, *, value, scaling, visible) -> AttentionRows:
    spec = feature_map.spec
    window = spec.window if spec.causal else 0
    features = _features(feature_map, query, key, scaling, Context(visible=visible))
    log_weight, mix = features.key_log_weight, features.query_log_scale
    if window:
        gate = GATE_UNIT * feature_map.window_gate.float()[:, None]
        mix = gate + mix if feature_map.calibrated else gate.expand(mix.shape)
    if not query.is_cuda:  # Triton's interpreter cannot multiply bf16
        query, key, value = query.float(), key.float(), value.float()
    logits_dtype = torch.promote_types(query.dtype, key.dtype)
    rows, teacher, student, statistics = transfer_op(
        features.query.contiguous(),
        features.key.contiguous(),
        features.decay,
        log_weight.contiguous(),
        mix.contiguous(),
        _row_maxima(log_weight.detach(), spec.causal, window),
        features.key.detach().norm(dim=-1),
        query.to(logits_dtype).contiguous(),
        key.to(logits_dtype).contiguous(),
        value.contiguous(),
        None if visible is None else visible.to(torch.uint8).contiguous(),
        scaling,
        window,
        spec.causal,
        feature_map.signed,
        feature_map.calibrated,
    )
    count_guarded(statistics[4] > 0)
    return AttentionRows(*rows.unbind(), teacher, student)


def transfer_loss(
    feature_map: FeatureMap, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Cross-entropy plus relative output error of one layer, summed over queries. Shapes as in `tiled_rows`."""
    rows = tiled_rows(feature_map, query, key, value, scaling=scaling)
    return over_queries(rows.cross_entropy)[0] + relative_output_error(rows.teacher, rows.student)[0]


def _row_maxima(log_weight: torch.Tensor, causal: bool, window: int) -> torch.Tensor:
    """The largest log-weight (B, S, T) among the keys outside each row's window; -inf where there is none."""
    if not causal:
        return log_weight.amax(-1, keepdim=True).expand(log_weight.shape).contiguous()
    length = log_weight.shape[-1]
    maxima = torch.nn.functional.pad(log_weight.cummax(-1).values, (window, 0), value=-torch.inf)
    return maxima[..., :length].contiguous()


@torch.library.custom_op("flexdistill::attention_transfer", mutates_args=())
def transfer_op(
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    decay: torch.Tensor | None,
    log_weight: torch.Tensor,
    mix: torch.Tensor,
    row_maximum: torch.Tensor,
    k_norm: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    window: int,
    causal: bool,
    signed: bool,
    calibrated: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of `tiled_rows`, from features; every tensor is contiguous.

    Args:
        q_features: (B, H, T, F) float32; k_features: (B, S, T, F) float32; decay: (S, F) float32.
        log_weight: (B, S, T) float32, -inf at padding; k_norm: (B, S, T), the norms of k_features.
        mix: (B, H, T) float32, logarithm of the kernel's weight against the window's; read where there is a window.
        row_maximum: (B, S, T) float32, the largest log-weight that a row sees outside its window.
        query, key, value, scaling: as in `tiled_rows`, queries and keys of one dtype.
        visible: (B, T) uint8.

    Returns:
        (3, B, H, T): cross-entropy, entropy, negative mass; (B, H, T, D): the teacher's output; the student's;
        (5, B, H, T): what the backward pass needs (log2 of the teacher's sum, the far weights' factor, their share of
        the row's mass, the teacher's share of keys whose weight is not below the least, the bound of guarded rows).
    """
    rows, teacher, student, statistics = _outputs(q_features, value)
    kept, walked = _tiles(q_features.shape[-1], query, key, value)
    _kernels().forward_kernel[_grid(q_features, kept)](
        q_features, k_features, _pointer(decay, mix), log_weight, k_norm, row_maximum, mix, query, key, value,
        _pointer(visible, mix),
        rows, teacher, student, statistics, *_sizes(q_features, k_features, key, value, window), scaling * _LOG2E,
        SIGNED_GUARD if signed else POSITIVE_GUARD, LEAST_WEIGHT, QUERIES=kept, KEYS=walked, WINDOWED=window > 0,
        CALIBRATED=calibrated, DECAY=decay is not None,
        **_settings(q_features, query, value, visible, causal, signed, kept),
    )  # fmt: skip
    return rows, teacher, student, statistics


@transfer_op.register_fake
def _(q_features, k_features, decay, log_weight, mix, row_maximum, k_norm, query, key, value, *settings):
    return _outputs(q_features, value)


@torch.library.custom_op("flexdistill::attention_transfer_backward", mutates_args=())
def transfer_backward_op(
    d_rows: torch.Tensor,
    d_student: torch.Tensor,
    rows: torch.Tensor,
    student: torch.Tensor,
    statistics: torch.Tensor,
    q_features: torch.Tensor,
    k_features: torch.Tensor,
    decay: torch.Tensor | None,
    log_weight: torch.Tensor,
    row_maximum: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    scaling: float,
    window: int,
    causal: bool,
    signed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `transfer_op`'s features of queries and keys, its decay (S, F), its log-weights and its mix."""
    kernels = _kernels()
    _, far_scale, far_share, kept_share, bound = statistics
    d_cross_entropy, _, d_negative = d_rows
    d_student = d_student.to(_value_dtype(value)).contiguous()
    # sum_j a_ij (gradient by a_ij): what moves the denominator; where it is guarded, the bound has it instead
    common = d_negative * rows[2] - d_cross_entropy * kept_share + (d_student.float() * student).sum(-1)
    guarded = bound > 0
    d_bound = torch.where(guarded, -SIGNED_GUARD * far_scale * common, 0.0)
    # the bound is |phi(q)| sum_j exp(w_j - m) |phi(k_j)|; this is its gradient over the norm of a key
    d_bound_by_key = d_bound * q_features.norm(dim=-1)
    gradients = torch.stack([d_cross_entropy, d_negative, common.masked_fill(guarded, 0.0), d_bound_by_key])

    d_q_features, d_k_features = torch.empty_like(q_features), torch.empty_like(k_features)
    d_norm, d_far = torch.zeros_like(log_weight), torch.zeros_like(far_share)
    tensors = (
        q_features, k_features, _pointer(decay, common), log_weight, row_maximum, query, key, value,
        _pointer(visible, common), statistics, d_student, gradients,
    )  # fmt: skip
    sizes = (*_sizes(q_features, k_features, key, value, window), scaling * _LOG2E, LEAST_WEIGHT)
    kept, walked = _tiles(q_features.shape[-1], query, key, value)
    settings = _settings(q_features, query, value, visible, causal, signed, kept)
    settings |= dict(FEATURE_DTYPE=settings["VALUE_DTYPE"], DECAY=decay is not None)
    kernels.query_gradient_kernel[_grid(q_features, kept)](
        *tensors, d_q_features, d_far, *sizes, QUERIES=kept, KEYS=walked, WINDOWED=window > 0, **settings
    )
    kernels.key_gradient_kernel[_grid(k_features, kept)](
        *tensors, d_k_features, d_norm, *sizes, QUERIES=walked, KEYS=kept, **settings
    )
    if signed:
        d_q_features += _norm_gradient(q_features, d_bound * bound / _norm(q_features))
        d_k_features += _norm_gradient(k_features, d_norm)
    # scores and bounds are of degree one in a key's features, just as in exp(w)
    d_log_weight = (d_k_features * k_features).sum(-1)
    d_mix = d_far - far_share * common if window else d_far
    d_decay = d_q_features.new_empty(0)
    if decay is not None:
        # a pair of query i and key j counts exp(-decay (i - j - window)) times
        position = torch.arange(q_features.shape[2], device=q_features.device)[:, None]
        by_query = (position * d_q_features * q_features).sum((0, 2)).unflatten(0, (decay.shape[0], -1)).sum(1)
        d_decay = ((position + window) * d_k_features * k_features).sum((0, 2)) - by_query
    return d_q_features, d_k_features, d_decay, d_log_weight, d_mix


@transfer_backward_op.register_fake
def _(d_rows, d_student, rows, student, statistics, q_features, k_features, decay, log_weight, *rest):
    inputs = (q_features, k_features, q_features.new_empty(0) if decay is None else decay, log_weight, statistics[0])
    return tuple(torch.empty_like(x) for x in inputs)


def _setup_context(ctx, inputs, output) -> None:
    q_features, k_features, decay, log_weight, _, row_maximum, _, query, key, value, visible, *settings, _ = inputs
    rows, _, student, statistics = output
    ctx.save_for_backward(
        rows, student, statistics, q_features, k_features, decay, log_weight, row_maximum, query, key, value, visible
    )
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1], statistics)


def _backward(ctx, d_rows, _, d_student, __):
    rows, student, *saved = ctx.saved_tensors
    d_rows = torch.zeros_like(rows) if d_rows is None else d_rows
    d_student = torch.zeros_like(student) if d_student is None else d_student
    gradients = transfer_backward_op(d_rows, d_student, rows, student, *saved, *ctx.settings)
    d_q_features, d_k_features, d_decay, d_log_weight, d_mix = gradients
    return d_q_features, d_k_features, d_decay if len(d_decay) else None, d_log_weight, d_mix, *(None,) * 11


def _norm(features: torch.Tensor) -> torch.Tensor:
    return features.norm(dim=-1).clamp_min(torch.finfo(features.dtype).tiny)


def _norm_gradient(features: torch.Tensor, d_norm: torch.Tensor) -> torch.Tensor:
    return (d_norm / _norm(features))[..., None] * features


transfer_op.register_autograd(_backward, setup_context=_setup_context)


def _kernels():
    from . import triton_transfer

    return triton_transfer


def _outputs(q_features, value):
    batch, heads, length, _ = q_features.shape
    output = (batch, heads, length, value.shape[-1])
    shapes = (_ROWS, batch, heads, length), output, output, (_STATISTICS, batch, heads, length)
    return tuple(q_features.new_empty(shape) for shape in shapes)


def _pointer(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A kernel takes a pointer where it reads nothing, too."""
    return other if tensor is None else tensor


def _sizes(q_features, k_features, key, value, window) -> tuple[int, ...]:
    batch, heads, length, features = q_features.shape
    return (
        batch * heads * length, heads, k_features.shape[1], key.shape[1], length, window, key.shape[-1],
        value.shape[-1], features,
    )  # fmt: skip


def _value_dtype(value: torch.Tensor) -> torch.dtype:
    """What products with values are computed in; bf16 for fp16 too, which cannot hold small gradients."""
    return torch.float32 if value.dtype == torch.float32 else torch.bfloat16


def _settings(q_features, query, value, visible, causal, signed, kept) -> dict:
    import triton.language as tl

    features = _power(q_features.shape[-1])
    return dict(
        CAUSAL=causal,
        SIGNED=signed,
        MASKED=visible is not None,
        BLOCK_D=_power(query.shape[-1]),
        BLOCK_V=_power(value.shape[-1]),
        BLOCK_F=features,
        VALUE_DTYPE=tl.float32 if value.dtype == torch.float32 else tl.bfloat16,
        PRECISION="tf32x3" if _is_exact(query, value) else "tf32",
        # two programs of four warps share a processor where they fit, and one's products hide the other's exponentials
        num_warps=4 if kept * features <= 64 * 128 else 8,
        num_stages=2,
    )


def _is_exact(query: torch.Tensor, value: torch.Tensor) -> bool:
    return query.dtype == value.dtype == torch.float32


def _tiles(num_features: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, int] | None:
    """The largest of `_TILES` of which two stages fit on chip; None if none does."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    token = 4 * _power(num_features) + dtype.itemsize * _power(query.shape[-1])
    token += _value_dtype(value).itemsize * _power(value.shape[-1])
    if _is_exact(query, value):  # three-pass products keep a second part of every number
        token *= 1.6
    memory = _INTERPRETED_BYTES
    if query.device.type == "cuda":
        memory = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    return next((tiles for tiles in _TILES if (tiles[0] + 2 * tiles[1]) * token <= memory), None)


def _grid(features: torch.Tensor, tile: int) -> tuple[int, int]:
    batch, heads, length, _ = features.shape
    return -(-length // tile), batch * heads


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
