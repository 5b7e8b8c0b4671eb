"""A small configuration of any Hugging Face architecture, by rules on field names that hold for all of them."""

from __future__ import annotations

import contextlib
import re
from dataclasses import MISSING, fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY = 128
FIRST_SPECIAL = 100
"""Token ids from here on are special ones (padding, image places); example inputs stay below."""

_NUMBERS: tuple[tuple[str, int], ...] = (
    (r"vocab_size", VOCABULARY),
    (r"(key_value|kv)_heads|n_head_kv|n_kv_heads?|multi_query_group_num|num_query_groups", 2),
    (r"(mamba|ssm).*(head_dim|d_head)|^head_dim_ssm", 32),
    (r"(mamba|ssm).*heads", 4),
    (r"linear_num_key_heads", 2),
    (r"heads?$|n_head$|num_heads", 4),
    (r"qk_rope_head_dim|qk_nope_head_dim", 8),
    (r"head_dim|d_kv$|d_head$|head_size|kv_channels|dim_head|head_width", 16),
    (r"lora_rank|lora_dim|low_rank_dim", 16),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|(attn|expert|attention)_layer_offset", 1),
    (r"num_nextn_predict_layers", 0),
    (r"layers?$|n_layer|num_blocks|^depth$|num_hidden_groups|num_.*_blocks$|n_blocks|num_stages_layers", 2),
    (r"n_groups?$|num_expert_group|topk_group|group_top", 1),
    (r"rotary_dim", 8),
    (r"experts_per_tok|moe_k$|top_?k(_experts)?$|moe_top_?k|num_selected_experts|num_activated|expert_top", 2),
    (r"experts|num_local_experts", 4),
    (r"(pattern|interval|period|freq|frequency|every_n|_every|step)$|every_n_layers", 2),
    (r"sliding_window|attention_chunk_size|local_attention|attention_window|window_size", 4),
    (r"chunk_(left|right)_context", 1),
    (r"(local_|global_)?block_size|num_random_blocks|chunk_length|num_buckets", 4),
    (r"intermediate|ffn|inner|d_ff|mlp_dim|feed_?forward|mlp_hidden", 96),
    (r"image_size|input_size|img_size", 64),
    (r"patch_size", 16),
    (r"max_source_positions", 32),
    (r"positions?(_embeddings)?$|n_ctx|max_seq_len|max_target|max_text_len", 512),
    (
        r"hidden|d_model|n_embd|n_embed|embed|model_dim|^dim$|width|projection|_dim$|_size$|channels|residual|d_embed",
        64,
    ),
    (r"state_size|d_state", 16),
)
_KEPT = re.compile(
    r"kernel|stride|num_channels|image_channels|in_channels|in_chans|type_vocab|conv_k|d_conv|padding|temporal|num_frames|"
    r"n_channels|num_labels|hop|mel|sampling|batch|chunk_size_feed|^scale|factor|eps|rate|depths|expand"
)
_MISSING = {
    "num_key_value_heads": 2, "num_kv_heads": 2, "n_head_kv": 2, "head_dim": 16, "vocab_size": VOCABULARY, "pad_token_id": 0,
    "num_experts_per_tok": 2, "n_routed_experts": 4, "num_experts": 4,
}  # fmt: skip
"""What a field without a default becomes; the others are left for the config to derive."""
_TOKENS = re.compile(r"token_id$|token_ids$|token_index$|_id$")


VARIANTS = (
    "^$",
    "key_value|kv",
    "layers?$",
    "window|chunk|block",
    "head|lora",
    "hidden_size_per|inner|expand",
    "^(?!.*(layers?$|vocab))",
)
"""Patterns of field names that keep their defaults, tried in order until a model builds and runs."""


def small_config(
    kind: type[PreTrainedConfig], kept: str = "^$", given: dict[str, Any] | None = None
) -> PreTrainedConfig:
    """A config of the given class with every number made small, sub-configs included.

    kept: pattern of field names whose defaults stay.  given: values that the enclosing config's defaults prescribe.
    A config that mixes kinds of layers gets one of each.
    """
    values = _small_values(kind, kept, given or {})
    kinds = _layer_kinds(kind)
    try:
        made = kind(**values)
    except Exception:
        if not kinds:
            raise
        return kind(
            **_mixed(kind, values, kinds * 2)
        )  # as many kinds as layers, and each twice for layers that share weights
    twice = values.get("num_kv_shared_layers") == 2  # the last two take their keys and values from the first two
    if twice or len(kinds) > len(set(getattr(made, "layer_types", None) or ())):
        with contextlib.suppress(Exception):
            return kind(**_mixed(kind, values, kinds * 2 if twice else kinds))
    return made


def _mixed(kind: type[PreTrainedConfig], values: dict[str, Any], kinds: list[str]) -> dict[str, Any]:
    """The values with one layer of each of the kinds."""
    layers = {name: len(kinds) for name in ("num_hidden_layers", "n_layer", "num_layers") if name in values}
    return {**values, **layers, kind.attribute_map.get("layer_types", "layer_types"): kinds}


def _small_values(kind: type[PreTrainedConfig], kept: str, given: dict[str, Any]) -> dict[str, Any]:
    values = dict(given)
    names = {field.name: field for field in fields(kind) if field.init}
    used: list[int] = []
    for name, field in names.items():
        default = given.get(name, _default(field))
        small = _kept(kept, default) if re.search(kept, name) else _small(name, default, used)
        if small is not default:
            values[name] = small
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]  # latent attention has no shared heads
    for name, spec in (kind.sub_configs_defaults or {}).items():
        inner = spec.config_class
        if inner is AutoConfig:
            inner = CONFIG_MAPPING[spec.model_type]
        values[name] = small_config(inner, kept, dict(spec.init_kwargs or {}))
    return values


def _kept(kept: str, default: Any) -> Any:
    """A field that the variant leaves alone; key and value heads then are as many as query heads."""
    return 4 if kept == VARIANTS[1] and isinstance(default, int) else default


def _default(field: Any) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else None


def _layer_kinds(kind: type[PreTrainedConfig]) -> list[str]:
    """The distinct kinds of layers of the full-sized default, at most three, in order of appearance."""
    try:
        types = getattr(kind(), "layer_types", None) or ()
    except Exception:
        return []
    kinds = list(dict.fromkeys(types))[:3]
    return kinds * 2 if len(kinds) == 1 else kinds


def _small(name: str, default: Any, used: list[int]) -> Any:
    if isinstance(default, bool) or default == "":
        return default
    if _TOKENS.search(name) and default is not None:
        return _small_token(default, used)
    if default is None:
        return _MISSING.get(name)
    if isinstance(default, int):
        return default if _KEPT.search(name) else _number(name, default)
    if isinstance(default, (list, tuple)) and default and all(type(v) is int for v in default):
        return type(default)(_numbers(name, list(default)))
    return default


def _small_token(default: Any, used: list[int]) -> Any:
    if isinstance(default, (list, tuple)):
        return [_small_token(v, used) for v in default]
    if not isinstance(default, int) or isinstance(default, bool) or default < FIRST_SPECIAL:
        return default
    used.append(default)
    return FIRST_SPECIAL + len(used)


def _number(name: str, default: int) -> int:
    for pattern, small in _NUMBERS:
        if re.search(pattern, name):
            return min(default, small if name != "image_size" or default <= 224 else 2 * small)
    return default


def _numbers(name: str, default: list[int]) -> list[int]:
    """Lists hold one number per stage or per convolution: equal ones stay equal, growing ones grow."""
    if re.search(r"depth|layers|blocks", name):
        return [min(v, 2) for v in default]
    if re.search(r"heads", name):
        return [min(v, 2) for v in default]
    if re.search(r"image_size|input_size|img_size", name):
        return [64] * len(default)
    if re.search(r"dims?$|sizes?$|channels$|widths?$|embed", name) and not re.search(
        r"patch|kernel|window|stride|pool", name
    ):
        if len(set(default)) == 1:
            return [min(default[0], 32)] * len(default)
        order = sorted(set(default))
        return [min(v, 16 * 2 ** order.index(v)) for v in default]
    return default
