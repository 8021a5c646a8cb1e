"""Tiny configurations of any model type, derived from its defaults by the names of its settings alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

VOCABULARY = 160
WIDTH, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 64, 4, 2, 16, 2

# setting -> value in a tiny model; the first pattern that matches the whole name counts
_COUNTS: dict[str, int] = {
    r"(.*_)?vocab_size(_per_layer_input)?": VOCABULARY,
    r"(.*_)?(num_hidden_layers|num_layers|n_layers?)|(num_)?(en|de)coder_layers|depth": LAYERS,
    r"num_(local_)?experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok(en)?|moe_top_?k|top_k_experts": 2,
    r"n_group|topk_group|num_expert_group": 1,
    r"max_position_embeddings|n_positions|max_seq_len|max_target_positions|n_ctx|max_sequence_length": 256,
    r"max_source_positions": 64,
}
_WIDTHS: dict[str, int] = {
    r"qk_head_dim": 2 * HEAD_DIM,
    r"(.*_)?head_dim|dim_head|d_kv|kv_channels|attention_head_size": HEAD_DIM,
    r"(q|kv|o)_lora_rank": HEAD_DIM,
    r"num_kv_heads|n_head_kv|(.*_)?num_key_value_heads|multi_query_group_num": KV_HEADS,
    r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?)": HEADS,
    r"(.*_)?(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|n_inner|d_ff)|hidden_dim": WIDTH,
    r"(.*_)?(hidden_size|d_model|n_embd|embed_dim|projection_dim|embedding_(size|dim)|embed_proj_dim)|dim": WIDTH,
    r"rotary_dim": 8,
}
_IMAGES: dict[str, int] = {r"image_size": 32, r"patch_size": 8}


# some settings must add up to a head's default size
_WIDE = {
    pattern: 512 if size == WIDTH else size for pattern, size in _WIDTHS.items() if size in (WIDTH, HEADS, KV_HEADS)
}


def tiny_configs(config_class: type[PreTrainedConfig], **settings: Any) -> Iterator[PreTrainedConfig]:
    """Configurations to try in turn: all sizes small, then less and less of them, then the defaults.

    Those that the class refuses are left out.

    Args:
        settings: what every configuration is to have.
    """
    for sizes in (_COUNTS | _WIDTHS | _IMAGES, _COUNTS | _WIDTHS, _COUNTS | _WIDE, _COUNTS, {}):
        try:
            yield config_class(**_overrides(config_class(), sizes) | settings)
        except Exception:  # each configuration has checks of its own; these sizes do not pass them
            continue


def _overrides(config: PreTrainedConfig, sizes: dict[str, int]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    reserved = 3
    for name, value in vars(config).items():
        if name in config.sub_configs and isinstance(value, PreTrainedConfig):
            settings[name] = {"model_type": value.model_type, **_overrides(value, sizes)}
        elif isinstance(value, bool) or not isinstance(value, int):
            continue
        elif name.endswith(("_token_id", "_token_index")):
            if sizes and value >= VOCABULARY:
                settings[name], reserved = reserved, reserved + 1
        else:
            size = next((size for pattern, size in sizes.items() if re.fullmatch(pattern, name)), value)
            if "layers" in name:
                size = max(size, _layers_of_every_kind(config))
            if size < value:
                settings[name] = size
    if vars(config).get("num_key_value_heads", 0) == getattr(config, "num_attention_heads", None):
        settings["num_key_value_heads"] = settings.get("num_attention_heads", config.num_attention_heads)
    return settings


def _layers_of_every_kind(config: PreTrainedConfig) -> int:
    """The fewest layers among which every type of the default's layers occurs."""
    types = getattr(config, "layer_types", None) or []
    return max((types.index(kind) + 1 for kind in set(types)), default=0)
