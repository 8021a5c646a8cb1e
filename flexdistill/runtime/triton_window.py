"""Fused softmax attention of each query to its nearest keys: the exact part of a layer with a window.

A query at position p sees the keys of indices p + PAST - SPAN + 1 to p + PAST, where PAST keys come before the first
query's own, and all earlier sinks (see `near.token_kinds`). The backward pass takes the log-sum of the whole row, the
kernel's part included, so both parts' gradients simply add.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .triton_features import LOG2E, finite
from .triton_states import load_rows


@triton.jit
def load_columns(X, stride, index, valid, SIZE, BLOCK: tl.constexpr):
    """Tokens as columns: (BLOCK, C)."""
    d = tl.arange(0, BLOCK)
    return tl.load(X + index.to(tl.int64)[None, :] * stride + d[:, None], valid[None, :] & (d < SIZE)[:, None], 0.0)


@triton.jit
def band(
    VISIBLE, FIRST, position, index, LENGTH, KEYS, PAST, SPAN,
    MASKED: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """Which queries (rows) see which keys (columns) before index KEYS."""
    distance = position[:, None] + PAST - index[None, :]
    seen = (distance >= 0) & (position < LENGTH)[:, None]
    known = (index >= 0) & (index < KEYS)
    near = distance < SPAN
    if MASKED:
        kind = tl.load(VISIBLE + index, known, 0)
        known = known & (kind != 0)
        if SINKS:
            near = near | (kind == 2)[None, :]
    seen = seen & near & known[None, :]
    if PACKED:
        seen = seen & (index[None, :] >= tl.load(FIRST + position, position < LENGTH, 0)[:, None])
    return seen


@triton.jit
def sinks_before(SPANS, row, low, SINKS: tl.constexpr, TILE: tl.constexpr):
    """Where a row's sinks start, where those before index `low` end, and how many tiles hold them."""
    first, end = 0, 0
    if SINKS:
        first, end = tl.load(SPANS + 2 * row), tl.minimum(tl.load(SPANS + 2 * row + 1), low)
    return first, end, tl.cdiv(tl.maximum(end - first, 0), TILE)


@triton.jit
def near_tile(step, first, end, before, low, KEYS, TILE: tl.constexpr):
    """The first index of a tile of keys and where its keys end: the sinks' tiles come before the window's."""
    return (
        tl.where(step < before, first + step * TILE, low + (step - before) * TILE),
        tl.where(step < before, end, KEYS),
    )


@triton.jit
def window_forward_kernel(
    Q, K, V, VISIBLE, FIRST, SPANS, OUT, LSE,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    HEADS, KV_HEADS, LENGTH, KEYS, PAST, SPAN, D, DV, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Output of the window alone, normalised, and the log2 of its sum."""
    start, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    VISIBLE += batch.to(tl.int64) * KEYS
    position = start + tl.arange(0, TILE)
    query = load_rows(Q, q_token, position, position < LENGTH, 0, D, BLOCK_D).to(DTYPE)
    maximum = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    output = tl.zeros((TILE, BLOCK_V), tl.float32)
    low, high = tl.maximum(start + PAST - SPAN + 1, 0), tl.minimum(start + TILE + PAST, KEYS)
    first, end, before = sinks_before(SPANS, start if PACKED else batch, low, SINKS, TILE)
    for step in range(0, before + tl.cdiv(high - low, TILE)):
        tile, limit = near_tile(step, first, end, before, low, KEYS, TILE)
        index = tile + tl.arange(0, TILE)
        key = load_columns(K, k_token, index, index < limit, D, BLOCK_D).to(DTYPE)
        value = load_rows(V, v_token, index, index < limit, 0, DV, BLOCK_V).to(DTYPE)
        seen = band(VISIBLE, FIRST, position, index, LENGTH, limit, PAST, SPAN, MASKED, PACKED, SINKS)
        logits = tl.dot(query, key, input_precision=PRECISION) * (SCALE * LOG2E)
        logits = tl.where(seen, logits, float("-inf"))
        larger = tl.maximum(maximum, tl.max(logits, 1))
        decay = tl.exp2(maximum - finite(larger))
        weights = tl.exp2(logits - finite(larger)[:, None])
        total = total * decay + tl.sum(weights, 1)
        output = tl.dot(weights.to(DTYPE), value, output * decay[:, None], input_precision=PRECISION)
        maximum = larger
    output = output / tl.where(total == 0, 1.0, total)[:, None]
    d = tl.arange(0, BLOCK_V)
    OUT += batch.to(tl.int64) * o_batch + head * o_head
    inside = (position < LENGTH)[:, None] & (d < DV)[None, :]
    tl.store(OUT + position.to(tl.int64)[:, None] * o_token + d[None, :], output.to(OUT.dtype.element_ty), inside)
    tl.store(LSE + pair.to(tl.int64) * LENGTH + position, maximum + tl.log2(total), position < LENGTH)


@triton.jit
def window_query_kernel(
    Q, K, V, VISIBLE, FIRST, SPANS, LSE, DELTA, D_OUT, D_Q,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    HEADS, KV_HEADS, LENGTH, KEYS, PAST, SPAN, D, DV, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the window's part to the queries' gradient (B, H, T, d), float32."""
    start, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    VISIBLE += batch.to(tl.int64) * KEYS
    D_OUT += batch.to(tl.int64) * o_batch + head * o_head
    position = start + tl.arange(0, TILE)
    inside = position < LENGTH
    rows = pair.to(tl.int64) * LENGTH + position
    query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
    d_out = load_rows(D_OUT, o_token, position, inside, 0, DV, BLOCK_V).to(DTYPE)
    lse, delta = tl.load(LSE + rows, inside, 0.0), tl.load(DELTA + rows, inside, 0.0)
    d_query = tl.zeros((TILE, BLOCK_D), tl.float32)
    low, high = tl.maximum(start + PAST - SPAN + 1, 0), tl.minimum(start + TILE + PAST, KEYS)
    first, end, before = sinks_before(SPANS, start if PACKED else batch, low, SINKS, TILE)
    for step in range(0, before + tl.cdiv(high - low, TILE)):
        tile, limit = near_tile(step, first, end, before, low, KEYS, TILE)
        index = tile + tl.arange(0, TILE)
        key = load_columns(K, k_token, index, index < limit, D, BLOCK_D).to(DTYPE)
        value = load_columns(V, v_token, index, index < limit, DV, BLOCK_V).to(DTYPE)
        seen = band(VISIBLE, FIRST, position, index, LENGTH, limit, PAST, SPAN, MASKED, PACKED, SINKS)
        logits = tl.dot(query, key, input_precision=PRECISION) * (SCALE * LOG2E)
        weights = tl.where(seen, tl.exp2(logits - finite(lse)[:, None]), 0.0)
        d_logits = weights * (tl.dot(d_out, value, input_precision=PRECISION) - delta[:, None])
        d_query = tl.dot(d_logits.to(DTYPE), tl.trans(key), d_query, input_precision=PRECISION)
    d = tl.arange(0, BLOCK_D)
    target = D_Q + rows[:, None] * D + d[None, :]
    mask = inside[:, None] & (d < D)[None, :]
    tl.store(target, tl.load(target, mask, 0.0) + d_query * SCALE, mask)


@triton.jit
def window_key_kernel(
    Q, K, V, VISIBLE, FIRST, SPANS, LSE, DELTA, D_OUT, D_K, D_V,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    HEADS, KV_HEADS, LENGTH, KEYS, PAST, SPAN, D, DV, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TILE: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, SINKS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the window's part to the gradients of keys and values (B, H, T', d), float32, per query head."""
    start, pair = tl.program_id(0) * TILE, tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    kv_head = head // (HEADS // KV_HEADS)
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    VISIBLE += batch.to(tl.int64) * KEYS
    D_OUT += batch.to(tl.int64) * o_batch + head * o_head
    index = start + tl.arange(0, TILE)
    key = load_columns(K, k_token, index, index < KEYS, D, BLOCK_D).to(DTYPE)
    value = load_columns(V, v_token, index, index < KEYS, DV, BLOCK_V).to(DTYPE)
    d_key = tl.zeros((TILE, BLOCK_D), tl.float32)
    d_value = tl.zeros((TILE, BLOCK_V), tl.float32)
    end = tl.minimum(start + TILE - PAST + SPAN - 1, LENGTH)
    if SINKS:
        kind = tl.load(VISIBLE + index, index < KEYS, 0)
        end = tl.where(tl.max(kind, 0) == 2, LENGTH, end)
    for tile in range(tl.maximum(start - PAST, 0), end, TILE):
        position = tile + tl.arange(0, TILE)
        inside = position < LENGTH
        rows = pair.to(tl.int64) * LENGTH + position
        query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
        d_out = load_rows(D_OUT, o_token, position, inside, 0, DV, BLOCK_V).to(DTYPE)
        lse, delta = tl.load(LSE + rows, inside, 0.0), tl.load(DELTA + rows, inside, 0.0)
        seen = band(VISIBLE, FIRST, position, index, LENGTH, KEYS, PAST, SPAN, MASKED, PACKED, SINKS)
        logits = tl.dot(query, key, input_precision=PRECISION) * (SCALE * LOG2E)
        weights = tl.where(seen, tl.exp2(logits - finite(lse)[:, None]), 0.0)
        d_value = tl.dot(tl.trans(weights.to(DTYPE)), d_out, d_value, input_precision=PRECISION)
        d_logits = weights * (tl.dot(d_out, value, input_precision=PRECISION) - delta[:, None])
        d_key = tl.dot(tl.trans(d_logits.to(DTYPE)), query, d_key, input_precision=PRECISION)
    keys = pair.to(tl.int64) * KEYS + index
    known = (index < KEYS)[:, None]
    d = tl.arange(0, BLOCK_D)
    target, mask = D_K + keys[:, None] * D + d[None, :], known & (d < D)[None, :]
    tl.store(target, tl.load(target, mask, 0.0) + d_key * SCALE, mask)
    d = tl.arange(0, BLOCK_V)
    target, mask = D_V + keys[:, None] * DV + d[None, :], known & (d < DV)[None, :]
    tl.store(target, tl.load(target, mask, 0.0) + d_value, mask)
