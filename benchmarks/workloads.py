"""What both sides of a comparison work on: models, a tokenizer that keeps token ids as they are, and rows."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config

from tutelage.groups import Completion, Group, Role
from tutelage.testing.gemma import gemma_3_270m

__all__ = ["MODELS", "STOP_EVERY", "Work", "adapter", "groups", "prepare_model", "rows", "stop_ids", "touched"]

MODELS = ("gemma-3-270m", "qwen3-32k")
_PAD, _EOS, _FIRST_WORD, _WORDS = 0, 1, 4, 30_000
STOP_EVERY = 50
"""Every so many token ids end a completion, so that even a random model's completions differ in length."""


@dataclass(frozen=True, slots=True)
class Work:
    """One workload.

    Attributes:
        model_path: a folder from ``prepare_model``.
        adapters: train LoRA r 16 on all linear layers, or all parameters.
        prompts: per step or stage.
        prompt_tokens: of each prompt; half to all of it where ``mixed``.
        completion_tokens: of each demonstration and given sample, end-of-sequence token included; the most a sampled
            completion may have.
        samples: per prompt, besides the demonstration.
        stages: of a whole pass over the prompts; T.
        mixed: prompts and demonstrations of different lengths.
        micro_batch: prompts, or pairs, of a step that either side of a row on training runs at once; by default what
            ``benchmarks.training`` chooses.
        seed: of the rows.
    """

    model_path: str
    adapters: bool = True
    prompts: int = 8
    prompt_tokens: int = 128
    completion_tokens: int = 64
    samples: int = 1
    stages: int = 1
    mixed: bool = False
    micro_batch: int | None = None
    seed: int = 0


def prepare_model(name: str, folder: Path) -> Path:
    """A folder with bfloat16 weights and a tokenizer of words ``w4``, ``w5``, …, one per token id; made once.

    Args:
        name: one of ``MODELS``: Gemma 3 270M (262,144 tokens), or a random Qwen3 of 4 layers, 512 wide, with 32,000 tokens.
    """
    path = folder / name
    if (path / "tokenizer_config.json").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    if name == "gemma-3-270m":
        source = gemma_3_270m()
        for file in ("config.json", "model.safetensors"):
            shutil.copy(source / file, path / file)
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config |= {"pad_token_id": _PAD, "eos_token_id": _EOS, "bos_token_id": None}
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        config = Qwen3Config(
            vocab_size=32_000,
            hidden_size=512,
            intermediate_size=1536,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=64,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=_PAD,
            eos_token_id=_EOS,
            bos_token_id=None,
        )
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def _tokenizer() -> PreTrainedTokenizerFast:
    special = ("<pad>", "<eos>", "<bos>", "<unk>")
    words = {word: i for i, word in enumerate((*special, *(f"w{i}" for i in range(_FIRST_WORD, _WORDS))))}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="right"
    )


def touched(model: Any) -> Any:
    """The model with all its weights read: loading may have mapped them from their file only, and memory counts from here."""
    for parameter in model.parameters():
        parameter.detach().sum()
    return model


def adapter() -> PeftConfig:
    """LoRA r 16 on all linear layers of the body."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def stop_ids(vocab_size: int) -> list[int]:
    """What ends a sampled completion."""
    return list(range(_EOS, vocab_size, STOP_EVERY))


def rows(work: Work) -> list[dict[str, Any]]:
    """Texts of random words: ``prompt``, ``completion`` (the demonstration) and ``samples``, without end-of-sequence."""
    draw = random.Random(work.seed)

    def words(most: int, mixed: bool) -> str:
        length = draw.randint(most // 2, most) if mixed else most
        return " ".join(f"w{draw.randrange(_FIRST_WORD, _WORDS)}" for _ in range(length))

    return [
        {
            "prompt": words(work.prompt_tokens, work.mixed),
            "completion": " " + words(work.completion_tokens - 1, work.mixed),
            "samples": [" " + words(work.completion_tokens - 1, work.mixed) for _ in range(work.samples)],
        }
        for _ in range(work.prompts)
    ]


def groups(work: Work) -> list[Group]:
    """The same rows as token ids: the demonstration and the samples of each prompt."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(int(word[1:]) for word in text.split())

    return [
        Group(
            ids(row["prompt"]),
            (
                Completion((*ids(row["completion"]), _EOS), Role.DEMONSTRATION, finished=True),
                *(Completion((*ids(text), _EOS), Role.SAMPLE, finished=True) for text in row["samples"]),
            ),
            row=index,
        )
        for index, row in enumerate(rows(work))
    ]
