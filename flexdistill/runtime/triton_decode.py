"""Fused decoding step: one launch updates every state in place and writes the outputs.

A program serves one state head for a few sequences: their features come from one pass over the head's frequencies, and
then each state is read and written once, which is all that the step's time should go to.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("The fused kernels need triton; install it or set FLEXDISTILL_BACKEND=torch.") from error

from .triton_features import (
    LN2,
    LOG2E,
    feature_norm,
    features,
    finite,
    largest_log_feature,
    load_frequencies,
    phases,
)
from .triton_states import key_phases, load_rows, state_unit


@triton.jit
def pick(x, chosen):
    """The chosen row of x (rows, N)."""
    return tl.sum(tl.where(chosen[:, None], x, 0.0), 0)


@triton.jit
def kept_of_feature(DECAY, head, half, N, UNIT, BLOCK_N: tl.constexpr):
    """What one half of the features keeps over a token, from the decay's parameter: (N,)."""
    n = tl.arange(0, BLOCK_N)
    x = tl.load(DECAY + (head * 2 + half) * N + n, n < N, 0.0).to(tl.float32)
    return tl.exp2(-tl.sigmoid(UNIT * x) * LOG2E)


@triton.jit
def decode_kernel(
    Q, K, V, VISIBLE, Q_W1, Q_W2, Q_AMPLITUDE, Q_UNIT, K_W1, K_W2, K_AMPLITUDE, K_UNIT, NORM, DECAY_PARAMETER,
    VALUES, NORMS, MAXIMUM, OUT, GUARDED,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    BATCH, HEADS, STATE_HEADS, KV_HEADS, MAP_HEADS, NORM_UNIT, DECAY_UNIT,
    D: tl.constexpr, DV: tl.constexpr, N: tl.constexpr, SCALE, GUARD,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, SEQUENCES: tl.constexpr,
    GROUP: tl.constexpr, HYPERBOLIC: tl.constexpr, NONSTATIONARY: tl.constexpr, DECAY: tl.constexpr,
    MASKED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One token of SEQUENCES sequences: queries (B, H, d), keys (B, K, d), values (B, K, D).

    They are the first of ROWS rows, the least that the matrix units take. Maps are as `FeatureMap.raw_spectrum` gives
    them, since what arithmetic they need would cost a step more launches than its work.
    """
    head, first = tl.program_id(0), tl.program_id(1) * SEQUENCES
    kv_head = head // (STATE_HEADS // KV_HEADS)
    place = tl.arange(0, ROWS)
    batch = first + place
    inside = (place < SEQUENCES) & (batch < BATCH)
    states = batch * STATE_HEADS + head
    valid = inside
    if MASKED:
        valid = inside & (tl.load(VISIBLE + batch, inside, 0) != 0)
    strength = tl.load(NORM + head).to(tl.float32)
    k_unit = 1.0
    if HYPERBOLIC:
        k_unit = tl.load(K_UNIT + head).to(tl.float32)
        factor = NORM_UNIT * strength * k_unit * k_unit * LOG2E
    else:
        factor = tl.exp(-strength) * LOG2E
    k_w1, k_w2 = load_frequencies(K_W1, K_W2, head, D, N, k_unit, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE)
    key = load_rows(K + kv_head * k_head, k_batch, batch, inside, 0, D, BLOCK_D).to(DTYPE)
    phase, modulation, norm, largest = key_phases(
        key, k_w1, k_w2, K_AMPLITUDE, head, N, factor, valid, BLOCK_N, HYPERBOLIC, NONSTATIONARY, PRECISION
    )
    maximum = tl.load(MAXIMUM + states, inside, float("-inf")) * LOG2E + state_unit(N, HYPERBOLIC)
    new = tl.maximum(maximum, largest)
    decay = tl.exp2(maximum - finite(new))
    shift = finite(new) - norm
    # a token's own features are as of now; what the state keeps of earlier ones is less by a token's decay
    now = tl.zeros((ROWS,), tl.float32)
    k_a, k_b = features(
        phase, modulation, shift, K_AMPLITUDE, head, N, DECAY_PARAMETER, head, now,
        BLOCK_N, HYPERBOLIC, NONSTATIONARY, False,
    )  # fmt: skip
    if DECAY:
        kept_a = kept_of_feature(DECAY_PARAMETER, head, 0, N, DECAY_UNIT, BLOCK_N)
        kept_b = kept_of_feature(DECAY_PARAMETER, head, 1, N, DECAY_UNIT, BLOCK_N)
    tl.store(MAXIMUM + states, (new - state_unit(N, HYPERBOLIC)) * LN2, inside)
    if not HYPERBOLIC:
        norms = tl.load(NORMS + states, inside, 0.0) * decay
        norms += feature_norm(modulation, shift, N, BLOCK_N, NONSTATIONARY)
        tl.store(NORMS + states, norms, inside)

    d, n = tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_N)
    tile = d[:, None] * 2 * N + n[None, :]
    mask = (d < DV)[:, None] & (n < N)[None, :]
    for member in tl.static_range(GROUP):
        q_head_index = head * GROUP + member
        q_map = q_head_index // (HEADS // MAP_HEADS)
        q_unit = tl.load(Q_UNIT + q_head_index).to(tl.float32) if HYPERBOLIC else 1.0
        q_w1, q_w2 = load_frequencies(
            Q_W1, Q_W2, q_map, D, N, SCALE * q_unit, BLOCK_D, BLOCK_N, HYPERBOLIC, NONSTATIONARY, DTYPE
        )
        query = load_rows(Q + q_head_index * q_head, q_batch, batch, inside, 0, D, BLOCK_D).to(DTYPE)
        phase, modulation = phases(query, q_w1, q_w2, NONSTATIONARY, PRECISION)
        scale = tl.zeros((ROWS,), tl.float32)
        if HYPERBOLIC:
            scale = largest_log_feature(phase, modulation, Q_AMPLITUDE, q_map, N, BLOCK_N, NONSTATIONARY)
        q_a, q_b = features(
            phase, modulation, scale, Q_AMPLITUDE, q_map, N, DECAY_PARAMETER, head, now,
            BLOCK_N, HYPERBOLIC, NONSTATIONARY, False,
        )  # fmt: skip
        least = tl.zeros((ROWS,), tl.float32) + GUARD
        if not HYPERBOLIC:
            least = GUARD * norms * feature_norm(modulation, scale, N, BLOCK_N, NONSTATIONARY)
        for sequence in range(SEQUENCES):
            if first + sequence < BATCH:
                chosen = place == sequence
                own_a, own_b = pick(q_a, chosen), pick(q_b, chosen)
                state = VALUES + ((first + sequence).to(tl.int64) * STATE_HEADS + head) * (DV + 1) * 2 * N
                values_a = tl.load(state + tile, mask, 0.0)
                values_b = tl.load(state + N + tile, mask, 0.0)
                mass_a = tl.load(state + DV * 2 * N + n, n < N, 0.0)
                mass_b = tl.load(state + DV * 2 * N + N + n, n < N, 0.0)
                if member == 0:
                    new_a, new_b = pick(k_a, chosen), pick(k_b, chosen)
                    kept = tl.sum(tl.where(chosen, decay, 0.0), 0)
                    value = V + (first + sequence).to(tl.int64) * v_batch + kv_head * v_head
                    value = tl.load(value + d, d < DV, 0.0).to(tl.float32)
                    if DECAY:
                        values_a, values_b = values_a * kept_a[None, :], values_b * kept_b[None, :]
                        mass_a, mass_b = mass_a * kept_a, mass_b * kept_b
                    values_a = values_a * kept + value[:, None] * new_a[None, :]
                    values_b = values_b * kept + value[:, None] * new_b[None, :]
                    mass_a, mass_b = mass_a * kept + new_a, mass_b * kept + new_b
                    tl.store(state + tile, values_a, mask)
                    tl.store(state + N + tile, values_b, mask)
                    tl.store(state + DV * 2 * N + n, mass_a, n < N)
                    tl.store(state + DV * 2 * N + N + n, mass_b, n < N)
                total = tl.sum(mass_a * own_a + mass_b * own_b, 0)
                bound = tl.sum(tl.where(chosen, least, 0.0), 0)
                row = (first + sequence).to(tl.int64) * HEADS + q_head_index
                seen = tl.sum(tl.where(chosen & (new > float("-inf")), 1, 0), 0)
                tl.store(GUARDED + row, ((total < bound) & (seen > 0)).to(tl.int8))
                total = tl.maximum(total, bound)
                output = tl.sum(values_a * own_a[None, :] + values_b * own_b[None, :], 1)
                output = output / tl.where(total == 0, 1.0, total)
                tl.store(OUT + row * DV + d, output.to(OUT.dtype.element_ty), d < DV)
        # a state that this member wrote is read again for the next
        tl.debug_barrier()
