"""Flexformer attention written out pair by pair in float64, straight from its definition: what all forms must equal."""

import torch

from flexdistill.runtime.feature_maps import DECAYED_GUARD, SIGNED_GUARD, FeatureMap


def reference_attention(
    feature_map: FeatureMap,
    parameters: dict[str, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    visible: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, H, T, D) in float64, at the cost of every pair times every feature; `parameters` are the map's, by name."""
    spec = feature_map.spec
    heads = spec.num_heads
    parameters = {name: x.double() for name, x in parameters.items()}
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    length = query.shape[2]
    distance = torch.arange(length, device=query.device)[:, None] - torch.arange(length, device=query.device)
    allowed = (distance >= 0 if spec.causal else distance < length)[None, None]
    if visible is not None:
        allowed = allowed & visible[:, None, None]
    far_allowed = allowed & (distance >= spec.window if spec.causal else distance < length)
    if spec.sinks:
        seen = torch.ones_like(distance[:1], dtype=torch.bool) if visible is None else visible
        far_allowed = far_allowed & ~(seen & (seen.cumsum(1) <= spec.sinks))[:, None, None]
    logits = (query @ key.transpose(-1, -2) * scaling).masked_fill(~(allowed & ~far_allowed), -torch.inf)

    def of(prefix, name):
        if spec.tied:
            prefix = "query"
        x = parameters.get(f"{prefix}_parameters.{name}")
        return None if x is None else x.repeat_interleave(heads // x.shape[0], 0)

    scaled = query * (scaling * query.shape[-1] ** 0.5)
    log_scale = torch.zeros(query.shape[:3], dtype=torch.float64, device=query.device)
    decay = torch.zeros(heads, feature_map.num_features, dtype=torch.float64, device=query.device)
    if spec.decay:
        decay = (5 * parameters["decay"]).sigmoid()
        decay = decay.repeat_interleave(heads // decay.shape[0], 0)
    elapsed = (distance - spec.window).clamp_min(0)[..., None]
    if feature_map.signed:
        factor = (-parameters["tau"]).exp()
        factor = factor.repeat_interleave(heads // factor.shape[0], 0)[:, None]
        features = []
        for prefix, x in (("query", scaled), ("key", key)):
            phase, other = x @ of(prefix, "w1"), of(prefix, "w2")
            modulation = 1.0 if other is None else (x @ other).cos()
            features.append(
                torch.cat([phase.cos() * modulation, phase.sin() * modulation], -1) * phase.shape[-1] ** -0.5
            )
        log_scale = factor * scaled.square().sum(-1)
        weight = (factor * key.square().sum(-1))[:, :, None].masked_fill(~far_allowed, -torch.inf)
        largest = weight.amax(-1, keepdim=True).masked_fill(~far_allowed.any(-1, keepdim=True), 0.0)
        weight = (weight - largest).exp()
        kept = (-elapsed * decay[:, None, None]).exp()
        scores = torch.einsum("bhif,bhjf,hijf->bhij", *features, kept) * weight
        if spec.decay:
            passed = torch.einsum("bhij,bhjf,hijf->bhif", weight, features[1].abs(), kept)
            least = DECAYED_GUARD * features[0].norm(dim=-1) * passed.norm(dim=-1)
        else:
            least = SIGNED_GUARD * features[0].norm(dim=-1) * (weight @ features[1].norm(dim=-1)[..., None])[..., 0]
        total = torch.maximum(scores.sum(-1), least)
    else:
        factor = 0.1 * parameters["norm_factor"]
        factor = factor.repeat_interleave(heads // factor.shape[0], 0)[:, None]
        units = (unit.double().to(query.device) for unit in (feature_map.query_unit, feature_map.key_unit))
        query_unit, key_unit = (unit.repeat_interleave(heads // len(unit))[:, None, None] for unit in units)
        scaled, key = scaled * query_unit, key * key_unit
        logarithms = []
        for prefix, x in (("query", scaled), ("key", key)):
            phase, other = x @ of(prefix, "w1"), of(prefix, "w2")
            envelope = (
                0.0 if other is None else torch.logaddexp(x @ other, -(x @ other)) - torch.log(phase.new_tensor(2.0))
            )
            log_features = torch.cat([envelope + phase, envelope - phase], -1) + of(prefix, "log_amplitude")[:, None]
            logarithms.append(log_features - 0.5 * torch.log(phase.new_tensor(2.0 * phase.shape[-1])))
        log_scores = torch.stack(
            [
                torch.logsumexp(logarithms[0][:, :, i, None] + logarithms[1] - elapsed[i] * decay[:, None], -1)
                + factor * key.square().sum(-1)
                for i in range(length)
            ],
            dim=2,
        ).masked_fill(~far_allowed, -torch.inf)
        largest = log_scores.amax(-1, keepdim=True).masked_fill(~far_allowed.any(-1, keepdim=True), 0.0)
        scores = (log_scores - largest).exp()
        total = scores.sum(-1)
    if not spec.window:
        return (scores @ value) / total.masked_fill(total == 0, 1.0)[..., None]
    gate = 10.0 * parameters["window_gate"][:, None]
    near_largest = logits.amax(-1, keepdim=True)
    near_largest = near_largest.masked_fill(near_largest == -torch.inf, 0.0)
    near = (logits - near_largest).exp()
    far_log = torch.where(far_allowed.any(-1), largest[..., 0] + log_scale + gate, -torch.inf)
    shared = torch.maximum(far_log, near_largest[..., 0]).detach()
    far_part, near_part = (far_log - shared).exp()[..., None], (near_largest[..., 0] - shared).exp()[..., None]
    total = far_part[..., 0] * total + near_part[..., 0] * near.sum(-1)
    return (far_part * (scores @ value) + near_part * (near @ value)) / total.masked_fill(total == 0, 1.0)[..., None]
