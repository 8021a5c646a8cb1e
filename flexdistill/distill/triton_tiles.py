"""Tiles of attention transfer: what its kernels load, weigh and compare of a block of queries and a block of keys."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("Attention transfer in linear memory needs triton.") from error

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finite(maximum):
    """Zero in place of the maximum of no keys, so that exp2(-inf - maximum) is 0 and not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def head_of(X, pair, LENGTH, SIZE):
    """The matrix (LENGTH, SIZE) of one head of one sequence."""
    return X + pair.to(tl.int64) * LENGTH * SIZE


@triton.jit
def load_tokens(X, index, LENGTH, SIZE, BLOCK: tl.constexpr):
    """Tokens as rows: (TILE, BLOCK)."""
    d = tl.arange(0, BLOCK)
    return tl.load(X + index[:, None] * SIZE + d[None, :], (index < LENGTH)[:, None] & (d < SIZE)[None, :], 0.0)


@triton.jit
def kept_after(RATE, age, F, BLOCK_F: tl.constexpr):
    """What features of tokens keep over each token's age: (TILE, BLOCK_F)."""
    f = tl.arange(0, BLOCK_F)
    return tl.exp2(-age.to(tl.float32)[:, None] * tl.load(RATE + f, f < F, 0.0)[None, :] * LOG2E)


@triton.jit
def load_features(X, index, LENGTH, F, RATE, age, TILE: tl.constexpr, BLOCK_F: tl.constexpr, DECAY: tl.constexpr):
    """Features of tokens as rows: (TILE, BLOCK_F)."""
    x = load_tokens(X, index, LENGTH, F, BLOCK_F)
    if DECAY:
        # pairs that nobody sees could grow without limit
        x *= kept_after(RATE, tl.maximum(age, -TILE), F, BLOCK_F)
    return x


@triton.jit
def store_tokens(X, x, index, LENGTH, SIZE, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(X + index[:, None] * SIZE + d[None, :], x, (index < LENGTH)[:, None] & (d < SIZE)[None, :])


@triton.jit
def seen_pairs(VISIBLE, row, column, LENGTH, DELAY, CAUSAL: tl.constexpr, MASKED: tl.constexpr):
    """Which keys (columns) queries (rows) see, if they see them `DELAY` positions late; a tile or a transposed one."""
    valid = column < LENGTH
    if MASKED:
        valid = valid & (tl.load(VISIBLE + column, valid, 0) != 0)
    seen = (row < LENGTH) & valid
    if CAUSAL:
        seen = seen & (row - column >= DELAY)
    return seen


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
    log_weight = tl.load(LOG_WEIGHT + column, column < LENGTH, float("-inf"))
    return tl.exp2(tl.where(far, (log_weight - row_maximum) * LOG2E, float("-inf")))
