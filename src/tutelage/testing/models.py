"""Tiny random models of the architectures that people train, made from configs: no download, a few kilobytes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

__all__ = ["ARCHITECTURES", "tiny_model"]

_ATTENTION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
_GROUPED = {**_ATTENTION, "num_key_value_heads": 2, "head_dim": 8}

ARCHITECTURES: dict[str, Callable[..., PreTrainedConfig]] = {
    "llama": lambda **kw: LlamaConfig(**{**_GROUPED, **kw}),
    "qwen3": lambda **kw: Qwen3Config(**{**_GROUPED, **kw}),
    # windows shorter than the tests' sequences, so that a wrong sliding-window mask shows
    "mistral": lambda **kw: MistralConfig(**{**_GROUPED, "sliding_window": 6, **kw}),
    "gemma3": lambda **kw: Gemma3TextConfig(
        **{**_GROUPED, "sliding_window": 6, "query_pre_attn_scalar": 8, "tie_word_embeddings": True, **kw},
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_neox": lambda **kw: GPTNeoXConfig(**{**_ATTENTION, **kw}),
    "opt": lambda **kw: OPTConfig(
        **{**_ATTENTION, "ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True, **kw}
    ),
    "mamba": lambda **kw: MambaConfig(**{"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, **kw}),
}


def tiny_model(
    architecture: str = "llama",
    *,
    vocab_size: int = 97,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    initializer_range: float = 0.3,
    **config,
) -> PreTrainedModel:
    """A random causal language model of a few thousand parameters, in evaluation mode.

    Args:
        architecture: one of ``ARCHITECTURES``.
        vocab_size: V.
        seed: of the weights; the global random state is left as it was.
        initializer_range: wide, so that different tokens get visibly different probabilities.
        config: other fields of the architecture's config.
    """
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = ARCHITECTURES[architecture](
        vocab_size=vocab_size, initializer_range=initializer_range, **{**tokens, **config}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(made, dtype=dtype).eval()
