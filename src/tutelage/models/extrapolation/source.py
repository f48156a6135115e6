"""The two models that are extrapolated: where they are, their configs, and what a loader needs besides weights."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from tutelage.errors import UserError
from tutelage.files import json_text, read_json, storing
from tutelage.models.loading import loading
from tutelage.models.paths import require_exists, run_part
from tutelage.models.stored import INDEX, StoredWeights

__all__ = [
    "FLOATS",
    "copy_for_loaders",
    "local_folder",
    "read_config",
    "require_finite",
    "require_same_config",
    "shown",
    "tied_names",
]

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Types of weights that are computed with."""

_FOR_LOADERS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    "processor_config.json",
    "preprocessor_config.json",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
"""Files of a model besides its weights: what makes it of use, and what its license wants to stay with it."""

_WEIGHTS = ("model*.safetensors", INDEX, "adapter_model.safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".pkl")
_DTYPES = ("dtype", "torch_dtype")

# Fields of a config that change no logit of a trained model: where it came from, and how it is run or trained.
_HAVE_NO_EFFECT = (
    *("_name_or_path", "transformers_version", "_commit_hash", "use_cache", "return_dict", "output_attentions"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "router_aux_loss_coef", "initializer_range"),
    *("id2label", "label2id", "problem_type", "task_specific_params"),
    *("output_hidden_states", "output_router_logits", "chunk_size_feed_forward", *_DTYPES),
)


def local_folder(name_or_path: str, *, field: str, revision: str | None = None) -> Path:
    """Where the files of a model are; of a hub name they are fetched first. In the folder of a run, its policy.

    Args:
        field: the setting that names it, for errors.
        revision: of a hub name.

    Raises:
        UserError: there is no such model.
    """
    require_exists(name_or_path, field)
    folder = Path(run_part(name_or_path, "policy"))
    if folder.exists():
        return folder
    with loading(f"the model '{name_or_path}'", "Give a hub name or a folder.", field=field):
        return Path(snapshot_download(name_or_path, revision=revision, allow_patterns=[*_FOR_LOADERS, *_WEIGHTS]))


def read_config(folder: Path, *, field: str, trust_remote_code: bool) -> PreTrainedConfig:
    """The config of a model, with the defaults of what its file leaves out.

    Raises:
        UserError: it cannot be read, or says that the weights are quantized.
    """
    with loading("the model's config", "Copy the folder anew.", file=str(folder), field=field):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None):
        raise UserError(
            "the weights are quantized: a step between quantized weights means nothing.",
            remedy="Give the model as it was before it was quantized.",
            file=str(folder),
            field=field,
        )
    return config


def require_same_config(aligned: PreTrainedConfig, start: PreTrainedConfig, folder: Path) -> None:
    """Raise ``UserError`` for the first field in which two configs differ, unless no logit depends on it."""
    for name, ours, theirs in _differences(aligned.to_dict(), start.to_dict()):
        raise UserError(
            f"the two configs differ: {name} is {shown(ours)} in the aligned model and {shown(theirs)} in the start.",
            remedy="Give the model that the training of the aligned one started from.",
            file=str(folder / "config.json"),
            field="start",
        )


def _differences(
    ours: Mapping[Any, Any], theirs: Mapping[Any, Any], place: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    for name in sorted(ours.keys() | theirs.keys(), key=str):
        if name in _HAVE_NO_EFFECT or "dropout" in str(name) or str(name).endswith("_pdrop"):
            continue
        one, other = ours.get(name), theirs.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differences(one, other, f"{place}{name}.")
        elif one != other:
            yield f"{place}{name}", one, other


def shown(value: Any) -> str:
    """A value for an error, not longer than a line."""
    text = str(value)
    return text if len(text) <= 80 else text[:79] + "…"


def tied_names(config: PreTrainedConfig, *, trust_remote_code: bool) -> list[tuple[str, ...]]:
    """Names of weights that are one tensor in a model of a config, such as embedding and head. No weight is made.

    Raises:
        UserError: transformers knows no causal language model of this kind.
    """
    with loading("a model of this config", "Give a causal language model.", field="aligned"), torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    names = defaultdict[int, list[str]](list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return sorted(tuple(sorted(group)) for group in names.values() if len(group) > 1)


def require_finite(value: Tensor, name: str, weights: StoredWeights) -> None:
    """Raise ``UserError`` where a stored weight is NaN or infinite."""
    if not torch.isfinite(value).all():
        raise weights.error(
            f"{name} holds NaN or infinite numbers.", "Give a model whose training did not break down."
        )


def copy_for_loaders(
    source: Path, target: Path, *, besides: Collection[str] = (), dtype: str | None = None
) -> list[str]:
    """Copy what a loader needs besides the weights: configs, tokenizer, chat template, code, licenses. Pickles are left.

    Args:
        besides: names that are not copied.
        dtype: what the config is to say of the precision, where it is not what it was.

    Returns:
        the names of the files.
    """
    found = sorted({path for pattern in _FOR_LOADERS for path in source.glob(pattern) if path.is_file()})
    names = []
    for path in found:
        name = str(path.relative_to(source))
        if name in besides or path.suffix in _PICKLES:
            continue
        names.append(name)
        with storing(target / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            if name == "config.json" and dtype is not None:
                (target / name).write_text(
                    json_text(_of_dtype(read_json(path), dtype), indent=2) + "\n", encoding="utf-8"
                )
            else:
                shutil.copyfile(path, target / name)
    return names


def _of_dtype(config: Any, dtype: str) -> Any:
    """A config, or a part of one, that says another precision wherever it says one; at the top it says one."""

    def changed(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        return {name: dtype if name in _DTYPES and value else changed(value) for name, value in part.items()}

    config = changed(config)
    return config if any(name in config for name in _DTYPES) else {**config, "dtype": dtype}
