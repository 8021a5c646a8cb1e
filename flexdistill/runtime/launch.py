"""How the fused kernels are launched: sizes, cuts, dtypes, and the states that forward and backward share."""

import os
from dataclasses import dataclass

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .feature_maps import POSITIVE_GUARD, SIGNED_GUARD
from .near import SEEN
from .triton_states import scan_kernel, states_kernel

# positions per program at least: shorter segments cost more states than they gain parallel work
SHORTEST_SEGMENT = 256


@dataclass(frozen=True)
class Blocks:
    """How all jobs of a call are cut: tokens per step, columns of values per program, warps, pipeline stages."""

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
        longest = segment_length(batch * heads, length, processors_of(query.device))
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

    @property
    def sizes(self) -> dict:
        """What all kernels of a call are compiled for."""
        blocks = blocks_of(self.dtype)
        return dict(
            BLOCK_D=power(self.size),
            BLOCK_N=power(self.frequencies),
            BLOCK_V=min(blocks.values, power(self.value_size)),
            CHUNK=blocks.chunk,
            STAGES=blocks.stages,
            num_warps=blocks.warps,
            num_stages=blocks.stages,
        )

    @property
    def slices(self) -> int:
        """Programs that share the columns of the values."""
        return triton.cdiv(self.value_size, self.sizes["BLOCK_V"])


def blocks_of(dtype: torch.dtype) -> Blocks:
    # the rows of a chunk share one scale, so all jobs of a call must cut the same chunks
    if dtype == torch.float32:
        return Blocks(chunk=32, values=64, warps=8)
    return Blocks()


def segment_length(pairs: int, length: int, processors: int) -> int:
    """Positions per program: as many programs as two per processor, none shorter than `SHORTEST_SEGMENT`."""
    count = max(1, min(2 * processors // pairs, length // SHORTEST_SEGMENT))
    return -(-length // (count * 64)) * 64


def decoded_together(state_heads: int, batch: int, processors: int) -> int:
    """Sequences that share a program when decoding: fewer load the frequencies more often, more leave processors idle.

    As many as leave two programs per processor, and at most the 16 rows that matrix units take anyway.
    """
    return min(16, triton.next_power_of_2(triton.cdiv(state_heads * batch, 2 * processors)))


def packed_segments(boundaries: list[int], longest: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences laid end to end, cut into segments of at most `longest` positions.

    Returns:
        int32 (N, 3): first position, last + 1, and the first position of the segment's sequence; and int32 (T,), each
        position's first.
    """
    rows, first = [], []
    for start, end in zip(boundaries[:-1], boundaries[1:], strict=True):
        rows += [(cut, min(cut + longest, end), start) for cut in range(start, end, longest)]
        first += [start] * (end - start)
    return (torch.tensor(x, dtype=torch.int32).to(device) for x in (rows, first))


def segments_of(query: torch.Tensor, segments: torch.Tensor | None) -> int:
    """Programs per head."""
    batch, heads, length, _ = query.shape
    if segments is not None:
        return segments.shape[0]
    return -(-length // segment_length(batch * heads, length, processors_of(query.device)))


def processors_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def power(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def dtypes(dtype: torch.dtype) -> dict:
    # Triton's interpreter multiplies bf16 bits as if they were integers
    if dtype == torch.float32 or os.environ.get("TRITON_INTERPRET") == "1":
        return dict(DTYPE=tl.float32, PRECISION="tf32x3")
    return dict(DTYPE=tl.bfloat16, PRECISION="tf32")


def token_strides(*tensors: torch.Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:3]]


def row_major(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def near_sides(query, key, near_query, near_key) -> tuple[torch.Tensor, torch.Tensor]:
    """The queries and keys that a window sees."""
    return (query, key) if near_query is None else (row_major(near_query), row_major(near_key))


def like_output(query: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, H, T, D), stored (B, T, H, D) as transformers wants it."""
    batch, heads, length, _ = query.shape
    return query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)


def floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def kernel_settings(q_w2, q_amplitude, decay, visible, segments, query) -> dict:
    return dict(
        HYPERBOLIC=q_amplitude is not None,
        NONSTATIONARY=q_w2 is not None,
        DECAY=decay is not None,
        MASKED=visible is not None,
        PACKED=segments is not None,
        **dtypes(query.dtype),
    )


def map_tensors(w1, w2, amplitude, norm_factor) -> tuple[torch.Tensor, ...]:
    return w1, *(w1 if x is None else x for x in (w2, amplitude)), norm_factor


def key_map_tensors(decay, w1, w2, amplitude, norm_factor) -> tuple[torch.Tensor, ...]:
    return *map_tensors(w1, w2, amplitude, norm_factor), w1 if decay is None else decay.contiguous()


def guard_of(amplitude) -> float:
    return SIGNED_GUARD if amplitude is None else POSITIVE_GUARD


def key_states(shape: Shape, key, value, visible, k_map, initial, segments, settings):
    """States (B * S, records, D + 1, F) of the keys before each segment, or of all segments' keys."""
    pairs, records = shape.batch * shape.state_heads, shape.records
    size = (shape.value_size + 1) * 2 * shape.frequencies
    values, norms = floats(key, pairs, records, size), floats(key, pairs, records)
    maximum, running = floats(key, pairs, records), floats(key, pairs, records)
    if records:
        states_kernel[(records, pairs, shape.slices)](
            key, value, visible, *k_map, *initial, values, norms, maximum, segments, *token_strides(key, value),
            shape.state_heads, shape.kv_heads, shape.length, shape.keys, shape.segment_length, records, shape.delay,
            shape.size, shape.value_size, shape.frequencies, **shape.sizes, **settings,
        )  # fmt: skip
        if records == 1:
            running = maximum
        else:
            scan(shape, shape.state_heads, values, norms, maximum, running, segments, k_map[-1], False, settings)
    return values, norms, running


def scan(shape: Shape, heads, values, norms, maximum, running, table, decay, reverse, settings) -> None:
    pairs, records, size = values.shape
    scan_kernel[(pairs, triton.cdiv(size, 1024))](
        values, norms, maximum, running, table, decay, heads, shape.state_heads, size, 2 * shape.frequencies,
        shape.segment_length, records, BLOCK=1024, REVERSE=reverse, PACKED=settings["PACKED"],
        DECAY=settings["DECAY"],
    )  # fmt: skip


def kinds_of(visible: torch.Tensor | None, spans: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """What keys are to the window, and whether they enter the state: uint8, None where all do."""
    if visible is None:
        return None, None
    kinds = visible.to(torch.uint8).contiguous()
    return kinds, kinds if spans is None else (kinds == SEEN).to(torch.uint8)


def window_launch(kernel, shape, settings, length, strided, keys, arguments, scaling, past, window) -> None:
    """`keys` holds what they are, where each one's sequence starts, and where its sinks are, or None."""
    query, key, value, output = strided
    sinks = keys[2] is not None
    keys = (query if x is None else x for x in keys)
    tile = 64 if max(shape.size, shape.value_size) <= 64 else 32
    kernel[(triton.cdiv(length, tile), shape.batch * shape.heads)](
        query, key, value, *keys, *arguments, *token_strides(query, key, value, output), shape.heads,
        shape.kv_heads, shape.length, shape.keys, past, window, shape.size, shape.value_size, scaling,
        BLOCK_D=power(shape.size), BLOCK_V=power(shape.value_size), TILE=tile,
        **{name: settings[name] for name in ("MASKED", "PACKED", "DTYPE", "PRECISION")}, SINKS=sinks, num_warps=4,
        num_stages=1,
    )  # fmt: skip
