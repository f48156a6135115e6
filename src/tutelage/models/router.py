"""The auxiliary loss that mixtures of experts are pretrained with, to keep their experts in use."""

from __future__ import annotations

from transformers import PreTrainedConfig

__all__ = ["router_loss"]


def router_loss(config: PreTrainedConfig) -> str | None:
    """The weight of a router's auxiliary loss in a config, as ``name=value``; None where there is none.

    >>> from transformers import LlamaConfig, MixtralConfig
    >>> router_loss(MixtralConfig()), router_loss(LlamaConfig())
    ('router_aux_loss_coef=0.001', None)
    """
    fields = config.get_text_config().to_dict()
    weights = {
        name: value for name, value in fields.items() if "aux_loss" in name and isinstance(value, float) and value
    }
    return next((f"{name}={value:g}" for name, value in weights.items()), None)
