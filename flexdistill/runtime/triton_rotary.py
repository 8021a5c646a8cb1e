"""Rotary embedding taken out of queries and keys in one launch, as `rotary.turned_back` does it plainly."""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error


@triton.jit
def turn_kernel(
    X, COS, SIN, OUT,
    x_batch, x_head, x_token, c_batch, c_token, s_batch, s_token, o_batch, o_head, o_token,
    HEADS, LENGTH, SIZE, ROTARY, KEPT,
    ADJACENT: tl.constexpr, ANGLE_STEP: tl.constexpr, BACK: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    """Some tokens of one head: all pairs but the first KEPT turned, back or on; coordinates beyond ROTARY copied."""
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (token < LENGTH)[:, None]
    rows = token.to(tl.int64)[:, None]
    X += batch * x_batch + head * x_head + rows * x_token
    OUT += batch * o_batch + head * o_head + rows * o_token
    pairs = ROTARY // 2
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    turned = inside & (pair >= KEPT) & (pair < pairs)
    cos = tl.load(COS + batch * c_batch + rows * c_token + pair * ANGLE_STEP, turned, 1.0).to(tl.float32)
    sin = tl.load(SIN + batch * s_batch + rows * s_token + pair * ANGLE_STEP, turned, 0.0).to(tl.float32)
    scale = tl.rsqrt(cos * cos + sin * sin)
    cos, sin = cos * scale, sin * scale
    if not BACK:
        sin = -sin
    first, second = pair, pair + pairs
    if ADJACENT:
        first, second = 2 * pair, 2 * pair + 1
    known = inside & (pair < pairs)
    x, y = tl.load(X + first, known, 0.0).to(tl.float32), tl.load(X + second, known, 0.0).to(tl.float32)
    tl.store(OUT + first, (x * cos + y * sin).to(OUT.dtype.element_ty), known)
    tl.store(OUT + second, (y * cos - x * sin).to(OUT.dtype.element_ty), known)
    if BLOCK_REST > 0:
        rest = ROTARY + tl.arange(0, BLOCK_REST)[None, :]
        tl.store(OUT + rest, tl.load(X + rest, inside & (rest < SIZE), 0.0), inside & (rest < SIZE))
