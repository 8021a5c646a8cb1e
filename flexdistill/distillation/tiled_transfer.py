"""Attention transfer in linear memory: the teacher's and the student's rows tile by tile, never a T x T map.

Hyperbolic features are made in one kernel (`transfer_features`), all others in torch, by any registered feature map;
autograd carries their gradients on to its parameters. What is quadratic runs in the kernels of `triton_transfer`. Time
stays quadratic in T, because the teacher's softmax is.
"""

from __future__ import annotations

import torch

from ..losses import AttentionRows, over_queries, relative_output_error
from ..runtime.attention import _features, count_guarded
from ..runtime.backend import fused_operators
from ..runtime.feature_maps import GATE_UNIT, Context, FeatureMap, Features
from ..runtime.near import SINK, token_kinds, visible_or_all
from ..runtime.rotary import Rotation, kernel_side
from . import transfer_operators
from .transfer_features import are_fused, fused_features
from .transfer_operators import is_exact, tiles, transfer_op


def can_run(feature_map: FeatureMap, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `tiled_rows` can run: where the fused kernels do, unless signed features decay, in at most float32."""
    return (
        fused_operators(query.device) is not None
        and not (feature_map.signed and feature_map.spec.decay)
        and max(x.dtype.itemsize for x in (query, key, value)) <= 4
        and tiles(feature_map.num_features, _feature_dtype(feature_map, value), query, value) is not None
    )


def tiled_rows(
    feature_map: FeatureMap,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float,
    visible: torch.Tensor | None = None,
    rotation: Rotation | None = None,
) -> AttentionRows:
    """What attention transfer compares, in memory linear in T.

    Where values are float32, products are in three-pass tf32. Else logits are in the values' dtype, as in torch's own
    attention under autocast, outputs too (bf16 for fp16), and features in bf16, or in tf32 where they are signed and
    cancel.

    With p = softmax(scaling q k^T) and a = `attention_weights(feature_map, ...)`, row i has the cross-entropy
    -sum_j p_ij log max(a_ij, 1e-8), the entropy -sum_j p_ij log p_ij, the negative mass sum_j max(-a_ij, 0) and the
    outputs sum_j p_ij v_j and sum_j a_ij v_j. The teacher sees the keys that the feature map's spec lets a query see.

    Args:
        feature_map: the layer's kernel; gradients flow to its parameters only.
        query: (B, H, T, d), any floating dtype; key: (B, K, T, d); value: (B, K, T, D). None may ask for a gradient.
        scaling: what softmax attention multiplies q.k with.
        visible: (B, T) bool, False at padding.
        rotation: rotary embedding, for a kernel that sees queries and keys without it.

    Returns:
        float32 rows. One that sees no key has zeros as its outputs, and losses that mean nothing.

    Raises:
        ValueError: if the query, key or value asks for a gradient.
    """
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        raise ValueError("Attention transfer trains kernels only: detach queries, keys and values.")
    with torch.autocast(query.device.type, enabled=False):
        return feature_map(query, key, _tiled_rows, value=value, scaling=scaling, visible=visible, rotation=rotation)


def _tiled_rows(feature_map, query, key, *, value, scaling, visible, rotation) -> AttentionRows:
    spec = feature_map.spec
    window = spec.window if spec.causal else 0
    far_query, far_key = (kernel_side(x, rotation, spec) for x in (query, key))
    if not query.is_cuda:  # Triton's interpreter cannot multiply bf16
        query, key, value = query.float(), key.float(), value.float()
    dtype = _feature_dtype(feature_map, value)
    make = fused_features if are_fused(feature_map, dtype) else _torch_features
    features = make(feature_map, far_query, far_key, scaling, window, dtype, visible)
    log_weight, mix = features.key_log_weight, features.query_log_scale
    if spec.sinks:
        visible = token_kinds(visible_or_all(visible, query), spec.sinks)
        log_weight = log_weight.masked_fill((visible == SINK)[:, None], -torch.inf)
    if window:
        gate = GATE_UNIT * feature_map.window_gate.float()[:, None]
        mix = gate + mix if feature_map.calibrated else gate.expand(mix.shape)
    k_norm = features.key.detach().norm(dim=-1) if feature_map.signed else log_weight.detach()
    rows, teacher, student, statistics = transfer_op(
        features.query.contiguous(),
        features.key.contiguous(),
        features.decay,
        log_weight.contiguous(),
        mix.contiguous(),
        _row_maxima(log_weight.detach(), spec.causal, window),
        k_norm.contiguous(),
        query.to(value.dtype).contiguous(),
        key.to(value.dtype).contiguous(),
        value.contiguous(),
        None if visible is None else visible.to(torch.uint8).contiguous(),
        scaling,
        window,
        spec.causal,
        feature_map.signed,
        feature_map.calibrated,
        spec.sinks > 0,
    )
    count_guarded(statistics[3] > 0)
    return AttentionRows(*rows[:3].unbind(), teacher, student)


def _feature_dtype(feature_map: FeatureMap, value: torch.Tensor) -> torch.dtype:
    # products of signed features cancel, so that they need more digits
    return torch.float32 if feature_map.signed or is_exact(value) else torch.bfloat16


def transfer_loss(
    feature_map: FeatureMap, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Cross-entropy plus relative output error of one layer, summed over queries. Shapes as in `tiled_rows`."""
    rows = tiled_rows(feature_map, query, key, value, scaling=scaling)
    return over_queries(rows.cross_entropy)[0] + relative_output_error(rows.teacher, rows.student)[0]


def _torch_features(feature_map, query, key, scaling, window, dtype, visible) -> Features:
    """As `fused_features`, of any map."""
    features = _features(feature_map, query, key, scaling, Context(visible=visible))
    if features.decay is not None:
        features.query, features.key = _relative_to_blocks(features, window)
    features.query, features.key = features.query.to(dtype), features.key.to(dtype)
    return features


def _relative_to_blocks(features: Features, window: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose products lack only the decay between their tokens' blocks; the decay gets no gradient here."""
    block = transfer_operators.DECAY_BLOCK
    position = torch.arange(features.query.shape[2], device=features.query.device)[:, None]
    rates = features.decay.detach()[:, None]
    query_rates = rates.repeat_interleave(features.query.shape[1] // len(rates), dim=0)
    query = features.query * (query_rates * (block // 2 - position % block)).exp()
    return query, features.key * (rates * ((position + window) % block - block // 2)).exp()


def _row_maxima(log_weight: torch.Tensor, causal: bool, window: int) -> torch.Tensor:
    """The largest log-weight (B, S, T) among the keys outside each row's window; -inf where there is none."""
    if not causal:
        return log_weight.amax(-1, keepdim=True).expand(log_weight.shape).contiguous()
    length = log_weight.shape[-1]
    maxima = torch.nn.functional.pad(log_weight.cummax(-1).values, (window, 0), value=-torch.inf)
    return maxima[..., :length].contiguous()
