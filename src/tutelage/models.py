"""Models: load with their tokenizer, add adapters, hold other sets of weights for them, find the head."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from tutelage.errors import UserError

__all__ = [
    "LMHead",
    "WeightSet",
    "adapters_under_autocast",
    "add_adapter",
    "base_causal_lm",
    "check_vocabulary",
    "evaluation_mode",
    "fingerprint",
    "first_line",
    "load_model",
    "load_tokenizer",
    "load_weights",
    "precision",
    "require_exists",
    "run_part",
]


def load_model(
    name_or_path: str,
    *,
    dtype: torch.dtype | str | None = "auto",
    whole: bool = False,
    revision: str = "main",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Load a causal language model: a full model, or an adapter together with its base.

    Args:
        name_or_path: hub name or folder. An adapter's folder (the output of an adapter run) loads base and adapter,
            the adapter trainable; the folder of a run with a reward loads its policy.
        dtype: of the base's weights; adapters are kept in float32, where small steps are not rounded away. None
            takes float32 for weights that are trained and the stored precision for those that stay frozen.
        whole: whether all weights of a full model will be trained; read where ``dtype`` is None.
        options: handed to ``from_pretrained``.

    Raises:
        UserError: no model is there, or it cannot be read.
    """
    require_exists(name_or_path)
    name_or_path = run_part(name_or_path, "policy")
    if dtype is None:
        trained_whole = whole and not (Path(name_or_path) / "adapter_config.json").exists()
        dtype = torch.float32 if trained_whole else "auto"
    options |= {"dtype": dtype, "revision": revision, "trust_remote_code": trust_remote_code}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    try:
        if find_adapter_config_file(name_or_path, revision=revision):
            return AutoPeftModelForCausalLM.from_pretrained(name_or_path, is_trainable=True, **options)
        return AutoModelForCausalLM.from_pretrained(name_or_path, **options)
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(
            f"the model '{name_or_path}' cannot be loaded: {first_line(error)}",
            remedy="Give a hub name or a folder with config.json or adapter_config.json and safetensors weights.",
            field="model_name_or_path",
        ) from error


def load_tokenizer(
    name_or_path: str, *, revision: str = "main", trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that lies with a model or an adapter, or with the policy of a run with a reward.

    Raises:
        UserError: there is none.
    """
    require_exists(name_or_path)
    name_or_path = run_part(name_or_path, "policy")
    try:
        return AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"no tokenizer can be loaded from '{name_or_path}': {first_line(error)}",
            remedy="Save the tokenizer next to the model (tokenizer.save_pretrained).",
            field="model_name_or_path",
        ) from error


def check_vocabulary(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Every token of the tokenizer has a row in the model's embedding; a model may have spare rows.

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


def add_adapter(model: nn.Module, config: PeftConfig) -> PeftModel:
    """Put a fresh adapter on a model whose own weights then stay as they are.

    Raises:
        UserError: the model already has an adapter; or the adapter would change a head that is tied to the
            embedding, which merging and saving then break.
    """
    if isinstance(model, PeftModel):
        raise UserError(
            "the model already has an adapter, which training continues.",
            remedy="Leave out --use_peft (peft_config), or merge the adapter into its base first.",
            field="use_peft",
        )
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


class WeightSet:
    """Another set of values for a model's trainable weights: π_0's, or those of a reward on the same frozen base.

    Holds the trainable weights alone: a few megabytes with adapters, which share the frozen base; as much as the model
    itself when all parameters are trained.

    Attributes:
        parameters: the set's own parameters, for an optimiser; gradients of a backward pass within ``active`` land here.
    """

    def __init__(self, model: nn.Module):
        self._slots = [p for p in model.parameters() if p.requires_grad]
        self.parameters = [nn.Parameter(p.detach().clone()) for p in self._slots]
        self._is_active = False

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within, the model has this set's weights; tensors change hands and nothing is copied.

        A backward pass belongs inside too: autograd reads a weight when it needs it. Inside itself it changes nothing.
        """
        if self._is_active:
            yield
            return
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        self._is_active = not self._is_active
        torch.clear_autocast_cache()  # autocast knows a weight by its identity, not by its values
        for slot, parameter in zip(self._slots, self.parameters, strict=True):
            slot.data, parameter.data = parameter.data, slot.data
            slot.grad, parameter.grad = parameter.grad, slot.grad


def save_weights(parameters: Iterable[nn.Parameter], path: Path) -> None:
    """Write weights in their order, by a temporary name; ``load_weights`` reads them."""
    temporary = path.with_name(path.name + ".tmp")
    save_file({str(index): p.detach().cpu().contiguous() for index, p in enumerate(parameters)}, temporary)
    os.replace(temporary, path)


@torch.no_grad()
def load_weights(parameters: Iterable[nn.Parameter], path: Path) -> None:
    """Take over weights that ``save_weights`` wrote, in the same order."""
    state = load_file(path)
    for index, parameter in enumerate(parameters):
        parameter.copy_(state[str(index)])


def base_causal_lm(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside adapters."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def precision(base: PreTrainedModel) -> torch.dtype:
    """What the model computes in: autocast's precision where that is on, else its weights'."""
    device = base.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype


def fingerprint(parameters: Iterable[tuple[str, nn.Parameter]]) -> str:
    """A short name for the state of weights: equal states have equal names.

    Reads at most 64 numbers of each tensor, so that it is cheap at any size; a training step moves nearly all of them.
    """
    digest = hashlib.sha256()
    for name, parameter in parameters:
        flat = parameter.detach().flatten()
        probe = flat[:: max(1, flat.numel() // 64)][:64].to("cpu", torch.float32)
        digest.update(name.encode() + probe.numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off within, the model's mode restored after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_under_autocast(model: nn.Module) -> Iterator[None]:
    """Within, adapters take their input as it comes where autocast chooses the precision.

    peft casts it to the adapter's float32, and autocast back: two copies of every activation for the same numbers.
    """
    active = torch.is_autocast_enabled(base_causal_lm(model).device.type)
    with disable_input_dtype_casting(model, active=active):
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within, the model drops nothing even in training mode, which activation checkpointing needs."""
    saved = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (name == "p" if isinstance(module, nn.Dropout) else "dropout" in name)
    ]
    for module, name, _ in saved:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)


@dataclass(frozen=True, slots=True)
class LMHead:
    """The last linear layer and what the architecture does to its output: cap · tanh(scale · (W h + b) / cap)."""

    module: nn.Module
    scale: float
    softcap: float | None

    @staticmethod
    def of(base: PreTrainedModel) -> LMHead:
        config = base.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
        module = cast(nn.Module, base.get_output_embeddings())
        return LMHead(module, float(scale), getattr(config, "final_logit_softcapping", None))

    @property
    def vocab_size(self) -> int:
        """V, the number of logits."""
        return cast(Tensor, self.module.weight).shape[0]

    @property
    def is_linear(self) -> bool:
        """True for a plain linear layer without adapters."""
        return type(self.module) is nn.Linear

    def raw_logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] what the linear layer gives, in the model's precision; ``transform`` makes logits of it."""
        return self.module(hidden_NH)

    def transform(self, raw_NV: Tensor) -> Tensor:
        """[N, V] float32 logits from the linear layer's output."""
        logits_NV = raw_NV.float()
        if self.scale != 1.0:
            logits_NV = logits_NV * self.scale
        if self.softcap is not None:
            logits_NV = self.softcap * torch.tanh(logits_NV / self.softcap)
        return logits_NV

    def damping(self, logits: Tensor) -> Tensor | None:
        """∂ logits / ∂ (scale · raw), of the logits' shape; None where it is 1 everywhere."""
        return None if self.softcap is None else 1 - (logits / self.softcap) ** 2

    def logits(self, hidden_NH: Tensor) -> Tensor:
        """[N, V] float32."""
        return self.transform(self.raw_logits(hidden_NH))


def require_exists(name_or_path: str, field: str = "model_name_or_path") -> None:
    """A path into a folder that is there, to something that is not, is a mistyped path and no name on the hub."""
    path = Path(name_or_path)
    is_path = path.is_absolute() or len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())
    if is_path and not path.exists():
        raise UserError("no such folder.", remedy="Check the path.", file=name_or_path, field=field)


def run_part(name_or_path: str, part: Literal["policy", "reward"]) -> str:
    """The model meant by the folder of a run that learned a reward: its policy and its reward lie side by side in it.

    Whatever has a model of its own, and whatever is no such folder, is meant as it is.
    """
    folder = Path(name_or_path)
    has_model = any((folder / name).exists() for name in ("config.json", "adapter_config.json"))
    return str(folder / part) if (folder / part).is_dir() and not has_model else name_or_path


def first_line(error: Exception) -> str:
    """What a library's error says, short enough for one line."""
    return str(error).splitlines()[0][:300] if str(error) else type(error).__name__
