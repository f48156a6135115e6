"""Exports are tried: before training whether they can be written, afterwards whether they load back as what was trained."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from tutelage.errors import UserError
from tutelage.files import storing, why_not_stored, writing_folder
from tutelage.groups import Completion, Group, Role
from tutelage.models.adapters import ADAPTER_FILE, make_readable_by_both, named_by_peft
from tutelage.models.generation import mend_generation_config, stop_at, with_eos
from tutelage.models.loading import base_causal_lm, first_line
from tutelage.models.memory import is_out_of_memory
from tutelage.models.modes import own_forward, without_dropout
from tutelage.models.precision import MEMORY_SHARE, available_memory
from tutelage.rewards.base import Reward
from tutelage.rewards.ensemble import RewardEnsemble
from tutelage.rewards.explicit import ExplicitReward
from tutelage.training.made import add_made

__all__ = ["check_export", "check_policy", "check_reward", "finish_export", "prepare_export", "write_whole"]

logger = logging.getLogger(__name__)

_NO_ROOM = "a second copy of the model does not fit into memory"
_TEXT = "What is 1 + 1? Äß 漢字\n\tEnd."


# --- before training ---------------------------------------------------------------------------------------------------


def prepare_export(
    policy: nn.Module, tokenizer: PreTrainedTokenizerBase, stop_ids: frozenset[int], end_of_turn: int
) -> PreTrainedTokenizerBase:
    """Make the policy one that can be written, write all but its weights once, and give the tokenizer to export.

    The generation config stops at ``stop_ids``, and the exported tokenizer's EOS is the end of a turn, so that plain
    ``generate`` and servers end where training ended.

    Raises:
        UserError: config, generation config, adapter config or tokenizer cannot be written, or read again.
    """
    base = base_causal_lm(policy)
    stop_at(base, stop_ids)
    for change in mend_generation_config(base):
        logger.warning(
            "transformers refuses to save the model's generation config as it is; it is saved with %s", change
        )
    exported = with_eos(tokenizer, end_of_turn)
    if exported is None:
        logger.warning(
            "the chat template or the tokenizer writes EOS itself, so it stays %s although turns end with %s: "
            "generation_config.json names both",
            tokenizer.eos_token,
            tokenizer.convert_ids_to_tokens(end_of_turn),
        )
    exported = exported or tokenizer
    with tempfile.TemporaryDirectory() as folder, _writing("config", str(base.name_or_path)):
        base.config.save_pretrained(folder)
        if base.generation_config is not None:
            base.generation_config.save_pretrained(folder)
    with tempfile.TemporaryDirectory() as folder, _writing("tokenizer", str(tokenizer.name_or_path)):
        exported.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=_is_remote(exported))
        if again(_TEXT)["input_ids"] != exported(_TEXT)["input_ids"]:
            raise ValueError("it makes other tokens when it is read again")
    if isinstance(policy, PeftModel):
        with tempfile.TemporaryDirectory() as folder, _writing("adapter's config", str(base.name_or_path)):
            policy.active_peft_config.save_pretrained(folder)
    return exported


@contextmanager
def _writing(what: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # libraries raise nearly anything
        if reason := why_not_stored(error):
            raise UserError(
                f"the folder for temporary files takes nothing, so saving the model's {what} could not be tried: {reason}.",
                remedy="Make room there, or name another folder with the environment variable TMPDIR.",
                file=tempfile.gettempdir(),
            ) from error
        raise UserError(
            f"the model's {what} cannot be saved, so nothing could be exported after training: {first_line(error)}",
            remedy="Mend it where it was loaded from.",
            file=name or None,
            field="model_name_or_path",
        ) from error


# --- while it is written -----------------------------------------------------------------------------------------------


def finish_export(folder: Path, policy: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """What is written besides what transformers' trainer writes: the tokenizer that ends turns, and an adapter's like."""
    tokenizer.save_pretrained(folder)
    config = base_causal_lm(policy).generation_config
    if isinstance(policy, PeftModel):
        make_readable_by_both(folder)
        if config is not None:
            config.save_pretrained(folder)


def write_whole(folder: Path, write: Callable[[Path], None]) -> None:
    """Have files written, which get their names in a folder when all of them are whole; the folder's record names them.

    Args:
        write: gets an empty folder.

    Raises:
        UserError: the disk does not take it.
    """
    with storing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with writing_folder(folder) as writing:
        write(writing)
        names = [str(path.relative_to(writing)) for path in sorted(writing.rglob("*")) if path.is_file()]
        add_made(folder, names)
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(writing / name, folder / name)


# --- after training ----------------------------------------------------------------------------------------------------


def check_export(folder: Path, policy: nn.Module, reward: Reward | None) -> list[str]:
    """Check what a run exported into a folder: its policy, and its reward if it learned one.

    Returns:
        what was compared, a sentence each.

    Raises:
        UserError: as ``check_policy``.
    """
    told = check_policy(folder if reward is None else folder / "policy", policy)
    found = check_reward(folder / "reward", reward) if reward is not None else None
    return [told, found] if found else [told]


def check_policy(folder: Path, policy: nn.Module) -> str:
    """Load what was exported with transformers (with peft, if it is an adapter) and compare.

    The logits of a batch are compared. Where a second copy of the model does not fit into half of the free memory, where the
    base of an adapter is quantized, or was never on disk, it is the files' weights that are, one by one.

    Returns:
        what was compared, in words.

    Raises:
        UserError: the export cannot be read, or gives other numbers than the policy that was trained.
    """
    base = base_causal_lm(policy)
    reason = _why_no_second_copy(policy)
    try:
        if reason:
            _compare_files(folder, policy)
            return f"{folder}: the weights on disk are those that were trained, one by one ({reason})"
        options: dict[str, Any] = {
            "dtype": base.dtype,
            "attn_implementation": base.config._attn_implementation,
            "trust_remote_code": _is_remote(base),
        }
        loader = AutoPeftModelForCausalLM if isinstance(policy, PeftModel) else AutoModelForCausalLM
        again = cast(nn.Module, loader.from_pretrained(str(folder), **options)).to(base.device)
        found, truth = _logits(again), _logits(policy)
    except Exception as error:
        if not is_out_of_memory(error):
            raise _not_as_trained(folder, first_line(error)) from error
        found = truth = again = None
    if found is None or truth is None:
        try:
            _compare_files(folder, policy)
        except ValueError as error:
            raise _not_as_trained(folder, first_line(error)) from error
        return f"{folder}: the weights on disk are those that were trained, one by one ({_NO_ROOM})"
    if not _close(found, truth, base.dtype):
        raise _not_as_trained(folder, f"its logits differ by up to {(found - truth).abs().max().item():.3g}")
    return f"{folder}: loaded back, it gives the logits of the policy that was trained"


def check_reward(folder: Path, reward: Reward) -> str | None:
    """Load a neural reward with the library that ``reward.json`` names, and compare the scores of a batch.

    Returns:
        what was compared; None if nothing was, because the reward is of another kind or does not fit into memory twice.

    Raises:
        UserError: as ``check_policy``.
    """
    if isinstance(reward, RewardEnsemble):
        told = [check_reward(folder / f"member-{place:02d}", each) for place, each in enumerate(reward.members)]
        return next((each for each in told if each), None)
    if not isinstance(reward, ExplicitReward) or _why_no_second_copy(reward.model):
        return None
    base = base_causal_lm(reward.model)
    groups = [Group(tuple(row[:2]), (Completion(tuple(row[2:]), Role.SAMPLE, True),)) for row in _rows(base)]
    try:
        if reward.why_no_classifier is None:
            again = AutoModelForSequenceClassification.from_pretrained(
                str(folder), num_labels=1, dtype=base.dtype, trust_remote_code=_is_remote(base)
            )
            again = again.to(base.device).eval()
            with torch.no_grad():
                scores = [again(input_ids=torch.tensor([row], device=base.device)).logits[0, 0] for row in _rows(base)]
            found = torch.stack(scores).float().cpu()
        else:
            loaded = ExplicitReward.from_pretrained(
                folder, dtype=base.dtype, trust_remote_code=_is_remote(base), pad_token_id=reward.pad_token_id
            )
            loaded.model.to(base.device)
            loaded.head.to(base.device)
            found = loaded.score(groups)
        with torch.no_grad(), reward.active(), without_dropout(reward.model):
            truth = reward.rewards(groups).float().cpu()
    except Exception as error:
        if is_out_of_memory(error):
            return f"{folder}: not loaded back ({_NO_ROOM})"
        raise _not_as_trained(folder, first_line(error)) from error
    if not _close(found, truth, base.dtype):
        raise _not_as_trained(folder, f"its scores differ by up to {(found - truth).abs().max().item():.3g}")
    return f"{folder}: loaded back, it gives the scores of the reward that was learned"


def _is_remote(part: object) -> bool:
    """Whether a model or tokenizer is of code that came with it, which the user has allowed already."""
    return type(part).__module__.startswith("transformers_modules.")


def _why_no_second_copy(policy: nn.Module) -> str | None:
    base = base_causal_lm(policy)
    if isinstance(policy, PeftModel):
        if getattr(base, "is_quantized", False):
            return "the base is quantized"
        if not base.name_or_path or not isinstance(base.name_or_path, str):
            return "the base was never on disk"
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    if size > MEMORY_SHARE * min(available_memory(base.device), available_memory()):
        return _NO_ROOM
    return None


def _compare_files(folder: Path, policy: nn.Module) -> None:
    """Raise ``ValueError`` where a weight on disk is not the one in memory; no more than one is loaded at a time."""
    is_adapter = isinstance(policy, PeftModel)
    live = get_peft_model_state_dict(policy) if is_adapter else cast(PreTrainedModel, policy).state_dict()
    files = [folder / ADAPTER_FILE] if is_adapter else sorted(folder.glob("model*.safetensors"))
    names = set()
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118
                (known,) = named_by_peft({name: torch.empty(0)})
                names.add(known)
                if known not in live:
                    raise ValueError(f"{known} is no weight of the model")
                if not torch.equal(weights.get_tensor(name), live[known].detach().cpu()):
                    raise ValueError(f"{known} has other values")
    stored = {live[name].data_ptr() for name in names}
    missing = [
        name for name, value in live.items() if name not in names and value.data_ptr() not in stored
    ]  # not tied
    parameters = {name for name, _ in policy.named_parameters()} if not is_adapter else set(live)
    if lost := [name for name in missing if name in parameters]:
        raise ValueError(f"{lost[0]} was not written")


def _rows(base: PreTrainedModel) -> list[list[int]]:
    size = base.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(size, (4, 12), generator=generator).tolist()


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """[4, 12, V] float32 logits of a batch of random tokens."""
    base = base_causal_lm(model)
    rows = torch.tensor(_rows(base), device=base.device)
    with without_dropout(model), torch.autocast(base.device.type, enabled=False):
        # accelerate puts a forward with autocast on the model that is trained, and not on the one loaded.
        return own_forward(model)(input_ids=rows).logits.float().cpu()


def _close(found: Tensor, truth: Tensor, dtype: torch.dtype) -> bool:
    """Equal but for rounding: the same operations on the same machine, though perhaps in another order."""
    share = 1e-3 if dtype in (torch.float32, torch.float64) else 0.05
    scale = truth.std().item() + 0.01 * truth.abs().mean().item()
    return bool(torch.isfinite(found).all()) and torch.allclose(found, truth, rtol=0, atol=share * scale + 1e-5)


def _not_as_trained(folder: Path, reason: str) -> UserError:
    return UserError(
        f"what was exported does not load back as what was trained: {reason}.",
        remedy="The checkpoints are as they were; use the last one, and report this with the versions of transformers and peft.",
        file=str(folder),
    )
