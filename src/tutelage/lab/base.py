"""The base model: a transformer of 64 thousand parameters, pretrained once on the mixture and kept."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from tutelage.lab import mixture, vocabulary
from tutelage.lab.vocabulary import lab_tokenizer
from tutelage.lab.worlds.task import generator

__all__ = ["BaseModel", "base_folder", "make_base"]


@dataclass(frozen=True, slots=True)
class BaseModel:
    """What the base model is and how it is pretrained.

    Attributes:
        layers, width, heads, intermediate: of the transformer.
        steps, batch_size, learning_rate: of the pretraining; AdamW, warm-up and a linear decay.
        seed: of weights and rows.
    """

    layers: int = 2
    width: int = 48
    heads: int = 4
    intermediate: int = 128
    steps: int = 1800
    batch_size: int = 192
    learning_rate: float = 4e-3
    seed: int = 0

    @property
    def key(self) -> str:
        """A name for everything that made it: the settings, the words and the mixture."""
        return _key(self)


@cache
def _key(base: BaseModel) -> str:
    sources = [inspect.getsource(module) for module in (mixture, vocabulary)]
    content = json.dumps([asdict(base), sources], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def base_folder(base: BaseModel, cache: str | Path | None = None) -> Path:
    """Folder with the base model and its tokenizer; pretrained at the first call (about a minute on a core).

    Args:
        cache: where such folders are kept; by default ``tutelage/lab`` in the user's cache folder.
    """
    root = Path(cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tutelage" / "lab")
    folder = root / f"base-{base.key}"
    if (folder / "config.json").exists():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        tokenizer = lab_tokenizer()
        made = Path(temporary) / "model"
        make_base(base, tokenizer).save_pretrained(made)
        tokenizer.save_pretrained(made)
        if not folder.exists():  # another process may have been faster
            shutil.move(made, folder)
    return folder


def make_base(base: BaseModel, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Pretrain on rows of the mixture; the loss is that of the answers. In evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(base.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=base.width,
                intermediate_size=base.intermediate,
                num_hidden_layers=base.layers,
                num_attention_heads=base.heads,
                max_position_embeddings=128,
                initializer_range=0.1,
                pad_token_id=cast(int, tokenizer.pad_token_id),
                bos_token_id=None,
                eos_token_id=cast(int, tokenizer.eos_token_id),
            )
        )
    optimizer = torch.optim.AdamW(model.parameters(), lr=base.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(1, base.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, max(0.02, 1 - step / base.steps))
    )
    rng = generator("pretraining", base.seed)
    for _ in range(base.steps):
        rows = [mixture.mixture_row(rng) for _ in range(base.batch_size)]
        input_ids, labels = _batch(rows, tokenizer)
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


def _batch(rows: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, L] tokens, padded at the right (causal attention needs no mask for that), and labels: answers with EOS."""
    ids = tokenizer([text for row in rows for text in row], add_special_tokens=False)["input_ids"]
    prompts, answers = ids[::2], ids[1::2]
    eos, pad = cast(int, tokenizer.eos_token_id), cast(int, tokenizer.pad_token_id)
    width = max(len(p) + len(a) + 1 for p, a in zip(prompts, answers, strict=True))
    input_ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), -100)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer) + 1
        input_ids[row, :end] = torch.tensor([*prompt, *answer, eos])
        labels[row, len(prompt) : end] = input_ids[row, len(prompt) : end]
    return input_ids, labels
