"""SDFT: the policy learns from itself with the demonstration in its prompt, on its own samples.

Shenfeld et al. 2026, "Self-Distillation Enables Continual Learning" (arXiv 2601.19897); on-policy self-distillation (OPSD, arXiv
2601.18734) is the same loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from tutelage.algorithms.registry import Algorithm
from tutelage.data.teacher_prompt import DEFAULT_TEMPLATE, TeacherPrompt
from tutelage.errors import UserError
from tutelage.groups import Group
from tutelage.losses import DivergenceKind
from tutelage.progress import Progress
from tutelage.ranges import number, whole
from tutelage.results import AlgorithmInfo, Curve, RunRecord
from tutelage.sampling import Sampler
from tutelage.scoring.divergence import TokenDivergences, completion_divergence
from tutelage.scoring.logps import Layout
from tutelage.training.objective import Step
from tutelage.training.replay import Replay, samples_alone
from tutelage.training.setup import make_rollout, make_stages, make_store
from tutelage.training.sharding import refuse_sharded
from tutelage.training.stage_config import StageConfig
from tutelage.training.teacher import AveragedTeacher, StartTeacher, Teacher, TeacherUpdate
from tutelage.training.trainer import DemonstrationTrainer

__all__ = ["ALGORITHM", "Distillation", "SDFTConfig", "SDFTObjective", "SDFTTrainer"]

_TEMPLATE_TOKENS = 128  # room for the template's own words


@dataclass
class SDFTConfig(StageConfig):
    """Settings of SDFT."""

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": (
                "Between the next-token distributions of teacher and student, over the whole vocabulary: forward_kl, KL(teacher ‖ "
                "student); reverse_kl, KL(student ‖ teacher); or jensen_shannon, to a mixture of both (see --mixture)."
            ),
            "choices": ["forward_kl", "reverse_kl", "jensen_shannon"],
        },
    )
    mixture: Annotated[float, number(0, 1, above=True, below=True)] = field(
        default=0.5, metadata={"help": "The teacher's weight in the mixture of --divergence jensen_shannon."}
    )
    average: str = field(
        default="tokens",
        metadata={
            "help": (
                "What a step's loss is the mean over: all sampled tokens alike, or the samples, each by the mean of its tokens, so "
                "that tokens of short samples weigh more."
            ),
            "choices": ["tokens", "samples"],
        },
    )
    teacher: str = field(
        default="start",
        metadata={
            "help": "Whose weights the teacher has: start, those that training began with; or average, an average of the student's "
            "over the steps (see --teacher_rate).",
            "choices": ["start", "average"],
        },
    )
    teacher_rate: Annotated[float, number(0, 1, above=True)] = field(
        default=0.01,
        metadata={"help": "With --teacher average, how much of the student goes into the average after each step."},
    )
    teacher_prompt: str = field(
        default=DEFAULT_TEMPLATE,
        metadata={
            "help": (
                "What the teacher reads instead of the prompt: a text in which {prompt} and {demonstration} are replaced. Of a "
                "conversation it takes the place of the last message, and {prompt} is that message."
            )
        },
    )
    max_teacher_prompt_length: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": (
                "Maximum length of the prompt that the teacher sees, in tokens; --on_long_prompt says what happens to longer ones. "
                f"By default --max_prompt_length + --max_completion_length + {_TEMPLATE_TOKENS}."
            )
        },
    )
    samplings_per_stage: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": (
                "How often a stage samples anew. By default at every optimizer step, so that each is on-policy; 1 samples for the "
                "whole stage at once, which takes less time."
            )
        },
    )
    reference: str = field(
        default="stage",
        metadata={"help": "Has no effect: SDFT reads no reference log-probs of samples.", "choices": ["stage"]},
    )

    def __post_init__(self):
        super().__post_init__()
        if self.replay_stages:
            raise UserError(
                "samples of earlier stages are not the student's own any more.",
                remedy="Leave it at 0; --samplings_per_stage says how often the student samples.",
                field="replay_stages",
            )
        _ = self.seen_by_teacher  # refuses a template without its fields

    @property
    def teacher_prompt_limit(self) -> int:
        """The most tokens of a prompt that the teacher sees."""
        return self.max_teacher_prompt_length or (
            self.max_prompt_length + self.max_completion_length + _TEMPLATE_TOKENS
        )

    @property
    def seen_by_teacher(self) -> TeacherPrompt:
        """What makes the teacher's prompts."""
        return TeacherPrompt(self.teacher_prompt, self.teacher_prompt_limit)


class Distillation:
    """Measures how far the policy is from its teacher at each token of its samples; see ``tutelage.training.objective.Measure``.

    Args:
        teacher: whose weights the policy takes on for the teacher's pass.
        kind, mixture: as for ``completion_divergence``.
    """

    def __init__(self, teacher: Teacher, kind: DivergenceKind, mixture: float):
        self.teacher, self.mixture = teacher, mixture
        self.kind: DivergenceKind = kind

    def __call__(
        self, model: nn.Module, groups: Sequence[Group], /, *, layout: Layout, pad_token_id: int
    ) -> TokenDivergences:
        divergences_N = completion_divergence(
            model,
            groups,
            [group.seen_by_teacher() for group in groups],
            kind=self.kind,
            mixture=self.mixture,
            teacher_context=self.teacher.active,
            layout=layout,
            pad_token_id=pad_token_id,
        )
        return TokenDivergences(groups, divergences_N)


class SDFTObjective:
    """The mean divergence of the policy from its teacher over the tokens of samples.

    Args:
        over_samples: the mean over samples of their means over tokens, instead of that over all tokens.
    """

    # Samples are drawn without it, and the teacher is run without: with it, equal weights would differ.
    uses_dropout = False

    def __init__(self, *, over_samples: bool = False):
        self.over_samples = over_samples

    def beta(self, stage: int) -> float:
        """SDFT has no temperature: the unit is one nat."""
        return 1.0

    def counts(self, groups: Sequence[Group]) -> dict[str, int]:
        """Samples, and their tokens."""
        samples = [completion for group in groups for completion in group.completions]
        return {"samples": len(samples), "tokens": sum(len(c.token_ids) for c in samples)}

    def loss(self, tokens: TokenDivergences, step: Step) -> Tensor:
        """The mean divergence (nats per token)."""
        step.track("teacher/divergence", tokens.divergences_N)
        step.track("teacher/divergence_per_sample", tokens.sums())
        if self.over_samples:
            return tokens.means().sum() / max(1, step.counts["samples"])
        return tokens.divergences_N.sum() / max(1, step.counts["tokens"])


_CURVES = (
    Curve("teacher/divergence", "Divergence from the teacher", "nats per token of the samples", "Teacher"),
    Curve("teacher/divergence_per_sample", "The same, per sample", "nats per sample", "Teacher"),
)
_NAMES = {
    "forward_kl": "KL(teacher ‖ student)",
    "reverse_kl": "KL(student ‖ teacher)",
    "jensen_shannon": "the Jensen-Shannon divergence",
}


def _card(record: RunRecord) -> str:
    """What was distilled from what."""
    settings = record.settings
    weights = "of the start" if settings.get("teacher") == "start" else "averaged over the steps"
    return (
        "The data are demonstrations alone. The policy sampled answers to the prompts, and its next-token distributions at their "
        "tokens were brought nearer to those of the same model with the demonstration in its prompt, with the weights "
        f"{weights} ({_NAMES.get(str(settings.get('divergence')), 'a divergence')}; Shenfeld et al. 2026, arXiv 2601.19897)."
    )


SDFT = AlgorithmInfo(
    "sdft", "become what the policy is with the demonstration in its prompt", "sdft.md", _card, _CURVES
)


class SDFTTrainer(DemonstrationTrainer):
    """Distills the policy with the demonstration in its prompt into the policy without, on the policy's samples.

    Args:
        sampler: draws the samples; by default from the model in memory.
        others: see ``DemonstrationTrainer``.
    """

    args: SDFTConfig

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SDFTConfig,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        sampler: Sampler | None = None,
        progress: Progress | None = None,
        source: str = "training data",
        eval_source: str = "held-out data",
    ):
        super().__init__(
            model,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            peft_config,
            callbacks,
            optimizers,
            progress=progress,
            source=source,
            eval_source=eval_source,
            info=SDFT,
            objective=SDFTObjective(over_samples=args.average == "samples"),
            seen_by_teacher=args.seen_by_teacher,
        )
        refuse_sharded(self, "sdft")
        self.measure = Distillation(self._make_teacher(), cast(DivergenceKind, args.divergence), args.mixture)
        store = make_store(self)
        rollout = make_rollout(self, sampler, reference_is_initial=False, scores_samples=False)
        phase = Replay(rollout, store, samples_alone)
        self.train_in_stages(make_stages(self, rollout, store, phase, draws_per_stage=args.samplings_per_stage))

    def _make_teacher(self) -> Teacher:
        if self.args.teacher == "start":
            return StartTeacher(self.start)
        teacher = AveragedTeacher(self.policy, self.args.teacher_rate)
        self.checkpointed.append(teacher)
        self.add_callback(TeacherUpdate(teacher))
        return teacher


ALGORITHM = Algorithm(SDFT, SDFTConfig, SDFTTrainer)
