"""The backward pass of fused attention as a torch operator."""

import torch

try:
    import triton
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .launch import (
    Shape,
    blocks_of,
    floats,
    guard_of,
    kernel_settings,
    key_map_tensors,
    key_states,
    kinds_of,
    map_tensors,
    near_sides,
    power,
    processors_of,
    row_major,
    scan,
    segment_length,
    token_strides,
    window_launch,
)
from .triton_backward import delta_kernel, map_gradient_kernel, query_states_kernel, value_gradient_kernel
from .triton_backward_features import key_gradient_kernel, query_gradient_kernel
from .triton_window import window_key_kernel, window_query_kernel

# one operator namespace per copy of this code, so that a checkpoint's copy does not serve another's model
NAMESPACE = __name__.rsplit(".", 1)[0].replace(".", "_")


def map_gradients(x, x_map, d_features, scale, settings, dtype: torch.dtype | None = None, features=None):
    """Gradients of tokens x in `dtype`, one (B, H, T, d) for each query head, and of each head's map, flat.

    Args:
        x: (B, K, T, d), any strides but for contiguous rows; `scale` multiplies it.
        x_map: W1 (M, d, n), W2, amplitudes and norm factor of M heads, K and M divide H; float32.
        d_features: (slices, B, H, T, 2 n), to be summed over slices: gradients of the hyperbolic features' logarithms.
        features: (B, H, T, 2 n); where they are given, `d_features` are gradients of them instead, and their dtype, not
            that of x, is what products are computed in.
        dtype: of the tokens' gradient; None for none of it.
    """
    w1 = x_map[0]
    slices, batch, heads, length, _ = d_features.shape
    size, frequencies = w1.shape[1:]
    span = segment_length(batch * heads, length, processors_of(x.device))
    spans = -(-length // span)
    d_x = None if dtype is None else torch.empty(batch, heads, length, size, dtype=dtype, device=x.device)
    d_map = floats(x, batch, heads, spans, flat_size(size, frequencies, settings["DECAY"]))
    blocks = blocks_of((x if features is None else features).dtype)
    map_gradient_kernel[(spans, batch * heads)](
        x, *x_map, features, d_features, d_x, d_map, *token_strides(x), heads, w1.shape[0], x.shape[1], length,
        d_features.stride(0), slices, span, size, frequencies, scale,
        BLOCK_D=power(size), BLOCK_N=power(frequencies), CHUNK=blocks.chunk,
        **{name: settings[name] for name in ("HYPERBOLIC", "NONSTATIONARY", "DECAY", "DTYPE", "PRECISION")},
        STAGES=blocks.stages, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return d_x, d_map.sum((0, 2))


def _query_states(shape, query, q_map, decay, rows, table, scale, guard, flags):
    """States (B * H, records, D + 1, F) of the queries after each segment, or of all segments' queries."""
    pairs, records = shape.batch * shape.heads, shape.records
    size = (shape.value_size + 1) * 2 * shape.frequencies
    values, norms = floats(query, pairs, records, size), floats(query, pairs, records)
    if records:
        maximum = torch.empty_like(norms)
        flags = {name: flag for name, flag in flags.items() if name != "MASKED"}
        query_states_kernel[(records, pairs, shape.slices)](
            query, *q_map[:3], decay, *rows, values, norms, maximum, table, *token_strides(query, rows[-1]),
            shape.heads, shape.state_heads, shape.length, shape.segment_length, records, shape.size, shape.value_size,
            shape.frequencies, scale, guard,
            **shape.sizes, **flags,
        )  # fmt: skip
        if records > 1:
            scan(shape, shape.heads, values, norms, maximum, maximum, table, decay, True, flags)
    return values, norms


@torch.library.custom_op(f"{NAMESPACE}::attention_backward", mutates_args=())
def attention_backward_op(
    d_output: torch.Tensor,
    output: torch.Tensor,
    row_reference: torch.Tensor,
    row_shift: torch.Tensor,
    row_guarded: torch.Tensor,
    row_lse: torch.Tensor,
    row_flags: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    near_query: torch.Tensor | None,
    near_key: torch.Tensor | None,
    visible: torch.Tensor | None,
    spans: torch.Tensor | None,
    q_w1: torch.Tensor,
    q_w2: torch.Tensor | None,
    q_amplitude: torch.Tensor | None,
    q_norm_factor: torch.Tensor,
    k_w1: torch.Tensor,
    k_w2: torch.Tensor | None,
    k_amplitude: torch.Tensor | None,
    k_norm_factor: torch.Tensor,
    decay: torch.Tensor | None,
    gate: torch.Tensor,
    segments: torch.Tensor | None,
    first: torch.Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    scaling: float,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """Gradients of query, key and value, near query and near key, and both maps as flat rows per head (`split_map`).

    Those of near queries and keys are empty where none are given.
    """
    query, key, value, d_output = (row_major(x) for x in (query, key, value, d_output))
    shape = Shape.of(query, key, value, q_w1, k_w1, causal, 0, window, segments)
    settings = kernel_settings(q_w2, q_amplitude, decay, visible, segments, query)
    pairs, length, guard = shape.batch * shape.heads, shape.length, guard_of(q_amplitude)
    q_map = map_tensors(q_w1, q_w2, q_amplitude, q_norm_factor)
    k_map = key_map_tensors(decay, k_w1, k_w2, k_amplitude, k_norm_factor)
    kinds, entering = kinds_of(visible, spans)
    visible = q_w1 if entering is None else entering
    table = q_w1 if segments is None else segments

    delta = torch.empty_like(row_shift)
    delta_kernel[(triton.cdiv(length, 64), pairs)](
        output, d_output, delta, *token_strides(output, d_output), shape.heads, length, shape.value_size,
        BLOCK_V=power(shape.value_size), TILE=64,
    )  # fmt: skip
    rows = (row_reference, row_shift, row_guarded, delta, d_output)
    sizes = (
        shape.heads, shape.state_heads, shape.kv_heads, length, shape.keys, shape.segment_length, shape.records,
        shape.delay, shape.size, shape.value_size, shape.frequencies, scale, guard,
    )  # fmt: skip
    strides = token_strides(query, key, value, d_output)
    flags = dict(settings, CAUSAL=causal)

    variants = (False, True) if causal else (False,)
    new = torch.zeros if window else torch.empty  # the last keys of a window never enter the state

    slices = shape.slices
    # slices of values nearly cancel, so they are summed in float32
    working = torch.bfloat16 if slices == 1 and query.dtype != torch.float32 else torch.float32
    d_features = torch.empty(
        slices, shape.batch, shape.heads, length, 2 * shape.frequencies, dtype=working, device=query.device
    )
    states = key_states(shape, key, value, visible, k_map, (q_w1,) * 3, table, dict(settings, INITIAL=False))
    for exact in variants:
        query_gradient_kernel[(shape.segments, pairs, 2 * slices)](
            query, key, value, visible, *q_map[:3], *k_map, *states, *rows, d_features, row_flags, table, *strides,
            *sizes, EXACT=exact, **shape.sizes, **flags,
        )  # fmt: skip
    # without a window a query's norm factor cancels
    q_factor = q_norm_factor if window else gate
    dtype = torch.float32 if window else query.dtype
    d_query, d_q_map = map_gradients(query, (*q_map[:3], q_factor), d_features, scale, settings, dtype)

    values, norms = _query_states(shape, query, q_map, k_map[-1], rows, table, scale, guard, flags)
    d_features = new(
        slices, shape.batch, shape.heads, shape.keys, 2 * shape.frequencies, dtype=working, device=query.device
    )
    for exact in variants:
        key_gradient_kernel[(shape.segments, pairs, 2 * slices)](
            query, key, value, visible, *q_map[:3], *k_map, values, norms, *rows, d_features, row_flags, table,
            *strides, *sizes, EXACT=exact, **shape.sizes, **flags,
        )  # fmt: skip
    # final in the inputs' dtype unless parts are yet to be summed
    parts = window > 0 or shape.heads > shape.kv_heads
    d_key, d_k_map = map_gradients(key, k_map[:4], d_features, 1.0, settings, torch.float32 if parts else key.dtype)

    dtype = torch.float32 if parts else value.dtype
    d_value = new(shape.batch, shape.heads, shape.keys, shape.value_size, dtype=dtype, device=key.device)
    for exact in variants:
        value_gradient_kernel[(shape.segments, pairs, slices)](
            query, key, visible, *q_map[:3], *k_map, values, norms, row_reference, row_shift, d_output, d_value,
            row_flags, table, *token_strides(query, key, d_output), *sizes[:-1], EXACT=exact, **shape.sizes,
            **flags,
        )  # fmt: skip
    d_near_query, d_near_key = query.new_empty(0), key.new_empty(0)
    if window:
        near = near_sides(query, key, near_query, near_key)
        apart = near_query is not None
        # the window's kernels add to what is there
        targets = (torch.zeros_like(d_query), torch.zeros_like(d_key)) if apart else (d_query, d_key)
        inputs, keys = (row_lse, delta, d_output), (kinds, first, spans)
        for kernel, count, outputs in (
            (window_query_kernel, length, targets[:1]),
            (window_key_kernel, shape.keys, (targets[1], d_value)),
        ):
            window_launch(
                kernel, shape, settings, count, (*near, value, d_output), keys, (*inputs, *outputs), scaling, 0, window
            )
        if apart:
            d_near_query = targets[0].to(query.dtype)
            d_near_key = _summed(targets[1], shape).to(key.dtype)
    if parts:
        d_key, d_value = _summed(d_key, shape), _summed(d_value, shape)
    groups = shape.heads // shape.state_heads
    return (
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        d_value.to(value.dtype),
        d_near_query,
        d_near_key,
        d_q_map,
        d_k_map.unflatten(0, (shape.state_heads, groups)).sum(1),
    )


def _summed(parts: torch.Tensor, shape: Shape) -> torch.Tensor:
    """(B, H, T, d) -> (B, K, T, d): over each KV head's queries."""
    return parts.unflatten(1, (shape.kv_heads, -1)).sum(2)


@attention_backward_op.register_fake
def _(d_output, output, row_reference, row_shift, row_guarded, row_lse, row_flags, query, key, value, near_query,
      near_key, visible, spans, q_w1, q_w2, q_amplitude, q_norm_factor, k_w1, k_w2, k_amplitude, k_norm_factor, decay,
      gate, segments, first, causal, window, scale, scaling):  # fmt: skip
    size = flat_size(*q_w1.shape[1:], decay is not None)
    gradients = [x.new_empty(x.shape) for x in (query, key, value)]
    gradients += [x.new_empty(0 if near_key is None else x.shape) for x in (query, key)]
    return *gradients, floats(query, q_w1.shape[0], size), floats(query, k_w1.shape[0], size)


def flat_size(size: int, frequencies: int, decays: bool) -> int:
    """Numbers of one head in what `split_map` takes apart."""
    return 2 * size * frequencies + 2 * frequencies + 2 + (2 * frequencies if decays else 0)


def split_map(flat: torch.Tensor, w1, w2, amplitude):
    """Flat rows per head -> gradients of W1, W2, amplitudes, norm factor and gate, and what decays are made from."""
    size = w1[0].numel()
    sizes = [size, size, 2 * w1.shape[2], 1, 1]
    d_w1, d_w2, d_amplitude, d_norm_factor, d_gate, moments = flat.split([*sizes, flat.shape[1] - sum(sizes)], dim=1)
    return (
        d_w1.unflatten(1, w1.shape[1:]),
        None if w2 is None else d_w2.unflatten(1, w1.shape[1:]),
        None if amplitude is None else d_amplitude,
        d_norm_factor.squeeze(1),
        d_gate.squeeze(1),
        moments,
    )
