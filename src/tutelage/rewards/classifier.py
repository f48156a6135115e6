"""Whether transformers has a model for sequence classification that computes what a reward does: found out before training."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel

from tutelage.models.loading import base_causal_lm, first_line, model_body
from tutelage.models.modes import without_dropout

__all__ = ["HEAD_NAME", "classifier_adapter_config", "empty_classifier", "why_no_classifier"]

HEAD_NAME = "score"


def empty_classifier(config: PretrainedConfig, pad_token_id: int | None) -> PreTrainedModel:
    """transformers' model for sequence classification with one label, without memory for its weights.

    Raises:
        Exception: transformers has none of this type; which exception depends on the type.
    """
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, pad_token_id
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config)


def classifier_adapter_config(model: PeftModel) -> Any:
    """The config of a policy's adapter as that of a reward with its head in it."""
    config: Any = copy.deepcopy(model.active_peft_config)
    config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", [HEAD_NAME], True
    return config


@torch.no_grad()
def why_no_classifier(model: nn.Module, head_size: int, pad_token_id: int | None) -> str | None:
    """Why the reward on this body cannot be a model for sequence classification of transformers; None if it can.

    The class is built without memory for weights, takes the adapter's config, then the body that is in memory, and has to
    give the same numbers as a linear head on the last token's hidden state.

    Args:
        model: the body, with or without an adapter and with any head.
        head_size: width of the hidden states that the reward's head reads.
        pad_token_id: fills the batch; None tries single rows alone.
    """
    base = base_causal_lm(model)
    kind = base.config.model_type
    try:
        whole = empty_classifier(base.config, pad_token_id)
    except Exception:
        return f"transformers has no model for sequence classification of type {kind}"
    body, head = whole.base_model, getattr(whole, HEAD_NAME, None)
    if (
        body is whole
        or not isinstance(head, nn.Linear)
        or head.bias is not None
        or head.weight.shape != (1, head_size)
    ):
        return f"transformers' model for sequence classification of type {kind} has another head"
    if isinstance(model, PeftModel):
        config = classifier_adapter_config(model)
        if hasattr(config, "init_lora_weights"):
            config.init_lora_weights = True  # some ways to begin read the weights, and there are none
        try:
            whole.add_adapter(config)
        except Exception as error:
            reason = first_line(error)[:120]
            return f"transformers loads no adapter of kind {getattr(config.peft_type, 'value', config.peft_type)} ({reason})"
    setattr(whole, whole.base_model_prefix, model_body(base))
    score = nn.Linear(head_size, 1, bias=False, device=base.device, dtype=base.dtype)
    setattr(whole, HEAD_NAME, score)
    try:
        found, truth = _scores(whole, score, pad_token_id)
    except Exception as error:
        return (
            f"transformers' model for sequence classification of type {kind} does not run ({first_line(error)[:120]})"
        )
    # Two ways to a number differ by rounding; a wrong token or a missing adapter is another number.
    if not torch.allclose(found, truth, rtol=0, atol=0.1 * truth.std().item() + 1e-6):
        return f"transformers' model for sequence classification of type {kind} gives other numbers"
    return None


def _scores(whole: PreTrainedModel, score: nn.Linear, pad_token_id: int | None) -> tuple[Tensor, Tensor]:
    """[8] scores of rows in a padded batch and alone by the class, and of the rows alone by the head on the last hidden state.

    Without a pad token the class refuses batches: then it is [4], of the rows alone.
    """
    generator = torch.Generator().manual_seed(0)
    score.weight.copy_(torch.randn(score.weight.shape, generator=generator))
    size = min(whole.config.get_text_config().vocab_size, 1000)
    known = torch.tensor([token for token in range(size) if token != pad_token_id])
    rows = [known[torch.randint(len(known), (length,), generator=generator)] for length in (3, 4, 5, 5)]
    rows = [row.to(score.weight.device) for row in rows]
    found = []
    with without_dropout(whole):
        if pad_token_id is not None:
            ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
            found.append(whole(input_ids=ids, attention_mask=(ids != pad_token_id).long()).logits[:, 0])
        found.append(torch.stack([whole(input_ids=row[None]).logits[0, 0] for row in rows]))
        states = [cast(Tensor, whole.base_model(input_ids=row[None])[0])[0, -1] for row in rows]
    truth = torch.stack([score(state.to(score.weight.dtype))[0] for state in states])
    return torch.cat(found).float(), truth.float().repeat(len(found))
