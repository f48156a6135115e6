"""Settings of every algorithm."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field, fields
from datetime import datetime
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from transformers import PreTrainedTokenizerBase, TrainingArguments

from tutelage.data.formats import Columns
from tutelage.data.tokenization import Tokenization
from tutelage.errors import UserError
from tutelage.models.precision import choose_precision
from tutelage.ranges import check_ranges, number, whole
from tutelage.training.arguments import RANGES, check_arguments

__all__ = ["SFT_LEARNING_RATES", "DemonstrationConfig", "default_of"]

SFT_LEARNING_RATES = {"adapter": 2e-4, "full": 2e-5}
"""Of SFT on an adapter and on all parameters: the unit of other algorithms' rates."""


def default_of(entry: Field[Any]) -> Any:
    """The default of a field of a config; ``MISSING`` without one."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


@dataclass
class DemonstrationConfig(TrainingArguments):
    """Settings shared by every algorithm, on top of transformers' ``TrainingArguments``."""

    adapter_learning_rate: ClassVar[float] = 1e-4
    full_learning_rate: ClassVar[float] = 1e-5
    is_new: ClassVar[bool] = False
    """Set on a config to say that what an earlier run left in the output folder is not gone on with."""

    learning_rate: Annotated[float | None, number(0, above=True)] = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": (
                "Initial learning rate. Each algorithm has its own default: larger for adapters, smaller when all "
                "parameters are trained. The first line of the run's output says which one is used."
            ),
        },
    )
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between log lines."})
    bf16: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Compute in bfloat16 (mixed precision). By default measured: on unless this machine is slower with it."
        },
    )
    hub_strategy: str = field(  # type: ignore[assignment]
        default="end",
        metadata={
            "help": "When to push with --push_to_hub: only at the end of training. Samples on disk are never pushed.",
            "choices": ["end"],
        },
    )
    save_total_limit: int | None = field(
        default=2, metadata={"help": "Keep only this many of the latest checkpoints."}
    )
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Has no effect: each algorithm knows which columns it needs."}
    )
    logging_nan_inf_filter: bool = field(
        default=False,
        metadata={
            "help": (
                "Leave losses that are not finite out of what is logged. There are none, because they end the run; looking "
                "for them waits for the device after each micro-batch."
            )
        },
    )
    max_prompt_length: Annotated[int, whole(1)] = field(
        default=512,
        metadata={
            "help": "Maximum prompt length in tokens. --on_long_prompt says what happens to longer prompts.",
        },
    )
    max_completion_length: Annotated[int, whole(1)] = field(
        default=256,
        metadata={
            "help": (
                "Maximum completion length in tokens, for demonstrations and samples alike. Longer completions are "
                "truncated and then have no end-of-turn token."
            ),
        },
    )
    on_long_prompt: str = field(
        default="error",
        metadata={
            "help": (
                "What to do with a prompt longer than --max_prompt_length: stop with an error, or drop the row and "
                "count it. Prompts are never truncated."
            ),
            "choices": ["error", "drop"],
        },
    )
    turns: str = field(
        default="last",
        metadata={
            "help": "Which assistant turns of a conversation are demonstrations.",
            "choices": ["last", "all"],
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={
            "help": "Column to read as the prompt, in all data of the run; by default known columns are recognized."
        },
    )
    completion_column: str | None = field(
        default=None, metadata={"help": "Column to read as the demonstration, with --prompt_column."}
    )
    messages_column: str | None = field(
        default=None, metadata={"help": "Column to read as the conversation, whatever other columns there are."}
    )
    layout: str = field(
        default="auto",
        metadata={
            "help": (
                "How a batch holds a prompt and its completions: 'shared_prefix' computes the prompt once for all "
                "its completions, 'padded' repeats it for each. 'auto' uses the shared-prefix layout if a check on "
                "the model gives the same log-probs as separate rows."
            ),
            "choices": ["auto", "shared_prefix", "padded"],
        },
    )
    verifier: str | None = field(
        default=None,
        metadata={
            "help": (
                "Scores sampled answers during evaluation: 'reasoning_gym:NAME' or 'module:function'. The function "
                "gets the answer's text and the row and returns a number; 1 means correct."
            )
        },
    )
    eval_rows: Annotated[int | None, whole(1)] = field(
        default=None,
        metadata={
            "help": "Number of held-out rows to evaluate on, from the start; by default all.",
        },
    )
    eval_samples: Annotated[int, whole(1)] = field(
        default=1,
        metadata={
            "help": (
                "Answers to each held-out row at temperature 1; the score is their mean. With several (8, for example) "
                "and a verifier, the evaluation also has diversity, and the quality of a learned reward."
            ),
        },
    )
    eval_kl: bool = field(
        default=False,
        metadata={
            "help": (
                "Keep the weights of the start, for the KL of the trained policy to it, where all parameters are trained: "
                "as much memory as the model takes. With an adapter the KL is measured anyway."
            )
        },
    )
    sampling_batch_size: Annotated[int, whole(1)] = field(
        default=64,
        metadata={
            "help": "Sequences decoded in parallel. Affects speed and memory, not the samples.",
        },
    )

    def __post_init__(self):
        check_ranges(self, RANGES)
        check_arguments(self)
        if not torch.accelerator.is_available():
            self.use_cpu = True  # transformers refuses bfloat16 without an accelerator unless the CPU is asked for
        if self.bf16 is None:
            device = "cpu" if self.use_cpu else None
            self.bf16 = not self.fp16 and choose_precision(device=device).dtype is torch.bfloat16
        _ = self.columns  # refuses what does not go together
        super().__post_init__()
        # A batch of groups holds no tensors, so accelerate cannot hand a streamed one out from its first process.
        self.accelerator_config.dispatch_batches = False  # type: ignore[union-attr]
        own = {
            name
            for cls in type(self).__mro__
            if cls.__module__.startswith("tutelage.")
            for name in cls.__annotations__
        }
        for entry in fields(self):
            choices = entry.metadata.get("choices") if entry.name in own else None
            value = getattr(self, entry.name)
            if choices and value not in choices and not (value is None and entry.default is None):
                raise UserError(f"must be one of {', '.join(choices)}, not {value!r}.", field=entry.name)

    @property
    def computing(self) -> torch.dtype:
        """What matrix products are computed in; ``load_model`` takes it."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32

    @property
    def columns(self) -> Columns:
        """The columns of the data that the user named."""
        return Columns(self.prompt_column, self.completion_column, self.messages_column)

    def tokenization(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        model_end_ids: frozenset[int] = frozenset(),
        now: datetime | None = None,
    ) -> Tokenization:
        """How prompts and completions are tokenized under these settings.

        Args:
            model_end_ids, now: as for ``Tokenization``.
        """
        return Tokenization(
            tokenizer,
            max_prompt_length=self.max_prompt_length,
            max_completion_length=self.max_completion_length,
            on_long_prompt=cast(Literal["error", "drop"], self.on_long_prompt),
            model_end_ids=model_end_ids,
            columns=self.columns,
            now=now or datetime.now(),
        )
