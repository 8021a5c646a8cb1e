"""Fused gradients of query and key features, each program walking its segment for one half of the features.

One half at a time keeps a program's state on chip. Written out is the gradient of the log features, or of the plain
ones for the trigonometric component.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .triton_backward import load_delta, maximum_before
from .triton_features import (
    LOG2E,
    add_column_sums,
    feature_norm,
    finite,
    forget,
    half_features,
    half_log_features,
    load_amplitude,
    load_frequencies,
    outer,
    phases,
    place_in_chunk,
    tokens_to_next,
)
from .triton_states import load_rows, segment_bounds, valid_keys


@triton.jit
def load_half_state(VALUES, NORMS, record, half, first, DV, N, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """One half (N, BLOCK_V) of a record's values, of its mass, repeated in 16 rows, and its norms."""
    n, d = tl.arange(0, BLOCK_N), first + tl.arange(0, BLOCK_V)
    VALUES += record.to(tl.int64) * (DV + 1) * 2 * N + half * N
    values = tl.load(VALUES + n[:, None] + d[None, :] * 2 * N, (n < N)[:, None] & (d < DV)[None, :], 0.0)
    mass = tl.zeros((16, BLOCK_N), tl.float32) + tl.load(VALUES + DV * 2 * N + n, n < N, 0.0)[None, :]
    return values, mass, tl.load(NORMS + record)


@triton.jit
def own_features(
    phase, modulation, half, amplitude, norm, N, RATE, rate_head, age,
    BLOCK_N: tl.constexpr, HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One half of the features of a chunk of keys, each relative to its own largest, and log2 of what they weigh."""
    shift = tl.zeros_like(norm)
    if HYPERBOLIC:
        shift = tl.max(half_log_features(phase, modulation, half, amplitude, NONSTATIONARY), 1)
    x = half_features(
        phase, modulation, half, shift, amplitude, N, RATE, rate_head, age, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY
    )
    return x, norm + shift


@triton.jit
def query_gradient_kernel(
    Q, K, V, VISIBLE, Q_W1, Q_W2, Q_AMPLITUDE, K_W1, K_W2, K_AMPLITUDE, K_NORM_FACTOR, RATE,
    VALUES, NORMS, MAXIMUM, ROW_REFERENCE, ROW_SHIFT, ROW_GUARDED, DELTA, D_OUT, D_FEATURES, FLAGS, SEGMENTS,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    HEADS, STATE_HEADS, KV_HEADS, LENGTH, KEYS, SEGMENT_LENGTH, RECORDS, DELAY,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, SCALE, GUARD,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one half of one segment's query features (slices, B, H, T, 2 N)."""
    segment, pair = tl.program_id(0), tl.program_id(1)
    half, first_value = tl.program_id(2) % 2, tl.program_id(2) // 2 * BLOCK_V
    if (tl.load(FLAGS + pair * tl.num_programs(0) + segment) != 0) != EXACT:
        return
    batch, head = pair // HEADS, pair % HEADS
    kv_head, state_head = head // (HEADS // KV_HEADS), head // (HEADS // STATE_HEADS)
    state_pair = batch * STATE_HEADS + state_head
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    D_OUT += batch.to(tl.int64) * g_batch + head * g_head
    VISIBLE += batch.to(tl.int64) * KEYS
    D_FEATURES += ((tl.program_id(2) // 2).to(tl.int64) * tl.num_programs(1) + pair) * LENGTH * 2 * N + half * N
    rows = pair.to(tl.int64) * LENGTH

    start, end, first = segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED)
    q_w1, q_w2 = load_frequencies(Q_W1, Q_W2, head, D, N, SCALE, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    if CAUSAL:
        k_w1, k_w2 = load_frequencies(
            K_W1, K_W2, state_head, D, N, 1.0, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE
        )
        k_factor = tl.load(K_NORM_FACTOR + state_head) * LOG2E
    record = segment - 1 if CAUSAL else RECORDS - 1
    carries = record >= 0
    if PACKED:
        carries = start > first
    values, mass = tl.zeros((BLOCK_N, BLOCK_V), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    norms, maximum = 0.0, float("-inf")
    if carries:
        values, mass, norms = load_half_state(
            VALUES, NORMS, state_pair * RECORDS + record, half, first_value, DV, N, BLOCK_N, BLOCK_V
        )
        maximum = tl.load(MAXIMUM + state_pair * RECORDS + record)
    if DECAY:
        values, mass = forget(values, mass, RATE, state_head, half, N, CHUNK // 2 * 1.0, BLOCK_N)
    place, n, age = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N), place_in_chunk(CHUNK)
    for chunk in tl.range(start, end, CHUNK, num_stages=STAGES):
        position = chunk + place
        inside = position < end
        d_out = load_rows(D_OUT, g_token, position, inside, first_value, DV, BLOCK_V).to(DTYPE)
        delta, bound_delta = load_delta(DELTA, ROW_GUARDED, rows + position, inside, first_value, GUARD, HYPERBOLIC)
        references = tl.load(ROW_REFERENCE + rows + position, inside, float("inf"))
        if CAUSAL:
            index = position - DELAY
            valid = valid_keys(VISIBLE, index, end, first, position, MASKED)
            key = load_rows(K, k_token, index, valid, 0, D, BLOCK_D).to(DTYPE)
            value = load_rows(V, v_token, index, valid, first_value, DV, BLOCK_V).to(DTYPE)
            norm = tl.sum(key.to(tl.float32) * key.to(tl.float32), 1)
            norm = tl.where(valid, k_factor * norm, float("-inf"))
            reference = tl.load(ROW_REFERENCE + rows + tl.minimum(chunk + CHUNK, end) - 1)
            phase, modulation = phases(key, k_w1, k_w2, NONSTATIONARY, PRECISION)
            amplitude = load_amplitude(K_AMPLITUDE, state_head, half, N, BLOCK_N, HYPERBOLIC)
            if EXACT:
                exact, weight = own_features(
                    phase, modulation, half, amplitude, norm, N, RATE, state_head, -age,
                    BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
                )  # fmt: skip
                exact = exact.to(DTYPE)
            shift = finite(reference) - norm
            k_x = half_features(
                phase, modulation, half, shift, amplitude, N, RATE, state_head, -age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
            k_x = k_x.to(DTYPE)
            if not HYPERBOLIC:
                k_norm = feature_norm(modulation, tl.zeros_like(norm), N, BLOCK_N, NONSTATIONARY)
        carried = tl.exp2(maximum - finite(references))
        d_x = tl.dot(d_out, tl.trans(values.to(DTYPE)), input_precision=PRECISION)
        d_x = (d_x - outer(delta, mass)) * carried[:, None]
        d_norm = carried * norms
        if CAUSAL:
            causal = position[:, None] >= position[None, :]
            d_scores = tl.dot(d_out, tl.trans(value), input_precision=PRECISION) - delta[:, None]
            if EXACT:
                weights = tl.where(causal, weight[None, :], float("-inf")) - finite(references)[:, None]
                d_scores *= tl.exp2(weights)
                d_x = tl.dot(d_scores.to(DTYPE), exact, d_x, input_precision=PRECISION)
            else:
                d_scores = tl.where(causal, d_scores, 0.0)
                d_x = tl.dot(d_scores.to(DTYPE), k_x, d_x, input_precision=PRECISION)
            decay = tl.exp2(maximum - finite(reference))
            values = tl.dot(tl.trans(k_x), value, values * decay, input_precision=PRECISION)
            mass = add_column_sums(mass * decay, tl.full((CHUNK,), 1.0, tl.float32), k_x, PRECISION)
            if DECAY:
                tokens = tokens_to_next(chunk, end, CHUNK)
                values, mass = forget(values, mass, RATE, state_head, half, N, tokens, BLOCK_N)
            if not HYPERBOLIC:
                weights = tl.where(causal, norm[None, :], float("-inf")) - finite(references)[:, None]
                d_norm += tl.sum(tl.exp2(weights) * k_norm[None, :], 1)
                norms = norms * decay + tl.sum(k_norm * tl.exp2(norm - finite(reference)), 0)
            maximum = reference
        query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
        shift = tl.load(ROW_SHIFT + rows + position, inside, float("inf"))
        phase, modulation = phases(query, q_w1, q_w2, NONSTATIONARY, PRECISION)
        amplitude = load_amplitude(Q_AMPLITUDE, head, half, N, BLOCK_N, HYPERBOLIC)
        if HYPERBOLIC:
            d_x *= half_features(
                phase, modulation, half, shift, amplitude, N, RATE, state_head, age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
        else:
            scale = tl.exp2(-shift)
            d_x = d_x * scale[:, None]
            x = half_features(
                phase, modulation, half, tl.zeros_like(shift), amplitude, N, RATE, state_head, age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, False,
            )  # fmt: skip
            length = feature_norm(modulation, tl.zeros_like(shift), N, BLOCK_N, NONSTATIONARY)
            d_x -= (d_norm * scale * bound_delta / tl.where(length == 0, 1.0, length))[:, None] * x
        target = D_FEATURES + position.to(tl.int64)[:, None] * 2 * N + n[None, :]
        tl.store(target, d_x.to(D_FEATURES.dtype.element_ty), inside[:, None] & (n < N)[None, :])


@triton.jit
def key_gradient_kernel(
    Q, K, V, VISIBLE, Q_W1, Q_W2, Q_AMPLITUDE, K_W1, K_W2, K_AMPLITUDE, K_NORM_FACTOR, RATE,
    VALUES, NORMS, ROW_REFERENCE, ROW_SHIFT, ROW_GUARDED, DELTA, D_OUT, D_FEATURES, FLAGS, SEGMENTS,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, g_batch, g_head, g_token,
    HEADS, STATE_HEADS, KV_HEADS, LENGTH, KEYS, SEGMENT_LENGTH, RECORDS, DELAY,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, SCALE, GUARD,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one half of one segment's key features (slices, B, H, T', 2 N), per query head."""
    segment, pair = tl.program_id(0), tl.program_id(1)
    half, first_value = tl.program_id(2) % 2, tl.program_id(2) // 2 * BLOCK_V
    if (tl.load(FLAGS + pair * tl.num_programs(0) + segment) != 0) != EXACT:
        return
    batch, head = pair // HEADS, pair % HEADS
    kv_head, state_head = head // (HEADS // KV_HEADS), head // (HEADS // STATE_HEADS)
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    D_OUT += batch.to(tl.int64) * g_batch + head * g_head
    VISIBLE += batch.to(tl.int64) * KEYS
    D_FEATURES += ((tl.program_id(2) // 2).to(tl.int64) * tl.num_programs(1) + pair) * KEYS * 2 * N + half * N
    rows = pair.to(tl.int64) * LENGTH

    start, end, first = segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED)
    k_w1, k_w2 = load_frequencies(K_W1, K_W2, state_head, D, N, 1.0, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    if CAUSAL:
        q_w1, q_w2 = load_frequencies(Q_W1, Q_W2, head, D, N, SCALE, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    k_factor = tl.load(K_NORM_FACTOR + state_head) * LOG2E
    # causal: the sum over later segments, whose record r is that of segment r + 1; else that over all
    record = segment if CAUSAL else segment * 0
    carries = record < RECORDS
    if PACKED:
        carries = carries & (tl.load(SEGMENTS + 3 * segment + 5, segment < RECORDS, -1) == first)
    values, mass = tl.zeros((BLOCK_N, BLOCK_V), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    norms = 0.0
    if carries:
        values, mass, norms = load_half_state(
            VALUES, NORMS, pair * RECORDS + record, half, first_value, DV, N, BLOCK_N, BLOCK_V
        )
    # sums of deltas, like the deltas themselves, count for one slice of values only
    mass, norms = tl.where(first_value == 0, mass, 0.0), tl.where(first_value == 0, norms, 0.0)
    reference = tl.load(ROW_REFERENCE + rows + end - 1)
    place, n, age = tl.arange(0, CHUNK), tl.arange(0, BLOCK_N), place_in_chunk(CHUNK)
    chunks = tl.cdiv(end - start, CHUNK)
    if DECAY:
        tokens = (end - start - (chunks - 1) * CHUNK - CHUNK // 2).to(tl.float32)
        values, mass = forget(values, mass, RATE, state_head, half, N, tokens, BLOCK_N)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = start + (chunks - 1 - step) * CHUNK
        position = chunk + place
        index = position - DELAY
        valid = valid_keys(VISIBLE, index, end, first, position, MASKED)
        key = load_rows(K, k_token, index, valid, 0, D, BLOCK_D).to(DTYPE)
        value = load_rows(V, v_token, index, valid, first_value, DV, BLOCK_V).to(DTYPE)
        d_x = tl.dot(value, tl.trans(values.to(DTYPE)), input_precision=PRECISION)
        d_x += outer(tl.full((CHUNK,), 1.0, tl.float32), mass)
        norm = tl.where(valid, k_factor * tl.sum(key.to(tl.float32) * key.to(tl.float32), 1), float("-inf"))
        shift = finite(reference) - norm
        d_norm = norms * tl.exp2(-shift)
        if CAUSAL:
            inside = position < end
            query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
            d_out = load_rows(D_OUT, g_token, position, inside, first_value, DV, BLOCK_V).to(DTYPE)
            q_shift = tl.load(ROW_SHIFT + rows + position, inside, float("inf"))
            references = tl.load(ROW_REFERENCE + rows + position, inside, float("inf"))
            delta, bound_delta = load_delta(DELTA, ROW_GUARDED, rows + position, inside, first_value, GUARD, HYPERBOLIC)
            phase, modulation = phases(query, q_w1, q_w2, NONSTATIONARY, PRECISION)
            amplitude = load_amplitude(Q_AMPLITUDE, head, half, N, BLOCK_N, HYPERBOLIC)
            q_x = half_features(
                phase, modulation, half, q_shift, amplitude, N, RATE, state_head, age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
            lower = maximum_before(ROW_REFERENCE, rows, chunk, first)
            decay, factors = tl.exp2(lower - finite(reference)), tl.exp2(lower - finite(references))
            if not HYPERBOLIC:
                q_norm = feature_norm(modulation, q_shift, N, BLOCK_N, NONSTATIONARY) * bound_delta
            # keys are rows here and queries columns
            causal = position[None, :] >= position[:, None]
            d_scores = tl.dot(value, tl.trans(d_out), input_precision=PRECISION) - delta[None, :]
            if EXACT:
                scaled = (q_x * factors[:, None]).to(DTYPE)
                mass = add_column_sums(mass * decay, -delta, scaled, PRECISION)
                values = tl.dot(tl.trans(scaled), d_out, values * decay, input_precision=PRECISION)
                q_x = q_x.to(DTYPE)
            else:
                # rows that share a reference are rescaled alike, after they have been added
                q_x = q_x.to(DTYPE)
                mass = add_column_sums(mass, -delta, q_x, PRECISION) * decay
                values = tl.dot(tl.trans(q_x), d_out, values, input_precision=PRECISION) * decay
                d_scores = tl.where(causal, d_scores, 0.0)
                d_x = tl.dot(d_scores.to(DTYPE), q_x, d_x, input_precision=PRECISION)
            if DECAY:
                values, mass = forget(values, mass, RATE, state_head, half, N, CHUNK * 1.0, BLOCK_N)
            if not HYPERBOLIC:
                weights = tl.where(causal, norm[:, None], float("-inf")) - finite(references)[None, :]
                d_norm -= tl.sum(tl.exp2(weights) * q_norm[None, :], 1)
                norms = norms * decay - tl.sum(q_norm * factors, 0)
            reference = lower
        phase, modulation = phases(key, k_w1, k_w2, NONSTATIONARY, PRECISION)
        amplitude = load_amplitude(K_AMPLITUDE, state_head, half, N, BLOCK_N, HYPERBOLIC)
        if HYPERBOLIC:
            d_x *= half_features(
                phase, modulation, half, shift, amplitude, N, RATE, state_head, -age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
        else:
            d_x *= tl.exp2(-shift)[:, None]
        if EXACT:
            own, weight = own_features(
                phase, modulation, half, amplitude, norm, N, RATE, state_head, -age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
            weights = tl.where(causal, weight[:, None], float("-inf")) - finite(references)[None, :]
            d_own = tl.dot((d_scores * tl.exp2(weights)).to(DTYPE), q_x, input_precision=PRECISION)
            if HYPERBOLIC:
                d_own *= own
            d_x += d_own
        if not HYPERBOLIC:
            x = half_features(
                phase, modulation, half, tl.zeros_like(norm), amplitude, N, RATE, state_head, age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, False,
            )  # fmt: skip
            length = feature_norm(modulation, tl.zeros_like(norm), N, BLOCK_N, NONSTATIONARY)
            d_x += (d_norm / tl.where(length == 0, 1.0, length))[:, None] * x
        present = ((position < end) & (index >= first))[:, None] & (n < N)[None, :]
        target = D_FEATURES + index.to(tl.int64)[:, None] * 2 * N + n[None, :]
        tl.store(target, d_x.to(D_FEATURES.dtype.element_ty), present)
