"""Flexformer's features computed on chip: what the fused kernels share.

Everything exponential is in units of log 2, so that the hardware's exp2 serves. A feature map returns the two halves of
a token's features apart: exp(+W1 x) and exp(-W1 x), or cosine and sine. Tokens are rows and frequencies columns.

Features that decay are relative to the middle of their chunk: the queries' shrink and the keys' grow with their place
in it, at most by exp(32). A state stands, while its program walks, as of the middle of the chunk, and in memory as of
its last token; `forget` takes it from one to the other.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def finite(maximum):
    """Zero in place of the maximum of no keys, so that exp2(-inf - maximum) is 0 and not NaN."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def load_frequencies(
    W1, W2, head, D, N, SCALE,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """One head's frequencies (D, N); the tokens' factor SCALE is moved into them."""
    d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    unit = SCALE * LOG2E if HYPERBOLIC else SCALE
    offsets = head * D * N + d[:, None] * N + n[None, :]
    inside = (d < D)[:, None] & (n < N)[None, :]
    w1 = (tl.load(W1 + offsets, inside, 0.0).to(tl.float32) * unit).to(DTYPE)
    w2 = w1
    if NONSTATIONARY:
        w2 = (tl.load(W2 + offsets, inside, 0.0).to(tl.float32) * unit).to(DTYPE)
    return w1, w2


@triton.jit
def load_amplitude(AMPLITUDE, head, half, N, BLOCK_N: tl.constexpr, HYPERBOLIC: tl.constexpr):
    """Amplitudes (N,) of one half of the features: logarithms for the hyperbolic component, else plain factors.

    Those of frequencies beyond N make features that are 0.
    """
    n = tl.arange(0, BLOCK_N)
    if HYPERBOLIC:
        return tl.load(AMPLITUDE + (head * 2 + half) * N + n, n < N, float("-inf")).to(tl.float32) * LOG2E
    else:
        return tl.where(n < N, tl.rsqrt(N * 1.0), 0.0)


@triton.jit
def load_rate(RATE, head, half, N, BLOCK_N: tl.constexpr):
    """How fast one half of the features forgets, in log2 per token: (N,)."""
    n = tl.arange(0, BLOCK_N)
    return tl.load(RATE + (head * 2 + half) * N + n, n < N, 0.0) * LOG2E


@triton.jit
def forgotten(RATE, head, half, N, tokens, BLOCK_N: tl.constexpr):
    """What one half of the features keeps over a number of tokens: (N,)."""
    return tl.exp2(-tokens * load_rate(RATE, head, half, N, BLOCK_N))


@triton.jit
def forget(values, mass, RATE, head, half, N, tokens, BLOCK_N: tl.constexpr):
    """One half of a state (N, V), and of its mass (16, N), a number of tokens later."""
    kept = forgotten(RATE, head, half, N, tokens, BLOCK_N)
    return values * kept[:, None], mass * kept[None, :]


@triton.jit
def place_in_chunk(CHUNK: tl.constexpr):
    """Tokens since the one that a chunk's decaying features are relative to."""
    return tl.arange(0, CHUNK) + (1.0 - CHUNK // 2)


@triton.jit
def tokens_to_next(chunk, end, CHUNK: tl.constexpr):
    """From the middle of a chunk to that of the next, or from the last chunk's to the last token."""
    return tl.where(chunk + CHUNK < end, CHUNK, end - chunk - CHUNK // 2).to(tl.float32)


@triton.jit
def phases(
    x, w1, w2, NONSTATIONARY: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """W1 x and W2 x of tokens x (C, D), in log 2 for the hyperbolic component."""
    phase = tl.dot(x, w1, input_precision=PRECISION)
    modulation = phase
    if NONSTATIONARY:
        modulation = tl.dot(x, w2, input_precision=PRECISION)
    return phase, modulation


@triton.jit
def largest_log_feature(
    phase, modulation, AMPLITUDE, head, N, BLOCK_N: tl.constexpr, NONSTATIONARY: tl.constexpr
):  # fmt: skip
    """log2 of each token's largest hyperbolic feature, but for the bracket (see `features`)."""
    plus = load_amplitude(AMPLITUDE, head, 0, N, BLOCK_N, True)
    minus = load_amplitude(AMPLITUDE, head, 1, N, BLOCK_N, True)
    # summed in another order than by `features`, or the compiler would keep these sums in registers until then
    larger = tl.maximum(phase + plus[None, :], minus[None, :] - phase)
    if NONSTATIONARY:
        larger += tl.abs(modulation)
    return tl.max(larger, 1)


@triton.jit
def features(
    phase, modulation, shift, AMPLITUDE, head, N, RATE, rate_head, age,
    BLOCK_N: tl.constexpr, HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Both halves of the features in float32, multiplied by exp2(-shift) per token, and decayed over its `age`.

    The hyperbolic ones are exp2(+-phase + |modulation|) times the bracket (1 + exp2(-2 |modulation|)) / 2, for cosh.
    Amplitudes are loaded for every chunk anew, because as vectors along rows they would take many registers for good.
    """
    plus = load_amplitude(AMPLITUDE, head, 0, N, BLOCK_N, HYPERBOLIC)
    if HYPERBOLIC:
        minus = load_amplitude(AMPLITUDE, head, 1, N, BLOCK_N, HYPERBOLIC)
        envelope = tl.abs(modulation) - shift[:, None] if NONSTATIONARY else -shift[:, None]
        a = envelope + phase + plus[None, :]
        b = envelope - phase + minus[None, :]
        if DECAY:
            a -= age[:, None] * load_rate(RATE, rate_head, 0, N, BLOCK_N)[None, :]
            b -= age[:, None] * load_rate(RATE, rate_head, 1, N, BLOCK_N)[None, :]
        a, b = tl.exp2(a), tl.exp2(b)
        if NONSTATIONARY:
            bracket = 0.5 + 0.5 * tl.exp2(-2.0 * tl.abs(modulation))
            a, b = a * bracket, b * bracket
    else:
        factor = plus[None, :] * tl.exp2(-shift)[:, None]
        if NONSTATIONARY:
            factor *= tl.cos(modulation)
        a, b = tl.cos(phase) * factor, tl.sin(phase) * factor
    return a, b


@triton.jit
def half_log_features(phase, modulation, half, amplitude, NONSTATIONARY: tl.constexpr):
    """log2 of one half of the hyperbolic features, but for the bracket."""
    envelope = tl.abs(modulation) if NONSTATIONARY else 0.0
    return envelope + phase * (1 - 2 * half) + amplitude[None, :]


@triton.jit
def half_features(
    phase, modulation, half, shift, amplitude, N, RATE, rate_head, age,
    BLOCK_N: tl.constexpr, HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """One half of the features, multiplied by exp2(-shift) per token, and decayed over its `age`."""
    if HYPERBOLIC:
        x = half_log_features(phase, modulation, half, amplitude, NONSTATIONARY) - shift[:, None]
        if DECAY:
            x -= age[:, None] * load_rate(RATE, rate_head, half, N, BLOCK_N)[None, :]
        x = tl.exp2(x)
        if NONSTATIONARY:
            x *= 0.5 + 0.5 * tl.exp2(-2.0 * tl.abs(modulation))
    else:
        # a sine is a cosine a quarter turn later
        x = tl.cos(phase - half * 1.5707963267948966) * (amplitude[None, :] * tl.exp2(-shift)[:, None])
        if NONSTATIONARY:
            x *= tl.cos(modulation)
    return x


@triton.jit
def feature_norm(modulation, shift, N, BLOCK_N: tl.constexpr, NONSTATIONARY: tl.constexpr):
    """Norm of each token's trigonometric features, both halves together, multiplied by exp2(-shift)."""
    amplitude = load_amplitude(modulation, 0, 0, N, BLOCK_N, False)
    squared = (amplitude * amplitude)[None, :]
    if NONSTATIONARY:
        squared = squared * tl.cos(modulation) * tl.cos(modulation)
    else:
        squared = squared + modulation * 0.0
    return tl.sqrt(tl.sum(squared, 1)) * tl.exp2(-shift)


@triton.jit
def add_column_sums(sums, weights, x, PRECISION: tl.constexpr):
    """Adds the sums of x (C, N) over tokens, each times its weight (C,), to every row of `sums` (16, N).

    On the matrix units, which take no fewer than 16 rows: adding up columns across threads costs far more.
    """
    rows = tl.zeros((16, x.shape[0]), tl.float32) + weights[None, :]
    return tl.dot(rows.to(x.dtype), x, sums, input_precision=PRECISION)


@triton.jit
def times_row(x, sums, PRECISION: tl.constexpr):
    """x (C, N) times the row that all of `sums` (16, N) repeat: (C,)."""
    return tl.sum(tl.dot(x, tl.trans(sums.to(x.dtype)), input_precision=PRECISION), 1) * 0.0625


@triton.jit
def outer(vector, sums):
    """A vector (C,) times the row (N,) that all of `sums` (16, N) repeat: (C, N)."""
    return vector[:, None] * tl.max(sums, 0)[None, :]
