"""Stages that learn a reward before they improve the policy: sample, fit the reward, look at both on kept rows, go on."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from transformers import Trainer

from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import preference_group_from_row, tokenize_dataset
from tutelage.errors import UserError
from tutelage.evaluation.holdout import Candidate, Standing, compare
from tutelage.evaluation.policy import Evaluation, EvaluationSet
from tutelage.groups import Group
from tutelage.losses import RewardLossKind
from tutelage.models import (
    add_adapter,
    check_vocabulary,
    fingerprint,
    load_model,
    load_tokenizer,
    load_weights,
    save_weights,
    without_dropout,
)
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import (
    CutSamples,
    RewardFitter,
    RewardObjective,
    contrast,
    reward_scale,
    with_cut_floor,
)
from tutelage.stage_trainer import StageConfig, StageTrainer
from tutelage.stages import write_json

__all__ = ["RewardStageConfig", "RewardStageTrainer"]

logger = logging.getLogger(__name__)

# Names in the random stream of what is sampled besides a stage's own samples. The kept rows get the same random numbers
# at every stage, so that policies differ by less chance.
_KEPT_ROWS, _INITIAL_POLICY = 1 << 20, 1 << 21


@dataclass
class RewardStageConfig(StageConfig):
    """Settings of stages that learn a reward."""

    num_samples: int = field(default=4, metadata={"help": "n: completions sampled for each prompt; at least 2."})
    reference: str = field(
        default="initial",
        metadata={"help": "Always the initial policy, π_0: the KL holds to it.", "choices": ["initial"]},
    )
    lr_scheduler_type: str = field(  # type: ignore[assignment]
        default="constant",
        metadata={"help": "linear, cosine, constant, constant_with_warmup, … (SchedulerType of transformers)."},
    )
    per_device_train_batch_size: int = field(
        default=2,
        metadata={
            "help": "Prompts in a micro-batch of the policy phase, each with its samples. Small: at a low learning rate many "
            "noisy steps learn more from a stage's samples than a few exact ones."
        },
    )
    beta: float = field(
        default=0.1,
        metadata={"help": "Weight of the KL to π_0, in units of reward a nat. Larger holds the policy nearer."},
    )
    reward_learning_rate: float = field(default=3e-4, metadata={"help": "Learning rate of the reward; constant."})
    reward_batch_size: int = field(
        default=8,
        metadata={"help": "Groups an optimiser step of the reward. Its gradient is noisy early; steps help it more."},
    )
    reward_loss: str = field(
        default="logistic",
        metadata={
            "help": "How demonstrations are put over samples: logistic (Bradley-Terry), or linear (the theory's contrast, "
            "bounded by squares of the rewards).",
            "choices": ["logistic", "linear"],
        },
    )
    reward_margin: float = field(default=0.0, metadata={"help": "Reward by which a demonstration should lead."})
    reward_label_smoothing: float = field(
        default=0.0, metadata={"help": "How often a sample may be the better answer, in [0, 0.5); logistic only."}
    )
    reward_centring: float = field(
        default=0.01, metadata={"help": "Weight of the squared sum of a pair's rewards, which keeps them around zero."}
    )
    reward_regularisation: float = field(
        default=1.0, metadata={"help": "ρ of the linear loss: rewards stay within ±1/ρ. Linear only."}
    )
    reward_passes: int = field(
        default=2, metadata={"help": "Passes of a reward phase over the stage's groups (K, in passes)."}
    )
    reward_steps: int | None = field(
        default=None, metadata={"help": "K, optimiser steps of a reward phase; goes before --reward_passes."}
    )
    reward_replay_stages: int = field(
        default=0, metadata={"help": "Fit the reward also on the samples of so many stages before."}
    )
    reward_pairs: str = field(
        default="demonstration_vs_sample",
        metadata={
            "help": "What demonstrations are put over: samples of the policy as it is, or also of the initial policy.",
            "choices": ["demonstration_vs_sample", "demonstration_vs_sample+initial"],
        },
    )
    reward_warmup_stages: int = field(
        default=1, metadata={"help": "The first so many stages of a run fit the reward and leave the policy as it is."}
    )
    early_stopping: str = field(
        default="saturated",
        metadata={
            "help": "End a reward phase whose training accuracy has reached --saturation, or never.",
            "choices": ["saturated", "never"],
        },
    )
    saturation: float = field(default=0.97, metadata={"help": "Training accuracy at which a reward phase ends."})
    cut_samples: str = field(
        default="floor",
        metadata={
            "help": "Completions cut at the length limit. floor: the reward compares them only with demonstrations that "
            "were cut too, and in the policy phase one is never better than the worst of its prompt that ended. "
            "score: like any other. drop: as floor for the reward, left out of the policy phase.",
            "choices": ["floor", "score", "drop"],
        },
    )
    preference_dataset: str | None = field(
        default=None,
        metadata={"help": "Preference pairs that the reward learns from too: a hub name, folder or file."},
    )
    preference_weight: float = field(default=1.0, metadata={"help": "Weight of the loss of the preference pairs."})
    demonstration_weight: float = field(
        default=1.0, metadata={"help": "Weight of the loss of demonstrations over samples."}
    )
    reward_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A separate model for the reward, with the policy's tokenizer; by default the policy's base."
        },
    )
    init_reward_from: str | None = field(
        default=None, metadata={"help": "Start from the reward of an earlier run (its reward folder)."}
    )
    holdout_rows: int | None = field(
        default=None,
        metadata={
            "help": "Rows kept from training: on them the policy phase waits for the reward, and the best stage is chosen. "
            "By default a tenth, at least 16 and at most 128."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.num_samples < 2:
            raise UserError(
                f"a sample is judged against the others of its prompt, so {self.num_samples} is too few.",
                remedy="Use --num_samples 2 or more.",
                field="num_samples",
            )
        if self.replay_stages:
            raise UserError(
                "the policy phase takes no old samples.", remedy="Use --reward_replay_stages.", field="replay_stages"
            )
        if self.fp16:
            raise UserError("the reward phase has no loss scaling.", remedy="Use --bf16.", field="fp16")
        for name in ("reward_passes", "reward_steps", "reward_batch_size", "holdout_rows"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"must be at least 1, not {getattr(self, name)}.", field=name)
        for name in ("reward_replay_stages", "reward_warmup_stages", "beta", "reward_margin", "reward_centring"):
            if getattr(self, name) < 0:
                raise UserError(f"must not be below 0, but is {getattr(self, name):g}.", field=name)
        for name in ("reward_learning_rate", "reward_regularisation"):
            if getattr(self, name) <= 0:
                raise UserError(f"must be above 0, not {getattr(self, name):g}.", field=name)
        if not 0 <= self.reward_label_smoothing < 0.5:
            raise UserError("must be at least 0 and below 0.5.", field="reward_label_smoothing")
        if not 0.5 < self.saturation <= 1:
            raise UserError("must be above 0.5 and at most 1.", field="saturation")


class RewardStageTrainer(StageTrainer):
    """Adds a reward to stages. A stage first fits the reward to its samples; then its optimiser steps move the policy.

    The reward has its own weights in the place of the policy's (``WeightSet``) on the same frozen base, or a model of its
    own. The policy is left alone in the first ``reward_warmup_stages``, and in every stage whose reward does not rank the
    demonstrations of the kept rows over fresh samples better than chance. After training the policy is set back to the
    stage that does best on the kept rows by the last reward and the KL.

    Args:
        preference_dataset: preference pairs for the reward.
        preference_source: what errors about them call them.
        otherwise: as ``StageTrainer``.
    """

    args: RewardStageConfig

    def __init__(
        self,
        model,
        args: RewardStageConfig,
        train_dataset=None,
        *further,
        preference_dataset: Dataset | None = None,
        preference_source: str = "preference data",
        **options,
    ):
        peft_config = copy.deepcopy(options.get("peft_config"))  # peft writes the policy's modules and name into it
        super().__init__(model, args, train_dataset, *further, **options)
        if peft_config is None and isinstance(self.policy, PeftModel):
            peft_config = copy.deepcopy(self.policy.active_peft_config)
            peft_config.base_model_name_or_path = None
        self.reward = self._make_reward(peft_config)
        self.fitter = self._make_fitter(self._preferences(preference_dataset, preference_source))
        self.selection: list[dict[str, Any]] = []
        self._candidates: dict[int, Candidate] = {}
        self._fitted = -1
        self._looked_at = ""
        self._initial_policy = fingerprint(self.policy.named_parameters())
        if train_dataset is not None:
            self.holdout = self._hold_out(train_dataset, options.get("source", "training data"))
            self.set_initial_training_values(args, self.get_train_dataloader())

    # --- the parts --------------------------------------------------------------------------------------------------

    def _make_reward(self, peft_config: Any) -> ExplicitReward:
        args, name = self.args, self.args.reward_model_name_or_path
        options = {
            "batch_size": args.per_device_eval_batch_size,
            "pad_token_id": self.tokenization.pad_id,
            "autocast": self.compute_loss_context_manager,
        }
        if name is None:
            reward = ExplicitReward.fresh(self.policy, shared=True, layout=self.layout, **options)
        else:
            tokenizer = load_tokenizer(name)
            if tokenizer.get_vocab() != self.tokenization.tokenizer.get_vocab():
                raise UserError(
                    f"the tokenizer of {name} is not the policy's: rewards read the policy's tokens.",
                    remedy="Use a reward model with the same tokenizer.",
                    field="reward_model_name_or_path",
                )
            model: nn.Module = load_model(name, dtype=None, whole=peft_config is None)
            check_vocabulary(model, tokenizer)
            if peft_config is not None and not hasattr(model, "peft_config"):
                model = add_adapter(model, peft_config)
            reward = ExplicitReward.fresh(cast(nn.Module, model).to(args.device), shared=False, **options)
        if args.init_reward_from:
            reward.load_adapter(args.init_reward_from)
        return reward

    def _make_fitter(self, preferences: list[Group]) -> RewardFitter:
        args = self.args
        optimizer, settings = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, self.model))
        settings = {**settings, "lr": args.reward_learning_rate, "weight_decay": args.weight_decay}
        return RewardFitter(
            self.reward,
            RewardObjective(
                kind=cast(RewardLossKind, args.reward_loss),
                margin=args.reward_margin,
                label_smoothing=args.reward_label_smoothing,
                centring=args.reward_centring,
                regularisation=args.reward_regularisation,
                demonstration_weight=args.demonstration_weight,
                preference_weight=args.preference_weight,
            ),
            optimizer(self.reward.parameters, **settings),
            batch_size=args.reward_batch_size,
            micro_batch_size=min(args.reward_batch_size, args.per_device_train_batch_size),
            preferences=preferences,
            max_grad_norm=args.max_grad_norm,
            saturation=args.saturation if args.early_stopping == "saturated" else None,
            seed=args.seed,
        )

    def _preferences(self, dataset: Dataset | None, source: str) -> list[Group]:
        if dataset is None:
            return []
        rows = tokenize_dataset(dataset, self.tokenization, turns=cast(Turns, self.args.turns), source=source)
        groups = [group for row in rows if (group := preference_group_from_row(cast(dict, row))) is not None]
        if not groups:
            raise UserError(
                "there is no preference pair in it.",
                remedy="Give rows with 'chosen' and 'rejected'.",
                file=source,
                field="preference_dataset",
            )
        return groups

    def _hold_out(self, dataset: Dataset | IterableDataset, source: str) -> EvaluationSet:
        """Takes rows out of the training data; streamed data give their first ones."""
        args, tokenized = self.args, cast(Any, self.train_dataset)
        if isinstance(dataset, IterableDataset):
            wanted = args.holdout_rows or 64
            raw = Dataset.from_list(list(dataset.take(wanted)))
        else:
            wanted = args.holdout_rows or max(16, min(128, len(dataset) // 10))
            if wanted > len(dataset) // 2:
                raise UserError(
                    f"{wanted} of {len(dataset)} rows would be kept from training.",
                    remedy="Give more data, or lower --holdout_rows.",
                    file=source,
                    field="holdout_rows",
                )
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed)).tolist()
            raw = dataset.select(sorted(order[:wanted]))
        rows = EvaluationSet.of(
            raw, self.tokenization, verifier=args.verifier, turns=cast(Turns, args.turns), source=source
        )
        kept = {(group.prompt_ids, group.completions[0].token_ids) for group in rows.groups}

        def trains(row: Mapping[str, Any]) -> bool:  # by content: a stream may repeat, a file may hold a row twice
            return (tuple(row["prompt_ids"]), tuple(row["demonstration_ids"])) not in kept

        if isinstance(dataset, IterableDataset):
            self.train_dataset = tokenized.filter(trains)
            return rows
        self.train_dataset = tokenized.select([place for place, row in enumerate(tokenized) if trains(row)])
        if not len(self.train_dataset):
            raise UserError(
                "every row is also among those kept from training.", remedy="Give more different rows.", file=source
            )
        return rows

    @property
    def beta(self) -> float:
        """The temperature: of the KL, and hence of the implicit reward in evaluations."""
        return self.args.beta

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As the engine's, without dropout: π_t was scored without, and importance ratios should start at 1."""
        with without_dropout(self.policy):
            return super().training_step(model, inputs, num_items_in_batch)

    # --- a stage ----------------------------------------------------------------------------------------------------

    def _begin_stage(self, epoch_iterator: Iterator) -> None:
        if self.state.global_step < self.state.max_steps:  # a finished run that is resumed has no stage to begin
            super()._begin_stage(epoch_iterator)

    @property
    def _moved(self) -> bool:
        """Whether the policy is another than π_0."""
        return fingerprint(self.policy.named_parameters()) != self._initial_policy

    def with_reference(self, groups: list[Group]) -> list[Group]:
        """The groups with log-probs under the policy that drew the samples and under the reference."""
        old = self.policy_logps(groups)
        groups = [replace(group, old_logps=values) for group, values in zip(groups, old, strict=True)]
        if not self._moved:
            return [replace(group, reference_logps=group.old_logps) for group in groups]
        return super().with_reference(groups)

    def policy_group(self, group: Group) -> Group:
        """What of a scored group the policy phase trains on."""
        raise NotImplementedError

    def prepare_stage(self, recorded: dict[int, Group], *, at_start: bool) -> dict[int, list[Group]]:
        """The reward phase, and the samples for the policy phase, scored; nothing where the policy is to stay."""
        folder = self.store.path(self.stage)
        if at_start:
            self._look(self.stage)
            with self.progress.phase(f"stage {self.stage}: reward", 0) as advance:
                begin = time.perf_counter()
                fit = self._fit(list(recorded.values()), advance)
                scored = self._scored(list(recorded.values()))
                if fit:
                    self._save_reward()
                self.took("reward", time.perf_counter() - begin)
            self.store.write_groups(self.stage, "scored", scored, self.tokenization.text)
            found = self._judge(scored, fit)
            write_json(folder / "reward.json", found)
            self.log({name: value for name, value in found.items() if isinstance(value, (int, float))})
        else:
            self._load_reward(self.stage)
            self._read_candidates(self.stage)
            found = _read(folder / "reward.json")
        if not found["policy/phase"]:
            return {row: [] for row in recorded}
        scored = {group.row: group for group in self.store.groups(self.stage, "scored")}
        return {row: self._for_policy(scored[row], found["scale"]) for row in recorded}

    def _fit(self, groups: list[Group], advance: Any) -> dict[str, float]:
        """The reward phase of the stage; empty if there was nothing to compare."""
        if self._fitted != self.stage - 1:  # a resumed run: the reward as the last stage left it
            self._load_reward(self.stage - 1)
        fitted = groups + self._standing_negatives(groups)
        for earlier in range(max(0, self.stage - self.args.reward_replay_stages), self.stage):
            fitted += self.store.groups(earlier)
        pairs = [pair for group in fitted if (pair := contrast(group, self._cut_samples))]
        if not pairs:
            return {}
        tokens = self.fitter.tokens_done
        with torch.random.fork_rng():  # dropout draws the same numbers in a resumed run
            torch.manual_seed(self.args.seed + self.stage)
            facts = self.fitter.fit(
                pairs,
                phase=self.stage,
                passes=self.args.reward_passes,
                steps=self.args.reward_steps,
                on_step=lambda done, facts: advance(done),
            )
        if facts["saturated"]:
            logger.warning(
                "stage %d: the reward phase ended after %d steps, its training accuracy at %.2f",
                self.stage,
                facts["steps"],
                self.args.saturation,
            )
        self.trained_tokens += self.fitter.tokens_done - tokens
        return facts

    def _save_reward(self) -> None:
        folder = self.store.path(self.stage)
        torch.save(self.fitter.state_dict(), folder / "reward-optimizer.pt")
        save_weights(self.reward.parameters, folder / "reward.safetensors")
        self._fitted = self.stage

    def _load_reward(self, stage: int) -> None:
        """The reward and its optimiser as a stage left them; before the first stage they are fresh."""
        if stage >= 0 and not (self.store.path(stage) / "reward.json").exists():
            raise UserError(
                f"the reward of stage {stage} is missing.",
                remedy="Keep the run's stages folder until the run is over.",
                file=str(self.store.path(stage)),
            )
        while stage >= 0 and not (self.store.path(stage) / "reward.safetensors").exists():
            stage -= 1  # a stage without a pair fits nothing
        if stage >= 0:
            folder = self.store.path(stage)
            load_weights(self.reward.parameters, folder / "reward.safetensors")
            self.fitter.load_state_dict(torch.load(folder / "reward-optimizer.pt", weights_only=True))
        self._fitted = self.stage

    def _standing_negatives(self, groups: list[Group]) -> list[Group]:
        """Samples of π_0 for the stage's rows, where they are asked for and the policy is another by now."""
        if self.args.reward_pairs == "demonstration_vs_sample" or not self._moved:
            return []
        bare = [Group(group.prompt_ids, group.completions[:1], group.row) for group in groups]
        assert self.initial is not None
        with self.initial.active():
            drawn = self.with_samples(bare, stage=_INITIAL_POLICY + self.stage)
        self.store.write_groups(self.stage, "initial", drawn, self.tokenization.text)
        self._count_samples(drawn)
        return drawn

    def _count_samples(self, groups: Sequence[Group]) -> None:
        self.sampled_tokens += sum(len(c.token_ids) for group in groups for c in group.completions[1:])

    def _scored(self, groups: list[Group]) -> list[Group]:
        scores = self.reward.scores(groups)
        if not np.isfinite(np.concatenate(scores)).all():
            raise self.non_finite("reward of a completion", float("nan"))
        return [replace(group, rewards=values) for group, values in zip(groups, scores, strict=True)]

    def _judge(self, scored: list[Group], fit: dict[str, float]) -> dict[str, Any]:
        """What the reward phase came to, and whether the policy phase may follow."""
        demonstrations = [group.rewards[0] for group in scored]  # type: ignore[index]
        samples = [list(group.rewards[1:]) for group in scored]  # type: ignore[index]
        flat = np.concatenate(samples)
        lengths = [len(c.token_ids) for group in scored for c in group.completions[1:]]
        standings = self._standings()
        standing = standings[max(standings)]
        candidate = standing.candidate
        found: dict[str, Any] = {f"reward/{name}": value for name, value in fit.items()}
        found |= {
            "reward/demonstrations": float(np.mean(demonstrations)),
            "reward/samples": float(np.mean(flat)),
            "reward/gap": float(np.mean(demonstrations) - np.mean(flat)),
            "reward/length_correlation": _correlation(flat, lengths),
            "holdout/reward": standing.reward.mean,
            "holdout/kl": candidate.kl,
            "holdout/demonstration_logp": candidate.demonstration_logp,
            "policy/entropy": _entropy(scored),
            "scale": reward_scale([_policy_rewards(group, self._cut_samples) for group in scored]),
        }
        if standing.accuracy is not None:
            found |= {"holdout/accuracy": standing.accuracy.mean, "holdout/accuracy_low": standing.accuracy.low}
        if candidate.gold is not None:
            found["holdout/gold"] = float(np.mean([score for row in candidate.gold for score in row]))
        if standing.gold_gap is not None:
            found["holdout/gold_gap"] = standing.gold_gap
        if self.fitter.preferences:
            found["preference/accuracy"] = preference_accuracy(self.reward, self.fitter.preferences[:256])
        reason = self._obstacle(fit, standing, float(np.ptp(flat)))
        if reason and self.stage >= self.args.reward_warmup_stages:
            logger.warning("stage %d: the policy stays as it is: %s", self.stage, reason)
        self._forget_all_but(0, self._best(standings), max(standings))
        return found | {"policy/phase": int(reason is None), "reason": reason}

    def _obstacle(self, fit: dict[str, float], standing: Standing, spread: float) -> str | None:
        """Why the policy phase should not run; None if it should."""
        if self.stage < self.args.reward_warmup_stages:
            return "the reward is warming up"
        if not fit:
            return (
                "no demonstration and sample differ by more than being cut, so the reward could not learn; start from an "
                "SFT checkpoint, raise --max_completion_length or use --cut_samples score"
            )
        if spread < 1e-6:
            return "the reward is the same for all samples of the stage"
        accuracy = standing.accuracy
        if accuracy is None or accuracy.low <= 0.5:
            shown = f"{accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" if accuracy else "unknown"
            return f"the reward does not beat chance on the rows kept from training: accuracy {shown}"
        return None

    @property
    def _cut_samples(self) -> CutSamples:
        return cast(CutSamples, self.args.cut_samples)

    def _for_policy(self, group: Group, scale: float) -> list[Group]:
        """The group with its rewards as the policy phase sees them; nothing where too few samples are left to compare."""
        assert group.rewards is not None
        samples = [reward / scale for reward in _policy_rewards(group, self._cut_samples)]
        group = replace(group, rewards=(group.rewards[0] / scale, *samples))
        if self.args.cut_samples == "drop":
            group = group.select([0] + [i for i, c in enumerate(group.completions) if i > 0 and c.ended])
        return [self.policy_group(group)] if len(group.completions) > 2 else []

    # --- the rows kept from training --------------------------------------------------------------------------------

    def _look(self, stage: int) -> None:
        """Draw samples of the policy as it stands for the kept rows, unless it is still the one looked at last."""
        folder = self.store.path(stage)
        name = fingerprint(self.policy.named_parameters())
        self._read_candidates(stage - 1)
        recorded = folder / "candidate.json"
        if recorded.exists() and _read(recorded)["policy"] == name and self._is_of_kept_rows(stage):
            self._read_candidates(stage)
            self._count_samples(self._candidates[stage].groups)  # no checkpoint has counted them yet
            return
        recorded.unlink(missing_ok=True)
        if self._looked_at == name:
            return
        begin = time.perf_counter()
        with self.progress.phase(f"stage {stage}: kept rows", len(self.holdout.groups)):
            groups = self.with_reference(self.with_samples(self.holdout.groups, stage=_KEPT_ROWS))
        folder.mkdir(parents=True, exist_ok=True)
        self.store.write_groups(stage, "holdout", groups, self.tokenization.text)
        save_weights(self._policy_weights, folder / "policy.safetensors")
        write_json(recorded, {"policy": name, "stage": stage, "settings": self.store.settings})
        self._candidates[stage] = Candidate.of(stage, groups, self.holdout)
        self._looked_at = name
        self._count_samples(groups)
        self.took("holdout", time.perf_counter() - begin)

    @property
    def _policy_weights(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def _read_candidates(self, last: int) -> None:
        """Candidates that a killed run left, up to a stage."""
        for stage in range(last + 1):
            path = self.store.path(stage) / "candidate.json"
            if stage not in self._candidates and path.exists():
                if not self._is_of_kept_rows(stage):
                    raise UserError(
                        "the rows kept from training, or the sampling settings, differ from the first run's.",
                        remedy="Resume with the data and settings of the first run.",
                        file=str(path),
                    )
                self._candidates[stage] = Candidate.of(stage, self.store.groups(stage, "holdout"), self.holdout)
                self._looked_at = _read(path)["policy"]

    def _is_of_kept_rows(self, stage: int) -> bool:
        """Whether a recorded candidate answers the kept rows of this run, under its settings."""
        found = [(group.prompt_ids, group.completions[0]) for group in self.store.groups(stage, "holdout")]
        return found == [(group.prompt_ids, group.completions[0]) for group in self.holdout.groups] and (
            _read(self.store.path(stage) / "candidate.json")["settings"] == self.store.settings
        )

    def _standings(self) -> dict[int, Standing]:
        """Every candidate through the reward as it is now."""
        candidates = [candidate for _, candidate in sorted(self._candidates.items())]
        found = compare(candidates, self.reward, beta=self.args.beta, cut_samples=self._cut_samples)
        return {standing.candidate.stage: standing for standing in found}

    def _best(self, standings: dict[int, Standing]) -> int:
        """The stage with the highest objective among those whose weights are still there."""
        kept = [stage for stage in standings if (self.store.path(stage) / "policy.safetensors").exists()]
        return max(kept, key=lambda stage: standings[stage].objective)

    def _forget_all_but(self, *stages: int) -> None:
        """Remove the weights of candidates that will not be chosen; their samples stay."""
        for stage in self._candidates.keys() - set(stages):
            (self.store.path(stage) / "policy.safetensors").unlink(missing_ok=True)

    def train(self, *args, **kwargs):
        """As the engine's; then the policy is set to the stage that does best on the kept rows by reward and KL."""
        output = super().train(*args, **kwargs)
        if self.stage < 0:  # resumed where training had ended
            assert self.schedule is not None
            self.stage = self.schedule.stage_of(self.state.global_step - 1)
            self._load_reward(self.stage)
        self._look(self.stage + 1)
        standings = self._standings()
        best = self._best(standings)
        load_weights(self._policy_weights, self.store.path(best) / "policy.safetensors")
        self.selection = [standing.to_dict(chosen=stage == best) for stage, standing in standings.items()]
        return output

    def export(self, folder: Path) -> None:
        """``policy``, the chosen one, and ``reward``, as it was at the end."""
        super().export(folder / "policy")
        self.reward.save_pretrained(
            folder / "reward",
            self.tokenization.tokenizer,
            max_prompt_length=self.args.max_prompt_length,
            max_completion_length=self.args.max_completion_length,
        )

    def evaluation(self, rows: EvaluationSet, **options: Any) -> Evaluation:
        """As the engine's, with what the learned reward makes of the rows."""
        return super().evaluation(rows, reward=self.reward, **options)

    def record(self, **options: Any) -> dict[str, Any]:
        """As the engine's, with the candidates and which was chosen."""
        return super().record(**options) | {"selection": self.selection}


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def preference_accuracy(reward: ExplicitReward, pairs: Sequence[Group]) -> float:
    """How often the preferred answer has the higher reward; a tie counts half."""
    return float(np.mean([(np.sign(first - other) + 1) / 2 for first, other in reward.scores(pairs)]))


def _policy_rewards(group: Group, cut_samples: CutSamples) -> list[float]:
    """Rewards of a scored group's samples, with what is done about cut ones."""
    assert group.rewards is not None
    samples = list(group.rewards[1:])
    return with_cut_floor(samples, [c.ended for c in group.completions[1:]]) if cut_samples == "floor" else samples


def _entropy(groups: Sequence[Group]) -> float:
    """Entropy of the policy by its own samples: mean of −log π (nats a token)."""
    logps = [logp for group in groups for logp in (group.old_logps or ())[1:]]
    return -sum(logps) / sum(len(c.token_ids) for group in groups for c in group.completions[1:])


def _correlation(a: Sequence[float] | np.ndarray, b: Sequence[float]) -> float:
    """Pearson's; 0 where one side does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0
