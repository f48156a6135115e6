"""What is asked of one architecture: log-probs in each layout and greedy samples, against the plain model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.layout import probe_layout
from tutelage.scoring.logps import completion_token_logps

__all__ = ["Finding", "compare"]

# Lengths past the windows and chunks of 6 tokens that the tiny configs have, in every place of a row.
PROMPTS, COMPLETIONS = (9, 3, 17), ((5, 3, 7), (4, 11), (2,))
NEW_TOKENS = 9


@dataclass(frozen=True, slots=True)
class Finding:
    """How an architecture is run, or why it is not.

    Attributes:
        layout: what the probe chose; None where the model is refused.
        sampled: whether it can be sampled from.
        refusals: the errors' texts.
        logps: largest difference of a token's log-prob from the plain model's, over the layouts.
        wrong_tokens: greedy tokens that are not the plain model's.
    """

    layout: str | None
    sampled: bool
    refusals: tuple[str, ...]
    logps: float = 0.0
    wrong_tokens: int = 0


def compare(model: PreTrainedModel, vocabulary: int) -> Finding:
    """Run a model in our ways and in its own; only a ``UserError`` is a refusal."""
    groups, refusals, layout, sampled, difference, wrong = _groups(vocabulary), [], None, False, 0.0, 0
    try:
        layout = probe_layout(model, 40, 60).layout
    except UserError as error:
        refusals.append(str(error))
    else:
        truth = torch.cat([_plain_logps(model, g.prompt_ids, c.token_ids) for g in groups for c in g.completions])
        for each in {"padded", layout, "auto"}:
            found = completion_token_logps(model, groups, layout=each).logps_N
            difference = max(difference, (found - truth).abs().max().item())
    try:
        sampler = TransformersSampler(model, batch_size=4)
        prompts = [group.prompt_ids for group in groups]
        params = SamplingParams(max_completion_length=NEW_TOKENS, temperature=0)
        drawn = sampler.sample(prompts, params, num_samples=2)
        sampled = True
    except UserError as error:
        refusals.append(str(error))
    else:
        wrong = sum(
            _wrong_tokens(model, prompt, s.token_ids)
            for prompt, each in zip(prompts, drawn, strict=True)
            for s in each
        )
    return Finding(layout, sampled, tuple(refusals), difference, wrong)


def _groups(vocabulary: int) -> list[Group]:
    generator = torch.Generator().manual_seed(5)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (count,), generator=generator).tolist())

    return [
        Group(tokens(prompt), tuple(Completion(tokens(n), Role.SAMPLE, finished=False) for n in lengths))
        for prompt, lengths in zip(PROMPTS, COMPLETIONS, strict=True)
    ]


@torch.no_grad()
def _plain_logps(model: PreTrainedModel, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """The model's own forward on one sequence: what a reader would write."""
    logps = (
        model(input_ids=torch.tensor([prompt + completion]), use_cache=False)
        .logits[0, len(prompt) - 1 : -1]
        .log_softmax(-1)
    )
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]


@torch.no_grad()
def _wrong_tokens(model: PreTrainedModel, prompt: tuple[int, ...], drawn: tuple[int, ...]) -> int:
    """Tokens that are not the most likely after what comes before them, but for rounding."""
    logits = model(input_ids=torch.tensor([prompt + drawn]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(drawn)[:, None])[:, 0]
    return int((logits.max(1).values - chosen > 1e-4).sum())
