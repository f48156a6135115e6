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

__all__ = ["ARCHITECTURES", "REFUSED", "SKIPPED", "VOCABULARY", "tiny"]

VOCABULARY = 97
LAYERS = 2

_DEPTH = r"(num|n|decoder|encoder)_(hidden_)?layers?|num_(hidden|decoder|encoder)_layers|num_layers_per_stack"
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
    (_DEPTH, LAYERS),
    (
        r"hidden_size|d_model|n_embd|emb_dim|embedding_size|\w*embedding_size|word_embed_proj_dim|embedding_dim|lru_width",
        32,
    ),
    (
        r"\w*intermediate_size\w*|\w*ffn\w*dim|ffn_hidden_size|dff|dim_ff|d_inner|n_inner|inner_dim|feed_forward_size",
        48,
    ),
    (r"(moe_)?(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"num_experts_per_tok(en)?|top_k|moe_top_?k|num_selected_experts|num_experts_per_token", 2),
    (r"n_group|topk_group|num_expert_group|n_groups", 1),
    (r"\w*(lora_)?rank", 8),
    (r"rotary_dim", 8),
    (r"moe_k", 2),
    (
        r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|model_max_length",
        128,
    ),
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
    fields = config().to_dict()
    return config(**(dict(_shrunk(fields)) | CHANGES.get(model_type, {})))


def _shrunk(fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    depths = {value for name, value in fields.items() if re.fullmatch(_DEPTH, name)}
    latent = "kv_lora_rank" in fields  # such attention has as many keys as queries
    for name, value in fields.items():
        if name in ("model_type", "transformers_version", "architectures", "dtype"):
            continue
        if isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            yield name, {key: each for key, each in value.items() if int(key) < LAYERS}  # of some layers
        elif isinstance(value, dict) and name.endswith("config"):
            yield name, dict(_shrunk(value)) | {key: value[key] for key in ("model_type",) if key in value}
        elif isinstance(value, list) and len(value) in depths:
            # One entry a layer: the first, and the first of another kind.
            short = [value[0], next((each for each in value if each != value[0]), value[0])]
            yield name, [_small(name, each, latent) for each in short]
        elif name == "is_decoder":
            yield name, True
        elif re.search(r"logit\w*soft_?cap|logits_soft_cap", name) and value is not None:
            yield name, 3.0
        elif re.fullmatch(r"logits?_scal\w+|lm_head_multiplier|logits_mup\w*", name) and value is not None:
            yield name, 0.7
        elif name in ("initializer_range", "init_std") and isinstance(value, float):
            yield name, 0.2  # different tokens get visibly different probabilities
        else:
            yield name, _small(name, value, latent)


def _small(name: str, value: Any, latent: bool) -> Any:
    if latent and name == "num_key_value_heads":
        return 4
    if name == "head_dim" and value is None:
        return 8
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        return value
    return min(value, next((new for rule, new in RULES if re.fullmatch(rule, name)), value))


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What the rules do not get right, with the reason.
CHANGES: dict[str, dict[str, Any]] = {
    # heads and their size must multiply to the expanded width
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zamba2": {
        "n_mamba_heads": 8,
        "mamba_headdim": 8,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "hybrid_layer_ids": [1],
        "num_mem_blocks": 1,
    },
    "xlstm": {"num_heads": 4, "hidden_size": 32, "embedding_dim": 32, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    # a model of two layers is too short for the default pattern: both kinds of layer
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 8,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "attention_window_size": 6},
    "zamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_dt_rank": 8,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_hidden_layers": 4,
        "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
    },
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": 48,
    },
    # experts: how many are chosen has another name, or no default
    "ernie4_5_moe": {"moe_k": 2},
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1},
    # multiplies by what others of this name divide by: with another factor than its default it is refused
    "hyperclovax": {"logits_scaling": 1.0},
    # heads without a default
    "nemotron": {"num_key_value_heads": 2},
    # a decoder by option
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8}},
    "longcat_flash": {"qk_head_dim": None, "head_dim": 8},
    "qwen4_exp_text": {"indexer_budget": 8, "indexer_compress_ratio": 4},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("sliding_attention", "full_attention"), _ROPE)},
    "hrm_text": {"H_cycles": 1, "L_cycles": 1, "num_layers_per_stack": 2, "num_hidden_layers": 4},
    "rwkv": {"attention_hidden_size": 32},
}
# What cannot be tried, with the reason.
SKIPPED: dict[str, str] = {
    "blt": "reads bytes in patches that a second model cuts; its config has no sizes of its own",
    "dots3_note": "sizes of heads that depend on each other, by layer",
    "dots3_note_text": "sizes of heads that depend on each other, by layer",
    "gemma3n": "its vision part needs timm; gemma3n_text is tried",
    "gemma4_assistant": "drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "drafts for another model, whose cache it reads",
    "musicgen": "composed of three models; no text decoder of its own",
    "musicgen_melody": "composed of three models; no text decoder of its own",
    "qwen4_exp": "has no default for the budget of its indexer",
    "qwen4_exp_text": "has no default for the budget of its indexer",
    "reformer": "hashes at random: two passes of its own differ",
}
_HEAD, _AHEAD = "before or after the head", "is bidirectional"
_NO_CACHE = r"cannot be sampled from: its forward takes no past_key_values"
# What we refuse, and how the error says so. Of those without a cache, only sampling is refused.
REFUSED: dict[str, str] = {
    **dict.fromkeys(
        (
            *(
                "bert",
                "big_bird",
                "camembert",
                "data2vec-text",
                "electra",
                "ernie",
                "megatron-bert",
                "modernbert-decoder",
            ),
            *("prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta"),
            *("xlm-roberta-xl", "xmod"),
        ),
        _HEAD,
    ),
    **dict.fromkeys(("cpmant", "xlm", "xlnet"), _AHEAD),
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), _NO_CACHE),
    "doge": "beside other rows",  # the keys that it keeps are counted over the padded row
    "openai-gpt": "cannot be sampled from: .*past_key_values",
    "recurrent_gemma": "cannot be sampled from: .*past_key_values",  # its cache is not handed out
}
ARCHITECTURES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
