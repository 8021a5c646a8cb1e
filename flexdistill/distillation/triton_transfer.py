"""Kernels of attention transfer in linear memory: rows of the teacher and of the student, tile by tile.

A tile is a block of queries (rows) by a block of keys (columns); no program ever holds more of the T x T maps. Far keys
are those that the student's kernel weighs, near ones those that its softmax window weighs; the teacher sees both. A
student's weight is

    far:  far_scale_i exp(w_j - m_i) <phi(q_i), phi(k_j)>        near:  exp2(logit_ij - near_shift_i)

with w the keys' log-weights and m_i the largest among a row's far keys. Logits, shifts and sums of logarithms are in
units of log 2, log-weights in natural ones. All tensors are contiguous, so a head is a matrix with one token per row.

Features that decay come relative to the middle of their block of DECAY_BLOCK positions, where a key stands WINDOW
later than its token. So a pair's features lack only the decay between their two blocks, and tiles of keys are aligned.
"""

import triton
import triton.language as tl

from .triton_tiles import (
    LN2,
    LOG2E,
    add_softmax,
    far_pairs,
    far_weights,
    finite,
    head_of,
    inside,
    load_features,
    load_tokens,
    products,
    queries_of_program,
    seen_pairs,
    store_moment,
    store_tokens,
)


@triton.jit
def totals_kernel(
    Q_FEATURES, K_FEATURES, RATE, LOG_WEIGHT, K_NORM, ROW_MAXIMUM, MIX, Q, K, VISIBLE, STATISTICS,
    TOKENS, HEADS, STATE_HEADS, KV_HEADS, LENGTH, WINDOW, D, DV, F, SCALE, GUARD,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr, SIGNED: tl.constexpr, CALIBRATED: tl.constexpr,
    MASKED: tl.constexpr, DECAY: tl.constexpr, DECAY_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Each row's sums over all its keys, without which no weight is known."""
    start, pair, batch, state_pair, kv_pair = queries_of_program(HEADS, STATE_HEADS, KV_HEADS, QUERIES)
    K_FEATURES = head_of(K_FEATURES, state_pair, LENGTH, F)
    LOG_WEIGHT = head_of(LOG_WEIGHT, state_pair, LENGTH, 1)
    K_NORM = head_of(K_NORM, state_pair, LENGTH, 1)
    K = head_of(K, kv_pair, LENGTH, D)
    VISIBLE += batch * LENGTH

    row = start + tl.arange(0, QUERIES)
    exists = row < LENGTH
    query = load_tokens(head_of(Q, pair, LENGTH, D), row, LENGTH, D, BLOCK_D)
    RATE += state_pair % STATE_HEADS * F
    q_features = load_tokens(head_of(Q_FEATURES, pair, LENGTH, F), row, LENGTH, F, BLOCK_F)
    row_maximum = tl.load(head_of(ROW_MAXIMUM, state_pair, LENGTH, 1) + row, exists, float("-inf"))
    scale = finite(row_maximum)
    end = tl.minimum(start + QUERIES, LENGTH) if CAUSAL else LENGTH

    maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    near_maximum = tl.full((QUERIES,), float("-inf"), tl.float32)
    total, near_total = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES,), tl.float32)
    far_total, bound = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES,), tl.float32)
    for first in range(-(WINDOW % KEYS), end, KEYS):
        column = first + tl.arange(0, KEYS)
        seen = seen_pairs(VISIBLE, row[:, None], column[None, :], LENGTH, 0, CAUSAL, MASKED)
        key = load_tokens(K, column, LENGTH, D, BLOCK_D)
        logits = products(query, key, PRECISION) * SCALE
        logits = tl.where(seen, logits, float("-inf"))
        maximum, total = add_softmax(logits, maximum, total)
        far = seen
        if WINDOWED:
            far = far_pairs(VISIBLE, seen, row[:, None], column[None, :], LENGTH, WINDOW, SINKS)
            near_maximum, near_total = add_softmax(tl.where(far, float("-inf"), logits), near_maximum, near_total)
        blocks = start // DECAY_BLOCK - (first + WINDOW) // DECAY_BLOCK
        k_features = load_features(K_FEATURES, column, LENGTH, F, RATE, blocks, BLOCK_F, DECAY, DECAY_BLOCK)
        weight = far_weights(LOG_WEIGHT, scale[:, None], column[None, :], far, LENGTH)
        far_total += tl.sum(products(q_features, k_features, PRECISION) * weight, 1)
        if SIGNED:
            bound += tl.sum(weight * tl.load(K_NORM + column, inside(column, LENGTH), 0.0)[None, :], 1)

    log_sum = finite(maximum) + tl.log2(tl.where(total > 0, total, 1.0))
    least = GUARD
    if SIGNED:
        bound *= tl.sqrt(tl.sum(q_features * q_features, 1))
        least = GUARD * bound
    guarded = far_total < least
    far_total = tl.maximum(far_total, least)
    denominator = far_total
    near_shift = finite(near_maximum)
    far_scale = tl.full((QUERIES,), 1.0, tl.float32)
    if WINDOWED:
        # logarithm of the kernel part's weight against the window's; the larger of the two is scaled to 1
        mix = tl.load(head_of(MIX, pair, LENGTH, 1) + row, exists, 0.0)
        if CALIBRATED:
            mix = (mix + row_maximum) * LOG2E - near_shift
        else:
            mix *= LOG2E
        larger = tl.maximum(mix, 0.0)
        near_shift += larger
        far_scale = tl.exp2(mix - larger)
        denominator = far_scale * far_total + tl.exp2(-larger) * near_total
    denominator = tl.where(denominator == 0, 1.0, denominator)
    far_scale /= denominator
    near_shift += tl.log2(denominator)
    STATISTICS = head_of(STATISTICS, pair, LENGTH, 1) + row
    tl.store(STATISTICS, log_sum, exists)
    tl.store(STATISTICS + TOKENS, far_scale, exists)
    tl.store(STATISTICS + 2 * TOKENS, far_scale * far_total, exists)
    tl.store(STATISTICS + 3 * TOKENS, tl.where(guarded, bound if SIGNED else 1.0, 0.0), exists)
    tl.store(STATISTICS + 4 * TOKENS, near_shift, exists)


@triton.jit
def rows_kernel(
    Q_FEATURES, K_FEATURES, RATE, LOG_WEIGHT, ROW_MAXIMUM, Q, K, V, VISIBLE, ROWS, TEACHER, STUDENT, STATISTICS,
    TOKENS, HEADS, STATE_HEADS, KV_HEADS, LENGTH, WINDOW, D, DV, F, SCALE, LEAST_WEIGHT,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SINKS: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr,
    DECAY: tl.constexpr, DECAY_BLOCK: tl.constexpr, VALUE_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both outputs and each row's losses, given its sums."""
    start, pair, batch, state_pair, kv_pair = queries_of_program(HEADS, STATE_HEADS, KV_HEADS, QUERIES)
    K_FEATURES = head_of(K_FEATURES, state_pair, LENGTH, F)
    LOG_WEIGHT = head_of(LOG_WEIGHT, state_pair, LENGTH, 1)
    K, V = head_of(K, kv_pair, LENGTH, D), head_of(V, kv_pair, LENGTH, DV)
    VISIBLE += batch * LENGTH

    row = start + tl.arange(0, QUERIES)
    exists = row < LENGTH
    query = load_tokens(head_of(Q, pair, LENGTH, D), row, LENGTH, D, BLOCK_D)
    RATE += state_pair % STATE_HEADS * F
    q_features = load_tokens(head_of(Q_FEATURES, pair, LENGTH, F), row, LENGTH, F, BLOCK_F)
    scale = finite(tl.load(head_of(ROW_MAXIMUM, state_pair, LENGTH, 1) + row, exists, 0.0))[:, None]
    STATISTICS = head_of(STATISTICS, pair, LENGTH, 1) + row
    log_sum = tl.load(STATISTICS, exists, 0.0)[:, None]
    far_scale = tl.load(STATISTICS + TOKENS, exists, 0.0)[:, None]
    near_shift = tl.load(STATISTICS + 4 * TOKENS, exists, 0.0)[:, None]
    end = tl.minimum(start + QUERIES, LENGTH) if CAUSAL else LENGTH

    cross_entropy, entropy = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES,), tl.float32)
    negative, kept = tl.zeros((QUERIES,), tl.float32), tl.zeros((QUERIES,), tl.float32)
    teacher = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    student = tl.zeros((QUERIES, BLOCK_V), tl.float32)
    for first in range(-(WINDOW % KEYS), end, KEYS):
        column = first + tl.arange(0, KEYS)
        seen = seen_pairs(VISIBLE, row[:, None], column[None, :], LENGTH, 0, CAUSAL, MASKED)
        key = load_tokens(K, column, LENGTH, D, BLOCK_D)
        logits = products(query, key, PRECISION) * SCALE
        share = tl.where(seen, tl.exp2(logits - log_sum), 0.0)
        far = seen
        if WINDOWED:
            far = far_pairs(VISIBLE, seen, row[:, None], column[None, :], LENGTH, WINDOW, SINKS)
        blocks = start // DECAY_BLOCK - (first + WINDOW) // DECAY_BLOCK
        k_features = load_features(K_FEATURES, column, LENGTH, F, RATE, blocks, BLOCK_F, DECAY, DECAY_BLOCK)
        weight = far_weights(LOG_WEIGHT, scale, column[None, :], far, LENGTH) * far_scale
        weight *= products(q_features, k_features, PRECISION)
        if WINDOWED:
            weight = tl.where(far, weight, tl.where(seen, tl.exp2(logits - near_shift), 0.0))
        entropy += tl.sum(share * (log_sum - logits), 1)
        cross_entropy -= tl.sum(share * tl.log2(tl.maximum(weight, LEAST_WEIGHT)), 1)
        kept += tl.sum(tl.where(weight >= LEAST_WEIGHT, share, 0.0), 1)
        if SIGNED:
            negative += tl.sum(tl.maximum(-weight, 0.0), 1)
        value = load_tokens(V, column, LENGTH, DV, BLOCK_V).to(VALUE_DTYPE)
        teacher = tl.dot(share.to(VALUE_DTYPE), value, teacher, input_precision=PRECISION)
        student = tl.dot(weight.to(VALUE_DTYPE), value, student, input_precision=PRECISION)

    store_tokens(head_of(TEACHER, pair, LENGTH, DV), teacher, row, LENGTH, DV, BLOCK_V)
    store_tokens(head_of(STUDENT, pair, LENGTH, DV), student, row, LENGTH, DV, BLOCK_V)
    ROWS = head_of(ROWS, pair, LENGTH, 1) + row
    tl.store(ROWS, cross_entropy * LN2, exists)
    tl.store(ROWS + TOKENS, entropy * LN2, exists)
    tl.store(ROWS + 2 * TOKENS, negative, exists)
    tl.store(ROWS + 3 * TOKENS, kept, exists)


@triton.jit
def load_row_numbers(STATISTICS, GRADIENTS, row, TOKENS, LENGTH):
    """Of each row: its log-sum and far scale; the gradients of cross-entropy and negative mass, what the denominator
    takes off every gradient, and the gradient of the bound over the norm of a key."""
    exists = row < LENGTH
    return (
        tl.load(STATISTICS + row, exists, 0.0),
        tl.load(STATISTICS + TOKENS + row, exists, 0.0),
        tl.load(GRADIENTS + row, exists, 0.0),
        tl.load(GRADIENTS + TOKENS + row, exists, 0.0),
        tl.load(GRADIENTS + 2 * TOKENS + row, exists, 0.0),
        tl.load(GRADIENTS + 3 * TOKENS + row, exists, 0.0),
    )


@triton.jit
def product_gradient(
    logits, by_weight, product, weight, far, log_sum, far_scale, d_cross_entropy, d_negative, common, LEAST_WEIGHT,
    SIGNED: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile's products <phi(q_i), phi(k_j)>, and each student's weight times its gradient.

    `by_weight` is the gradient of the student's weights through its output.
    """
    scaled = weight * far_scale
    student = scaled * product
    # the cross-entropy's gradient by a weight is -share / weight; weights below the least have none
    kept = far & (student >= LEAST_WEIGHT)
    share = tl.where(kept, d_cross_entropy * tl.exp2(logits - log_sum), 0.0)
    if SIGNED:
        by_weight -= tl.where(student < 0, d_negative, 0.0)
    gradient = scaled * (by_weight - common) - share / tl.where(kept, product, 1.0)
    return gradient, student * by_weight - share


@triton.jit
def query_gradient_kernel(
    Q_FEATURES, K_FEATURES, RATE, LOG_WEIGHT, ROW_MAXIMUM, Q, K, V, VISIBLE, STATISTICS, D_STUDENT, GRADIENTS,
    D_FEATURES, MOMENTS, D_FAR,
    TOKENS, HEADS, STATE_HEADS, KV_HEADS, LENGTH, WINDOW, D, DV, F, SCALE, LEAST_WEIGHT,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr, DECAY: tl.constexpr,
    DECAY_BLOCK: tl.constexpr, VALUE_DTYPE: tl.constexpr, FEATURE_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the queries' features, and of the logarithm of the far weights' common factor, denominator apart.

    Where features decay, MOMENTS are a program's share of the decay's gradient.
    """
    start, pair, batch, state_pair, kv_pair = queries_of_program(HEADS, STATE_HEADS, KV_HEADS, QUERIES)
    K_FEATURES = head_of(K_FEATURES, state_pair, LENGTH, F)
    LOG_WEIGHT = head_of(LOG_WEIGHT, state_pair, LENGTH, 1)
    K, V = head_of(K, kv_pair, LENGTH, D), head_of(V, kv_pair, LENGTH, DV)
    VISIBLE += batch * LENGTH

    row = start + tl.arange(0, QUERIES)
    query = load_tokens(head_of(Q, pair, LENGTH, D), row, LENGTH, D, BLOCK_D)
    RATE += state_pair % STATE_HEADS * F
    q_features = load_tokens(head_of(Q_FEATURES, pair, LENGTH, F), row, LENGTH, F, BLOCK_F)
    d_student = load_tokens(head_of(D_STUDENT, pair, LENGTH, DV), row, LENGTH, DV, BLOCK_V)
    scale = finite(tl.load(head_of(ROW_MAXIMUM, state_pair, LENGTH, 1) + row, row < LENGTH, 0.0))[:, None]
    log_sum, far_scale, d_cross_entropy, d_negative, common, _ = load_row_numbers(
        head_of(STATISTICS, pair, LENGTH, 1), head_of(GRADIENTS, pair, LENGTH, 1), row[:, None], TOKENS, LENGTH
    )
    end = tl.minimum(start + QUERIES - WINDOW, LENGTH) if CAUSAL else LENGTH
    d_features, d_far = tl.zeros((QUERIES, BLOCK_F), tl.float32), tl.zeros((QUERIES,), tl.float32)
    for first in range(-(WINDOW % KEYS), end, KEYS):
        column = first + tl.arange(0, KEYS)
        far = seen_pairs(VISIBLE, row[:, None], column[None, :], LENGTH, WINDOW, CAUSAL, MASKED)
        key = load_tokens(K, column, LENGTH, D, BLOCK_D)
        value = load_tokens(V, column, LENGTH, DV, BLOCK_V).to(VALUE_DTYPE)
        blocks = start // DECAY_BLOCK - (first + WINDOW) // DECAY_BLOCK
        k_features = load_features(K_FEATURES, column, LENGTH, F, RATE, blocks, BLOCK_F, DECAY, DECAY_BLOCK)
        logits = products(query, key, PRECISION) * SCALE
        by_weight = products(d_student, value, PRECISION)
        product = products(q_features, k_features, PRECISION)
        weight = far_weights(LOG_WEIGHT, scale, column[None, :], far, LENGTH)
        gradient, by_log = product_gradient(
            logits, by_weight, product, weight, far, log_sum, far_scale, d_cross_entropy, d_negative, common,
            LEAST_WEIGHT, SIGNED,
        )  # fmt: skip
        d_features = tl.dot(
            gradient.to(FEATURE_DTYPE), k_features.to(FEATURE_DTYPE), d_features, input_precision=PRECISION
        )
        if WINDOWED:
            d_far += tl.sum(by_log, 1)
    store_tokens(head_of(D_FEATURES, pair, LENGTH, F), d_features, row, LENGTH, F, BLOCK_F)
    if DECAY:
        # loaded anew, because held all along they would take the registers that the loop needs
        q_features = load_tokens(head_of(Q_FEATURES, pair, LENGTH, F), row, LENGTH, F, BLOCK_F)
        store_moment(MOMENTS, pair, d_features * q_features, row, F, BLOCK_F)
    if WINDOWED:
        tl.store(head_of(D_FAR, pair, LENGTH, 1) + row, d_far, row < LENGTH)


@triton.jit
def key_gradient_kernel(
    Q_FEATURES, K_FEATURES, RATE, LOG_WEIGHT, ROW_MAXIMUM, Q, K, V, VISIBLE, STATISTICS, D_STUDENT, GRADIENTS,
    D_FEATURES, MOMENTS, D_LOG_WEIGHT,
    TOKENS, HEADS, STATE_HEADS, KV_HEADS, LENGTH, WINDOW, D, DV, F, SCALE, LEAST_WEIGHT,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_F: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    CAUSAL: tl.constexpr, SIGNED: tl.constexpr, MASKED: tl.constexpr, DECAY: tl.constexpr,
    DECAY_BLOCK: tl.constexpr, VALUE_DTYPE: tl.constexpr, FEATURE_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the keys' features and log-weights; a key map's query heads are summed.

    Where features decay, MOMENTS are a program's share of the decay's gradient.
    """
    start, state_pair = tl.program_id(0) * KEYS - WINDOW % KEYS, tl.program_id(1)
    group = HEADS // STATE_HEADS
    batch, first_head = state_pair // STATE_HEADS, state_pair % STATE_HEADS * group
    kv_pair = batch * KV_HEADS + first_head // (HEADS // KV_HEADS)
    VISIBLE += batch * LENGTH
    LOG_WEIGHT = head_of(LOG_WEIGHT, state_pair, LENGTH, 1)
    ROW_MAXIMUM = head_of(ROW_MAXIMUM, state_pair, LENGTH, 1)

    column = start + tl.arange(0, KEYS)
    key = load_tokens(head_of(K, kv_pair, LENGTH, D), column, LENGTH, D, BLOCK_D)
    value = load_tokens(head_of(V, kv_pair, LENGTH, DV), column, LENGTH, DV, BLOCK_V).to(VALUE_DTYPE)
    RATE += state_pair % STATE_HEADS * F
    k_features = load_tokens(head_of(K_FEATURES, state_pair, LENGTH, F), column, LENGTH, F, BLOCK_F)
    begin = (start + WINDOW) // QUERIES * QUERIES if CAUSAL else 0
    d_features, d_norm = tl.zeros((KEYS, BLOCK_F), tl.float32), tl.zeros((KEYS,), tl.float32)
    tiles = tl.cdiv(tl.maximum(LENGTH - begin, 0), QUERIES)
    for step in range(0, group * tiles):
        pair = batch * HEADS + first_head + step // tiles
        row = begin + step % tiles * QUERIES + tl.arange(0, QUERIES)
        far = seen_pairs(VISIBLE, row[None, :], column[:, None], LENGTH, WINDOW, CAUSAL, MASKED)
        query = load_tokens(head_of(Q, pair, LENGTH, D), row, LENGTH, D, BLOCK_D)
        blocks = (begin + step % tiles * QUERIES) // DECAY_BLOCK - (start + WINDOW) // DECAY_BLOCK
        q_features = load_features(
            head_of(Q_FEATURES, pair, LENGTH, F), row, LENGTH, F, RATE, blocks, BLOCK_F, DECAY, DECAY_BLOCK
        )
        d_student = load_tokens(head_of(D_STUDENT, pair, LENGTH, DV), row, LENGTH, DV, BLOCK_V)
        scale = finite(tl.load(ROW_MAXIMUM + row, row < LENGTH, 0.0))[None, :]
        log_sum, far_scale, d_cross_entropy, d_negative, common, d_bound = load_row_numbers(
            head_of(STATISTICS, pair, LENGTH, 1), head_of(GRADIENTS, pair, LENGTH, 1), row[None, :], TOKENS, LENGTH
        )
        logits = products(key, query, PRECISION) * SCALE
        by_weight = products(value, d_student, PRECISION)
        product = products(k_features, q_features, PRECISION)
        weight = far_weights(LOG_WEIGHT, scale, column[:, None], far, LENGTH)
        gradient, _ = product_gradient(
            logits, by_weight, product, weight, far, log_sum, far_scale, d_cross_entropy, d_negative, common,
            LEAST_WEIGHT, SIGNED,
        )  # fmt: skip
        d_features = tl.dot(
            gradient.to(FEATURE_DTYPE),
            q_features.to(FEATURE_DTYPE),
            d_features,
            input_precision=PRECISION,
        )
        if SIGNED:
            d_norm += tl.sum(weight * d_bound, 1)
    if SIGNED:
        norm = tl.sqrt(tl.sum(k_features * k_features, 1))
        d_features += (d_norm / tl.where(norm > 0, norm, 1.0))[:, None] * k_features
    store_tokens(head_of(D_FEATURES, state_pair, LENGTH, F), d_features, column, LENGTH, F, BLOCK_F)
    # loaded anew, because held all along they would take the registers that the loop needs
    k_features = load_tokens(head_of(K_FEATURES, state_pair, LENGTH, F), column, LENGTH, F, BLOCK_F)
    d_log = d_features * k_features
    # scores and bounds are of degree one in a key's features, just as in exp(w)
    tl.store(head_of(D_LOG_WEIGHT, state_pair, LENGTH, 1) + column, tl.sum(d_log, 1), inside(column, LENGTH))
    if DECAY:
        store_moment(MOMENTS, state_pair, d_log, column + WINDOW, F, BLOCK_F)
