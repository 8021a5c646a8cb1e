"""Tiles of attention transfer: what its kernels load, weigh and compare of a block of queries and a block of keys."""

import triton
import triton.language as tl

from ..runtime.triton_features import LN2, LOG2E, finite  # noqa: F401


@triton.jit
def queries_of_program(HEADS, STATE_HEADS, KV_HEADS, QUERIES: tl.constexpr):
    """The first row of a program; its pair of sequence and query head, the sequence, and its state and KV head's pairs.

    Later rows see more keys, so their programs start first.
    """
    pair = tl.program_id(1)
    batch, head = pair // HEADS, pair % HEADS
    return (
        (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES,
        pair,
        batch,
        batch * STATE_HEADS + head // (HEADS // STATE_HEADS),
        batch * KV_HEADS + head // (HEADS // KV_HEADS),
    )


@triton.jit
def head_of(X, pair, LENGTH, SIZE):
    """The matrix (LENGTH, SIZE) of one head of one sequence."""
    return X + pair.to(tl.int64) * LENGTH * SIZE


@triton.jit
def inside(index, LENGTH):
    """Which positions there are; a window that is no multiple of the tile makes tiles begin before the first."""
    return (index >= 0) & (index < LENGTH)


@triton.jit
def load_tokens(X, index, LENGTH, SIZE, BLOCK: tl.constexpr):
    """Tokens as rows: (TILE, BLOCK)."""
    d = tl.arange(0, BLOCK)
    return tl.load(X + index[:, None] * SIZE + d[None, :], inside(index, LENGTH)[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def load_features(
    X, index, LENGTH, F, RATE, blocks, BLOCK_F: tl.constexpr, DECAY: tl.constexpr, DECAY_BLOCK: tl.constexpr
):
    """Features of tokens as rows (TILE, BLOCK_F), after so many more blocks of decay."""
    x = load_tokens(X, index, LENGTH, F, BLOCK_F)
    if DECAY:
        f = tl.arange(0, BLOCK_F)
        # less than none would be pairs that nobody sees
        age = (tl.maximum(blocks, 0) * DECAY_BLOCK).to(tl.float32)
        x = (x * tl.exp2(-age * tl.load(RATE + f, f < F, 0.0) * LOG2E)[None, :]).to(x.dtype)
    return x


@triton.jit
def store_tokens(X, x, index, LENGTH, SIZE, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(X + index[:, None] * SIZE + d[None, :], x, inside(index, LENGTH)[:, None] & (d < SIZE)[None, :])


@triton.jit
def store_moment(MOMENTS, pair, d_log, position, F, BLOCK_F: tl.constexpr):
    """Of a program's tokens and each feature, the sum of positions times gradients of its logarithm."""
    f = tl.arange(0, BLOCK_F)
    record = pair.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(MOMENTS + record * F + f, tl.sum(d_log * position.to(tl.float32)[:, None], 0), f < F)


@triton.jit
def seen_pairs(VISIBLE, row, column, LENGTH, DELAY, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Which keys (columns) queries (rows) see, if they see them `DELAY` positions late; a tile or a transposed one."""
    valid = inside(column, LENGTH)
    if MASKED:
        valid = valid & (tl.load(VISIBLE + column, valid, 0) != 0)
    seen = (row < LENGTH) & valid
    if CAUSAL:
        seen = seen & (row - column >= DELAY)
    return seen


@triton.jit
def far_pairs(VISIBLE, seen, row, column, LENGTH, WINDOW, SINKS: tl.constexpr):
    """Of the pairs that are seen, those that neither the window nor sinks serve."""
    far = seen & (row - column >= WINDOW)
    if SINKS:
        far = far & (tl.load(VISIBLE + column, inside(column, LENGTH), 0) != 2)
    return far


@triton.jit
def add_softmax(logits, maximum, total):
    """A running maximum and sum of exp2(logits - maximum), after one more tile."""
    larger = tl.maximum(maximum, tl.max(logits, 1))
    scale = finite(larger)
    total = total * tl.exp2(maximum - scale) + tl.sum(tl.exp2(logits - scale[:, None]), 1)
    return larger, total


@triton.jit
def products(x, y, PRECISION: tl.constexpr):
    """Every row of x (X, SIZE) times every row of y (Y, SIZE): (X, Y)."""
    return tl.dot(x, tl.trans(y), input_precision=PRECISION)


@triton.jit
def far_weights(LOG_WEIGHT, row_maximum, column, far, LENGTH):
    """The keys' weights exp(w_j - m_i); 0 where a key is not far."""
    log_weight = tl.load(LOG_WEIGHT + column, inside(column, LENGTH), float("-inf"))
    return tl.exp2(tl.where(far, (log_weight - row_maximum) * LOG2E, float("-inf")))
