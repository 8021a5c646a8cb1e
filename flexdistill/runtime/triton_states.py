"""States of a sequence's segments, the first step of every fused pass over linear attention.

A program walks one segment of one head chunk by chunk and keeps the state on chip. Segments run side by side: the state
before each comes from a first pass over the keys and a scan, so keys are read twice and features never leave the chip.
One segment per head needs neither. Keys enter the state `DELAY` positions late when a window covers the nearest.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .triton_features import (
    LOG2E,
    add_column_sums,
    feature_norm,
    features,
    finite,
    forget,
    largest_log_feature,
    load_frequencies,
    phases,
    place_in_chunk,
    tokens_to_next,
)


@triton.jit
def segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED: tl.constexpr):
    """First position, last position + 1, and the first key of the segment's sequence."""
    if PACKED:
        start = tl.load(SEGMENTS + 3 * segment)
        end = tl.load(SEGMENTS + 3 * segment + 1)
        first = tl.load(SEGMENTS + 3 * segment + 2)
    else:
        start = segment * SEGMENT_LENGTH
        end = tl.minimum(start + SEGMENT_LENGTH, LENGTH)
        first = 0
    return start, end, first


@triton.jit
def load_rows(X, stride, index, valid, first, SIZE, BLOCK: tl.constexpr):
    """Tokens as rows, their entries from `first` on: (C, BLOCK)."""
    d = first + tl.arange(0, BLOCK)
    return tl.load(X + index.to(tl.int64)[:, None] * stride + d[None, :], valid[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def valid_keys(VISIBLE, index, end, first, position, MASKED: tl.constexpr):
    """Which positions hold a key that may be seen."""
    valid = (position < end) & (index >= first)
    if MASKED:
        valid = valid & (tl.load(VISIBLE + index, valid, 0) != 0)
    return valid


@triton.jit
def load_state(VALUES, NORMS, record, first, DV, N, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Both halves (N, BLOCK_V) of a record's values, both of its mass, repeated in 16 rows, and its norms."""
    n, d = tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_V)
    VALUES += record.to(tl.int64) * (DV + 1) * 2 * N
    offsets = n[:, None] + d[None, :] * 2 * N
    inside = (n < N)[:, None] & (d < DV)[None, :]
    values_a = tl.load(VALUES + offsets, inside, 0.0)
    values_b = tl.load(VALUES + N + offsets, inside, 0.0)
    mass_a = tl.load(VALUES + DV * 2 * N + n, n < N, 0.0)
    mass_b = tl.load(VALUES + DV * 2 * N + N + n, n < N, 0.0)
    rows = tl.zeros((16, BLOCK_N), tl.float32)
    return values_a, values_b, rows + mass_a[None, :], rows + mass_b[None, :], tl.load(NORMS + record)


@triton.jit
def store_state(
    VALUES, NORMS, MAXIMUM, record, first, DV, N, values_a, values_b, mass_a, mass_b, norms, maximum,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    n, d = tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_V)
    VALUES += record.to(tl.int64) * (DV + 1) * 2 * N
    offsets = n[:, None] + d[None, :] * 2 * N
    inside = (n < N)[:, None] & (d < DV)[None, :]
    tl.store(VALUES + offsets, values_a, inside)
    tl.store(VALUES + N + offsets, values_b, inside)
    if first == 0:
        tl.store(VALUES + DV * 2 * N + n, tl.max(mass_a, 0), n < N)
        tl.store(VALUES + DV * 2 * N + N + n, tl.max(mass_b, 0), n < N)
        tl.store(NORMS + record, norms)
        tl.store(MAXIMUM + record, maximum)


@triton.jit
def key_phases(
    key, w1, w2, AMPLITUDE, head, N, factor, valid,
    BLOCK_N: tl.constexpr, HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of a chunk of keys: phases, and log2 of each key's norm factor and largest weighted feature, or -inf."""
    phase, modulation = phases(key, w1, w2, NONSTATIONARY, PRECISION)
    norm = tl.where(valid, factor * tl.sum(key.to(tl.float32) * key.to(tl.float32), 1), float("-inf"))
    largest = norm
    if HYPERBOLIC:
        largest += largest_log_feature(phase, modulation, AMPLITUDE, head, N, BLOCK_N, NONSTATIONARY)
    return phase, modulation, norm, largest


@triton.jit
def state_unit(N, HYPERBOLIC: tl.constexpr):
    """log2 of the factor 1 / sqrt(2 N) that hyperbolic features carry outside the kernels and not inside."""
    return 0.5 * tl.log2(2.0 * N) if HYPERBOLIC else 0.0


@triton.jit
def states_kernel(
    K, V, VISIBLE, W1, W2, AMPLITUDE, NORM_FACTOR, RATE, INITIAL_VALUES, INITIAL_NORMS, INITIAL_MAXIMUM,
    VALUES, NORMS, MAXIMUM, SEGMENTS,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    STATE_HEADS, KV_HEADS, LENGTH, KEYS, SEGMENT_LENGTH, RECORDS, DELAY,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr, MASKED: tl.constexpr,
    INITIAL: tl.constexpr, PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state of each segment's keys alone; that of the first starts from the initial state."""
    segment, pair, first_value = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_V
    batch, head = pair // STATE_HEADS, pair % STATE_HEADS
    kv_head = head // (STATE_HEADS // KV_HEADS)
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    VISIBLE += batch.to(tl.int64) * KEYS
    start, end, first = segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED)
    w1, w2 = load_frequencies(W1, W2, head, D, N, 1.0, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    factor = tl.load(NORM_FACTOR + head) * LOG2E
    values_a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    values_b = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    mass_a, mass_b = tl.zeros((16, BLOCK_N), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    norms, maximum = 0.0, float("-inf")
    if INITIAL:
        if segment == 0:
            values_a, values_b, mass_a, mass_b, norms = load_state(
                INITIAL_VALUES, INITIAL_NORMS, pair, first_value, DV, N, BLOCK_N, BLOCK_V
            )
            maximum = tl.load(INITIAL_MAXIMUM + pair) * LOG2E + state_unit(N, HYPERBOLIC)
            if DECAY:
                values_a, mass_a = forget(values_a, mass_a, RATE, head, 0, N, CHUNK // 2 * 1.0, BLOCK_N)
                values_b, mass_b = forget(values_b, mass_b, RATE, head, 1, N, CHUNK // 2 * 1.0, BLOCK_N)
    age = -place_in_chunk(CHUNK)
    for chunk in tl.range(start, end, CHUNK, num_stages=STAGES):
        position = chunk + tl.arange(0, CHUNK)
        index = position - DELAY
        valid = valid_keys(VISIBLE, index, end, first, position, MASKED)
        key = load_rows(K, k_token, index, valid, 0, D, BLOCK_D).to(DTYPE)
        value = load_rows(V, v_token, index, valid, first_value, DV, BLOCK_V).to(DTYPE)
        phase, modulation, norm, largest = key_phases(
            key, w1, w2, AMPLITUDE, head, N, factor, valid, BLOCK_N, HYPERBOLIC, NONSTATIONARY, PRECISION
        )
        new = tl.maximum(maximum, tl.max(largest, 0))
        shift = finite(new) - norm
        a, b = features(
            phase, modulation, shift, AMPLITUDE, head, N, RATE, head, age, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY
        )
        decay = tl.exp2(maximum - finite(new))
        a, b = a.to(DTYPE), b.to(DTYPE)
        ones = tl.full((CHUNK,), 1.0, tl.float32)
        mass_a = add_column_sums(mass_a * decay, ones, a, PRECISION)
        mass_b = add_column_sums(mass_b * decay, ones, b, PRECISION)
        values_a = tl.dot(tl.trans(a), value, values_a * decay, input_precision=PRECISION)
        values_b = tl.dot(tl.trans(b), value, values_b * decay, input_precision=PRECISION)
        if DECAY:
            tokens = tokens_to_next(chunk, end, CHUNK)
            values_a, mass_a = forget(values_a, mass_a, RATE, head, 0, N, tokens, BLOCK_N)
            values_b, mass_b = forget(values_b, mass_b, RATE, head, 1, N, tokens, BLOCK_N)
        if not HYPERBOLIC:
            norms = norms * decay + tl.sum(feature_norm(modulation, shift, N, BLOCK_N, NONSTATIONARY), 0)
        maximum = new
    store_state(
        VALUES, NORMS, MAXIMUM, pair * RECORDS + segment, first_value, DV, N,
        values_a, values_b, mass_a, mass_b, norms, maximum, BLOCK_N, BLOCK_V,
    )  # fmt: skip


@triton.jit
def scan_kernel(
    VALUES, NORMS, MAXIMUM, RUNNING, SEGMENTS, RATE, HEADS, STATE_HEADS, SIZE, FEATURES, SEGMENT_LENGTH, RECORDS,
    BLOCK: tl.constexpr, REVERSE: tl.constexpr, PACKED: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Running sums over segments' records (pairs, RECORDS, SIZE), in place, each scaled to its own maximum.

    Forwards, the maximum runs along and goes to `RUNNING`. In reverse, `MAXIMUM` holds what each record is scaled to,
    which falls towards the start, and record r is that of segment r + 1.
    """
    pair, offsets = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    carry = tl.zeros((BLOCK,), tl.float32)
    if DECAY:
        rates = RATE + pair % HEADS // (HEADS // STATE_HEADS) * FEATURES + offsets % FEATURES
        rate = tl.load(rates, offsets < SIZE, 0.0) * LOG2E
    norms, carried = 0.0, float("-inf")
    for step in range(RECORDS):
        record = RECORDS - 1 - step if REVERSE else step
        place = pair * RECORDS + record
        own = tl.load(MAXIMUM + place)
        target = VALUES + place.to(tl.int64) * SIZE + offsets
        x = tl.load(target, offsets < SIZE, 0.0)
        starts = step == 0
        if PACKED:
            if REVERSE:
                following = tl.load(SEGMENTS + 3 * record + 8, step > 0, -1)
                starts = starts | (tl.load(SEGMENTS + 3 * record + 5) != following)
            else:
                starts = starts | (tl.load(SEGMENTS + 3 * record) == tl.load(SEGMENTS + 3 * record + 2))
        if REVERSE:
            new = own
            decay, weight = tl.exp2(own - finite(carried)), 1.0
        else:
            carried = tl.where(starts, float("-inf"), carried)
            new = tl.maximum(carried, own)
            decay, weight = tl.exp2(carried - finite(new)), tl.exp2(own - finite(new))
        decay = tl.where(starts, 0.0, decay)
        if DECAY:
            tokens = SEGMENT_LENGTH
            if PACKED:
                row = SEGMENTS + 3 * (record + 1 if REVERSE else record)
                tokens = tl.load(row + 1) - tl.load(row)
            carry *= tl.exp2(-tokens * rate)
        carry = carry * decay + x * weight
        tl.store(target, carry, offsets < SIZE)
        if tl.program_id(1) == 0:
            norms = norms * decay + tl.load(NORMS + place) * weight
            tl.store(NORMS + place, norms)
            if not REVERSE:
                tl.store(RUNNING + place, new)
        carried = new
