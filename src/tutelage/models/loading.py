"""Load a model and its tokenizer, add an adapter, find the transformers model inside one."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from tutelage.errors import UserError
from tutelage.models.paths import first_line, require_exists, run_part
from tutelage.models.precision import fits_in_float32, model_size
from tutelage.models.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

__all__ = [
    "add_adapter",
    "base_causal_lm",
    "check_vocabulary",
    "end_ids",
    "first_line",
    "load_model",
    "load_tokenizer",
    "loading",
    "model_body",
    "refuse_virtual_tokens",
    "require_base",
    "require_exists",
    "run_part",
]


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = "auto",
    whole: bool = False,
    computing: torch.dtype | None = None,
    revision: str = "main",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model: a full model, or an adapter together with its base.

    Args:
        name_or_path: hub name or folder. An adapter's folder (the output of an adapter run) loads base and adapter,
            the adapter trainable; the folder of a run with a reward loads its policy.
        dtype: precision of the base's weights; adapters are in float32, where small updates do not round to zero. None
            takes float32 for weights that are trained. Frozen ones keep their stored precision, unless products are
            ``computing`` in float32 and float32 weights fit into memory.
        whole: whether all weights of a full model will be trained; read where ``dtype`` is None.
        computing: what products will be computed in; read where ``dtype`` is None.
        options: handed to ``from_pretrained``.

    Raises:
        UserError: no model is there, or it cannot be read.
    """
    require_exists(name_or_path)
    name_or_path = run_part(name_or_path, "policy")
    if dtype is None:
        trained_whole = whole and not (Path(name_or_path) / "adapter_config.json").exists()
        dtype = torch.float32 if trained_whole else "auto"
        if computing is torch.float32 and not trained_whole:
            size = model_size(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
            if size is None or fits_in_float32(size):
                dtype = torch.float32
            else:
                logger.warning(
                    "float32 weights do not fit into memory: %s computes in its stored precision", name_or_path
                )
    options |= {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    with loading(f"the model '{name_or_path}'", _REMEDY):
        is_adapter = find_adapter_config_file(name_or_path, revision=revision)
    if is_adapter:
        refuse_virtual_tokens(require_base(name_or_path, revision=revision, trust_remote_code=trust_remote_code))
        with loading(f"the model '{name_or_path}'", _REMEDY):
            return AutoPeftModelForCausalLM.from_pretrained(name_or_path, is_trainable=True, **options)
    with loading(f"the model '{name_or_path}'", _REMEDY):
        model, found = cast(
            Any, AutoModelForCausalLM.from_pretrained(name_or_path, output_loading_info=True, **options)
        )
    if found["missing_keys"]:  # transformers fills them with random numbers
        raise UserError(
            f"the model '{name_or_path}' lacks weights, such as {min(found['missing_keys'])}.",
            remedy="Copy the folder anew, or give a whole model.",
            field="model_name_or_path",
        )
    return model


_REMEDY = "Give a hub name or a folder with config.json or adapter_config.json and safetensors weights."


@contextmanager
def loading(what: str, remedy: str, *, file: str | None = None, field: str = "model_name_or_path") -> Iterator[None]:
    """Within, what a library says of a model that it cannot load is the user's to mend.

    A broken or unknown model makes libraries raise nearly anything.

    Args:
        what: could not be loaded.
        remedy: unless a package is missing or an attention implementation.
        file, field: of the error.

    Raises:
        UserError: the library raised.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = first_line(error)
        if isinstance(error, KeyError):  # says the key alone
            reason = f"unknown: {reason}"
        if isinstance(error, ImportError):
            remedy = "Install what is missing, or leave out the setting or the quantized weights that need it."
        if any(sign in reason for sign in ("FlashAttention", "attn_implementation", "flash_attn")):
            field, remedy = "attn_implementation", "Install its package, or use --attn_implementation sdpa."
        raise UserError(
            f"{what} cannot be loaded: {_sentence(reason)}", remedy=remedy, file=file, field=field
        ) from error


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def require_base(adapter: str, *, field: str = "model_name_or_path", **options: Any) -> PeftConfig:
    """Find the model that an adapter was trained on; a relative path is looked for from the current folder.

    Args:
        options: of ``PeftConfig.from_pretrained`` and ``AutoConfig.from_pretrained``.

    Returns:
        the adapter's config.

    Raises:
        UserError: the adapter cannot be read or names no base, or its base is not there.
    """
    revision = options.pop("revision", "main")
    with loading("the adapter", "Copy the folder anew.", file=adapter, field=field):
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    base = config.base_model_name_or_path
    remedy = (
        "A relative path is looked for from the current folder: start where it can be found, or write where the base is into "
        f"base_model_name_or_path of {Path(adapter) / 'adapter_config.json'}."
    )
    if not base or not isinstance(base, str):
        raise UserError("the adapter does not name the model it belongs to.", remedy=remedy, file=adapter, field=field)
    try:
        AutoConfig.from_pretrained(base, revision=config.revision or "main", **options)
    except Exception as error:
        reason = "there is no such folder" if "/" in base and not Path(base).exists() else first_line(error)
        raise UserError(
            f"the model '{base}' that the adapter belongs to cannot be loaded: {_sentence(reason)}",
            remedy=remedy,
            file=adapter,
            field=field,
        ) from error
    return config


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every token of the tokenizer has a row in the model's embedding; the model may have extra rows.

    Raises:
        UserError: the tokenizer knows more tokens than the model.
    """
    embeddings = cast(nn.Embedding, base_causal_lm(model).get_input_embeddings()).num_embeddings
    if len(tokenizer) > embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model's embedding {embeddings}.",
            remedy="Use the model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and save it.",
            field="model_name_or_path",
        )


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end the model's text by its generation config: none, one or several.

    A generation config that nobody wrote, and that was made of the model's config, counts as far as its tokens are the
    tokenizer's special ones: the model's config has a default there.
    """
    config: Any = getattr(base_causal_lm(model), "generation_config", None)
    found: Any = getattr(config, "eos_token_id", None)
    if isinstance(found, torch.Tensor):
        found = found.tolist()
    found = found if isinstance(found, (list, tuple)) else [found]
    known = frozenset(token_id for token_id in found if isinstance(token_id, int) and token_id >= 0)
    if getattr(config, "_from_model_config", False):
        added = tokenizer.added_tokens_decoder
        known &= frozenset(tokenizer.all_special_ids) | {id for id, token in added.items() if token.special}
    return known


def refuse_virtual_tokens(config: PeftConfig) -> None:
    """Raise for adapters that are tokens before the prompt: bodies are run without peft's forward, which would leave them out.

    Raises:
        UserError: it is one of them (prompt tuning, prefix tuning, P-tuning).
    """
    if config.is_prompt_learning:
        raise UserError(
            f"adapters of kind {getattr(config.peft_type, 'value', config.peft_type)} are not supported: they put virtual "
            "tokens before the prompt.",
            remedy="Use LoRA or another adapter on the model's layers.",
            field="peft_config",
        )


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Add a new adapter to a model and freeze the model's own weights.

    Raises:
        UserError: the model already has an adapter; the new one is of virtual tokens; or the adapter would change a head that is tied to the
            embedding, which merging and saving then break.
    """
    if isinstance(model, PeftModel):
        raise UserError(
            "the model already has an adapter, which training continues.",
            remedy="Leave out --use_peft (peft_config), or merge the adapter into its base first.",
            field="use_peft",
        )
    refuse_virtual_tokens(config)
    base = cast(PreTrainedModel, model)
    adapted = cast(PeftModel, get_peft_model(base, config))
    ends = (base.get_input_embeddings(), base.get_output_embeddings())
    if getattr(base.config.get_text_config(), "tie_word_embeddings", False) and any(
        isinstance(end, (BaseTunerLayer, ModulesToSaveWrapper)) for end in ends
    ):
        raise UserError(
            f"{type(base).__name__} shares the weights of embedding and head (lm_head): an adapter on one of them breaks "
            "the tie when it is merged or saved.",
            remedy="Leave it out, for example with --lora_target_modules all-linear (which spares the head).",
            field="lora_target_modules",
        )
    return adapted


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside adapters."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def model_body(base: PreTrainedModel) -> PreTrainedModel:
    """The part of a model that turns tokens into last hidden states, without its head; the model itself if it has none.

    transformers' ``base_model`` is the whole model where the name it goes by is that of no part (Llama 4).
    """
    body = cast(PreTrainedModel, base.base_model)
    if body is not base:
        return body
    parts = [part for part in base.children() if isinstance(part, PreTrainedModel)]
    return parts[0] if len(parts) == 1 else base
