"""Fused forward pass of linear attention: outputs from the states before each segment (see `triton_states`).

Exponents are relative to the largest log-weight up to the end of a chunk, which is exact enough for all of its rows
unless they see log-weights that lie further than `SHARED_SCALE_LIMIT` below it. A segment in which that happens is
flagged, and a second launch of the same kernel, which leaves all other segments alone, gives each of its rows a scale
of its own.
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
    largest_log_feature,
    load_frequencies,
    phases,
    place_in_chunk,
    times_row,
    tokens_to_next,
)
from .triton_states import key_phases, load_rows, load_state, segment_bounds, state_unit, store_state, valid_keys

# log2 by which the largest log-weight that a row sees may lie below that of its chunk: the product of a query's and a
# key's features may be as small again, and float32 ends at -126
SHARED_SCALE_LIMIT = tl.constexpr(48.0)
# below this the guard, which stands on a row's own scale, need not follow the shared one
NEGLIGIBLE_SPREAD = tl.constexpr(8.0)


@triton.jit
def outputs_kernel(
    Q, K, V, VISIBLE, Q_W1, Q_W2, Q_AMPLITUDE, Q_NORM_FACTOR, K_W1, K_W2, K_AMPLITUDE, K_NORM_FACTOR, RATE,
    GATE, VALUES, NORMS, MAXIMUM, INITIAL_VALUES, INITIAL_NORMS, INITIAL_MAXIMUM,
    FINAL_VALUES, FINAL_NORMS, FINAL_MAXIMUM, NEAR, NEAR_LSE,
    OUT, ROW_REFERENCE, ROW_SHIFT, ROW_GUARDED, ROW_LSE, FLAGS, SEGMENTS,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, o_batch, o_head, o_token,
    HEADS, STATE_HEADS, KV_HEADS, LENGTH, KEYS, SEGMENT_LENGTH, RECORDS, DELAY,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, SCALE, GUARD,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
    HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, MASKED: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Normalised outputs of one segment of queries, and what the backward pass needs of each row.

    That is the log2 of the scale that the row's keys are relative to, and of what its features are divided by to make
    attention weights of their products; whether the guard raised its sum; with a window, the log2 of the whole sum.
    """
    segment, pair, first_value = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BLOCK_V
    FLAGS += pair * tl.num_programs(0) + segment
    if EXACT:
        if tl.load(FLAGS) == 0:
            return
    batch, head = pair // HEADS, pair % HEADS
    kv_head, state_head = head // (HEADS // KV_HEADS), head // (HEADS // STATE_HEADS)
    state_pair = batch * STATE_HEADS + state_head
    Q += batch.to(tl.int64) * q_batch + head * q_head
    K += batch.to(tl.int64) * k_batch + kv_head * k_head
    V += batch.to(tl.int64) * v_batch + kv_head * v_head
    VISIBLE += batch.to(tl.int64) * KEYS
    OUT += batch.to(tl.int64) * o_batch + head * o_head
    NEAR += batch.to(tl.int64) * o_batch + head * o_head
    rows = pair.to(tl.int64) * LENGTH

    start, end, first = segment_bounds(SEGMENTS, segment, LENGTH, SEGMENT_LENGTH, PACKED)
    q_w1, q_w2 = load_frequencies(Q_W1, Q_W2, head, D, N, SCALE, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    if CAUSAL:
        k_w1, k_w2 = load_frequencies(
            K_W1, K_W2, state_head, D, N, 1.0, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE
        )
        k_factor = tl.load(K_NORM_FACTOR + state_head) * LOG2E
    values_a = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    values_b = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    mass_a, mass_b = tl.zeros((16, BLOCK_N), tl.float32), tl.zeros((16, BLOCK_N), tl.float32)
    norms, maximum = 0.0, float("-inf")
    # causal: the sum over earlier segments; else that over all
    record = segment - 1 if CAUSAL else RECORDS - 1
    carries = record >= 0
    if PACKED:
        carries = start > first
    if carries:
        values_a, values_b, mass_a, mass_b, norms = load_state(
            VALUES, NORMS, state_pair * RECORDS + record, first_value, DV, N, BLOCK_N, BLOCK_V
        )
        maximum = tl.load(MAXIMUM + state_pair * RECORDS + record)
    if INITIAL:
        if segment == 0:
            values_a, values_b, mass_a, mass_b, norms = load_state(
                INITIAL_VALUES, INITIAL_NORMS, state_pair, first_value, DV, N, BLOCK_N, BLOCK_V
            )
            maximum = tl.load(INITIAL_MAXIMUM + state_pair) * LOG2E + state_unit(N, HYPERBOLIC)
    if DECAY:
        values_a, mass_a = forget(values_a, mass_a, RATE, state_head, 0, N, CHUNK // 2 * 1.0, BLOCK_N)
        values_b, mass_b = forget(values_b, mass_b, RATE, state_head, 1, N, CHUNK // 2 * 1.0, BLOCK_N)

    flag = start * 0
    place, age = tl.arange(0, CHUNK), place_in_chunk(CHUNK)
    for chunk in tl.range(start, end, CHUNK, num_stages=STAGES):
        position = chunk + place
        inside = position < end
        query = load_rows(Q, q_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
        if CAUSAL:
            index = position - DELAY
            valid = valid_keys(VISIBLE, index, end, first, position, MASKED)
            key = load_rows(K, k_token, index, valid, 0, D, BLOCK_D).to(DTYPE)
            value = load_rows(V, v_token, index, valid, first_value, DV, BLOCK_V).to(DTYPE)
            phase, modulation, norm, largest = key_phases(
                key, k_w1, k_w2, K_AMPLITUDE, state_head, N, k_factor, valid,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, PRECISION,
            )  # fmt: skip
            new = tl.maximum(maximum, tl.max(largest, 0))
            shift = finite(new) - norm
            k_a, k_b = features(
                phase, modulation, shift, K_AMPLITUDE, state_head, N, RATE, state_head, -age,
                BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
            )  # fmt: skip
            k_a, k_b = k_a.to(DTYPE), k_b.to(DTYPE)
            if EXACT:
                own = tl.where(valid, largest - norm, 0.0)
                own_a, own_b = features(
                    phase, modulation, own, K_AMPLITUDE, state_head, N, RATE, state_head, -age,
                    BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
                )  # fmt: skip
                own_a, own_b = own_a.to(DTYPE), own_b.to(DTYPE)
            if not HYPERBOLIC:
                k_norm = feature_norm(modulation, tl.zeros_like(norm), N, BLOCK_N, NONSTATIONARY)
        phase, modulation = phases(query, q_w1, q_w2, NONSTATIONARY, PRECISION)
        q_scale = tl.zeros((CHUNK,), tl.float32)
        if HYPERBOLIC:
            q_scale = largest_log_feature(phase, modulation, Q_AMPLITUDE, head, N, BLOCK_N, NONSTATIONARY)
        q_a, q_b = features(
            phase, modulation, q_scale, Q_AMPLITUDE, head, N, RATE, state_head, age,
            BLOCK_N, HYPERBOLIC, NONSTATIONARY, DECAY,
        )  # fmt: skip
        q_a, q_b = q_a.to(DTYPE), q_b.to(DTYPE)
        if not HYPERBOLIC:
            q_norm = feature_norm(modulation, q_scale, N, BLOCK_N, NONSTATIONARY)
        reference = tl.zeros((CHUNK,), tl.float32) + maximum
        spread = 0.0
        bound = tl.zeros((CHUNK,), tl.float32) + norms
        output = tl.dot(q_a, values_a.to(DTYPE), input_precision=PRECISION)
        output = tl.dot(q_b, values_b.to(DTYPE), output, input_precision=PRECISION)
        total = times_row(q_a, mass_a, PRECISION) + times_row(q_b, mass_b, PRECISION)
        if CAUSAL:
            causal = position[:, None] >= position[None, :]
            if EXACT:
                visible = tl.where(causal, largest[None, :], float("-inf"))
                reference = tl.maximum(maximum, tl.max(visible, 1))
                scores = tl.dot(q_a, tl.trans(own_a), input_precision=PRECISION)
                scores = tl.dot(q_b, tl.trans(own_b), scores, input_precision=PRECISION)
                scores *= tl.exp2(visible - finite(reference)[:, None])
            else:
                scores = tl.dot(q_a, tl.trans(k_a), input_precision=PRECISION)
                scores = tl.dot(q_b, tl.trans(k_b), scores, input_precision=PRECISION)
                scores = tl.where(causal, scores, 0.0)
                reference = tl.zeros((CHUNK,), tl.float32) + new
                if new - maximum > NEGLIGIBLE_SPREAD:
                    # the first row that sees any key lies furthest below
                    first_key = tl.min(tl.where(valid, place, CHUNK), 0)
                    sees = place >= tl.where(maximum > float("-inf"), 0, first_key)
                    reference = tl.where(sees, reference, float("-inf"))
                    lowest = tl.maximum(maximum, tl.max(tl.where(place == first_key, largest, float("-inf")), 0))
                    spread = new - lowest
                    flag = tl.where(spread > SHARED_SCALE_LIMIT, 1, flag)
            carried = tl.exp2(maximum - finite(reference))
            total = total * carried + tl.sum(scores, 1)
            output = tl.dot(scores.to(DTYPE), value, output * carried[:, None], input_precision=PRECISION)
            decay = tl.exp2(maximum - finite(new))
            values_a = tl.dot(tl.trans(k_a), value, values_a * decay, input_precision=PRECISION)
            values_b = tl.dot(tl.trans(k_b), value, values_b * decay, input_precision=PRECISION)
            ones = tl.full((CHUNK,), 1.0, tl.float32)
            mass_a = add_column_sums(mass_a * decay, ones, k_a, PRECISION)
            mass_b = add_column_sums(mass_b * decay, ones, k_b, PRECISION)
            if DECAY:
                tokens = tokens_to_next(chunk, end, CHUNK)
                values_a, mass_a = forget(values_a, mass_a, RATE, state_head, 0, N, tokens, BLOCK_N)
                values_b, mass_b = forget(values_b, mass_b, RATE, state_head, 1, N, tokens, BLOCK_N)
            if not HYPERBOLIC:
                weights = tl.exp2(tl.where(causal, norm[None, :], float("-inf")) - finite(reference)[:, None])
                bound = bound * carried + tl.sum(weights * k_norm[None, :], 1)
                norms = norms * decay + tl.sum(k_norm * tl.exp2(-shift), 0)
            maximum = new

        least = tl.zeros((CHUNK,), tl.float32) + GUARD * tl.exp2(-spread)
        if not HYPERBOLIC:
            least = GUARD * bound * q_norm
        guarded = (total < least) & (reference > float("-inf"))
        total = tl.maximum(total, least)
        output = output / tl.where(total == 0, 1.0, total)[:, None]
        empty = (reference == float("-inf")) | (total == 0)
        row_shift = tl.where(empty, float("inf"), q_scale + tl.log2(total))
        if WINDOW:
            squared = tl.sum(query.to(tl.float32) * query.to(tl.float32), 1) * SCALE * SCALE
            factors = (tl.load(Q_NORM_FACTOR + head) * squared + tl.load(GATE + head)) * LOG2E
            factors += reference - 2.0 * state_unit(N, HYPERBOLIC)
            far = tl.where(empty, float("-inf"), row_shift + factors)
            near = tl.load(NEAR_LSE + rows + position, inside, float("-inf"))
            larger = tl.maximum(far, near)
            lse = larger + tl.log2(tl.exp2(far - finite(larger)) + tl.exp2(near - finite(larger)))
            near_output = load_rows(NEAR, o_token, position, inside, first_value, DV, BLOCK_V).to(tl.float32)
            output = output * tl.exp2(far - finite(lse))[:, None]
            output += near_output * tl.exp2(near - finite(lse))[:, None]
            row_shift = tl.where(empty, float("inf"), finite(lse) - factors)
            if first_value == 0:
                tl.store(ROW_LSE + rows + position, lse, inside)
        if first_value == 0:
            tl.store(ROW_REFERENCE + rows + position, reference, inside)
            tl.store(ROW_SHIFT + rows + position, row_shift, inside)
            tl.store(ROW_GUARDED + rows + position, guarded.to(tl.int8), inside)
        d = first_value + tl.arange(0, BLOCK_V)
        tl.store(
            OUT + position.to(tl.int64)[:, None] * o_token + d[None, :],
            output.to(OUT.dtype.element_ty),
            inside[:, None] & (d < DV)[None, :],
        )
    if not EXACT:
        if first_value == 0:
            tl.store(FLAGS, flag)
    if FINAL:
        if (segment == tl.num_programs(0) - 1) & (head % (HEADS // STATE_HEADS) == 0):
            store_state(
                FINAL_VALUES, FINAL_NORMS, FINAL_MAXIMUM, state_pair, first_value, DV, N, values_a, values_b,
                mass_a, mass_b, norms, (maximum - state_unit(N, HYPERBOLIC)) * LN2, BLOCK_N, BLOCK_V,
            )  # fmt: skip
