"""At which lengths a model changes how it computes: windows, chunks, ropes with several sets of frequencies."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedConfig

from tutelage.errors import UserError
from tutelage.models.loading import base_causal_lm

__all__ = ["RopeSwitch", "bracket", "regime_lengths", "require_one_rope", "rope_switch"]

# Names under which configs of transformers hold a number of tokens. A length of another name is passed all the same: a
# probe goes to the longest row. The names bring the lengths in between, and what the run's record says.
_LENGTH = re.compile(
    r"window(?!_layers)|chunk|max_position|original_max|n_positions|n_ctx|context_len|max_seq|seq_len|max_target_pos|"
    r"mem_len|local_att|floor|rel_extent|max_distance|index_topk|block_size|compress|model_max_length",
    re.IGNORECASE,
)
_SMALLEST = 32  # tokens; lengths below are tried at once


@dataclass(frozen=True, slots=True)
class RopeSwitch:
    """Rotary frequencies that transformers chooses by the longest row of a batch.

    Attributes:
        length: tokens of the longest row that still has the first set.
        kind: transformers' name, "longrope" or "dynamic".
    """

    length: int
    kind: str


_switches: WeakKeyDictionary[nn.Module, RopeSwitch | None] = WeakKeyDictionary()


def regime_lengths(config: PreTrainedConfig) -> dict[str, int]:
    """The lengths (tokens) in a config at which the model may begin to compute otherwise, by name and by size.

    >>> from transformers import GPTNeoConfig
    >>> regime_lengths(GPTNeoConfig())
    {'window_size': 256, 'max_position_embeddings': 2048}
    """
    found = {
        name: value
        for name, value in _integers(config.get_text_config().to_dict(), "")
        if value > 1 and _LENGTH.search(name)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _integers(value: Any, name: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        yield name, value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _integers(each, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for place, each in enumerate(value):
            yield from _integers(each, f"{name}[{place}]")


def bracket(tokens: int, lengths: Iterable[int]) -> int:
    """The length to probe for rows of ``tokens``: up to twice as long, but past no length that they do not pass.

    >>> [bracket(tokens, [256]) for tokens in (10, 200, 256, 257)]
    [32, 256, 256, 512]
    """
    room = max(_SMALLEST, 1 << (tokens - 1).bit_length())
    return min([room, *(length for length in lengths if tokens <= length)])


def rope_switch(model: nn.Module) -> RopeSwitch | None:
    """Where the model's rotary frequencies change with the longest row of a batch; None where they do not."""
    base = base_causal_lm(model)
    if base not in _switches:
        found = [switch for module in base.modules() for switch in _of_module(module)]
        _switches[base] = min(found, key=lambda switch: switch.length, default=None)
    return _switches[base]


def _of_module(module: nn.Module) -> Iterator[RopeSwitch]:
    """See ``transformers.modeling_rope_utils.dynamic_rope_update``."""
    kinds = getattr(module, "rope_type", None)
    config = cast(Any, getattr(module, "config", None))
    for layer, kind in (kinds if isinstance(kinds, Mapping) else {None: kinds}).items():
        if not isinstance(kind, str):
            continue
        if "dynamic" in kind:
            yield RopeSwitch(int(cast(Any, module).original_max_seq_len), "dynamic")
        elif kind == "longrope":
            parameters = config.rope_parameters if layer is None else config.rope_parameters[layer]
            yield RopeSwitch(int(parameters["original_max_position_embeddings"]), "longrope")


def require_one_rope(model: nn.Module, tokens: int, *, what: str, remedy: str) -> None:
    """Refuse rows beyond the length at which the rotary frequencies change.

    transformers chooses them by the longest row of a batch, so the numbers of a row would depend on the rows beside it.
    Alone, too, a row that grows beyond it changes the log-probs of the tokens it already has: there is no conditional
    probability that one could sample from or train on.

    Args:
        tokens: of the longest row.
        what: names it.
        remedy: besides another model.

    Raises:
        UserError: it is longer.
    """
    switch = rope_switch(model)
    if switch is None or tokens <= switch.length:
        return
    raise UserError(
        f"{type(base_causal_lm(model)).__name__} has {switch.kind} rotary embeddings: beyond {switch.length:,} tokens "
        f"its log-probs depend on the longest row of the batch, and {what} {tokens:,} tokens.",
        remedy=f"{remedy}, or use a model without them.",
    )
