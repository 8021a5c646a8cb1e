"""Fused Flexformer attention as torch operators: what launches the Triton kernels, with fake kernels and autograd.

Matrix units take bf16 where inputs are bf16 or fp16 (fp16 cannot hold states of long texts), and three-pass tf32 where
they are float32; logarithms, sums, states and gradients of parameters are float32 throughout. Results do not depend on
the order in which the GPU runs programs, so equal inputs give equal bits.
"""

import os
from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error


from .backend import VARIABLE
from .feature_maps import GATE_UNIT, POSITIVE_GUARD, SIGNED_GUARD, FeatureMap, constant_zeros
from .linear_attention import State
from .triton_backward import delta_kernel, map_gradient_kernel, query_states_kernel, value_gradient_kernel
from .triton_backward_features import key_gradient_kernel, query_gradient_kernel
from .triton_decode import decode_kernel
from .triton_forward import outputs_kernel, scan_kernel, states_kernel
from .triton_window import window_forward_kernel, window_key_kernel, window_query_kernel

# one operator namespace per copy of this code, so that a checkpoint's copy does not serve another's model
NAMESPACE = __name__.replace(".", "_")
# head sizes and frequencies that a multiprocessor's shared memory can hold
LARGEST_SIZE = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
# sequences that share a program when decoding: fewer load the frequencies more often, more leave processors idle
_SEQUENCES = 8
# positions per program at least: shorter segments cost more states than they gain parallel work
_SHORTEST_SEGMENT = 256


@dataclass(frozen=True)
class Blocks:
    """How one job is cut: tokens per step, columns of values per program, warps, pipeline stages."""

    chunk: int = 64
    values: int = 64
    warps: int = 4
    stages: int = 1


@dataclass(frozen=True)
class Shape:
    """Sizes and launch settings that all kernels of a call share."""

    batch: int
    heads: int
    kv_heads: int
    state_heads: int
    length: int
    keys: int
    size: int
    value_size: int
    frequencies: int
    causal: bool
    past: int
    window: int
    segments: int
    segment_length: int
    dtype: torch.dtype

    @classmethod
    def of(cls, query, key, value, w1, k_w1, causal, past, window, segments) -> "Shape":
        batch, heads, length, size = query.shape
        longest = segment_length(batch * heads, length, _processors(query.device))
        count = segments_of(query, segments)
        return cls(
            batch, heads, key.shape[1], k_w1.shape[0], length, key.shape[2], size, value.shape[3], w1.shape[2],
            causal, past, window, count, longest, query.dtype,
        )  # fmt: skip

    @property
    def records(self) -> int:
        """States kept between segments: one before each but the first, or, both ways, one per segment."""
        return self.segments - 1 if self.causal else self.segments

    @property
    def delay(self) -> int:
        """Positions by which keys enter the state late."""
        return self.window - self.past

    def blocks(self, job: str) -> Blocks:
        return _blocks(job, self.size, self.frequencies, self.dtype)

    def sizes(self, blocks: Blocks) -> dict:
        return dict(
            BLOCK_D=_power(self.size),
            BLOCK_N=_power(self.frequencies),
            BLOCK_V=min(blocks.values, _power(self.value_size)),
            CHUNK=blocks.chunk,
            STAGES=blocks.stages,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    def slices(self, blocks: Blocks) -> int:
        return triton.cdiv(self.value_size, min(blocks.values, _power(self.value_size)))


def _blocks(job: str, size: int, frequencies: int, dtype: torch.dtype) -> Blocks:
    # the rows of a chunk share one scale, so all jobs of a call must cut the same chunks
    if dtype == torch.float32:
        return Blocks(chunk=32, values=64, warps=8)
    if max(size, frequencies) > 64:
        return Blocks(chunk=32, values=32, warps=8)
    return Blocks()


def segment_length(pairs: int, length: int, processors: int) -> int:
    """Positions per program: as many programs as two per processor, none shorter than `_SHORTEST_SEGMENT`."""
    count = max(1, min(2 * processors // pairs, length // _SHORTEST_SEGMENT))
    return -(-length // (count * 64)) * 64


def segments_of(query: torch.Tensor, segments: torch.Tensor | None) -> int:
    """Programs per head."""
    batch, heads, length, _ = query.shape
    if segments is not None:
        return segments.shape[0]
    return -(-length // segment_length(batch * heads, length, _processors(query.device)))


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def _power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _dtypes(query: torch.Tensor) -> dict:
    # Triton's interpreter multiplies bf16 bits as if they were integers
    if query.dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1":
        return dict(DTYPE=tl.float32, PRECISION="tf32x3")
    return dict(DTYPE=tl.bfloat16, PRECISION="tf32")


def _strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def _row_major(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _like_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D), stored (B, T, H, D) as transformers wants it."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _key_states(shape: Shape, key, value, visible, k_map, initial, segments, settings):
    """States (B * S, records, D + 1, F) of the keys before each segment, or of all segments' keys."""
    pairs, records = shape.batch * shape.state_heads, shape.records
    size = (shape.value_size + 1) * 2 * shape.frequencies
    values, norms = _floats(key, pairs, records, size), _floats(key, pairs, records)
    maximum, running = _floats(key, pairs, records), _floats(key, pairs, records)
    if records:
        blocks = shape.blocks("states")
        states_kernel[(records, pairs, shape.slices(blocks))](
            key, value, visible, *k_map, *initial, values, norms, maximum, segments, *_strides(key, value),
            shape.state_heads, shape.kv_heads, shape.length, shape.keys, shape.segment_length, records, shape.delay,
            shape.size, shape.value_size, shape.frequencies, **shape.sizes(blocks), **settings,
        )  # fmt: skip
        if records == 1:
            running = maximum
        else:
            _scan(values, norms, maximum, running, segments, reverse=False, packed=settings["PACKED"])
    return values, norms, running


def _map_gradients(x, x_map, d_features, scale, settings, parts: bool):
    """Gradients of tokens x, one (B, H, T, d) for each query head, and of each head's map, flat."""
    w1 = x_map[0]
    slices, batch, heads, length, _ = d_features.shape
    size, frequencies = w1.shape[1:]
    span = segment_length(batch * heads, length, _processors(x.device))
    spans = -(-length // span)
    d_x = torch.empty(batch, heads, length, size, dtype=torch.float32 if parts else x.dtype, device=x.device)
    d_map = _floats(x, batch, heads, spans, 2 * size * frequencies + 2 * frequencies + 2)
    blocks = _blocks("map_gradient", size, frequencies, x.dtype)
    map_gradient_kernel[(spans, batch * heads)](
        x, *x_map, d_features, d_x, d_map, *_strides(x), heads, w1.shape[0], x.shape[1], length,
        d_features.stride(0), slices, span, size, frequencies, scale,
        BLOCK_D=_power(size), BLOCK_N=_power(frequencies), CHUNK=blocks.chunk,
        **{name: settings[name] for name in ("HYPERBOLIC", "NONSTATIONARY", "DTYPE", "PRECISION")},
        STAGES=blocks.stages, num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip
    return d_x, d_map.sum((0, 2))


def _query_states(shape, query, q_map, rows, table, scale, guard, flags):
    """States (B * H, records, D + 1, F) of the queries after each segment, or of all segments' queries."""
    pairs, records = shape.batch * shape.heads, shape.records
    size = (shape.value_size + 1) * 2 * shape.frequencies
    values, norms = _floats(query, pairs, records, size), _floats(query, pairs, records)
    if records:
        maximum = torch.empty_like(norms)
        blocks = shape.blocks("query_states")
        flags = {name: flag for name, flag in flags.items() if name != "MASKED"}
        query_states_kernel[(records, pairs, shape.slices(blocks))](
            query, *q_map[:3], *rows, values, norms, maximum, table, *_strides(query, rows[-1]), shape.heads,
            shape.length, shape.segment_length, records, shape.size, shape.value_size, shape.frequencies, scale, guard,
            **shape.sizes(blocks), **flags,
        )  # fmt: skip
        if records > 1:
            _scan(values, norms, maximum, maximum, table, reverse=True, packed=flags["PACKED"])
    return values, norms


def _scan(values, norms, maximum, running, table, reverse, packed) -> None:
    pairs, records, size = values.shape
    scan_kernel[(pairs, triton.cdiv(size, 1024))](
        values, norms, maximum, running, table, size, records, BLOCK=1024, REVERSE=reverse, PACKED=packed
    )


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor | None,
    q_w1: torch.Tensor,
    q_w2: torch.Tensor | None,
    q_amplitude: torch.Tensor | None,
    q_norm_factor: torch.Tensor,
    k_w1: torch.Tensor,
    k_w2: torch.Tensor | None,
    k_amplitude: torch.Tensor | None,
    k_norm_factor: torch.Tensor,
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

    Returns the output (B, H, T, D); of each row its reference and shift (see `outputs_kernel`), whether it was guarded
    and, with a window, log2 of its whole sum; which segments were flagged; and where `final`, the state's values
    (B, S, D + 1, F), norms and maximum after the last position.
    """
    query, key, value = _row_major(query), _row_major(key), _row_major(value)
    shape = Shape.of(query, key, value, q_w1, k_w1, causal, past, window, segments)
    settings = _settings(q_w2, q_amplitude, visible, segments, query)
    initial = (initial_values, initial_norms, initial_maximum)
    k_map = _map(k_w1, k_w2, k_amplitude, k_norm_factor)
    visible = q_w1 if visible is None else visible.to(torch.uint8).contiguous()
    states_settings = dict(settings, INITIAL=initial_values is not None)
    initial = tuple(q_w1 if x is None else x for x in initial)
    table = q_w1 if segments is None else segments
    values, norms, maximum = _key_states(shape, key, value, visible, k_map, initial, table, states_settings)

    output = _like_output(query, value)
    rows = [_floats(query, shape.batch, shape.heads, shape.length) for _ in range(2)]
    rows.append(torch.empty_like(rows[0], dtype=torch.int8))
    rows.append(_floats(query, *(rows[0].shape if window else (0,))))
    pairs = (shape.batch, shape.state_heads) if final else (0, 0)
    final_values = _floats(query, *pairs, shape.value_size + 1, 2 * shape.frequencies)
    finals = (final_values, _floats(query, *pairs), _floats(query, *pairs))
    near, near_lse = output, rows[3]
    if window:
        near, near_lse = _like_output(query, value), torch.empty_like(rows[0])
        _window_launch(
            window_forward_kernel, shape, settings, shape.length, (query, key, value, near),
            (visible, q_w1 if first is None else first, near, near_lse), scaling, past, window,
        )  # fmt: skip
    blocks = shape.blocks("outputs")
    flags = torch.empty(shape.batch * shape.heads, shape.segments, dtype=torch.int32, device=query.device)
    for exact in (False, True) if causal else (False,):
        outputs_kernel[(shape.segments, shape.batch * shape.heads, shape.slices(blocks))](
            query, key, value, visible, *_map(q_w1, q_w2, q_amplitude, q_norm_factor), *k_map, gate,
            values, norms, maximum, *initial, *finals, near, near_lse, output, *rows, flags, table,
            *_strides(query, key, value, output), shape.heads, shape.state_heads, shape.kv_heads, shape.length,
            shape.keys, shape.segment_length, shape.records, shape.delay, shape.size, shape.value_size,
            shape.frequencies, scale, _guard(q_amplitude), CAUSAL=causal, WINDOW=window > 0, FINAL=final, EXACT=exact,
            **shape.sizes(blocks), **states_settings,
        )  # fmt: skip
    return output, *rows, flags, *finals


def _settings(q_w2, q_amplitude, visible, segments, query) -> dict:
    return dict(
        HYPERBOLIC=q_amplitude is not None,
        NONSTATIONARY=q_w2 is not None,
        MASKED=visible is not None,
        PACKED=segments is not None,
        **_dtypes(query),
    )


def _map(w1, w2, amplitude, norm_factor) -> tuple[torch.Tensor, ...]:
    return w1, w1 if w2 is None else w2, w1 if amplitude is None else amplitude, norm_factor


def _guard(amplitude) -> float:
    return SIGNED_GUARD if amplitude is None else POSITIVE_GUARD


def _window_launch(kernel, shape, settings, length, strided, arguments, scaling, past, window) -> None:
    query, key, value, output = strided
    tile = 64 if max(shape.size, shape.value_size) <= 64 else 32
    kernel[(triton.cdiv(length, tile), shape.batch * shape.heads)](
        query, key, value, *arguments, *_strides(query, key, value, output), shape.heads, shape.kv_heads, shape.length,
        shape.keys, past, window, shape.size, shape.value_size, scaling,
        BLOCK_D=_power(shape.size), BLOCK_V=_power(shape.value_size), TILE=tile,
        MASKED=settings["MASKED"], PACKED=settings["PACKED"], DTYPE=settings["DTYPE"],
        PRECISION=settings["PRECISION"], num_warps=4, num_stages=1,
    )  # fmt: skip


@attention_op.register_fake
def _(query, key, value, visible, q_w1, q_w2, q_amplitude, q_norm_factor, k_w1, k_w2, k_amplitude, k_norm_factor, gate,
      initial_values, initial_norms, initial_maximum, segments, first, causal, window, past, scale, scaling,
      final):  # fmt: skip
    batch, heads, length, _ = query.shape
    row = (batch, heads, length)
    pairs = (batch, k_w1.shape[0]) if final else (0, 0)
    return (
        _like_output(query, value),
        _floats(query, *row),
        _floats(query, *row),
        torch.empty(row, dtype=torch.int8, device=query.device),
        _floats(query, *(row if window else (0,))),
        torch.empty(batch * heads, segments_of(query, segments), dtype=torch.int32, device=query.device),
        _floats(query, *pairs, value.shape[-1] + 1, 2 * q_w1.shape[2]),
        _floats(query, *pairs),
        _floats(query, *pairs),
    )


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
    visible: torch.Tensor | None,
    q_w1: torch.Tensor,
    q_w2: torch.Tensor | None,
    q_amplitude: torch.Tensor | None,
    q_norm_factor: torch.Tensor,
    k_w1: torch.Tensor,
    k_w2: torch.Tensor | None,
    k_amplitude: torch.Tensor | None,
    k_norm_factor: torch.Tensor,
    gate: torch.Tensor,
    segments: torch.Tensor | None,
    first: torch.Tensor | None,
    causal: bool,
    window: int,
    scale: float,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, and of both maps as flat rows per head (see `_split_map`)."""
    query, key, value, d_output = (_row_major(x) for x in (query, key, value, d_output))
    shape = Shape.of(query, key, value, q_w1, k_w1, causal, 0, window, segments)
    settings = _settings(q_w2, q_amplitude, visible, segments, query)
    pairs, length, guard = shape.batch * shape.heads, shape.length, _guard(q_amplitude)
    q_map = _map(q_w1, q_w2, q_amplitude, q_norm_factor)
    k_map = _map(k_w1, k_w2, k_amplitude, k_norm_factor)
    visible = q_w1 if visible is None else visible.to(torch.uint8).contiguous()
    table = q_w1 if segments is None else segments

    delta = torch.empty_like(row_shift)
    delta_kernel[(triton.cdiv(length, 64), pairs)](
        output, d_output, delta, *_strides(output, d_output), shape.heads, length, shape.value_size,
        BLOCK_V=_power(shape.value_size), TILE=64,
    )  # fmt: skip
    rows = (row_reference, row_shift, row_guarded, delta, d_output)
    sizes = (
        shape.heads, shape.state_heads, shape.kv_heads, length, shape.keys, shape.segment_length, shape.records,
        shape.delay, shape.size, shape.value_size, shape.frequencies, scale, guard,
    )  # fmt: skip
    strides = _strides(query, key, value, d_output)
    flags = dict(settings, CAUSAL=causal)

    variants = (False, True) if causal else (False,)
    new = torch.zeros if window else torch.empty  # the last keys of a window never enter the state

    blocks = shape.blocks("query_gradient")
    slices = shape.slices(blocks)
    # slices of values nearly cancel, so they are summed in float32
    working = torch.bfloat16 if slices == 1 and query.dtype != torch.float32 else torch.float32
    d_features = torch.empty(
        slices, shape.batch, shape.heads, length, 2 * shape.frequencies, dtype=working, device=query.device
    )
    states = _key_states(shape, key, value, visible, k_map, (q_w1,) * 3, table, dict(settings, INITIAL=False))
    for exact in variants:
        query_gradient_kernel[(shape.segments, pairs, 2 * slices)](
            query, key, value, visible, *q_map[:3], *k_map, *states, *rows, d_features, row_flags, table, *strides,
            *sizes, EXACT=exact, **shape.sizes(blocks), **flags,
        )  # fmt: skip
    # without a window a query's norm factor cancels
    q_factor = q_norm_factor if window else gate
    d_query, d_q_map = _map_gradients(query, (*q_map[:3], q_factor), d_features, scale, settings, window > 0)

    values, norms = _query_states(shape, query, q_map, rows, table, scale, guard, flags)
    blocks = shape.blocks("key_gradient")
    slices = shape.slices(blocks)
    d_features = new(
        slices, shape.batch, shape.heads, shape.keys, 2 * shape.frequencies, dtype=working, device=query.device
    )
    for exact in variants:
        key_gradient_kernel[(shape.segments, pairs, 2 * slices)](
            query, key, value, visible, *q_map[:3], *k_map, values, norms, *rows, d_features, row_flags, table,
            *strides, *sizes, EXACT=exact, **shape.sizes(blocks), **flags,
        )  # fmt: skip
    # final in the inputs' dtype unless parts are yet to be summed
    parts = window > 0 or shape.heads > shape.kv_heads
    d_key, d_k_map = _map_gradients(key, k_map, d_features, 1.0, settings, parts)

    blocks = shape.blocks("value_gradient")
    dtype = torch.float32 if parts else value.dtype
    d_value = new(shape.batch, shape.heads, shape.keys, shape.value_size, dtype=dtype, device=key.device)
    for exact in variants:
        value_gradient_kernel[(shape.segments, pairs, shape.slices(blocks))](
            query, key, visible, *q_map[:3], *k_map, values, norms, row_reference, row_shift, d_output, d_value,
            row_flags, table, *_strides(query, key, d_output), *sizes[:-1], EXACT=exact, **shape.sizes(blocks), **flags,
        )  # fmt: skip
    if window:
        inputs = (visible, q_w1 if first is None else first, row_lse, delta, d_output)
        for kernel, count, targets in (
            (window_query_kernel, length, (d_query,)),
            (window_key_kernel, shape.keys, (d_key, d_value)),
        ):
            _window_launch(
                kernel, shape, settings, count, (query, key, value, d_output), (*inputs, *targets), scaling, 0, window
            )
    d_key, d_value = (x.unflatten(1, (shape.kv_heads, -1)).sum(2) if parts else x for x in (d_key, d_value))
    groups = shape.heads // shape.state_heads
    return (
        d_query.to(query.dtype),
        d_key.to(key.dtype),
        d_value.to(value.dtype),
        d_q_map,
        d_k_map.unflatten(0, (shape.state_heads, groups)).sum(1),
    )


@attention_backward_op.register_fake
def _(d_output, output, row_reference, row_shift, row_guarded, row_lse, row_flags, query, key, value, visible, q_w1,
      q_w2, q_amplitude, q_norm_factor, k_w1, k_w2, k_amplitude, k_norm_factor, gate, segments, first, causal, window,
      scale, scaling):  # fmt: skip
    size = 2 * q_w1.shape[1] * q_w1.shape[2] + 2 * q_w1.shape[2] + 2
    gradients = [x.new_empty(x.shape) for x in (query, key, value)]
    return *gradients, _floats(query, q_w1.shape[0], size), _floats(query, k_w1.shape[0], size)


def _split_map(flat: torch.Tensor, w1, w2, amplitude):
    """Flat rows per head -> gradients of W1, W2, amplitudes, norm factor and gate."""
    size = w1[0].numel()
    d_w1, d_w2, d_amplitude, d_norm_factor, d_gate = flat.split([size, size, 2 * w1.shape[2], 1, 1], dim=1)
    return (
        d_w1.unflatten(1, w1.shape[1:]),
        None if w2 is None else d_w2.unflatten(1, w1.shape[1:]),
        None if amplitude is None else d_amplitude,
        d_norm_factor.squeeze(1),
        d_gate.squeeze(1),
    )


def _setup_context(ctx, inputs, output) -> None:
    (*tensors, _, _, _, segments, first, causal, window, past, scale, scaling, final) = inputs
    ctx.save_for_backward(*output[:6], *tensors, segments, first)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings = (causal, window, scale, scaling)


def _backward(ctx, d_output, *_):
    gradients = attention_backward_op(d_output, *ctx.saved_tensors, *ctx.settings)
    d_query, d_key, d_value, d_q_map, d_k_map = gradients
    q_w1, q_w2, q_amplitude, _, k_w1, k_w2, k_amplitude = ctx.saved_tensors[10:17]
    *q_gradients, d_gate = _split_map(d_q_map, q_w1, q_w2, q_amplitude)
    *k_gradients, _ = _split_map(d_k_map, k_w1, k_w2, k_amplitude)
    return d_query, d_key, d_value, None, *q_gradients, *k_gradients, d_gate, *(None,) * 11


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
    q_norm_factor: torch.Tensor,
    k_w1: torch.Tensor,
    k_w2: torch.Tensor | None,
    k_amplitude: torch.Tensor | None,
    k_norm_factor: torch.Tensor,
    values: torch.Tensor,
    norms: torch.Tensor,
    maximum: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds one token's key (B, K, 1, d) and value (B, K, 1, D) to the state, in place, and attends to it.

    Returns the output (B, H, 1, D) for the query (B, H, 1, d), and which rows were guarded (B, H, 1).
    """
    query, key, value = _row_major(query), _row_major(key), _row_major(value)
    batch, heads, _, size = query.shape
    state_heads, value_size, frequencies = k_w1.shape[0], value.shape[3], q_w1.shape[2]
    settings = _settings(q_w2, q_amplitude, visible, None, query)
    del settings["PACKED"]
    output = query.new_empty(batch, heads, 1, value_size)
    guarded = torch.empty(batch, heads, 1, dtype=torch.int8, device=query.device)
    sequences = min(_SEQUENCES, batch)
    visible = q_w1 if visible is None else visible.to(torch.uint8).contiguous()
    decode_kernel[(state_heads, triton.cdiv(batch, sequences))](
        query, key, value, visible, *_map(q_w1, q_w2, q_amplitude, q_norm_factor)[:3],
        *_map(k_w1, k_w2, k_amplitude, k_norm_factor), values, norms, maximum, output, guarded,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], batch, heads, state_heads, key.shape[1], size,
        value_size, frequencies, scale, _guard(q_amplitude), BLOCK_D=_power(size), BLOCK_V=_power(value_size),
        BLOCK_N=_power(frequencies), ROWS=16, SEQUENCES=sequences, GROUP=heads // state_heads,
        num_warps=4, num_stages=1, **settings,
    )  # fmt: skip
    return output, guarded


@decode_op.register_fake
def _(query, key, value, visible, q_w1, q_w2, q_amplitude, q_norm_factor, k_w1, k_w2, k_amplitude, k_norm_factor,
      values, norms, maximum, scale):  # fmt: skip
    batch, heads, _, _ = query.shape
    guarded = torch.empty(batch, heads, 1, dtype=torch.int8, device=query.device)
    return query.new_empty(batch, heads, 1, value.shape[-1]), guarded


class FusedAttention:
    """Attention of a feature map through the fused operators; shapes as in `attention.attend`."""

    @staticmethod
    def serves(feature_map: FeatureMap, query: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether the kernels know this map, these sizes and this dtype.

        Raises:
            ValueError: if they do not, and the environment asks for them.
        """
        spec = feature_map.spec
        obstacle = None
        if not feature_map.has_spectrum:
            obstacle = f"the kernel {spec.variant} is not theirs"
        elif query.dtype not in LARGEST_SIZE:
            obstacle = f"they do not compute in {query.dtype}"
        elif max(spec.head_dim, spec.num_frequencies, value.shape[-1]) > LARGEST_SIZE[query.dtype]:
            obstacle = f"head size and frequencies may be at most {LARGEST_SIZE[query.dtype]} in {query.dtype}"
        if obstacle and os.environ.get(VARIABLE) == "triton":
            raise ValueError(f"{VARIABLE}=triton cannot serve here: {obstacle}; unset it or choose torch.")
        return obstacle is None

    @staticmethod
    def needs_gradient(feature_map: FeatureMap, *tensors: torch.Tensor) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *feature_map.parameters()))

    @staticmethod
    def attend(feature_map, query, key, value, scaling, visible):
        """Output and which rows were guarded."""
        output, _, _, guarded, *_ = _call(feature_map, query, key, value, scaling, visible, None, 0, False)
        return output, guarded

    @staticmethod
    def prefill(feature_map, query, key, value, scaling, visible, state: State | None, past: int):
        """Output, which rows were guarded, and the values, norms and maximum of the state after the last position."""
        output, _, _, guarded, *_, values, norms, maximum = _call(
            feature_map, query, key, value, scaling, visible, state, past, True
        )
        return output, guarded, values, norms, maximum

    @staticmethod
    def decode(feature_map, query, key, value, scaling, visible, state: State):
        """Output and which rows were guarded; the state is updated in place."""
        spectrum = feature_map.spectrum()
        return decode_op(
            query, key, value, visible, *spectrum.query, *spectrum.key, state.values, state.norms, state.maximum,
            scaling * query.shape[-1] ** 0.5,
        )  # fmt: skip


def _call(feature_map, query, key, value, scaling, visible, state, past, final):
    spec, spectrum = feature_map.spec, feature_map.spectrum()
    gate = constant_zeros(spec.num_heads, query.device)
    if spec.window:
        gate = GATE_UNIT * feature_map.window_gate.float()
    state = (None, None, None) if state is None else (state.values, state.norms, state.maximum)
    return attention_op(
        query, key, value, visible, *spectrum.query, *spectrum.key, gate, *state, None, None,
        spec.causal, spec.window, past, scaling * query.shape[-1] ** 0.5, scaling, final,
    )  # fmt: skip
