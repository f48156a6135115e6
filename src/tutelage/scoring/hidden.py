"""Hidden states of chosen layers at completion tokens: features of a frozen model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tutelage.errors import UserError
from tutelage.groups import Batch, Group
from tutelage.models.loading import base_causal_lm
from tutelage.models.modes import evaluation_mode
from tutelage.scoring.forward import layer_hidden_states
from tutelage.scoring.layout import collate_in_layout
from tutelage.scoring.logps import Layout

__all__ = ["CompletionStates", "completion_hidden_states", "layers_at_depths", "token_places"]


@dataclass(frozen=True, slots=True)
class CompletionStates:
    """Hidden states at the tokens of the completions of a batch.

    Attributes:
        layers: which layers, counted from 0, the embedding.
        states: [layers, N, H] in the model's precision, groups in order, completions in order, tokens in order.
        completion_ids: [N] which completion of the batch, counted in order, each token belongs to.
        num_completions: C.
    """

    layers: tuple[int, ...]
    states: Tensor
    completion_ids: Tensor
    num_completions: int

    def means(self) -> Tensor:
        """[layers, C, H] float32 mean over the tokens of each completion."""
        counts_C = torch.bincount(self.completion_ids, minlength=self.num_completions)
        layers, _, width = self.states.shape
        sums = self.states.new_zeros((layers, self.num_completions, width), dtype=torch.float32)
        return sums.index_add_(1, self.completion_ids, self.states.float()) / counts_C[:, None]


def completion_hidden_states(
    model: nn.Module,
    groups: Sequence[Group],
    *,
    layers: Sequence[int],
    layout: Layout = "auto",
    pad_token_id: int = 0,
) -> CompletionStates:
    """Hidden states of chosen layers at the completion tokens, without gradient and without dropout.

    A state stands at the position of the token itself, so it knows that token. (The state that predicts the token
    stands one position before.) All chosen layers are kept for the whole batch while it runs, [B, L, H] each. The
    architectures of transformers that do not select layers, Mamba for example, keep all.

    Args:
        model: of transformers, with or without peft adapters or a head; its body alone runs.
        groups: prompts with their completions.
        layers: counted as ``output_hidden_states`` of transformers does: 0 is the embedding, k the output of the k-th
            layer, and the last the output of the body after its final norm. Negative numbers count from the end.
            ``layers_at_depths`` makes them of fractions.
        layout, pad_token_id: as for ``completion_logps``.

    Raises:
        ValueError: no layers, or a layer that the model does not have.
        UserError: the architecture does not give its hidden states.
    """
    base = base_causal_lm(model)
    count = _num_layers(model)
    chosen = [layer if layer >= 0 else count + 1 + layer for layer in layers]
    if not chosen or not all(0 <= layer <= count for layer in chosen):
        raise ValueError(
            f"layers are {list(layers)}; a model of {count} layers has 0 to {count} and -1 to {-count - 1}"
        )
    with torch.no_grad(), evaluation_mode(model):
        batch = collate_in_layout(model, groups, layout, pad_token_id).to(base.device)
        found = layer_hidden_states(base, batch, chosen)
        rows_N, columns_N = token_places(batch)
        states = [
            state_BLH[rows_N.to(state_BLH.device), columns_N.to(state_BLH.device)].to(batch.targets.device)
            for state_BLH in found
            if state_BLH is not None
        ]
    if len(states) < len(chosen):
        raise UserError(
            f"{type(base).__name__} does not give its hidden states.", remedy="Use another architecture for features."
        )
    return CompletionStates(tuple(chosen), torch.stack(states), batch.completion_ids, batch.num_completions)


def layers_at_depths(model: nn.Module, depths: Sequence[float]) -> tuple[int, ...]:
    """The layers nearest to fractions of a model's depth: 0 is the embedding, 1 the output of the body.

    Raises:
        ValueError: a depth that is not from 0 to 1.
    """
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError(f"depths are {list(depths)}, not all from 0 to 1")
    count = _num_layers(model)
    return tuple(int(depth * count + 0.5) for depth in depths)


def token_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """[N] rows and [N] columns of ``batch.input_ids`` where the completion tokens stand, in the order of ``targets``."""
    lengths_C = torch.bincount(batch.completion_ids, minlength=batch.num_completions)
    starts_C = lengths_C.cumsum(0) - lengths_C
    ids_N = batch.completion_ids
    in_completion_N = torch.arange(len(ids_N), device=ids_N.device) - starts_C[ids_N]
    return batch.end_rows[ids_N], batch.end_columns[ids_N] - lengths_C[ids_N] + 1 + in_completion_N


def _num_layers(model: nn.Module) -> int:
    return base_causal_lm(model).config.get_text_config().num_hidden_layers
