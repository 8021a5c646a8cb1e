"""Fused backward pass of linear attention: all but the gradients of features.

With P_ij the attention weights, delta_i = d_out_i . out_i and dP_ij = d_out_i . v_j - delta_i, the gradient of query
features comes from the keys' state, walked forwards, and that of keys and values from the queries' state, walked
backwards. Features are recomputed on chip. From the gradients of features the last kernel makes those of queries, keys
and maps; each of its programs writes its own share of the maps', so results do not depend on the order in which
programs run. A row that the guard raised gets the gradient of its bound instead of its sum.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .triton_features import (
    LN2,
    LOG2E,
    add_column_sums,
    feature_norm,
    features,
    finite,
    forget,
    load_amplitude,
    load_frequencies,
    phases,
    place_in_chunk,
)
from .triton_states import key_phases, load_rows, load_state, segment_bounds, store_state, valid_keys


@triton.jit
def delta_kernel(
    OUT, D_OUT, DELTA, o_batch, o_head, o_token, g_batch, g_head, g_token, HEADS, LENGTH, DV,
    BLOCK_V: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Each row's product of output and gradient."""
    pair, position = tl.program_id(1), tl.program_id(0) * TILE + tl.arange(0, TILE)
    batch, head = pair // HEADS, pair % HEADS
    OUT += batch.to(tl.int64) * o_batch + head * o_head
    D_OUT += batch.to(tl.int64) * g_batch + head * g_head
    output = load_rows(OUT, o_token, position, position < LENGTH, 0, DV, BLOCK_V).to(tl.float32)
    d_out = load_rows(D_OUT, g_token, position, position < LENGTH, 0, DV, BLOCK_V).to(tl.float32)
    tl.store(DELTA + pair.to(tl.int64) * LENGTH + position, tl.sum(output * d_out, 1), position < LENGTH)


@triton.jit
def load_delta(DELTA, ROW_GUARDED, rows, inside, first_value, GUARD, HYPERBOLIC: tl.constexpr):
    """Gradients of a row's sum and of its bound, negated; they count for one slice of values only."""
    delta = tl.load(DELTA + rows, inside, 0.0) * tl.where(first_value == 0, 1.0, 0.0)
    bound = delta * 0.0
    if not HYPERBOLIC:
        guarded = tl.load(ROW_GUARDED + rows, inside, 0) != 0
        bound = tl.where(guarded, delta * GUARD, 0.0)
        delta = tl.where(guarded, 0.0, delta)
    return delta, bound


@triton.jit
def maximum_before(ROW_REFERENCE, rows, position, first):
    """What rows up to `position` - 1 of this sequence are relative to; -inf before its first row."""
    return tl.load(ROW_REFERENCE + rows + position - 1, position > first, float("-inf"))


@triton.jit
def query_states_kernel(
    Q, W1, W2, AMPLITUDE, RATE, ROW_REFERENCE, ROW_SHIFT, ROW_GUARDED, DELTA, D_OUT, VALUES, NORMS, MAXIMUM, SEGMENTS,
    q_batch, q_head, q_token, g_batch, g_head, g_token,
    HEADS, STATE_HEADS, LENGTH, SEGMENT_LENGTH, RECORDS,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, SCALE, GUARD,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    PACKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The state of each segment's queries, for the gradients of all earlier keys, as of the token before the segment.

    Record r is that of segment r + 1 in a causal layer, of segment r else.
    """
    skip: tl.constexpr = 1 if CAUSAL else 0
    segment, pair, first_value = tl.program_id(0) + skip, tl.program_id(1), tl.program_id(2) * BLOCK_V
    batch, head = pair // HEADS, pair % HEADS
    Q += batch.to(tl.int64) * q_batch + head * q_head
    D_OUT += batch.to(tl.int64) * g_batch + head * g_head
    rows = pair.to(tl.int64) * LENGTH
    start, end, first = segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED)
    w1, w2 = load_frequencies(W1, W2, head, D, N, SCALE, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    values_a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    values_b = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    mass_a, mass_b = tl.zeros((16, BLOCK_N), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    norms = 0.0
    if CAUSAL:
        lower = maximum_before(ROW_REFERENCE, rows, start, first)
    else:
        lower = tl.load(ROW_REFERENCE + rows)
    for chunk in tl.range(start, end, CHUNK, num_stages=STAGES):
        position = chunk + tl.arange(0, CHUNK)
        inside = position < end
        query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
        d_out = load_rows(D_OUT, g_token, position, inside, first_value, DV, BLOCK_V).to(DTYPE)
        references = tl.load(ROW_REFERENCE + rows + position, inside, float("inf"))
        shift = tl.load(ROW_SHIFT + rows + position, inside, float("inf")) + finite(references) - lower
        delta, bound_delta = load_delta(DELTA, ROW_GUARDED, rows + position, inside, first_value, GUARD, HYPERBOLIC)
        phase, modulation = phases(query, w1, w2, NONSTATIONARY, PRECISION)
        if not HYPERBOLIC:
            norms -= tl.sum(bound_delta * feature_norm(modulation, shift, N, BLOCK_N, NONSTATIONARY), 0)
        age = (position - start + 1).to(tl.float32)
        a, b = features(
            phase, modulation, shift, AMPLITUDE, head, N, RATE, head // (HEADS // STATE_HEADS), age,
            BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
        )  # fmt: skip
        a, b = a.to(DTYPE), b.to(DTYPE)
        mass_a = add_column_sums(mass_a, -delta, a, PRECISION)
        mass_b = add_column_sums(mass_b, -delta, b, PRECISION)
        values_a = tl.dot(tl.trans(a), d_out, values_a, input_precision=PRECISION)
        values_b = tl.dot(tl.trans(b), d_out, values_b, input_precision=PRECISION)
    store_state(
        VALUES, NORMS, MAXIMUM, pair * RECORDS + tl.program_id(0), first_value, DV, N,
        values_a, values_b, mass_a, mass_b, norms, lower, BLOCK_N, BLOCK_V,
    )  # fmt: skip


@triton.jit
def value_gradient_kernel(
    Q, K, VISIBLE, Q_W1, Q_W2, Q_AMPLITUDE, K_W1, K_W2, K_AMPLITUDE, K_NORM_FACTOR, RATE,
    VALUES, NORMS, ROW_REFERENCE, ROW_SHIFT, D_OUT, D_V, FLAGS, SEGMENTS,
    q_batch, q_head, q_token, k_batch, k_head, k_token, g_batch, g_head, g_token,
    HEADS, STATE_HEADS, KV_HEADS, LENGTH, KEYS, SEGMENT_LENGTH, RECORDS, DELAY,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    MASKED: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of one segment's values (B, H, T', D), per query head."""
    segment, pair, first_value = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_V
    if (tl.load(FLAGS + pair * tl.num_programs(0) + segment) != 0) != EXACT:
        return
    batch, head = pair // HEADS, pair % HEADS
    kv_head, state_head = head // (HEADS // KV_HEADS), head // (HEADS // STATE_HEADS)
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    D_OUT += batch.to(tl.int64) * g_batch + head * g_head
    VISIBLE += batch.to(tl.int64) * KEYS
    D_V += pair.to(tl.int64) * KEYS * DV
    rows = pair.to(tl.int64) * LENGTH
    start, end, first = segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED)
    k_w1, k_w2 = load_frequencies(K_W1, K_W2, state_head, D, N, 1.0, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    if CAUSAL:
        q_w1, q_w2 = load_frequencies(Q_W1, Q_W2, head, D, N, SCALE, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    k_factor = tl.load(K_NORM_FACTOR + state_head) * LOG2E
    record = segment if CAUSAL else segment * 0
    carries = record < RECORDS
    if PACKED:
        carries = carries & (tl.load(SEGMENTS + 3 * segment + 5, segment < RECORDS, -1) == first)
    values_a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    values_b = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if carries:
        values_a, values_b, _, _, _ = load_state(
            VALUES, NORMS, pair * RECORDS + record, first_value, DV, N, BLOCK_N, BLOCK_V
        )
    reference = tl.load(ROW_REFERENCE + rows + end - 1)
    place, columns = tl.arange(0, CHUNK), first_value + tl.arange(0, BLOCK_V)
    age = place_in_chunk(CHUNK)
    chunks = tl.cdiv(end - start, CHUNK)
    no_mass = tl.zeros((16, BLOCK_N), tl.float32)
    if DECAY:
        tokens = (end - start - (chunks - 1) * CHUNK - CHUNK // 2).to(tl.float32)
        values_a, _ = forget(values_a, no_mass, RATE, state_head, 0, N, tokens, BLOCK_N)
        values_b, _ = forget(values_b, no_mass, RATE, state_head, 1, N, tokens, BLOCK_N)
    for step in tl.range(0, chunks, num_stages=STAGES):
        chunk = start + (chunks - 1 - step) * CHUNK
        position = chunk + place
        index = position - DELAY
        valid = valid_keys(VISIBLE, index, end, first, position, MASKED)
        key = load_rows(K, k_token, index, valid, 0, D, BLOCK_D).to(DTYPE)
        if CAUSAL:
            inside = position < end
            query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
            d_out = load_rows(D_OUT, g_token, position, inside, first_value, DV, BLOCK_V).to(DTYPE)
            q_shift = tl.load(ROW_SHIFT + rows + position, inside, float("inf"))
            references = tl.load(ROW_REFERENCE + rows + position, inside, float("inf"))
            phase, modulation = phases(query, q_w1, q_w2, NONSTATIONARY, PRECISION)
            q_a, q_b = features(
                phase, modulation, q_shift, Q_AMPLITUDE, head, N, RATE, state_head, age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
            lower = maximum_before(ROW_REFERENCE, rows, chunk, first)
            factors = tl.exp2(lower - finite(references))
            scaled_a, scaled_b = q_a, q_b
            if EXACT:
                scaled_a, scaled_b = q_a * factors[:, None], q_b * factors[:, None]
            q_a, q_b, scaled_a, scaled_b = q_a.to(DTYPE), q_b.to(DTYPE), scaled_a.to(DTYPE), scaled_b.to(DTYPE)
        phase, modulation, norm, largest = key_phases(
            key, k_w1, k_w2, K_AMPLITUDE, state_head, N, k_factor, valid,
            BLOCK_N, HYPERBOLIC, NONSTATIONARY, PRECISION,
        )  # fmt: skip
        shift = finite(reference) - norm
        k_a, k_b = features(
            phase, modulation, shift, K_AMPLITUDE, state_head, N, RATE, state_head, -age,
            BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
        )  # fmt: skip
        k_a, k_b = k_a.to(DTYPE), k_b.to(DTYPE)
        d_value = tl.dot(k_a, values_a.to(DTYPE), input_precision=PRECISION)
        d_value = tl.dot(k_b, values_b.to(DTYPE), d_value, input_precision=PRECISION)
        if CAUSAL:
            # keys are rows here and queries columns
            causal = position[None, :] >= position[:, None]
            if EXACT:
                own = tl.where(valid, largest - norm, 0.0)
                k_a, k_b = features(
                    phase, modulation, own, K_AMPLITUDE, state_head, N, RATE, state_head, -age,
                    BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
                )  # fmt: skip
                k_a, k_b = k_a.to(DTYPE), k_b.to(DTYPE)
            scores = tl.dot(k_a, tl.trans(q_a), input_precision=PRECISION)
            scores = tl.dot(k_b, tl.trans(q_b), scores, input_precision=PRECISION)
            if EXACT:
                weights = tl.where(causal, largest[:, None], float("-inf"))
                scores *= tl.exp2(weights - finite(references)[None, :])
            else:
                scores = tl.where(causal, scores, 0.0)
            d_value = tl.dot(scores.to(DTYPE), d_out, d_value, input_precision=PRECISION)
            decay = tl.exp2(lower - finite(reference))
            # all rows of a shared reference are rescaled alike, after they have been added
            before, after = (decay, 1.0) if EXACT else (1.0, decay)
            values_a = tl.dot(tl.trans(scaled_a), d_out, values_a * before, input_precision=PRECISION) * after
            values_b = tl.dot(tl.trans(scaled_b), d_out, values_b * before, input_precision=PRECISION) * after
            if DECAY:
                values_a, _ = forget(values_a, no_mass, RATE, state_head, 0, N, CHUNK * 1.0, BLOCK_N)
                values_b, _ = forget(values_b, no_mass, RATE, state_head, 1, N, CHUNK * 1.0, BLOCK_N)
            reference = lower
        present = ((position < end) & (index >= first))[:, None] & (columns < DV)[None, :]
        target = D_V + index.to(tl.int64)[:, None] * DV + columns[None, :]
        tl.store(target, d_value.to(D_V.dtype.element_ty), present)


@triton.jit
def map_gradient_kernel(
    X, W1, W2, AMPLITUDE, NORM_FACTOR, FEATURES, D_FEATURES, D_X, D_MAP,
    x_batch, x_head, x_token, HEADS, MAP_HEADS, X_HEADS, LENGTH, SLICE, SLICES, SPAN,
    D: tl.constexpr, N: tl.constexpr, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of SPAN tokens (B, H, T, d) from those of their features, and a program's share of the map's.

    That share is W1, W2, amplitudes, norm factor, the sum of all log features' gradients and, where features decay, of
    each feature that of positions times its gradients. Hyperbolic features' gradients are those of their logarithms,
    or, where FEATURES holds features, of these. Without D_X, tokens ask for no gradient.
    """
    span, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    X += batch.to(tl.int64) * x_batch + head // (HEADS // X_HEADS) * x_head
    map_head = head // (HEADS // MAP_HEADS)
    own = pair.to(tl.int64) * LENGTH * 2 * N
    D_MAP += (pair * tl.num_programs(0) + span).to(tl.int64) * (2 * D * N + 2 * N + 2 + (2 * N if DECAY else 0))
    w1, w2 = load_frequencies(W1, W2, map_head, D, N, SCALE, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    factor = tl.load(NORM_FACTOR + map_head)
    d_w1 = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    d_w2 = tl.zeros((BLOCK_D, BLOCK_N), tl.float32)
    d_plus, d_minus = tl.zeros((16, BLOCK_N), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    moments_a, moments_b = tl.zeros((16, BLOCK_N), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    d_factor, d_sum = 0.0, 0.0
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    for chunk in tl.range(span * SPAN, tl.minimum(span * SPAN + SPAN, LENGTH), CHUNK, num_stages=STAGES):
        position = chunk + tl.arange(0, CHUNK)
        inside = position < LENGTH
        x = load_rows(X, x_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
        offsets = own + position.to(tl.int64)[:, None] * 2 * N + n[None, :]
        source = D_FEATURES + offsets
        mask = inside[:, None] & (n < N)[None, :]
        d_a = tl.load(source, mask, 0.0)
        d_b = tl.load(source + N, mask, 0.0)
        for part in range(1, SLICES):
            d_a += tl.load(source + part * SLICE, mask, 0.0)
            d_b += tl.load(source + part * SLICE + N, mask, 0.0)
        if FEATURES is not None:
            d_a = d_a.to(tl.float32) * tl.load(FEATURES + offsets, mask, 0.0)
            d_b = d_b.to(tl.float32) * tl.load(FEATURES + offsets + N, mask, 0.0)
        if HYPERBOLIC:
            ones = tl.full((CHUNK,), 1.0, tl.float32)
            none = tl.zeros((16, BLOCK_N), tl.float32)
            sums_a = add_column_sums(none, ones, d_a.to(DTYPE), PRECISION)
            sums_b = add_column_sums(none, ones, d_b.to(DTYPE), PRECISION)
            d_plus += sums_a
            d_minus += sums_b
            if DECAY:
                # places in a chunk are exact in bf16, positions are not
                place = tl.arange(0, CHUNK).to(tl.float32)
                moments_a = add_column_sums(moments_a + chunk * sums_a, place, d_a.to(DTYPE), PRECISION)
                moments_b = add_column_sums(moments_b + chunk * sums_b, place, d_b.to(DTYPE), PRECISION)
            d_a, d_b = d_a.to(tl.float32), d_b.to(tl.float32)
            d_phase, d_modulation = d_a - d_b, d_a + d_b
            d_row = tl.sum(d_modulation, 1)
            if NONSTATIONARY:
                modulation = tl.dot(x, w2, input_precision=PRECISION)
                decay = tl.exp2(-2.0 * tl.abs(modulation))
                tangent = (1.0 - decay) / (1.0 + decay)
                d_modulation *= tl.where(modulation < 0, -tangent, tangent)
        else:
            d_a, d_b = d_a.to(tl.float32), d_b.to(tl.float32)
            phase, modulation = phases(x, w1, w2, NONSTATIONARY, PRECISION)
            amplitude = load_amplitude(AMPLITUDE, map_head, 0, N, BLOCK_N, HYPERBOLIC)
            cosine, sine = tl.cos(phase) * amplitude[None, :], tl.sin(phase) * amplitude[None, :]
            d_phase = d_b * cosine - d_a * sine
            d_modulation = d_a * cosine + d_b * sine
            d_log = d_modulation
            if NONSTATIONARY:
                d_log = d_modulation * tl.cos(modulation)
                d_phase *= tl.cos(modulation)
                d_modulation *= -tl.sin(modulation)
            d_row = tl.sum(d_log, 1)
        squared = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1) * SCALE * SCALE
        d_factor += tl.sum(d_row * squared, 0)
        d_sum += tl.sum(d_row, 0)
        d_phase, d_modulation = d_phase.to(DTYPE), d_modulation.to(DTYPE)
        d_w1 = tl.dot(tl.trans(x), d_phase, d_w1, input_precision=PRECISION)
        if NONSTATIONARY:
            d_w2 = tl.dot(tl.trans(x), d_modulation, d_w2, input_precision=PRECISION)
        if D_X is not None:
            d_x = tl.dot(d_phase, tl.trans(w1), input_precision=PRECISION)
            if NONSTATIONARY:
                d_x = tl.dot(d_modulation, tl.trans(w2), d_x, input_precision=PRECISION)
            if HYPERBOLIC:
                d_x *= LN2
            d_x += (2.0 * SCALE * SCALE * factor * d_row)[:, None] * x.to(tl.float32)
            target = D_X + (pair.to(tl.int64) * LENGTH + position)[:, None] * D + d[None, :]
            tl.store(target, d_x.to(D_X.dtype.element_ty), inside[:, None] & (d < D)[None, :])
    inside = (d < D)[:, None] & (n < N)[None, :]
    offsets = d[:, None] * N + n[None, :]
    tl.store(D_MAP + offsets, d_w1 * SCALE, inside)
    tl.store(D_MAP + D * N + offsets, d_w2 * SCALE, inside)
    tl.store(D_MAP + 2 * D * N + n, tl.max(d_plus, 0), n < N)
    tl.store(D_MAP + 2 * D * N + N + n, tl.max(d_minus, 0), n < N)
    tl.store(D_MAP + 2 * D * N + 2 * N, d_factor)
    tl.store(D_MAP + 2 * D * N + 2 * N + 1, d_sum)
    if DECAY:
        tl.store(D_MAP + 2 * D * N + 2 * N + 2 + n, tl.max(moments_a, 0), n < N)
        tl.store(D_MAP + 2 * D * N + 3 * N + 2 + n, tl.max(moments_b, 0), n < N)
