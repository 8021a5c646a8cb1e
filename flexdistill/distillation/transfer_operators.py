"""Attention transfer as torch operators: what launches the Triton kernels, with fake kernels and autograd."""

from __future__ import annotations

import torch

from ..losses import LEAST_WEIGHT
from ..runtime.feature_maps import POSITIVE_GUARD, SIGNED_GUARD

# statistics and losses are kept as rows of one tensor: how many of each
_ROWS, _STATISTICS = 4, 5
_LOG2E = 1.4426950408889634
# tokens of the tile that a program keeps and of those that it walks along, largest first
TILES = (64, 32), (32, 32), (16, 16)
# tokens whose features decay relative to one of them; a multiple of every tile. Features grow at most by e in a token
DECAY_BLOCK = 64
# of a GPU with the largest on-chip memory; what Triton's interpreter is given, so that tests see its tiles
_INTERPRETED_BYTES = 227 * 1024


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
    sinks: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rows of `tiled_rows`, from features; every tensor is contiguous.

    Args:
        q_features: (B, H, T, F), k_features: (B, S, T, F): float32 or bf16, relative to blocks where they decay.
        decay: (S, F) float32; its gradient is the whole one, through features that are relative to blocks, too.
        log_weight: (B, S, T) float32, -inf at padding; k_norm: (B, S, T), the norms of signed k_features.
        mix: (B, H, T) float32, logarithm of the kernel's weight against the window's; read where there is a window.
        row_maximum: (B, S, T) float32, the largest log-weight that a row sees outside its window.
        query, key, value, scaling: as in `tiled_rows`, all of one dtype.
        visible: (B, T) uint8: what each token is (`near.token_kinds`); sinks' log_weight is -inf, too.

    Returns:
        (4, B, H, T): cross-entropy, entropy, negative mass, the teacher's share of keys whose weight is not below the
        least; (B, H, T, D): the teacher's output; the student's; (5, B, H, T): log2 of the teacher's sum, the far
        weights' factor, their share of the row's mass, the bound of guarded rows, log2 of the near weights' divisor.
    """
    rows, teacher, student, statistics = _outputs(q_features, value)
    kept, walked = tiles(q_features.shape[-1], q_features.dtype, query, value)
    settings = _settings(q_features, query, value, visible, decay, causal, signed, kept)
    settings |= dict(QUERIES=kept, KEYS=walked, WINDOWED=window > 0)
    sizes = (*_sizes(q_features, k_features, key, value, window), scaling * _LOG2E)
    features, visible = (q_features, k_features, _pointer(decay, mix), log_weight), _pointer(visible, mix)
    _kernels().totals_kernel[_grid(q_features, kept)](
        *features, k_norm, row_maximum, mix, query, key, visible, statistics, *sizes,
        SIGNED_GUARD if signed else POSITIVE_GUARD, CALIBRATED=calibrated, SINKS=sinks, **settings,
    )  # fmt: skip
    _kernels().rows_kernel[_grid(q_features, kept)](
        *features, row_maximum, query, key, value, visible, rows, teacher, student, statistics, *sizes, LEAST_WEIGHT,
        SINKS=sinks, **_for_three_programs(settings | _value_settings(value), q_features),
    )  # fmt: skip
    return rows, teacher, student, statistics


@transfer_op.register_fake
def _(q_features, k_features, decay, log_weight, mix, row_maximum, k_norm, query, key, value, *settings):
    return _outputs(q_features, value)


@torch.library.custom_op("flexdistill::attention_transfer_backward", mutates_args=())
def transfer_backward_op(
    gradients: torch.Tensor,
    d_student: torch.Tensor,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of features (B, H, T, F) and (B, S, T, F), log-weights (B, S, T), far weights (B, H, T); moments.

    Features' are in their dtype and those of signed queries without their norms'; all else is float32. Far weights' are
    without what rows have in common. `gradients` (4, B, H, T) is what `load_row_numbers` reads. Of positions times
    gradients of log features, moments (B, H, tiles, F) and (B, S, tiles, F) are each tile's sum; none without a decay.
    """
    kernels = _kernels()
    kept, walked = tiles(q_features.shape[-1], q_features.dtype, query, value)
    outputs = _gradients(q_features, k_features, decay, log_weight, statistics, window, kept)
    d_q_features, d_k_features, d_log_weight, d_far, q_moments, k_moments = outputs
    tensors = (
        q_features, k_features, _pointer(decay, gradients), log_weight, row_maximum, query, key, value,
        _pointer(visible, gradients), statistics, d_student, gradients,
    )  # fmt: skip
    sizes = (*_sizes(q_features, k_features, key, value, window), scaling * _LOG2E, LEAST_WEIGHT)
    settings = _settings(q_features, query, value, visible, decay, causal, signed, kept)
    settings = _for_three_programs(settings | _value_settings(value), q_features)
    settings["FEATURE_DTYPE"] = settings["VALUE_DTYPE"]
    kernels.query_gradient_kernel[_grid(q_features, kept)](
        *tensors, d_q_features, q_moments, d_far, *sizes, QUERIES=kept, KEYS=walked, WINDOWED=window > 0, **settings
    )
    # keys' tiles are aligned where they stand `window` later
    kernels.key_gradient_kernel[_grid(k_features, kept, window % kept)](
        *tensors, d_k_features, k_moments, d_log_weight, *sizes, QUERIES=walked, KEYS=kept, **settings
    )
    return outputs


@transfer_backward_op.register_fake
def _(gradients, d_student, statistics, q_features, k_features, decay, log_weight, row_maximum, query, key, value,
      visible, scaling, window, *settings):  # fmt: skip
    kept, _ = tiles(q_features.shape[-1], q_features.dtype, query, value)
    return _gradients(q_features, k_features, decay, log_weight, statistics, window, kept)


def _gradients(q_features, k_features, decay, log_weight, statistics, window, tile):
    moments = []
    for features, before in ((q_features, 0), (k_features, window % tile)):
        batch, heads, _, size = features.shape
        count = 0 if decay is None else _grid(features, tile, before)[0]
        moments.append(statistics.new_empty(batch, heads, count, size))
    features = (torch.empty_like(x) for x in (q_features, k_features))
    return *features, torch.empty_like(log_weight), torch.zeros_like(statistics[0]), *moments


def _setup_context(ctx, inputs, output) -> None:
    q_features, k_features, decay, log_weight, _, row_maximum, _, query, key, value, visible, *settings, _, _ = inputs
    rows, _, student, statistics = output
    ctx.save_for_backward(
        rows, student, statistics, q_features, k_features, decay, log_weight, row_maximum, query, key, value, visible
    )
    ctx.settings = settings
    ctx.mark_non_differentiable(output[1], statistics)


def _backward(ctx, d_rows, _, d_student, __):
    rows, student, statistics, q_features, k_features, decay, *saved = ctx.saved_tensors
    _, window, _, signed = ctx.settings
    value = saved[4]
    d_rows = torch.zeros_like(rows) if d_rows is None else d_rows
    d_student = torch.zeros_like(student) if d_student is None else d_student
    d_student = d_student.to(_value_dtype(value)).contiguous()
    _, far_scale, far_share, bound, _ = statistics
    d_cross_entropy, _, d_negative, _ = d_rows
    kept_share = rows[3]
    # sum_j a_ij (gradient by a_ij): what moves the denominator; where it is guarded, the bound has it instead
    common = d_negative * rows[2] - d_cross_entropy * kept_share + (d_student.float() * student).sum(-1)
    guarded = bound > 0
    d_bound = d_bound_by_key = torch.zeros_like(common)
    if signed:
        d_bound = torch.where(guarded, -SIGNED_GUARD * far_scale * common, 0.0)
        # the bound is |phi(q)| sum_j exp(w_j - m) |phi(k_j)|; this is its gradient over the norm of a key
        q_norm = q_features.norm(dim=-1)
        d_bound_by_key = d_bound * q_norm
    gradients = torch.stack([d_cross_entropy, d_negative, common.masked_fill(guarded, 0.0), d_bound_by_key])
    d_q_features, d_k_features, d_log_weight, d_far, q_moments, k_moments = transfer_backward_op(
        gradients, d_student, statistics, q_features, k_features, decay, *saved, *ctx.settings
    )
    if signed:
        q_norm = q_norm.clamp_min(torch.finfo(q_norm.dtype).tiny)
        d_q_features = d_q_features + (d_bound * bound / q_norm / q_norm)[..., None] * q_features
    d_mix = d_far - far_share * common if window else d_far
    d_decay = None
    if decay is not None:
        # a pair of query i and key j counts exp(-decay (i - j - window)) times
        by_query = q_moments.sum((0, 2)).unflatten(0, (decay.shape[0], -1)).sum(1)
        d_decay = k_moments.sum((0, 2)) - by_query
    return d_q_features, d_k_features, d_decay, d_log_weight, d_mix, *(None,) * 12


transfer_op.register_autograd(_backward, setup_context=_setup_context)


def _kernels():
    from . import triton_transfer

    return triton_transfer


def _outputs(q_features, value):
    batch, heads, length, _ = q_features.shape
    output = (batch, heads, length, value.shape[-1])
    shapes = (_ROWS, batch, heads, length), output, output, (_STATISTICS, batch, heads, length)
    return tuple(q_features.new_empty(shape, dtype=torch.float32) for shape in shapes)


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


def _settings(q_features, query, value, visible, decay, causal, signed, kept) -> dict:
    features = _power(q_features.shape[-1])
    return dict(
        CAUSAL=causal,
        SIGNED=signed,
        MASKED=visible is not None,
        DECAY=decay is not None,
        DECAY_BLOCK=DECAY_BLOCK,
        BLOCK_D=_power(query.shape[-1]),
        BLOCK_F=features,
        PRECISION="tf32x3" if is_exact(value) else "tf32",
        # two programs of four warps share a processor where they fit, and one's products hide the other's exponentials
        num_warps=4 if kept * features <= 64 * 128 else 8,
        num_stages=2,
    )


def _value_settings(value) -> dict:
    """Further ones of the kernels that read values."""
    import triton.language as tl

    dtype = tl.float32 if _value_dtype(value) == torch.float32 else tl.bfloat16
    return dict(BLOCK_V=_power(value.shape[-1]), VALUE_DTYPE=dtype)


def _for_three_programs(settings: dict, q_features: torch.Tensor) -> dict:
    """Registers and memory of which three programs share a processor, where that spills little: faster by a tenth."""
    if q_features.dtype != torch.bfloat16 or settings["num_warps"] != 4:
        return settings
    return settings | dict(maxnreg=168, num_stages=1)


def is_exact(value: torch.Tensor) -> bool:
    return value.dtype == torch.float32


def tiles(num_features: int, dtype: torch.dtype, query: torch.Tensor, value: torch.Tensor) -> tuple[int, int] | None:
    """The largest of `TILES` of which two stages fit on chip, with features of `dtype`; None if none does."""
    token = dtype.itemsize * _power(num_features)
    token += value.dtype.itemsize * _power(query.shape[-1])
    token += _value_dtype(value).itemsize * _power(value.shape[-1])
    if is_exact(value):  # three-pass products keep a second part of every number
        token *= 1.6
    memory = _INTERPRETED_BYTES
    if query.device.type == "cuda":
        memory = torch.cuda.get_device_properties(query.device).shared_memory_per_block_optin
    return next((tile for tile in TILES if (tile[0] + 2 * tile[1]) * token <= memory), None)


def _grid(features: torch.Tensor, tile: int, before: int = 0) -> tuple[int, int]:
    batch, heads, length, _ = features.shape
    return -(-(before + length) // tile), batch * heads


def _power(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())
