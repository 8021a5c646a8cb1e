"""Fused Flexformer attention as torch operators: what launches the Triton kernels, with fake kernels and autograd.

Matrix units take bf16 where inputs are bf16 or fp16 (fp16 cannot hold states of long texts), and three-pass tf32 where
they are float32; logarithms, sums, states and gradients of parameters are float32 throughout. Results do not depend on
the order in which the GPU runs programs, so equal inputs give equal bits.
"""

import torch

try:
    import triton
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .feature_maps import DECAY_UNIT, GATE_UNIT, NORM_UNIT, FeatureMap, constant_zeros
from .fused_backward import NAMESPACE, attention_backward_op, split_map
from .fused_rotary import turn_op
from .launch import (
    Shape,
    decoded_together,
    floats,
    guard_of,
    kernel_settings,
    key_map_tensors,
    key_states,
    kinds_of,
    like_output,
    map_tensors,
    near_sides,
    packed_segments,
    power,
    processors_of,
    row_major,
    segment_length,
    segments_of,
    token_strides,
    window_launch,
)
from .linear_attention import State
from .near import far_side, kinds_and_spans, near_side, sink_spans, visible_or_all
from .triton_decode import decode_kernel
from .triton_forward import outputs_kernel
from .triton_window import window_forward_kernel

# head sizes and frequencies that a multiprocessor's shared memory can hold
LARGEST_SIZE = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention_op(
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
    initial_values: torch.Tensor | None,
    initial_norms: torch.Tensor | None,
    initial_maximum: torch.Tensor | None,
    segments: torch.Tensor | None,
    first: torch.Tensor | None,
    causal: bool,
    window: int,
    past: int,
    scale: float,
    scaling: float,
    final: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor,
    torch.Tensor,
]:  # fmt: skip
    """Attention of queries (B, H, T, d) to keys (B, K, past + T, d) and values (B, K, past + T, D).

    The window takes the near queries and keys, of the same shapes, in their place where they are given. `visible` is
    bool or, with sinks, what each key is (`near.token_kinds`), and `spans` where the sinks are: int32 (B, 2) or, in
    packed sequences, (T, 2) by query.
    Returns the output (B, H, T, D); of each row its reference and shift (see `outputs_kernel`), whether it was guarded
    and, with a window, log2 of its whole sum; which segments were flagged; and where `final`, the state's values
    (B, S, D + 1, F), norms and maximum after the last position.
    """
    query, key, value = row_major(query), row_major(key), row_major(value)
    shape = Shape.of(query, key, value, q_w1, k_w1, causal, past, window, segments)
    settings = kernel_settings(q_w2, q_amplitude, decay, visible, segments, query)
    initial = (initial_values, initial_norms, initial_maximum)
    k_map = key_map_tensors(decay, k_w1, k_w2, k_amplitude, k_norm_factor)
    kinds, entering = kinds_of(visible, spans)
    visible = q_w1 if entering is None else entering
    states_settings = dict(settings, INITIAL=initial_values is not None)
    initial = tuple(q_w1 if x is None else x for x in initial)
    table = q_w1 if segments is None else segments
    values, norms, maximum = key_states(shape, key, value, visible, k_map, initial, table, states_settings)

    output = like_output(query, value)
    rows = [floats(query, shape.batch, shape.heads, shape.length) for _ in range(2)]
    rows.append(torch.empty_like(rows[0], dtype=torch.int8))
    rows.append(floats(query, *(rows[0].shape if window else (0,))))
    pairs = (shape.batch, shape.state_heads) if final else (0, 0)
    final_values = floats(query, *pairs, shape.value_size + 1, 2 * shape.frequencies)
    finals = (final_values, floats(query, *pairs), floats(query, *pairs))
    near, near_lse = output, rows[3]
    if window:
        near, near_lse = like_output(query, value), torch.empty_like(rows[0])
        sides = near_sides(query, key, near_query, near_key)
        window_launch(
            window_forward_kernel, shape, settings, shape.length, (*sides, value, near),
            (kinds, first, spans), (near, near_lse), scaling, past, window,
        )  # fmt: skip
    flags = torch.empty(shape.batch * shape.heads, shape.segments, dtype=torch.int32, device=query.device)
    for exact in (False, True) if causal else (False,):
        outputs_kernel[(shape.segments, shape.batch * shape.heads, shape.slices)](
            query, key, value, visible, *map_tensors(q_w1, q_w2, q_amplitude, q_norm_factor), *k_map, gate,
            values, norms, maximum, *initial, *finals, near, near_lse, output, *rows, flags, table,
            *token_strides(query, key, value, output), shape.heads, shape.state_heads, shape.kv_heads, shape.length,
            shape.keys, shape.segment_length, shape.records, shape.delay, shape.size, shape.value_size,
            shape.frequencies, scale, guard_of(q_amplitude), CAUSAL=causal, WINDOW=window > 0, FINAL=final, EXACT=exact,
            **shape.sizes, **states_settings,
        )  # fmt: skip
    return output, *rows, flags, *finals


@attention_op.register_fake
def _(query, key, value, near_query, near_key, visible, spans, q_w1, q_w2, q_amplitude, q_norm_factor, k_w1, k_w2,
      k_amplitude, k_norm_factor, decay, gate, initial_values, initial_norms, initial_maximum, segments, first, causal,
      window, past, scale, scaling, final):  # fmt: skip
    batch, heads, length, _ = query.shape
    row = (batch, heads, length)
    pairs = (batch, k_w1.shape[0]) if final else (0, 0)
    return (
        like_output(query, value),
        floats(query, *row),
        floats(query, *row),
        torch.empty(row, dtype=torch.int8, device=query.device),
        floats(query, *(row if window else (0,))),
        torch.empty(batch * heads, segments_of(query, segments), dtype=torch.int32, device=query.device),
        floats(query, *pairs, value.shape[-1] + 1, 2 * q_w1.shape[2]),
        floats(query, *pairs),
        floats(query, *pairs),
    )


def _setup_context(ctx, inputs, output) -> None:
    (*tensors, _, _, _, segments, first, causal, window, past, scale, scaling, final) = inputs
    ctx.save_for_backward(*output[:6], *tensors, segments, first)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = (causal, window, scale, scaling)


def _backward(ctx, d_output, *_):
    saved = ctx.saved_tensors  # activation checkpointing gives them out once
    gradients = attention_backward_op(d_output, *saved, *ctx.settings)
    d_query, d_key, d_value, d_near_query, d_near_key, d_q_map, d_k_map = gradients
    near = (None, None) if saved[9] is None else (d_near_query, d_near_key)
    q_w1, q_w2, q_amplitude, _, k_w1, k_w2, k_amplitude, _, decay = saved[13:22]
    *q_gradients, d_gate, q_moments = split_map(d_q_map, q_w1, q_w2, q_amplitude)
    *k_gradients, _, k_moments = split_map(d_k_map, k_w1, k_w2, k_amplitude)
    d_decay = None
    if decay is not None:
        # a pair of query i and key j counts exp(-decay (i - j - window)) times; the sums over i and over j nearly
        # cancel, so in bf16 this gradient carries noise: a fourth of its norm over 1,037 random tokens
        _, window, *_ = ctx.settings
        q_moments = q_moments.unflatten(0, (decay.shape[0], -1)).sum(1)
        d_decay = k_moments + window * k_gradients[2] - q_moments
    return d_query, d_key, d_value, *near, None, None, *q_gradients, *k_gradients, d_decay, d_gate, *(None,) * 11


attention_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op(f"{NAMESPACE}::decode", mutates_args=("values", "norms", "maximum"))
def decode_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    q_w1: torch.Tensor,
    q_w2: torch.Tensor | None,
    q_amplitude: torch.Tensor | None,
    q_unit: torch.Tensor | None,
    k_w1: torch.Tensor,
    k_w2: torch.Tensor | None,
    k_amplitude: torch.Tensor | None,
    k_unit: torch.Tensor | None,
    norm: torch.Tensor,
    decay: torch.Tensor | None,
    values: torch.Tensor,
    norms: torch.Tensor,
    maximum: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds one token's key (B, K, 1, d) and value (B, K, 1, D) to the state, in place, and attends to it.

    The maps are as `FeatureMap.raw_spectrum` gives them.
    Returns the output (B, H, 1, D) for the query (B, H, 1, d), and which rows were guarded (B, H, 1).
    """
    query, key, value = row_major(query), row_major(key), row_major(value)
    batch, heads, _, size = query.shape
    state_heads, value_size, frequencies = k_w1.shape[0], value.shape[3], q_w1.shape[2]
    settings = kernel_settings(q_w2, q_amplitude, decay, visible, None, query)
    del settings["PACKED"]
    output = query.new_empty(batch, heads, 1, value_size)
    guarded = torch.empty(batch, heads, 1, dtype=torch.int8, device=query.device)
    sequences = decoded_together(state_heads, batch, processors_of(query.device))
    visible = q_w1 if visible is None else visible.to(torch.uint8).contiguous()
    maps = (q_w1, q_w2, q_amplitude, q_unit, k_w1, k_w2, k_amplitude, k_unit, norm, decay)
    maps = (q_w1 if x is None else x.contiguous() for x in maps)
    decode_kernel[(state_heads, triton.cdiv(batch, sequences))](
        query, key, value, visible, *maps, values, norms, maximum, output, guarded, *query.stride()[:2],
        *key.stride()[:2], *value.stride()[:2], batch, heads, state_heads, key.shape[1], q_w1.shape[0], NORM_UNIT,
        DECAY_UNIT, size, value_size, frequencies, scale, guard_of(q_amplitude), BLOCK_D=power(size),
        BLOCK_V=power(value_size), BLOCK_N=power(frequencies), ROWS=16, SEQUENCES=sequences,
        GROUP=heads // state_heads, num_warps=4, num_stages=1, **settings,
    )  # fmt: skip
    return output, guarded


@decode_op.register_fake
def _(query, key, value, *rest):
    batch, heads, _, _ = query.shape
    guarded = torch.empty(batch, heads, 1, dtype=torch.int8, device=query.device)
    return query.new_empty(batch, heads, 1, value.shape[-1]), guarded


class FusedAttention:
    """Attention of a feature map through the fused operators; shapes as in `attention.attend`."""

    @staticmethod
    def obstacle(feature_map: FeatureMap, query: torch.Tensor, value: torch.Tensor) -> str | None:
        """Why the kernels cannot serve this map at these sizes in this dtype; None if they can."""
        spec = feature_map.spec
        if not feature_map.has_spectrum:
            return f"the kernel {spec.variant} is not theirs"
        if feature_map.signed and spec.decay:
            return "signed features do not decay there"
        if query.dtype not in LARGEST_SIZE:
            return f"they do not compute in {query.dtype}"
        if max(spec.head_dim, spec.num_frequencies, value.shape[-1]) > LARGEST_SIZE[query.dtype]:
            return f"head size and frequencies may be at most {LARGEST_SIZE[query.dtype]} in {query.dtype}"
        return None

    @staticmethod
    def needs_gradient(feature_map: FeatureMap, *tensors: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *feature_map.parameters()))

    @staticmethod
    def turns(x: torch.Tensor) -> bool:
        """Whether `turned_back` knows the dtype of queries or keys."""
        return x.dtype in LARGEST_SIZE

    @staticmethod
    def turned_back(
        x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], layout: str, kept: int
    ) -> torch.Tensor:
        """As `rotary.turned_back`, in one launch."""
        return turn_op(x, *rotation, layout != "halves", 2 if layout == "interleaved" else 1, kept, True)

    @staticmethod
    def attend(feature_map, query, key, value, scaling, visible, boundaries: list[int] | None = None):
        """Output and which rows were guarded; with `boundaries`, of sequences laid end to end."""
        packed, spans, spec = (None, None), None, feature_map.spec
        if spec.sinks:
            visible, spans = kinds_and_spans(visible_or_all(visible, query), spec.sinks, boundaries)
        if boundaries is not None:
            longest = segment_length(query.shape[1], query.shape[2], processors_of(query.device))
            packed = packed_segments(boundaries, longest, query.device)
        output, _, _, guarded, *_ = _call(
            feature_map, query, key, value, scaling, visible, spans, None, 0, False, packed
        )
        return output, guarded

    @staticmethod
    def prefill(feature_map, query, key, value, scaling, visible, state: State | None, past: int):
        """Output, which rows were guarded, and the values, norms and maximum of the state after the last position.

        `past` keys come before the first query's own. With sinks, `visible` says what each key is (`near.token_kinds`).
        """
        spans = sink_spans(visible) if feature_map.spec.sinks else None
        output, _, _, guarded, *_, values, norms, maximum = _call(
            feature_map, query, key, value, scaling, visible, spans, state, past, True
        )
        return output, guarded, values, norms[..., None], maximum

    @staticmethod
    def decode(feature_map, query, key, value, scaling, visible, state: State):
        """Output and which rows were guarded; the state is updated in place."""
        scale = scaling * query.shape[-1] ** 0.5
        maps = feature_map.raw_spectrum()
        return decode_op(query, key, value, visible, *maps, *_stored(state), scale)


def _call(feature_map, query, key, value, scaling, visible, spans, state, past, final, packed=(None, None)):
    spec, spectrum = feature_map.spec, feature_map.spectrum()
    near_query = near_key = None
    if spec.window and spec.rotary:
        near_query, near_key = near_side(query, spec), near_side(key, spec)
        query, key = far_side(query, spec), far_side(key, spec)
    gate = constant_zeros(spec.num_heads, query.device)
    if spec.window:
        gate = GATE_UNIT * feature_map.window_gate.float()
    state = (None, None, None) if state is None else _stored(state)
    return attention_op(
        query, key, value, near_query, near_key, visible, spans, *spectrum.query, *spectrum.key, spectrum.decay, gate,
        *state, *packed, spec.causal, spec.window, past, scaling * query.shape[-1] ** 0.5, scaling, final,
    )  # fmt: skip


def _stored(state: State) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state as kernels read and write it: with the one norm per head that it has where they serve."""
    return state.values, state.norms.squeeze(-1), state.maximum
