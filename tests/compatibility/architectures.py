"""Every causal language model that the installed transformers knows, at a tiny size.

The list is the library's own (``MODEL_FOR_CAUSAL_LM_MAPPING_NAMES``). Each config is made with its own defaults, and then
its numbers are made small by their names. So an architecture is tried on the day it appears, by the rules below. What
the rules do not get right stands in ``CHANGES``, what cannot be tried in ``SKIPPED``, each with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

__all__ = ["ARCHITECTURES", "SKIPPED", "tiny"]

VOCABULARY = 97
LAYERS = 2

# By the whole name, the first that fits; numbers alone are changed, and lists keep their kind.
RULES: tuple[tuple[str, Any], ...] = (
    (r"(bos|sep|cls|decoder_start)_token_id", 1),
    (r"eos_token_id", 2),
    (r"\w*_token_id|padding_idx", 0),
    (r"vocab_size|decoder_vocab_size", VOCABULARY),
    (r"\w*vocab_size\w*", VOCABULARY),
    (r"num_key_value_heads|num_kv_heads|swa_num_key_value_heads|num_key_value_groups", 2),
    (r"head_dim|v_head_dim|attention_head_dim|attention_head_size|d_head|dim_head|\w*_head_dim|kv_channels", 8),
    (r"\w*(num_attention_heads|attention_heads)|n_heads?|num_heads", 4),
    (r"(num|n|decoder|encoder)_(hidden_)?layers?|num_(hidden|decoder|encoder)_layers|num_layers_per_stack", LAYERS),
    (r"hidden_size|d_model|n_embd|emb_dim|embedding_size|\w*embedding_size|word_embed_proj_dim|embedding_dim|lru_width", 32),
    (r"\w*intermediate_size\w*|\w*ffn\w*dim|ffn_hidden_size|dff|dim_ff|d_inner|n_inner|inner_dim|feed_forward_size", 48),
    (r"(moe_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"num_experts_per_tok(en)?|top_k|moe_top_?k|num_selected_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_groups", 1),
    (r"\w*(lora_)?rank", 8),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|model_max_length", 128),
    (r"\w*window\w*|local_attention|\w*chunk_(size|length)\w*", 6),
)


def tiny(model_type: str) -> PreTrainedModel:
    """A random model of some thousand parameters in float32, in evaluation mode; the same at each call."""
    config = tiny_config(model_type)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def tiny_config(model_type: str) -> PreTrainedConfig:
    config = CONFIG_MAPPING[model_type]
    given = dict(shrunk(config().to_dict()))
    given |= CHANGES.get(model_type, {})
    return config(**given)


def shrunk(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if name in ("model_type", "transformers_version", "architectures", "torch_dtype", "dtype"):
            continue
        if isinstance(value, dict) and name.endswith("config"):
            yield name, dict(shrunk(value)) | ({"model_type": value["model_type"]} if "model_type" in value else {})
        elif name == "layer_types" and value:
            yield name, value[:1] + [next((v for v in value if v != value[0]), value[0])]
        elif name in ("initializer_range", "init_std", "initializer_factor") and isinstance(value, float):
            yield name, 0.2
        elif isinstance(value, int) and not isinstance(value, bool):
            found = next((new for rule, new in RULES if re.fullmatch(rule, name)), value)
            yield name, min(found, value) if value > 0 else value
        else:
            yield name, value


CHANGES: dict[str, dict[str, Any]] = {}
SKIPPED: dict[str, str] = {}
ARCHITECTURES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
