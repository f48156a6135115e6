"""Out-of-fold policies: SFT on the demonstrations of the other folds, so that each row has a policy that never saw it.

A policy repeats the demonstrations that it was trained on; what it says elsewhere is what a reward should learn from.
"""

from __future__ import annotations

import hashlib
import logging
import math
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import get_linear_schedule_with_warmup

from tutelage.errors import NonFiniteLossError, UserError
from tutelage.files import read_json, storing, write_json
from tutelage.groups import Group, Role
from tutelage.losses import sft_loss
from tutelage.models.loading import load_model
from tutelage.models.modes import adapters_under_autocast, without_dropout
from tutelage.models.paths import require_exists
from tutelage.models.weights import WeightSet, load_weights, save_weights
from tutelage.scoring.logps import Layout, completion_token_logps
from tutelage.training.manifest import Manifest, move_aside
from tutelage.training.parallel import ALONE, Processes
from tutelage.training.store import FORMAT
from tutelage.training.termination import leave_if_asked

__all__ = ["FoldSettings", "Folds", "base_weights", "check_base", "fold_of_prompts"]

logger = logging.getLogger(__name__)

_LEAVES_BASE = (True, "gaussian")  # what LoRA may begin as so that it changes nothing; some others take from the base


@dataclass(frozen=True, slots=True)
class FoldSettings:
    """How the folds are trained.

    Attributes:
        num_folds: K; each row is answered by the policy of its fold, which was trained on the other K − 1.
        epochs: passes over the demonstrations.
        learning_rate: at its peak; a tenth of the steps warms up to it, and it decays linearly to zero.
        batch_size: demonstrations per optimizer step.
        max_grad_norm: gradients are clipped to this norm; 0 turns clipping off.
        seed: of the division and of the order.
    """

    num_folds: int = 2
    epochs: float = 3.0
    learning_rate: float = 2e-4
    batch_size: int = 8
    max_grad_norm: float = 1.0
    seed: int = 0


def fold_of_prompts(groups: Sequence[Group], num_folds: int, seed: int = 0) -> list[int]:
    """The fold of each group; folds are of like size, and groups of the same prompt are in the same one.

    Raises:
        UserError: fewer different prompts than folds.

    >>> rows = [Group((1,)), Group((2,)), Group((1,)), Group((3,))]
    >>> folds = fold_of_prompts(rows, 2)
    >>> folds[0] == folds[2], sorted(set(folds))
    (True, [0, 1])
    """
    prompts = list(dict.fromkeys(group.prompt_ids for group in groups))
    if len(prompts) < num_folds:
        raise UserError(
            f"{len(prompts)} different prompts cannot be divided into {num_folds} folds.",
            remedy="Lower --num_folds, or give more demonstrations.",
            field="num_folds",
        )
    random.Random(seed).shuffle(prompts)
    folds = {prompt: place % num_folds for place, prompt in enumerate(prompts)}
    return [folds[group.prompt_ids] for group in groups]


def check_base(policy: nn.Module, name: str | None, *, needed: bool) -> None:
    """Refuse before training what ``base_weights`` could not give.

    Args:
        needed: whether it will be asked.

    Raises:
        UserError: a path to nothing, a name for a policy with an adapter, or an adapter that began with a change of its
            base.
    """
    if name is not None:
        require_exists(name, "base_model_name_or_path")
    if not isinstance(policy, PeftModel):
        return
    if name is not None:
        raise UserError(
            "the model before SFT is the adapter's base; no other can be named.",
            remedy="Leave --base_model_name_or_path out.",
            field="base_model_name_or_path",
        )
    start = getattr(policy.active_peft_config, "init_lora_weights", True)
    if needed and start not in _LEAVES_BASE:
        raise UserError(
            f"an adapter that begins as '{start}' does not leave its base as the model before SFT was.",
            remedy="Use an adapter that begins as zero, or --reward_negatives own.",
        )


def base_weights(policy: nn.Module, name: str | None, *, start: WeightSet | None = None, seed: int) -> WeightSet:
    """The trainable weights of the model before any SFT.

    Of a policy with an adapter: a fresh adapter, which leaves the frozen base as it is. Else those of the model
    ``name``, or ``start`` where no name is given.

    Args:
        start: the weights that training started with; needed without an adapter and a name.
        seed: of the fresh adapter.

    Raises:
        UserError: the named model has other weights than the policy.
    """
    if not isinstance(policy, PeftModel) and name is None:
        if start is None:
            raise ValueError("neither a start nor the name of a base")
        return start
    weights = WeightSet(policy)
    slots = [slot for slot, parameter in policy.named_parameters() if parameter.requires_grad]
    if isinstance(policy, PeftModel):
        found = _fresh_adapter(policy, seed)
    else:
        found = dict(load_model(str(name), dtype=None, whole=True).named_parameters())
    with torch.no_grad():
        for slot, own in zip(slots, weights.parameters, strict=True):
            if slot not in found or found[slot].shape != own.shape:
                raise UserError(
                    f"its weights are not those of the policy: {slot} differs.",
                    remedy="Name the model that the policy was trained from.",
                    file=name,
                    field="base_model_name_or_path",
                )
            own.copy_(found[slot])
    return weights


def _fresh_adapter(policy: PeftModel, seed: int) -> dict[str, nn.Parameter]:
    """The weights of an adapter like the policy's that was not trained, by the names of the policy's."""
    fresh, active = "tutelage_fresh", cast(str, policy.active_adapter)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        policy.add_adapter(fresh, policy.peft_config[active])
    found = {
        slot.replace(f".{fresh}", f".{active}"): p for slot, p in policy.named_parameters() if f".{fresh}" in slot
    }
    policy.delete_adapter(fresh)
    policy.set_adapter(active)
    return found


class Folds:
    """K policies on one base, each SFT on the demonstrations outside its fold; on disk, so that each is trained once.

    Args:
        policy: the model whose trainable weights are swapped for those of a fold.
        base: gives the weights that SFT starts from.
        groups: the demonstrations.
        folder: keeps ``fold-0.safetensors``, ``fold-0.json`` (trained tokens) and so on, and ``folds.json``.
        settings: how they are trained.
        layout, pad_token_id: as for ``completion_token_logps``.
        autocast: makes a context for mixed precision.
        processes: each trains the same; the first reads and writes.
    """

    def __init__(
        self,
        policy: nn.Module,
        base: Callable[[], WeightSet],
        groups: Sequence[Group],
        folder: Path,
        settings: FoldSettings,
        *,
        layout: Layout = "auto",
        pad_token_id: int = 0,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
        processes: Processes = ALONE,
    ):
        self.policy, self.base, self.groups = policy, base, list(groups)
        self.folder, self.settings, self.autocast, self.processes = folder, settings, autocast, processes
        self._options: dict[str, Any] = {"layout": layout, "pad_token_id": pad_token_id}
        self.of_group = fold_of_prompts(self.groups, settings.num_folds, settings.seed)

    def members(self, fold: int) -> list[Group]:
        """The groups of a fold: those that its policy has not seen."""
        return [group for group, own in zip(self.groups, self.of_group, strict=True) if own == fold]

    def weights(self, fold: int, on_step: Callable[[int], None] = lambda done: None) -> WeightSet:
        """The trained weights of a fold's policy: from disk if they are there, else trained now.

        Raises:
            UserError: those on disk are of other data or settings.
            NonFiniteLossError: a loss is NaN or infinite.
        """
        own = WeightSet(self.policy)
        path = self.folder / f"fold-{fold}.safetensors"
        if self.processes.on_main(lambda: self._has(path)):
            load_weights(own.parameters, path)
            return own
        with torch.no_grad():
            for to, start in zip(own.parameters, self.base().parameters, strict=True):
                to.copy_(start)
        tokens = self._train(
            own, [g for g, f in zip(self.groups, self.of_group, strict=True) if f != fold], fold, on_step
        )
        self.processes.on_main(partial(self._keep, path, own, tokens))
        return own

    def _keep(self, path: Path, weights: WeightSet, tokens: int) -> None:
        with storing(path):
            write_json(path.with_suffix(".json"), {"tokens": tokens})
            save_weights(weights.parameters, path)
            self._manifest.note(path.with_suffix(".json").name, path.name)

    def trained_tokens(self) -> int:
        """Completion tokens that all folds were trained on, in this process or an earlier one."""
        return sum(read_json(path)["tokens"] for path in sorted(self.folder.glob("fold-*.json")))

    @property
    def _manifest(self) -> Manifest:
        return Manifest(self.folder)

    def _has(self, path: Path) -> bool:
        """Whether a fold's policy is there, of these demonstrations and settings."""
        self._check()
        return self._is_whole(path.name) and self._is_whole(path.with_suffix(".json").name)

    def _is_whole(self, name: str) -> bool:
        """Whether a file is there as it was written; one that is not is named and moved out of the way."""
        if not self._manifest.has(name):
            return False
        if problem := self._manifest.problems([name]).get(name):
            path = self.folder / name
            logger.warning("%s %s; moved to %s", path, problem, move_aside(path, self.folder.parent))
        return problem is None

    def steps(self, groups: int) -> int:
        """Optimizer steps of one fold's training on so many groups."""
        return max(1, math.ceil(self.settings.epochs * groups / self.settings.batch_size))

    def _check(self) -> None:
        """Note what the folds are of, or compare with what is noted."""
        tokens = [[g.prompt_ids, *(c.token_ids for c in g.completions)] for g in self.groups]
        what = asdict(self.settings) | {"demonstrations": hashlib.sha256(repr(tokens).encode()).hexdigest()}
        path = self.folder / "folds.json"
        if not self._is_whole(path.name):
            with storing(path):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(path, what)
                self._manifest.note(path.name, format=FORMAT)
        elif read_json(path) != what:
            raise UserError(
                "the folds are of other demonstrations, or were trained under other settings.",
                remedy="Resume with the data and settings of the first run.",
                file=str(path),
            )

    def _train(self, weights: WeightSet, groups: Sequence[Group], fold: int, on_step: Callable[[int], None]) -> int:
        """Train, in place; gives the number of completion tokens that were trained on."""
        settings, trained = self.settings, 0
        steps = self.steps(len(groups))
        optimizer = torch.optim.AdamW(weights.parameters, lr=settings.learning_rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, max(1, steps // 10), steps)
        order = random.Random(f"{settings.seed}/{fold}")
        queue: list[Group] = []
        for step in range(steps):
            while len(queue) < settings.batch_size:
                queue += order.sample(list(groups), len(groups))
            batch, queue = queue[: settings.batch_size], queue[settings.batch_size :]
            with (
                weights.active(),
                without_dropout(self.policy),
                self.autocast(),
                adapters_under_autocast(self.policy),
            ):
                tokens = completion_token_logps(self.policy, batch, **self._options)
                loss = sft_loss(tokens.logps_of(Role.DEMONSTRATION)).mean()
                loss.backward()
            if not math.isfinite(value := loss.item()):
                raise NonFiniteLossError(
                    f"the loss of fold {fold} is {value} at step {step + 1}.", remedy="Lower --fold_learning_rate."
                )
            if settings.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(weights.parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            trained += sum(len(c.token_ids) for group in batch for c in group.completions)
            on_step(step + 1)
            leave_if_asked()
        return trained
