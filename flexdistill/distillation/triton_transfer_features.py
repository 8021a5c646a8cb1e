"""The kernel that makes hyperbolic features for attention transfer: it reads tokens and writes features once."""

import triton
import triton.language as tl

from ..runtime.triton_features import LN2, features, largest_log_feature, load_frequencies, phases
from ..runtime.triton_states import load_rows, state_unit


@triton.jit
def features_kernel(
    X, W1, W2, AMPLITUDE, NORM_FACTOR, RATE, FEATURES, LOG_SCALE,
    x_batch, x_head, x_token, HEADS, X_HEADS, STATE_HEADS, LENGTH, DELAY, SPAN,
    D: tl.constexpr, N: tl.constexpr, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, NONSTATIONARY: tl.constexpr,
    DECAY: tl.constexpr, DECAY_BLOCK: tl.constexpr, KEYS: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Features of SPAN queries or keys of one head, and the logarithms of what is factored out of them."""
    span, pair = tl.program_id(0), tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    X += batch.to(tl.int64) * x_batch + head // (HEADS // X_HEADS) * x_head
    rows = pair.to(tl.int64) * LENGTH
    w1, w2 = load_frequencies(W1, W2, head, D, N, SCALE, BLOCK_D, BLOCK_N, True, NONSTATIONARY, DTYPE)
    factor = tl.load(NORM_FACTOR + head) * SCALE * SCALE
    n = tl.arange(0, BLOCK_N)
    for chunk in tl.range(span * SPAN, tl.minimum(span * SPAN + SPAN, LENGTH), CHUNK, num_stages=STAGES):
        position = chunk + tl.arange(0, CHUNK)
        inside = position < LENGTH
        x = load_rows(X, x_token, position, inside, 0, D, BLOCK_D).to(DTYPE)
        phase, modulation = phases(x, w1, w2, NONSTATIONARY, PRECISION)
        largest = largest_log_feature(phase, modulation, AMPLITUDE, head, N, BLOCK_N, NONSTATIONARY)
        age = ((position + DELAY) % DECAY_BLOCK - DECAY_BLOCK // 2).to(tl.float32)
        if KEYS:
            age = -age
        a, b = features(
            phase, modulation, largest, AMPLITUDE, head, N, RATE, head // (HEADS // STATE_HEADS), age,
            BLOCK_N, True, NONSTATIONARY, DECAY,
        )  # fmt: skip
        norm = tl.sum(x.to(tl.float32) * x.to(tl.float32), 1) * factor
        tl.store(LOG_SCALE + rows + position, (largest - state_unit(N, True)) * LN2 + norm, inside)
        target = FEATURES + (rows + position)[:, None] * 2 * N + n[None, :]
        mask = inside[:, None] & (n < N)[None, :]
        tl.store(target, a.to(FEATURES.dtype.element_ty), mask)
        tl.store(target + N, b.to(FEATURES.dtype.element_ty), mask)
