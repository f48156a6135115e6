"""What a saved model tells programs that generate with it: when to stop, and settings that can be written at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator

import jinja2
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["mend_generation_config", "stop_at", "with_eos"]


def stop_at(model: PreTrainedModel, stop_ids: Iterable[int]) -> None:
    """Have plain ``generate`` stop at these tokens too, besides those that the model's generation config has already.

    What a generation config has that transformers made of the model's config is a default there, and may be any token:
    only ``stop_ids`` count then. It is one that somebody wrote from now on; else it would be made anew where it is loaded.
    """
    config = model.generation_config
    if config is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if getattr(config, "_from_model_config", False):
        known, config._from_model_config = [], False
    found = list(dict.fromkeys([*sorted(stop_ids), *(token for token in known if token is not None)]))
    config.eos_token_id = found if len(found) > 1 else found[0] if found else None


def mend_generation_config(model: PreTrainedModel) -> list[str]:
    """Make the generation config one that transformers agrees to write.

    Settings of sampling without ``do_sample`` get it, which is what they are for; others that transformers refuses become
    their defaults.

    Returns:
        what was changed, in words; empty if nothing had to be.
    """
    config = model.generation_config
    if config is None or _is_valid(config):
        return []
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    if _is_valid(sampling):
        config.do_sample = True
        return ["do_sample: true, without which its settings of sampling are refused"]
    told = []
    for name, default in _changes(config):
        trial = copy.deepcopy(config)
        setattr(trial, name, default)
        if not _is_valid(config) and _problem(trial) != _problem(config):
            setattr(config, name, default)
            told.append(f"{name}: {default}")
    return told


def _changes(config: GenerationConfig) -> Iterator[tuple[str, object]]:
    """What differs from the defaults, with the defaults; the tokens are facts about the model and no settings."""
    default = GenerationConfig()
    for name, value in vars(config).items():
        if not name.startswith("_") and not name.endswith("_token_id") and value != getattr(default, name, None):
            yield name, getattr(default, name, None)


def _problem(config: GenerationConfig) -> str | None:
    try:
        config.validate(strict=True)
    except ValueError as error:
        return str(error)
    return None


def _is_valid(config: GenerationConfig) -> bool:
    return _problem(config) is None


def with_eos(tokenizer: PreTrainedTokenizerBase, token_id: int) -> PreTrainedTokenizerBase | None:
    """The tokenizer with another EOS token, for programs that stop there; None if it would then write other tokens.

    A chat template may write EOS, and a tokenizer may add it to a text.
    """
    if tokenizer.eos_token_id == token_id:
        return tokenizer
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = str(tokenizer.convert_ids_to_tokens(token_id))
    same = changed.eos_token_id == token_id and list(_written(changed)) == list(_written(tokenizer))
    return changed if same else None


def _written(tokenizer: PreTrainedTokenizerBase) -> Iterator[object]:
    """What a tokenizer makes of a text and of a conversation."""
    yield tokenizer("text")["input_ids"]
    yield len(tokenizer)
    if tokenizer.chat_template is None:
        return
    conversation = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    for messages, opens in ((conversation, False), (conversation[:1], True)):
        try:
            yield tokenizer.apply_chat_template(messages, add_generation_prompt=opens, tokenize=False)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            yield type(error)
