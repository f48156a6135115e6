"""One forward pass of a batch in either layout: the model's body, then the head on completion positions only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tutelage.groups import Batch, handed_over
from tutelage.models.attention import attention_by_products, attention_kind
from tutelage.models.head import LMHead, head_logps
from tutelage.models.head_divergence import DivergenceKind, head_divergence
from tutelage.models.loading import base_causal_lm, model_body
from tutelage.models.modes import adapters_under_autocast

__all__ = [
    "TeacherStates",
    "hidden_states",
    "layer_hidden_states",
    "predictor_hidden_states",
    "token_logps",
    "token_logps_and_divergences",
]


@dataclass(frozen=True, slots=True)
class TeacherStates:
    """What a teacher says of the completion tokens of a batch: enough for its next-token distributions.

    Attributes:
        hidden_NH: its last hidden states that predict the tokens, without gradient.
        head: its head, without gradient.
        kind, mixture: how the student is compared with it; see ``head_divergence``.
    """

    hidden_NH: Tensor
    head: LMHead
    kind: DivergenceKind
    mixture: float = 0.5


def token_logps(model: nn.Module, batch: Batch, *, block_size: int | None = None) -> Tensor:
    """Log-prob of every completion token of a batch.

    Args:
        batch: from ``collate_shared_prefix`` (its ``attention_mask`` is None) or ``collate_padded``.

    Returns:
        [N] float32 (nats per token), in the order of ``batch.targets``; differentiable.
    """
    return token_logps_and_divergences(model, batch, None, block_size=block_size)[0]


def token_logps_and_divergences(
    model: nn.Module, batch: Batch, teacher: TeacherStates | None, *, block_size: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """The same, with the divergence from a teacher at each token, from one pass through the model's body.

    Args:
        teacher: of the same completions, in order; None for no divergences.

    Returns:
        [N] log-probs, and [N] divergences (nats per token) or None; differentiable.
    """
    base = base_causal_lm(model)
    hidden_NH = predictor_hidden_states(base, batch)
    head, targets_N = LMHead.of(base), handed_over(batch.targets, hidden_NH.device)
    logps_N = head_logps(head, hidden_NH, targets_N, block_size=block_size)
    if teacher is None:
        return logps_N, None
    divergence_N = head_divergence(
        head,
        hidden_NH,
        teacher.hidden_NH,
        kind=teacher.kind,
        mixture=teacher.mixture,
        teacher_head=teacher.head,
        block_size=block_size,
    )
    return logps_N, divergence_N


def predictor_hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    """[N, H] the last hidden states that predict the completion tokens of a batch; differentiable."""
    batch = batch.to(base.device)
    with attention_by_products(base, batch.input_ids.shape[1]):
        hidden_BLH = hidden_states(base, batch)
    rows_N, columns_N = (handed_over(t, hidden_BLH.device) for t in (batch.predictor_rows, batch.predictor_columns))
    return hidden_BLH[rows_N, columns_N]


def hidden_states(base: PreTrainedModel, batch: Batch) -> Tensor:
    """[B, L, H] last hidden states of a batch on the model's device; differentiable."""
    return _run_body(base, batch).last_hidden_state


def layer_hidden_states(base: PreTrainedModel, batch: Batch, layers: Sequence[int]) -> list[Tensor | None]:
    """[B, L, H] what each of ``layers`` gives, for a batch on the model's device.

    Args:
        layers: as ``output_hidden_states`` of transformers counts them: 0 is the embedding, and the last is the output
            of the body, after its final norm.

    Returns:
        one for each of ``layers``; None where the body gives no such layer.
    """
    # The architectures that select keep the chosen layers alone; to any other the list means "yes", and it keeps all.
    outputs = _run_body(base, batch, output_hidden_states=list(layers))
    found = cast(Sequence[Tensor | None], getattr(outputs, "hidden_states", None) or ())
    return [found[layer] if layer < len(found) else None for layer in layers]


def _run_body(base: PreTrainedModel, batch: Batch, **options: Any) -> Any:
    # Only the body runs, so no logits are computed for the prompt; the head is our own.
    if batch.attention_mask is not None:
        inputs = {"attention_mask": batch.attention_mask.long()}
    else:
        inputs = {"attention_mask": _shared_prefix_attention(base, batch), "position_ids": batch.position_ids}
    with adapters_under_autocast(base):
        return model_body(base)(input_ids=batch.input_ids, use_cache=False, **inputs, **options)


def _shared_prefix_attention(base: PreTrainedModel, batch: Batch) -> Tensor | dict[str, Tensor]:
    """The shared-prefix mask in the form the model accepts: one 4D mask, or one per kind of layer."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)

    def mask(window: int | None) -> Tensor:
        mask_BLL = batch.shared_prefix_mask(window)
        if attention_kind(config) == "eager":  # adds its mask to the scores instead of selecting by it
            return torch.zeros(mask_BLL.shape, dtype=base.dtype, device=mask_BLL.device).masked_fill(
                ~mask_BLL, torch.finfo(base.dtype).min
            )
        return mask_BLL

    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds:
        return {kind: mask(window if kind == "sliding_attention" else None) for kind in kinds}
    return mask(window)
