"""Flexformer attention: a kernel over the distant keys and, where a window is set, softmax over the nearest ones.

Both parts share one denominator. A causal layer sees keys through a delay line: the last `window` keys are attended to
exactly, and a key that leaves the window enters the state, unless it is a sink (see `near`). So one formula serves
training, prefill and decoding, with window = 0 as its simplest case.
"""

import contextlib
from dataclasses import dataclass

import torch

from .backend import operators_for
from .configuration_flexformer import KernelSpec
from .feature_maps import DECAYED_GUARD, GATE_UNIT, POSITIVE_GUARD, SIGNED_GUARD, Context, FeatureMap, Features
from .linear_attention import RowSums, State, bidirectional_sums, causal_sums, quadratic_scores
from .near import Sinks, far_side, first_visible, near_side, near_sums, repeat, softmax_scores, visible_or_all
from .rotary import Rotation, both_sides, kernel_side

_guard_counters: list["GuardCounter"] = []


@dataclass
class GuardCounter:
    """Rows whose denominator the guard raised, out of all rows, while `count_guards` is active: int64 scalars."""

    guarded: torch.Tensor
    rows: torch.Tensor


@contextlib.contextmanager
def count_guards(device: torch.device | str = "cpu"):
    """Counts guarded rows of all Flexformer attention on `device` inside the context."""
    # tensors, because compiled attention would be compiled again for every value of a number
    counter = GuardCounter(*torch.zeros(2, dtype=torch.int64, device=device).unbind())
    _guard_counters.append(counter)
    try:
        yield counter
    finally:
        _guard_counters.remove(counter)


@dataclass
class Memory:
    """What a causal layer carries from call to call; its size does not depend on the number of tokens seen."""

    state: State
    key: torch.Tensor  # (B, K, W, d or 2 d): the window's keys, oldest first, with both sides where they differ
    value: torch.Tensor  # (B, K, W, D)
    visible: torch.Tensor  # (B, W) bool: False where the window is not filled yet or holds padding
    seen: int = 0  # tokens before the next one, for kernels of positions; the fused kernels have none and leave it
    sinks: Sinks | None = None

    @classmethod
    def empty(cls, key: torch.Tensor, value: torch.Tensor, spec: KernelSpec) -> "Memory":
        batch, heads, _, size = key.shape
        return cls(
            state=None,
            key=key.new_zeros(batch, heads, spec.window, size),
            value=value.new_zeros(batch, heads, spec.window, value.shape[-1]),
            visible=torch.zeros(batch, spec.window, dtype=torch.bool, device=key.device),
            sinks=Sinks.empty(near_side(key, spec), value, spec.sinks) if spec.sinks else None,
        )

    def before(
        self, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The window's keys, values and visibility, followed by those of a call."""
        return (
            torch.cat([self.key, key], dim=2),
            torch.cat([self.value, value], dim=2),
            torch.cat([self.visible, visible_or_all(visible, key)], dim=1),
        )


def attend(
    feature_map: FeatureMap,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    visible: torch.Tensor | None = None,
    memory: Memory | None = None,
    keep_memory: bool = True,
    boundaries: list[int] | None = None,
    rotation: Rotation | None = None,
) -> tuple[torch.Tensor, Memory | None]:
    """Attention output and, for a causal layer, the memory after the last key.

    The fused kernels compute it where they can run (see `backend`) and know the kernel; torch does elsewhere, and
    whenever gradients have to flow through a memory.

    Args:
        feature_map: the layer's kernel.
        query: (B, H, T, d), any floating dtype; key: (B, K, T, d); value: (B, K, T, D).
        scaling: what softmax attention multiplies q.k with.
        visible: (B, T) bool, False at padding.
        memory: what an earlier call returned; the tokens of this call come after its tokens. It may be written to.
        keep_memory: whether the memory is wanted; training does without.
        boundaries: for a batch of one that holds sequences laid end to end: 0, where each further one starts, and T.
        rotation: rotary embedding of these tokens, for a kernel that sees them without it.

    Returns:
        (B, H, T, D) in the query's dtype, or autocast's where that is on, 0 where a query sees no key; and the memory,
        None if it is not kept.

    Raises:
        ValueError: for boundaries with a memory, in a bidirectional layer, or that do not rise from 0 to T; without a
            rotation where the kernel needs it.
    """
    if boundaries is not None:
        _check_boundaries(boundaries, query, feature_map.spec.causal and memory is None and not keep_memory)
    arguments = dict(
        value=value,
        scaling=scaling,
        visible=visible,
        memory=memory,
        keep_memory=keep_memory,
        boundaries=boundaries,
    )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as torch's own attention does
        dtype = torch.get_autocast_dtype(device)
        query, key, arguments["value"] = (x.to(dtype) for x in (query, key, value))
    query, key = (both_sides(x, rotation, feature_map.spec) for x in (query, key))
    with torch.autocast(device, enabled=False):
        return feature_map(query, key, _attend, **arguments)


def _check_boundaries(boundaries: list[int], query: torch.Tensor, servable: bool) -> None:
    rising = all(start < end for start, end in zip(boundaries[:-1], boundaries[1:], strict=True))
    if not servable or query.shape[0] != 1:
        raise ValueError(
            "Packed sequences are for causal layers, in a batch of one, without a memory (keep_memory=False)."
        )
    if not rising or boundaries[0] != 0 or boundaries[-1] != query.shape[2]:
        raise ValueError(f"Boundaries must rise from 0 to the length {query.shape[2]}, not {boundaries}.")


def _attend(feature_map, query, key, *, value, scaling, visible, memory, keep_memory, boundaries):
    spec = feature_map.spec
    keep_memory = keep_memory and spec.causal
    fused = operators_for(feature_map, query, value)
    if fused is not None:
        if not keep_memory and memory is None:
            output, guarded = fused.attend(feature_map, query, key, value, scaling, visible, boundaries)
            count_guarded(guarded)
            return output, None
        if not fused.needs_gradient(feature_map, query, key, value):
            output, guarded, memory = _attend_remembering(
                fused, feature_map, query, key, value, scaling, visible, memory
            )
            count_guarded(guarded)
            return output, memory
    if not spec.causal:
        return _attend_without_window(feature_map, query, key, value=value, scaling=scaling, visible=visible), None
    if boundaries is not None:
        parts = [slice(*part) for part in zip(boundaries[:-1], boundaries[1:], strict=True)]
        outputs = []
        for part in parts:
            tensors = (x[:, :, part] for x in (query, key, value))
            seen = None if visible is None else visible[:, part]
            empty = Memory.empty(key, value, spec)
            outputs.append(_attend_in_torch(feature_map, *tensors, scaling, seen, empty, False)[0])
        return torch.cat(outputs, dim=2), None
    memory = memory or Memory.empty(key, value, spec)
    return _attend_in_torch(feature_map, query, key, value, scaling, visible, memory, keep_memory)


def _attend_in_torch(feature_map, query, key, value, scaling, visible, memory, keep_memory):
    spec = feature_map.spec
    length = query.shape[-2]
    key, value, visible = memory.before(key, value, visible)
    near, sinks, leaving = None, None, visible[:, :length]
    if spec.window:
        near_query, near_key = (near_side(x, spec) for x in (query, key))
        near, sinks, leaving = near_sums(near_query, near_key, value, visible, spec.window, scaling, memory.sinks)
    context = Context(memory.seen, memory.seen - spec.window, leaving)
    far_query, far_key = far_side(query, spec), far_side(key[:, :, :length], spec)
    features = _features(feature_map, far_query, far_key, scaling, context)
    far, state = causal_sums(features, _per_state_head(value[:, :, :length], spec), memory.state)
    output = _normalise(feature_map, far, near, features.query_log_scale)
    if keep_memory:
        memory = Memory(state, *_window_of(key, value, visible, length), memory.seen + length, sinks)
    return output.to(query.dtype), memory if keep_memory else None


def attend_without_window(
    feature_map, query, key, value, *, scaling, visible=None, rotation: Rotation | None = None
) -> torch.Tensor:
    """The kernel over all keys, whatever the window: what `attend` gives a layer whose window is 0. Shapes as there."""
    query, key = (kernel_side(x, rotation, feature_map.spec) for x in (query, key))
    with torch.autocast(query.device.type, enabled=False):
        return feature_map(query, key, _attend_without_window, value=value, scaling=scaling, visible=visible)


def _attend_without_window(feature_map, query, key, *, value, scaling, visible):
    features = _features(feature_map, query, key, scaling, Context(visible=visible))
    value = _per_state_head(value, feature_map.spec)
    rows = causal_sums(features, value)[0] if feature_map.spec.causal else bidirectional_sums(features, value)
    return _normalise(feature_map, rows).to(query.dtype)


def _window_of(key, value, visible, length):
    """What follows the first `length` keys; copies, because a view would keep all keys and values alive."""
    return *(x[:, :, length:].clone() for x in (key, value)), visible[:, length:].clone()


def _attend_remembering(fused, feature_map, query, key, value, scaling, visible, memory):
    """Fused prefill or decoding step: output, which rows were guarded, and the memory."""
    window, length = feature_map.spec.window, query.shape[-2]
    if memory is not None and length == 1 and window == 0:
        output, guarded = fused.decode(feature_map, query, key, value, scaling, visible, memory.state)
        return output, guarded, memory
    memory = memory or Memory.empty(key, value, feature_map.spec)
    if window == 0:
        output, guarded, *state = fused.prefill(feature_map, query, key, value, scaling, visible, memory.state, 0)
        return output, guarded, Memory(State(*state), memory.key, memory.value, memory.visible)
    key, value, visible = memory.before(key, value, visible)
    sinks, past, inputs = memory.sinks, window, (key, value, visible)
    if sinks is not None:
        inputs, past = sinks.before(key, value, visible), past + feature_map.spec.sinks
        leaving = near_side(key, feature_map.spec)[:, :, :length], value[:, :, :length], visible[:, :length]
        sinks, *_ = sinks.after(*leaving)
    output, guarded, *state = fused.prefill(feature_map, query, *inputs[:2], scaling, inputs[2], memory.state, past)
    return output, guarded, Memory(State(*state), *_window_of(key, value, visible, length), sinks=sinks)


def attention_weights(
    feature_map: FeatureMap,
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    scaling: float,
    visible: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> torch.Tensor:
    """The same attention as a matrix: the reference for `attend`, and what attention transfer trains.

    Returns:
        float32 weights (B, H, T, T), in quadratic memory; weights @ values is the output of `attend` without memory.
        A row of a positive kernel sums to 1; of a signed one, to 1 unless its denominator was guarded.
    """
    with torch.autocast(query.device.type, enabled=False):
        return feature_map(query, key, _attention_weights, scaling=scaling, visible=visible, rotation=rotation)


def _attention_weights(feature_map, query, key, *, scaling, visible, rotation):
    spec = feature_map.spec
    length = query.shape[-2]
    far_query, far_key = (kernel_side(x, rotation, spec) for x in (query, key))
    features = _features(feature_map, far_query, far_key, scaling, Context(visible=visible))
    allowed = torch.ones(length, length, dtype=torch.bool, device=query.device)
    distance = torch.arange(length, device=query.device)
    distance = distance[:, None] - distance
    if spec.causal:
        allowed = distance >= spec.window
    allowed = allowed[None, None]
    banded = ((distance >= 0) & (distance < spec.window))[None, None]
    if spec.sinks:
        sink = first_visible(visible_or_all(visible, query), spec.sinks)[:, None, None]
        allowed, banded = allowed & ~sink, banded | (sink & (distance >= 0))
    if visible is not None:
        allowed, banded = allowed & visible[:, None, None], banded & visible[:, None, None]
    scores, bound, maximum = quadratic_scores(features, allowed, spec.window)
    far = RowSums(scores, scores.sum(-1), bound, maximum)
    near = None
    if spec.window:
        weights, near_maximum = softmax_scores(query, repeat(key, query.shape[1]), banded, scaling)
        near = RowSums(weights, weights.sum(-1), weights.sum(-1), near_maximum)
    return _normalise(feature_map, far, near, features.query_log_scale)


def _features(feature_map, query, key, scaling, context: Context) -> Features:
    # kernels are defined for logits q.k / sqrt(d); a model that scales otherwise has it moved into its queries
    features = feature_map.features(query * (scaling * query.shape[-1] ** 0.5), key, context)
    features.decay, features.signed = feature_map.decay_rates(), feature_map.signed
    if context.visible is not None:
        features.key_log_weight = features.key_log_weight.masked_fill(~context.visible[:, None], -torch.inf)
    return features


def _normalise(
    feature_map: FeatureMap, far: RowSums, near: RowSums | None = None, log_scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Divides by the guarded denominator, shared with the window's where there is one."""
    sees_any = far.maximum > -torch.inf
    share = DECAYED_GUARD if feature_map.spec.decay else SIGNED_GUARD
    least = share * far.bound if feature_map.signed else POSITIVE_GUARD * sees_any
    count_guarded((far.denominator < least) & sees_any)
    denominator = torch.maximum(far.denominator, least)
    far_weight = near_weight = torch.ones_like(denominator)
    if near is not None:
        # logarithm of the kernel part's weight against the window's; the larger of the two is scaled to 1
        mix = GATE_UNIT * feature_map.window_gate.float()[:, None].expand(denominator.shape)
        if feature_map.calibrated:
            mix = mix + log_scale + (far.maximum - near.maximum.masked_fill(near.maximum == -torch.inf, 0.0))
        far_weight, near_weight = (mix - mix.clamp_min(0)).exp(), (-mix.clamp_min(0)).exp()
        denominator = near_weight * near.denominator + far_weight * denominator
    denominator = denominator.masked_fill(denominator == 0, 1.0)
    output = (far_weight / denominator)[..., None] * far.numerator
    return output if near is None else output + (near_weight / denominator)[..., None] * near.numerator


def count_guarded(guarded: torch.Tensor) -> None:
    """Adds rows, True where the guard raised the denominator, to the active counters."""
    for counter in _guard_counters:
        counter.guarded = counter.guarded + guarded.sum()
        counter.rows = counter.rows + guarded.numel()


def _per_state_head(value: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    return repeat(value, spec.num_state_heads)
