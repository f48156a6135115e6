"""How long the rows of a run can be: what its probe has to reach."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import nn

from tutelage.models.regimes import require_one_rope, rope_switch
from tutelage.training.config import DemonstrationConfig

__all__ = ["probed_lengths"]


def probed_lengths(model: nn.Module, args: DemonstrationConfig, dataset: Any, source: str) -> tuple[int, int]:
    """The longest prompt with a completion, and with all its completions, in tokens.

    Args:
        dataset: tokenized rows. Where the model's rope allows no rows as long as the limits do, they are looked at;
            streamed ones when they come.

    Raises:
        UserError: a row of theirs is too long for one rope, or may become so by what is sampled for it.
    """
    samples = getattr(args, "num_samples", 0)
    prompts = ["prompt_ids"]
    longest_prompt = args.max_prompt_length
    seen = getattr(args, "teacher_prompt_limit", 0)
    if seen and isinstance(dataset, Dataset):  # its limit leaves room for what no row may have: the rows say
        prompts.append("teacher_prompt_ids")
        seen = max(map(len, dataset["teacher_prompt_ids"]), default=0)
    row = max(longest_prompt, seen) + args.max_completion_length
    switch = rope_switch(model)
    if switch is not None and row > switch.length:
        if isinstance(dataset, Dataset):
            longest = max(
                len(prompt) + (args.max_completion_length if samples else len(demonstration))
                for name in prompts
                for prompt, demonstration in zip(dataset[name], dataset["demonstration_ids"], strict=True)
            )
            what = f"rows of {source} {'may grow to' if samples else 'have up to'}"
            require_one_rope(model, longest, what=what, remedy="Lower --max_prompt_length or --max_completion_length")
        row = switch.length
    return row, row + samples * args.max_completion_length
