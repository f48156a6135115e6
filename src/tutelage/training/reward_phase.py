"""Stages that learn a reward before they improve the policy: sample, fit the reward, look at both on validation rows, go on."""

from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer

from tutelage.data.demonstrations import Turns
from tutelage.data.tokenization import preference_group_from_row, tokenize_dataset
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.evaluation.policy import Evaluation, EvaluationSet, ranking
from tutelage.files import write_json
from tutelage.groups import Group
from tutelage.losses import RewardLossKind
from tutelage.models.loading import add_adapter, check_vocabulary, load_model, load_tokenizer
from tutelage.models.modes import without_dropout
from tutelage.models.weights import fingerprint, load_weights, save_weights
from tutelage.results import CandidateRecord, RunRecord
from tutelage.rewards.comparisons import TruncatedSamples, contrast, policy_rewards, reward_scale
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.fitting import RewardFitter, RewardObjective
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.schedule import StageEpochs
from tutelage.training.selection import Candidates, Standing
from tutelage.training.stages import StageTrainer
from tutelage.training.validation import split_validation

__all__ = ["RewardStageTrainer"]

logger = logging.getLogger(__name__)

# Names in the random stream of what is sampled besides a stage's own samples. The validation rows get the same random numbers
# at every stage, so that policies differ by less chance.
_KEPT_ROWS, _INITIAL_POLICY = 1 << 20, 1 << 21


class RewardStageTrainer(StageTrainer):
    """Adds a reward to stages. A stage first fits the reward to its samples; then its optimizer steps move the policy.

    The reward has its own weights in the place of the policy's (``WeightSet``) on the same frozen base, or a model of its
    own. The policy is left alone in the first ``reward_warmup_stages``, and in every stage whose reward does not rank the
    demonstrations of the validation rows over fresh samples better than chance. After training the policy is set back to the
    stage that does best on the validation rows by the last reward and the KL.

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
        kept_prompts: set[tuple[int, ...]] = set()
        if train_dataset is not None:
            self.validation, self.train_dataset = split_validation(
                train_dataset,
                self.train_dataset,
                self.tokenization,
                rows=args.validation_rows,
                seed=args.seed,
                turns=cast(Turns, args.turns),
                verifier=args.verifier,
                source=options.get("source", "training data"),
            )
            kept_prompts = {group.prompt_ids for group in self.validation.groups}
        self.reward = self._make_reward(peft_config)
        preferences = self._preferences(preference_dataset, preference_source)
        self.fitter = self._make_fitter([pair for pair in preferences if pair.prompt_ids not in kept_prompts])
        self.selection: list[dict[str, Any]] = []
        self._fitted = -1
        self._initial_policy = fingerprint(self.policy.named_parameters())
        if train_dataset is not None:
            self.candidates = Candidates(self.store, self.validation, self.policy, self._kept_rows_sampled)
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
            reward.start_from(args.init_reward_from)
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
                centering=args.reward_centering,
                regularization=args.reward_regularization,
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
            if self.args.preference_dataset:
                raise UserError(
                    "the trainer was given no preference data.",
                    remedy="Load them (tutelage.data.load_dataset) and hand them over as preference_dataset.",
                    field="preference_dataset",
                )
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
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(self.args.seed)).tolist()
        compared = [contrast(groups[index], self._truncated_samples) for index in order]
        return [group for group in compared if group is not None]

    @property
    def beta(self) -> float:
        """The temperature: of the KL, and hence of the implicit reward in evaluations."""
        return self.args.beta

    @property
    def passes(self) -> int:
        """Passes of the policy phase over a stage's samples."""
        return self.args.policy_epochs

    def get_train_dataloader(self) -> DataLoader:
        """As transformers'; with several epochs per stage its batches come several times.

        Raises:
            UserError: several passes over streamed data.
        """
        if self.passes == 1:
            return super().get_train_dataloader()
        if isinstance(self.train_dataset, IterableDataset):
            raise UserError(
                "streamed data can be gone over once.", remedy="Leave --policy_epochs at 1.", field="policy_epochs"
            )
        args, rows = self.args, cast(Any, self.train_dataset)
        batches = StageEpochs(
            len(rows),
            args.per_device_train_batch_size,
            args.gradient_accumulation_steps,
            args.stages_per_epoch,
            self.passes,
            args.seed,
        )
        return self.accelerator.prepare(
            DataLoader(
                rows,
                batch_sampler=cast(Any, batches),
                collate_fn=self.data_collator,
                num_workers=args.dataloader_num_workers,
                pin_memory=args.dataloader_pin_memory,
            )
        )

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
            begin = time.perf_counter()
            found = self._judge(scored, fit)
            self.took("validation", time.perf_counter() - begin)
            write_json(folder / "reward.json", found)
            self.log({name: value for name, value in found.items() if isinstance(value, (int, float))})
        else:
            self._load_reward(self.stage)
            self.candidates.read(self.stage)
            found = _read(folder / "reward.json")
        if not found["policy/phase"]:
            return {row: [] for row in recorded}
        scored = {group.row: group for group in self.store.groups(self.stage, "scored")}
        return {row: self._for_policy(scored[row], found["scale"]) for row in recorded}

    def _fit(self, groups: list[Group], advance: Any) -> dict[str, float]:
        """The reward phase of the stage; empty if there was nothing to compare."""
        if self._fitted != self.stage - 1:  # a resumed run: the reward as the last stage left it
            self._load_reward(self.stage - 1)
        fitted = groups + self._initial_policy_negatives(groups)
        for earlier in range(max(0, self.stage - self.args.reward_replay_stages), self.stage):
            fitted += self.store.groups(earlier)
        pairs = [pair for group in fitted if (pair := contrast(group, self._truncated_samples))]
        if not pairs:
            return {}
        tokens = self.fitter.tokens_done
        with torch.random.fork_rng():  # dropout draws the same numbers in a resumed run
            torch.manual_seed(self.args.seed + self.stage)
            facts = self.fitter.fit(
                pairs,
                phase=self.stage,
                passes=self.args.reward_epochs,
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
        """The reward and its optimizer as a stage left them; before the first stage they are fresh."""
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
            self.fitter.load_state_dict(
                torch.load(folder / "reward-optimizer.pt", weights_only=True, map_location="cpu")
            )
        self._fitted = self.stage

    def _initial_policy_negatives(self, groups: list[Group]) -> list[Group]:
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
            raise NonFiniteLossError(
                f"the reward of a completion is not finite after the reward phase of stage {self.stage}.",
                remedy="Lower --reward_learning_rate.",
            )
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
            "validation/reward": standing.reward.mean,
            "validation/kl": candidate.kl,
            "validation/demonstration_logp": candidate.demonstration_logp,
            "policy/entropy": _entropy(scored),
            "scale": reward_scale([policy_rewards(group, self._truncated_samples) for group in scored]),
            "samples/left_out": float(
                np.mean([r is None for g in scored for r in policy_rewards(g, self._truncated_samples)])
            ),
        }
        if standing.accuracy is not None:
            found |= {"validation/accuracy": standing.accuracy.mean, "validation/accuracy_low": standing.accuracy.low}
        if candidate.verifier_scores is not None:
            found["validation/verifier_score"] = float(
                np.mean([score for row in candidate.verifier_scores for score in row])
            )
        if standing.verifier_gap is not None:
            found["validation/verifier_gap"] = standing.verifier_gap
        if self.fitter.preferences:
            found["preference/accuracy"] = float(np.mean(ranking(self.reward, self.fitter.preferences[:256])))
        reason = self._obstacle(fit, standing, max(float(np.ptp(row)) for row in samples))
        if reason and self.stage >= self.args.reward_warmup_stages:
            logger.warning("stage %d: the policy stays as it is: %s", self.stage, reason)
        self.candidates.forget_all_but(0, self.candidates.best(standings), max(standings))
        return found | {"policy/phase": int(reason is None), "reason": reason}

    def _obstacle(self, fit: dict[str, float], standing: Standing, spread: float) -> str | None:
        """Why the policy phase should not run; None if it should."""
        if self.stage < self.args.reward_warmup_stages:
            return "the reward is warming up"
        if not fit:
            return (
                "no sample can be compared with its demonstration, so the reward could not learn: all are equal to it, or "
                "differ from it by being cut; then start from an SFT checkpoint, raise --max_completion_length or use "
                "--truncated_samples score"
            )
        if spread < 1e-6:
            return "the reward is the same for all samples of each prompt"
        accuracy = standing.accuracy
        if accuracy is None or accuracy.low <= 0.5:
            shown = f"{accuracy.mean:.2f} ({accuracy.low:.2f} to {accuracy.high:.2f})" if accuracy else "unknown"
            return f"the reward does not beat chance on the validation rows: accuracy {shown}"
        return None

    @property
    def _truncated_samples(self) -> TruncatedSamples:
        return cast(TruncatedSamples, self.args.truncated_samples)

    def _for_policy(self, group: Group, scale: float) -> list[Group]:
        """The group with its rewards as the policy phase sees them; nothing where too few samples are left to compare."""
        rewards = policy_rewards(group, self._truncated_samples)
        kept = [index for index, reward in enumerate(rewards, start=1) if reward is not None]
        scaled = tuple((reward or 0.0) / scale for reward in rewards)
        group = replace(group, rewards=(0.0, *scaled)).select([0, *kept])
        return [self.policy_group(group)] if len(kept) > 1 else []

    # --- the validation rows --------------------------------------------------------------------------------

    def _look(self, stage: int) -> None:
        """Make a candidate of the policy as it stands, if it is a new one."""
        begin = time.perf_counter()
        self._count_samples(self.candidates.look(stage))
        self.took("validation", time.perf_counter() - begin)

    def _kept_rows_sampled(self, groups: list[Group]) -> list[Group]:
        with self.progress.phase("sampling for the validation rows", len(groups)):
            return self.with_reference(self.with_samples(groups, stage=_KEPT_ROWS))

    def _standings(self) -> dict[int, Standing]:
        """Every candidate through the reward as it is now."""
        return self.candidates.standings(self.reward, beta=self.args.beta, truncated_samples=self._truncated_samples)

    def train(self, *args, **kwargs):
        """As the engine's; then the policy is set to the stage that does best on the validation rows by reward and KL."""
        output = super().train(*args, **kwargs)
        if self.stage < 0:  # resumed where training had ended
            assert self.schedule is not None
            self.stage = self.schedule.stage_of(self.state.global_step - 1)
            self._load_reward(self.stage)
        self._look(self.stage + 1)
        standings = self._standings()
        best = self.candidates.best(standings)
        self.candidates.restore(best)
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

    def record(self, *, name: str) -> RunRecord:
        """As the engine's, with the candidates and which was chosen."""
        record = replace(super().record(name=name), selection=[CandidateRecord(**entry) for entry in self.selection])
        return replace(record, card=self.card(record))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _entropy(groups: Sequence[Group]) -> float:
    """Entropy of the policy by its own samples: mean of −log π (nats per token)."""
    logps = [logp for group in groups for logp in (group.old_logps or ())[1:]]
    return -sum(logps) / sum(len(c.token_ids) for group in groups for c in group.completions[1:])


def _correlation(a: Sequence[float] | np.ndarray, b: Sequence[float]) -> float:
    """Pearson's; 0 where one side does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if np.std(a) > 0 and np.std(b) > 0 else 0.0
