"""Tiny tokenizers with the manners of the large families, built here: nothing is downloaded.

Each has a vocabulary of about 400 byte-level tokens, its family's special tokens and BOS habit, and a chat template
that writes the family's documented format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

__all__ = ["STYLES", "Style", "tiny_tokenizer"]

Style = Literal["llama3", "qwen3", "gemma3", "zephyr", "plain"]

_CORPUS = (
    "The quick brown fox jumps over the lazy dog. A user asks a question and the assistant gives the answer. ",
    "What is the sum of two numbers? The answer is the number that the question asks for. Yes, and no. ",
    "Human: How many apples are there? Assistant: There are 12 apples, and then there were 34 and 56 more. ",
)

_LLAMA3 = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' + message.content.strip() + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
_QWEN3 = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if loop.last and message.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ message.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_GEMMA3 = (
    "{{ bos_token }}"
    "{% set system = namespace(text='') %}"
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% set system.text = message.content + '\n\n' %}{% else %}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' }}"
    "{{ system.text + message.content.strip() + '<end_of_turn>\n' }}{% set system.text = '' %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
_ZEPHYR = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@dataclass(frozen=True)
class _Family:
    eos: str
    pad: str | None = None
    bos: str | None = None  # added in front of every text by default
    special: tuple[str, ...] = ()
    ordinary: tuple[str, ...] = ()  # tokens of their own that are not special
    template: str | None = None


_FAMILIES: dict[Style, _Family] = {
    "llama3": _Family(
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        pad="<|finetune_right_pad_id|>",
        special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        template=_LLAMA3,
    ),
    "qwen3": _Family(
        eos="<|im_end|>",
        pad="<|endoftext|>",
        special=("<|im_start|>",),
        ordinary=("<think>", "</think>"),
        template=_QWEN3,
    ),
    "gemma3": _Family(
        bos="<bos>", eos="<eos>", pad="<pad>", special=("<start_of_turn>", "<end_of_turn>"), template=_GEMMA3
    ),
    "zephyr": _Family(bos="<s>", eos="</s>", template=_ZEPHYR),
    "plain": _Family(eos="<|endoftext|>"),
}

STYLES: tuple[Style, ...] = tuple(_FAMILIES)


def tiny_tokenizer(style: Style) -> PreTrainedTokenizerFast:
    """A small tokenizer that behaves like those of a family of models.

    Args:
        style: ``llama3``, ``gemma3`` and ``zephyr`` put BOS before every text. ``llama3`` and ``gemma3`` end a turn
            with a token that is not EOS. ``qwen3`` writes an empty thinking block before the last answer. ``zephyr``
            and ``plain`` have no pad token, and ``plain`` has no chat template.

    >>> tokenizer = tiny_tokenizer("zephyr")
    >>> tokenizer.decode(tokenizer("The answer")["input_ids"])
    '<s>The answer'
    """
    family = _FAMILIES[style]
    backend = Tokenizer.from_str(_trained())
    special = [token for token in (family.bos, family.eos, family.pad, *family.special) if token]
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    backend.add_tokens([AddedToken(token, normalized=False) for token in family.ordinary])
    if family.bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, backend.token_to_id(family.bos))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        extra_special_tokens=list(family.special),
    )
    tokenizer.chat_template = family.template
    return tokenizer


@cache
def _trained() -> str:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=390, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend.to_str()
