"""Linear attention as sums over keys: a quadratic reference, a chunked form of linear cost, and a recurrent form.

All three compute, for every query i over the keys j that it may see,

    numerator_i   = sum_j exp(w_j - m_i) <phi(q_i), phi(k_j)> v_j
    denominator_i = the same without v_j,

with w the keys' log-weights and m_i the largest w_j in sight, so that no exponent is ever positive. Shapes as in
`feature_maps`: queries' features (B, H, T, F), keys' features (B, S, T, F), values (B, S, T, D), S dividing H. A key
that must not be seen (padding) has log-weight -inf and leaves numerator and denominator alike. Everything is float32.

Features that decay count exp(-decay (i - j)) times, and what bounds rows likewise. Within a chunk that is a factor of
the query's features times one of the key's, both relative to the token before the chunk; no feature forgets faster than
exp(-1) per token, so the factors of a chunk's 64 tokens are far from the ends of float32.
"""

from dataclasses import dataclass

import torch

from .feature_maps import Features

CHUNK = 64
# chunks whose states are combined at once; longer sequences go block by block, so cost and memory stay linear
CHUNKS_PER_BLOCK = 32


@dataclass
class RowSums:
    """Unnormalised attention of each query, scaled by exp(-maximum)."""

    numerator: torch.Tensor  # (B, H, T, D)
    denominator: torch.Tensor  # (B, H, T)
    # (B, H, T): |phi(q_i)| times the norm of sum_j exp(w_j - m_i) size_j, decayed, with sizes as of `Features.sizes`;
    # at least |denominator| (Cauchy-Schwarz)
    bound: torch.Tensor
    maximum: torch.Tensor  # (B, H, T): m_i; -inf where a query sees no key


@dataclass
class State:
    """What is kept of all keys seen so far, at a size that does not depend on their number."""

    # (B, S, D + 1, F): sum_j exp(w_j - m) [v_j, 1] phi(k_j)^T, decayed up to the last token
    values: torch.Tensor
    norms: torch.Tensor  # (B, S, M): sum_j exp(w_j - m) size_j, decayed likewise; sizes as of `Features.sizes`
    maximum: torch.Tensor  # (B, S): m, the largest log-weight seen

    @classmethod
    def empty(cls, features: Features, value: torch.Tensor) -> "State":
        """The state before any key."""
        batch, heads, _, size = features.key.shape
        return cls(
            values=features.key.new_zeros(batch, heads, value.shape[-1] + 1, size),
            norms=features.key.new_zeros(batch, heads, features.sizes()[0].shape[-1]),
            maximum=features.key.new_full((batch, heads), -torch.inf),
        )


def causal_sums(features: Features, value: torch.Tensor, state: State | None = None) -> tuple[RowSums, State]:
    """Row sums of causal attention after `state`, and the state after the last key.

    One query takes the recurrent step, more take the chunked form.
    """
    form = recurrent_sums if features.query.shape[-2] == 1 else chunked_sums
    return form(features, value, state)


def quadratic_scores(
    features: Features, allowed: torch.Tensor, delay: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The reference: every pair's kernel value, in quadratic memory.

    Args:
        features: of Tq queries and Tk keys.
        allowed: bool, broadcastable to (B, H, Tq, Tk); which keys a query sees.
        delay: positions after its own at which a key comes to be seen, for features that decay.

    Returns:
        signed scores exp(w_j - m_i) <phi(q_i), phi(k_j)> (B, H, Tq, Tk), their bound and maximum as in `RowSums`.
    """
    groups = features.query.shape[1] // features.key.shape[1]
    key = features.key.repeat_interleave(groups, dim=1)
    log_weight = features.key_log_weight.repeat_interleave(groups, dim=1)[:, :, None]
    log_weight = log_weight.expand(*features.query.shape[:-1], -1).masked_fill(~allowed, -torch.inf)
    maximum = log_weight.detach().amax(-1)
    weight = (log_weight - _finite(maximum)[..., None]).exp()
    sizes, rates = features.sizes()
    sizes = sizes.repeat_interleave(groups, dim=1)
    if features.decay is None:
        scores, passed = features.query @ key.transpose(-1, -2) * weight, weight @ sizes
    else:
        decay, rates = (x.repeat_interleave(groups, dim=0)[:, None] for x in (features.decay, rates))
        # queries go by in chunks, so that their factors and those of all keys are relative to a token near by
        entered = torch.arange(key.shape[-2], device=key.device)[:, None] + delay
        rows = []
        for start in range(0, weight.shape[-2], CHUNK):
            seen = weight[..., start : start + CHUNK, :]
            place = torch.arange(seen.shape[-2], device=key.device)[:, None]
            # keys that no query of this chunk sees would grow without limit
            age = (start - entered).clamp_min(-CHUNK)
            query = features.query[..., start : start + CHUNK, :] * (-decay * place).exp()
            products = query @ (key * (-decay * age).exp()).transpose(-1, -2)
            rows.append((products * seen, seen @ (sizes * (-rates * age).exp()) * (-rates * place).exp()))
        scores, passed = (torch.cat(parts, dim=-2) for parts in zip(*rows, strict=True))
    return scores, features.query.norm(dim=-1) * passed.norm(dim=-1), maximum


def quadratic_sums(features: Features, value: torch.Tensor, allowed: torch.Tensor) -> RowSums:
    """Row sums from `quadratic_scores`."""
    scores, bound, maximum = quadratic_scores(features, allowed)
    value = value.float().repeat_interleave(scores.shape[1] // value.shape[1], dim=1)
    return RowSums(scores @ value, scores.sum(-1), bound, maximum)


def bidirectional_sums(features: Features, value: torch.Tensor) -> RowSums:
    """Row sums of attention in which every query sees every key: one state serves all queries."""
    query = _grouped(features.query, features.key.shape[1])
    _, state = _summarise(features.key, features.key_log_weight, _with_ones(value), features.sizes()[0])
    sums = query @ state.values[:, :, None].transpose(-1, -2)
    bound = query.norm(dim=-1) * state.norms.norm(dim=-1)[:, :, None, None]
    maximum = state.maximum[:, :, None, None].expand(bound.shape)
    return _ungrouped(sums, bound, maximum)


def recurrent_sums(features: Features, value: torch.Tensor, state: State | None = None) -> tuple[RowSums, State]:
    """Causal row sums one token at a time; returns them with the state after the last key."""
    state = state or State.empty(features, value)
    value = _with_ones(value)
    query = _grouped(features.query, features.key.shape[1])
    sizes, rates = features.sizes()
    kept = kept_norm = 1.0
    if features.decay is not None:
        kept, kept_norm = (-features.decay).exp()[:, None], (-rates).exp()
    rows = []
    for t in range(features.key.shape[-2]):
        log_weight = features.key_log_weight[:, :, t]
        maximum = torch.maximum(state.maximum, log_weight.detach())
        decay, weight = (state.maximum - _finite(maximum)).exp(), (log_weight - _finite(maximum)).exp()
        update = value[:, :, t, :, None] * (weight[..., None] * features.key[:, :, t])[..., None, :]
        state = State(
            values=decay[..., None, None] * kept * state.values + update,
            norms=decay[..., None] * kept_norm * state.norms + weight[..., None] * sizes[:, :, t],
            maximum=maximum,
        )
        sums = query[:, :, :, t, None] @ state.values[:, :, None].transpose(-1, -2)
        bound = query[:, :, :, t, None].norm(dim=-1) * state.norms.norm(dim=-1)[:, :, None, None]
        rows.append(_ungrouped(sums, bound, maximum[:, :, None, None].expand(bound.shape)))
    fields = ("numerator", "denominator", "bound", "maximum")
    return RowSums(*(torch.cat([getattr(row, name) for row in rows], dim=2) for name in fields)), state


def chunked_sums(
    features: Features, value: torch.Tensor, state: State | None = None, chunk: int = CHUNK
) -> tuple[RowSums, State]:
    """Causal row sums in linear time and memory: exact within a chunk, through states between chunks."""
    state = state or State.empty(features, value)
    value = _with_ones(value)
    query = _grouped(features.query, features.key.shape[1])
    length = query.shape[-2]
    chunk = min(chunk, length)
    sizes, rates = features.sizes()
    outputs = []
    for start in range(0, length, chunk * CHUNKS_PER_BLOCK):
        block = slice(start, min(start + chunk * CHUNKS_PER_BLOCK, length))
        size = block.stop - block.start
        padding = -size % chunk
        rows, state = _block_sums(
            _cut(query[..., block, :], padding, chunk),
            _cut(features.key[..., block, :], padding, chunk),
            _cut(features.key_log_weight[..., block, None], padding, chunk, fill=-torch.inf).squeeze(-1),
            _cut(value[..., block, :], padding, chunk),
            _cut(sizes[..., block, :], padding, chunk),
            state,
            features.decay,
            rates,
            size,
        )
        outputs.append([x.flatten(3, 4)[:, :, :, :size] for x in rows])
    sums, bound, maximum = (torch.cat(parts, dim=3) for parts in zip(*outputs, strict=True))
    return _ungrouped(sums, bound.squeeze(-1), maximum.squeeze(-1)), state


def _block_sums(query, key, log_weight, value, sizes, state, decay, rates, length):
    """Chunks (B, S, G, N, C, F) of queries, (B, S, N, C, ...) of all else -> rows and the next state.

    Of the N C tokens, the first `length` are not padding.
    """
    query_norm, kept_sizes = query.norm(dim=-1, keepdim=True), 1.0
    if decay is not None:
        place = torch.arange(1, log_weight.shape[-1] + 1, device=key.device)[:, None]
        elapsed, elapsed_sizes = decay[:, None, None] * place, rates[:, None, None] * place
        query, key = query * (-elapsed[:, None]).exp(), key * elapsed.exp()
        sizes, kept_sizes = sizes * elapsed_sizes.exp(), (-elapsed_sizes).exp()
    # the running maximum a row sees: that of all earlier chunks, then of its own chunk up to itself
    chunk_maxima, summaries = _summarise(key, log_weight, value, sizes)
    maxima = torch.cat([state.maximum[..., None], chunk_maxima], dim=-1)
    before = maxima.cummax(-1).values
    row_maximum = torch.maximum(before[..., :-1, None], log_weight.detach().cummax(-1).values)
    row_scale = _finite(row_maximum)

    size = log_weight.shape[-1]
    visible = torch.ones(size, size, dtype=torch.bool, device=query.device).tril()
    weight = (log_weight[..., None, :] - row_scale[..., None]).masked_fill(~visible, -torch.inf).exp()
    scores = query @ key[:, :, None].transpose(-1, -2) * weight[:, :, None]

    # states are prefix sums over chunks; a small triangular matrix rescales each chunk to the prefix's maximum
    count = maxima.shape[-1]
    lower = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()
    rescale = (maxima[..., None, :] - _finite(before)[..., None]).masked_fill(~lower, -torch.inf).exp()
    states = torch.cat([state.values[:, :, None], summaries.values], dim=2)
    norms = torch.cat([state.norms[:, :, None], summaries.norms], dim=2)
    if decay is None:
        prefix, passed = (rescale @ states.flatten(-2)).unflatten(-1, states.shape[-2:]), rescale @ norms
    else:
        prefix = torch.einsum("bsnmf,bsmdf->bsndf", rescale[..., None] * _kept(decay, count, size, length), states)
        passed = torch.einsum("bsnmf,bsmf->bsnf", rescale[..., None] * _kept(rates, count, size, length), norms)

    carried = (before[..., :-1, None] - row_scale).exp()[..., None]
    sums = scores @ value[:, :, None] + carried[:, :, None] * (query @ prefix[:, :, None, :-1].transpose(-1, -2))
    passed_by_row = (weight @ sizes + carried * passed[:, :, :-1, None]) * kept_sizes
    bound = passed_by_row.norm(dim=-1, keepdim=True)[:, :, None] * query_norm
    maximum = row_maximum[:, :, None, ..., None].expand(bound.shape)
    # copies, because a view would keep the states of all chunks alive
    last = State(prefix[:, :, -1].clone(), passed[:, :, -1].clone(), before[..., -1].clone())
    return (sums, bound, maximum), last


def _kept(decay, count, chunk, length):
    """(S, N + 1, N + 1, F): what the states of `count` - 1 chunks, after the first, keep until the end of each chunk.

    Chunk m's state stands as of the token before the chunk, the state before all chunks likewise.
    """
    # not as integers: Inductor of torch 2.11 fails at the indices that it takes them for
    chunks = torch.arange(count, dtype=decay.dtype, device=decay.device)
    elapsed = ((chunks * chunk).clamp_max(length)[:, None] - (chunks - 1).clamp_min(0) * chunk).clamp_min(0)
    return (-decay[:, None, None] * elapsed[..., None]).exp()


def _summarise(key, log_weight, value, sizes):
    """Keys (..., T, F), log-weights (..., T), values (..., T, D + 1), sizes (..., T, M) -> maxima (...) and `State`."""
    maximum = log_weight.detach().amax(-1)
    weight = (log_weight - _finite(maximum)[..., None]).exp()
    values = value.transpose(-1, -2) @ (key * weight[..., None])
    return maximum, State(values, (weight[..., None] * sizes).sum(-2), maximum)


def _finite(maximum: torch.Tensor) -> torch.Tensor:
    """Zero in place of the maximum of no keys, so that exp(-inf - maximum) is 0 and not NaN."""
    return maximum.masked_fill(maximum == -torch.inf, 0.0)


def _with_ones(value: torch.Tensor) -> torch.Tensor:
    """Values with a last column of ones, whose weighted sum is the denominator."""
    value = value.float()
    return torch.cat([value, torch.ones_like(value[..., :1])], dim=-1)


def _grouped(query: torch.Tensor, state_heads: int) -> torch.Tensor:
    """(B, H, ...) -> (B, S, H / S, ...)."""
    return query.unflatten(1, (state_heads, -1))


def _ungrouped(sums, bound, maximum) -> RowSums:
    return RowSums(
        sums[..., :-1].flatten(1, 2), sums[..., -1].flatten(1, 2), bound.flatten(1, 2), maximum.flatten(1, 2)
    )


def _cut(x: torch.Tensor, padding: int, chunk: int, fill: float = 0.0) -> torch.Tensor:
    """(..., T, F) -> (..., N, C, F), the end padded."""
    return torch.nn.functional.pad(x, (0, 0, 0, padding), value=fill).unflatten(-2, (-1, chunk))
