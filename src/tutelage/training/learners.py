"""What fits a reward, stage by stage: a model, features, an ensemble of either, or the best of several kinds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.files import read_json, write_json
from tutelage.groups import Group
from tutelage.models.weights import load_weights, save_weights
from tutelage.rewards.base import Reward
from tutelage.rewards.comparisons import Comparisons, TruncatedSamples, contrast
from tutelage.rewards.ensemble import Combine, RewardEnsemble, write_ensemble
from tutelage.rewards.explicit import ExplicitReward
from tutelage.rewards.feature_reward import FeatureReward
from tutelage.rewards.feature_sets import FeatureParts
from tutelage.rewards.fitting import RewardFitter

__all__ = ["AutoLearner", "EnsembleLearner", "FeatureLearner", "FixedLearner", "Learner", "ModelLearner", "OnStep"]

logger = logging.getLogger(__name__)

OnStep = Callable[[int], None]
"""Called with the number of steps done."""


class Learner(Protocol):
    """Fits a reward, keeps what it needs to go on, and writes the reward for others."""

    @property
    def tokens_done(self) -> int:
        """Completion tokens of all optimizer steps so far."""
        ...

    @property
    def reward(self) -> Reward:
        """As it stands."""
        ...

    @property
    def compares_across_prompts(self) -> bool:
        """Whether rewards of different prompts' completions can be held against each other."""
        ...

    @property
    def reads_logps(self) -> bool:
        """Whether the reward reads log-probs of the policy."""
        ...

    def fit(
        self, comparisons: Comparisons, *, stage: int, validation: Sequence[Group] = (), on_step: OnStep
    ) -> dict[str, float]:
        """Fit to what a stage has to compare.

        Args:
            comparisons: demonstrations with their negatives, and samples of prompts without a demonstration.
            stage: its number, for what is random.
            validation: held-out demonstrations with samples of the policy, to choose among rewards; none in some runs.
            on_step: called as it goes on.

        Returns:
            what there is to log; empty if there was nothing to compare.
        """
        ...

    def save(self, folder: Path) -> None:
        """Keep the state, so that a resumed run goes on from it."""
        ...

    def load(self, folder: Path) -> bool:
        """Go back to the state that a folder keeps; False if it keeps none."""
        ...

    def export(self, folder: Path, tokenization: Tokenization) -> None:
        """Write the reward for others to load."""
        ...


class ModelLearner:
    """A neural reward, which goes on from where the last stage left it.

    Args:
        fitter: fits it.
        epochs, steps: of a reward phase over its groups; ``steps`` in optimizer steps goes before ``epochs``.
        truncated_samples: which completions are compared.
        seed: of dropout.
        compares_across_prompts: whether there will be samples of prompts without a demonstration to compare with.
    """

    reads_logps = False

    def __init__(
        self,
        fitter: RewardFitter,
        *,
        epochs: int,
        steps: int | None,
        truncated_samples: TruncatedSamples,
        seed: int,
        compares_across_prompts: bool = False,
    ):
        self.fitter, self.epochs, self.steps = fitter, epochs, steps
        self.truncated_samples: TruncatedSamples = truncated_samples
        self.seed = seed
        self.compares_across_prompts = compares_across_prompts

    @property
    def reward(self) -> ExplicitReward:
        """As it stands."""
        return self.fitter.reward

    @property
    def tokens_done(self) -> int:
        """Completion tokens of all optimizer steps so far."""
        return self.fitter.tokens_done

    def fit(
        self, comparisons: Comparisons, *, stage: int, validation: Sequence[Group] = (), on_step: OnStep
    ) -> dict[str, float]:
        """See ``Learner.fit``."""
        pairs = [pair for group in comparisons.paired_groups for pair in contrast(group, self.truncated_samples)]
        if not pairs:
            return {}
        with torch.random.fork_rng():  # dropout draws the same numbers in a resumed run
            torch.manual_seed(self.seed + stage)
            return self.fitter.fit(
                pairs,
                phase=stage,
                epochs=self.epochs,
                steps=self.steps,
                unpaired=comparisons.unpaired,
                on_step=lambda done, facts: on_step(done),
            )

    def save(self, folder: Path) -> None:
        """See ``Learner.save``."""
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.fitter.state_dict(), folder / "reward-optimizer.pt")
        save_weights(self.reward.parameters, folder / "reward.safetensors")

    def load(self, folder: Path) -> bool:
        """See ``Learner.load``."""
        if not (folder / "reward.safetensors").exists():
            return False
        load_weights(self.reward.parameters, folder / "reward.safetensors")
        self.fitter.load_state_dict(torch.load(folder / "reward-optimizer.pt", weights_only=True, map_location="cpu"))
        return True

    def export(self, folder: Path, tokenization: Tokenization) -> None:
        """See ``Learner.export``; ``AutoModelForSequenceClassification`` loads it."""
        self.reward.save_pretrained(
            folder,
            tokenization.tokenizer,
            max_prompt_length=tokenization.max_prompt_length,
            max_completion_length=tokenization.max_completion_length,
        )


class FeatureLearner:
    """A reward on features, fitted anew at every stage, in seconds.

    Args:
        names: of the sets of features.
        parts: what the sets need besides tokens.
        truncated_samples: which completions are compared.
        seed: of the folds of its cross-validation, and of what is drawn to be compared.
        facts: what the exported reward says of itself.
    """

    tokens_done = 0

    def __init__(
        self,
        names: str,
        parts: FeatureParts,
        *,
        truncated_samples: TruncatedSamples,
        seed: int,
        facts: Mapping[str, Any],
    ):
        self.reward, self.parts, self.seed, self.facts = FeatureReward.of(names, parts), parts, seed, facts
        self.truncated_samples: TruncatedSamples = truncated_samples

    @property
    def reads_logps(self) -> bool:
        """See ``Learner.reads_logps``."""
        return any(features.name == "logp" for features in self.reward.sets)

    @property
    def compares_across_prompts(self) -> bool:
        """See ``Learner.compares_across_prompts``."""
        return self.reward.compares_across_prompts

    def fit(
        self, comparisons: Comparisons, *, stage: int, validation: Sequence[Group] = (), on_step: OnStep
    ) -> dict[str, float]:
        """See ``Learner.fit``."""
        facts = self.reward.fit(comparisons, truncated_samples=self.truncated_samples, seed=self.seed)
        return facts if facts["pairs"] else {}

    def save(self, folder: Path) -> None:
        """See ``Learner.save``."""
        self.reward.save(folder / "reward-features")

    def load(self, folder: Path) -> bool:
        """See ``Learner.load``."""
        if not (folder / "reward-features").exists():
            return False
        saved = FeatureReward.load(folder / "reward-features", self.parts)
        names, own = ([features.name for features in reward.sets] for reward in (saved, self.reward))
        if names != own:
            raise UserError(
                f"the reward of the run is on the features {','.join(names)}, not {','.join(own)}.",
                remedy="Resume with the settings of the first run.",
                file=str(folder / "reward-features"),
                field="reward_features",
            )
        self.reward = saved
        return True

    def export(self, folder: Path, tokenization: Tokenization) -> None:
        """See ``Learner.export``; ``tutelage score`` and ``FeatureReward.from_pretrained`` read it.

        What a model for sequence classification can compute is one too, in ``classifier``.
        """
        self.reward.save(folder, tokenization.tokenizer, **self.facts)
        if self.reward.is_classifier:  # on the base alone: the one in memory may have an adapter in it
            try:
                FeatureReward.from_pretrained(folder).save_as_classifier(folder / "classifier", tokenization.tokenizer)
            except UserError as error:
                logger.warning(
                    "the reward is not written as a model for sequence classification too: %s", error.problem
                )


class FixedLearner:
    """A reward with nothing to learn from samples, such as the mean log-prob of out-of-fold policies.

    Args:
        make: gives the reward, when it is first asked for.
    """

    tokens_done = 0
    reads_logps = True
    compares_across_prompts = False

    def __init__(self, make: Callable[[], Reward]):
        self._make = make
        self._reward: Reward | None = None

    @property
    def reward(self) -> Reward:
        """As it is."""
        if self._reward is None:
            self._reward = self._make()
        return self._reward

    def fit(
        self, comparisons: Comparisons, *, stage: int, validation: Sequence[Group] = (), on_step: OnStep
    ) -> dict[str, float]:
        """Nothing is fitted."""
        return {"fixed": 1.0}

    def save(self, folder: Path) -> None:
        """There is no state."""

    def load(self, folder: Path) -> bool:
        """There is no state."""
        return True

    def export(self, folder: Path, tokenization: Tokenization) -> None:
        """There is nothing of its own to write."""


class EnsembleLearner:
    """Several learners of one kind, each on its own resample of the prompts.

    Args:
        members: at least two.
        combine: their rewards; as for ``RewardEnsemble``.
        seed: of the resamples.
    """

    def __init__(self, members: Sequence[Learner], combine: Combine, *, seed: int):
        self.members, self.seed = list(members), seed
        self.combine: Combine = combine

    @property
    def reward(self) -> RewardEnsemble:
        """Of the members as they stand."""
        return RewardEnsemble([member.reward for member in self.members], self.combine)

    @property
    def tokens_done(self) -> int:
        """Of all members."""
        return sum(member.tokens_done for member in self.members)

    @property
    def reads_logps(self) -> bool:
        """Whether any member does."""
        return any(member.reads_logps for member in self.members)

    @property
    def compares_across_prompts(self) -> bool:
        """Whether all members do."""
        return all(member.compares_across_prompts for member in self.members)

    def fit(
        self, comparisons: Comparisons, *, stage: int, validation: Sequence[Group] = (), on_step: OnStep
    ) -> dict[str, float]:
        """See ``Learner.fit``; gives the means over the members, of what all of them log."""
        found = []
        for place, member in enumerate(self.members):
            of = comparisons.resampled(self.seed + place)
            facts = member.fit(of, stage=stage, validation=validation, on_step=on_step)
            # A small resample may hold nothing to compare.
            found.append(facts or member.fit(comparisons, stage=stage, validation=validation, on_step=on_step))
        names = [name for name in found[0] if all(name in facts for facts in found)]
        return {name: sum(facts[name] for facts in found) / len(found) for name in names}

    def save(self, folder: Path) -> None:
        """See ``Learner.save``."""
        for place, member in enumerate(self.members):
            member.save(folder / f"member-{place:02d}")

    def load(self, folder: Path) -> bool:
        """See ``Learner.load``."""
        found = [member.load(folder / f"member-{place:02d}") for place, member in enumerate(self.members)]
        return all(found)

    def export(self, folder: Path, tokenization: Tokenization) -> None:
        """See ``Learner.export``; ``tutelage score`` reads it."""
        writers = [partial(member.export, tokenization=tokenization) for member in self.members]
        write_ensemble(folder, writers, self.combine)


class AutoLearner:
    """Fits several rewards and takes the one that ranks the validation rows best.

    Args:
        learners: by name.
        accuracy: of a reward on validation groups: how often a demonstration is over a sample.
        tell: gets a sentence that says which was taken, and how the others did.
    """

    def __init__(
        self,
        learners: Mapping[str, Learner],
        accuracy: Callable[[Reward, Sequence[Group]], float],
        tell: Callable[[str], None],
    ):
        self.learners, self._accuracy, self._tell = dict(learners), accuracy, tell
        self.taken = next(iter(self.learners))

    @property
    def reward(self) -> Reward:
        """Of the learner that was taken last."""
        return self.learners[self.taken].reward

    @property
    def tokens_done(self) -> int:
        """Of all learners."""
        return sum(learner.tokens_done for learner in self.learners.values())

    @property
    def reads_logps(self) -> bool:
        """See ``Learner.reads_logps``."""
        return self.learners[self.taken].reads_logps

    @property
    def compares_across_prompts(self) -> bool:
        """Whether all do: any of them may be taken."""
        return all(learner.compares_across_prompts for learner in self.learners.values())

    def fit(
        self, comparisons: Comparisons, *, stage: int, validation: Sequence[Group] = (), on_step: OnStep
    ) -> dict[str, float]:
        """See ``Learner.fit``; the facts are those of the reward that was taken."""
        facts: dict[str, dict[str, float]] = {}
        found: dict[str, float] = {}
        for name, learner in self.learners.items():
            facts[name] = learner.fit(comparisons, stage=stage, validation=validation, on_step=on_step)
            if facts[name]:
                found[name] = self._accuracy(learner.reward, validation)
        if not found:
            return {}
        self.taken = max(found, key=lambda name: found[name])
        shown = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        self._tell(f"stage {stage}: of {shown} (accuracy on validation rows) it takes {self.taken}")
        return facts[self.taken]

    def save(self, folder: Path) -> None:
        """See ``Learner.save``."""
        for name, learner in self.learners.items():
            learner.save(folder / f"reward-{_plain(name)}")
        write_json(folder / "reward-taken.json", {"taken": self.taken})

    def load(self, folder: Path) -> bool:
        """See ``Learner.load``."""
        path = folder / "reward-taken.json"
        if not path.exists():
            return False
        self.taken = read_json(path)["taken"]
        for name, learner in self.learners.items():
            learner.load(folder / f"reward-{_plain(name)}")
        return True

    def export(self, folder: Path, tokenization: Tokenization) -> None:
        """See ``Learner.export``: the one that was taken last."""
        self.learners[self.taken].export(folder, tokenization)


def _plain(name: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in name)
