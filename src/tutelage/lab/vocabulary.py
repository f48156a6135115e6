"""The words of all worlds, and a tokenizer that has one token per word."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["GRAMMARS", "NODES", "SYMBOLS", "WORDS", "lab_tokenizer"]

SYMBOLS = tuple(f"s{index}" for index in range(16))
"""What ``arrange`` and ``reverse`` are about."""

NODES = tuple(f"n{index}" for index in range(16))
"""What ``navigate`` walks over."""

WORDS = tuple(f"w{index}" for index in range(24))
"""What ``compose`` writes with."""

GRAMMARS = tuple(f"g{index}" for index in range(4))
"""Names of the grammars that the base model has seen."""

_PAD, _EOS, _UNKNOWN = "<pad>", "<eos>", "<unk>"
_TASKS = ("arrange", "navigate", "compose", "reverse", "copy", "sort", "shuffle", "backward", "walk", "text")


def lab_tokenizer() -> PreTrainedTokenizerFast:
    """Words separated by spaces, one token each; EOS ends an answer and nothing begins a text.

    >>> tokenizer = lab_tokenizer()
    >>> tokenizer.decode(tokenizer("copy s1 s2 : s1 s2")["input_ids"])
    'copy s1 s2 : s1 s2'
    >>> len(tokenizer) < 100
    True
    """
    words = (_PAD, _EOS, _UNKNOWN, ":", *_TASKS, *SYMBOLS, *NODES, *WORDS, *GRAMMARS)
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=_UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=_PAD,
        eos_token=_EOS,
        unk_token=_UNKNOWN,
        clean_up_tokenization_spaces=False,
    )
