"""What a model's own ``forward`` says of one sequence alone: the truth that our faster ways are held against."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from tutelage.errors import UserError
from tutelage.models.memory import is_out_of_memory
from tutelage.models.modes import evaluation_mode, exact_float32, own_forward, precision
from tutelage.models.paths import first_line
from tutelage.models.regimes import regime_lengths

__all__ = [
    "affordable_row",
    "agree",
    "does_not_run",
    "is_exact",
    "plain_logits",
    "plain_logps",
    "random_tokens",
    "require_causal",
    "said_by",
    "tolerance",
]

_causal: WeakSet[PreTrainedModel] = WeakSet()
_EXACT = (torch.float32, torch.float64)
# A probe goes no further than this: in tokens of a row, for the masks' size, and in operations, for the time (a minute
# on a slow CPU).
_LONGEST = 8192
_CPU_OPERATIONS, _ACCELERATOR_OPERATIONS = 5e12, 1e15


def is_exact(base: PreTrainedModel) -> bool:
    """Whether the model computes in float32 or better, where two right ways differ by next to nothing."""
    return precision(base) in _EXACT


def affordable_row(base: PreTrainedModel, tokens: int, *, passes: float) -> int:
    """The longest row up to ``tokens`` that a probe may try, by size and operations; the same on every machine of a kind.

    Args:
        passes: rows of this length that the probe runs.
    """
    operations = _CPU_OPERATIONS if base.device.type == "cpu" else _ACCELERATOR_OPERATIONS
    per_token = 2 * max(1, base.num_parameters(exclude_embeddings=True))
    return min(tokens, _LONGEST, max(64, int(operations / per_token / passes)))


def random_tokens(base: PreTrainedModel, count: int, seed: int) -> tuple[int, ...]:
    """``count`` random token ids, the same for the same seed."""
    vocabulary = base.config.get_text_config().vocab_size
    return tuple(torch.randint(vocabulary, (count,), generator=torch.Generator().manual_seed(seed)).tolist())


def plain_logits(base: PreTrainedModel, token_ids: Sequence[int], last: int) -> Tensor:
    """[last, V] float32 logits at the last positions of a sequence that runs alone."""
    ids = torch.tensor([token_ids], device=base.device)
    # All logits of a long row and a large vocabulary are gigabytes.
    few: dict[str, Any] = {"logits_to_keep": last} if "logits_to_keep" in _parameters(base) else {}
    return own_forward(base)(input_ids=ids, use_cache=False, **few).logits[0, -last:].float()


def plain_logps(base: PreTrainedModel, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> Tensor:
    """[N] log-probs (nats) of the tokens after a prompt, by the model's own forward on the sequence alone."""
    logits = plain_logits(base, (*prompt_ids, *token_ids), len(token_ids) + 1)[:-1]
    return -F.cross_entropy(logits, torch.tensor(token_ids, device=logits.device), reduction="none")


def tolerance(base: PreTrainedModel, truth_N: Tensor) -> float:
    """How far log-probs of one way may lie from those of another (nats per token).

    Low precision rounds differently in each way of computing, and by more where log-probs are far from 0, as after long
    training. A wrong mask changes them by about as much as they differ from token to token, so the tolerance is a share of that.
    """
    spread = truth_N.std().item() if len(truth_N) > 1 else 1.0
    return 1e-3 * min(1.0, spread) if is_exact(base) else 0.15 * spread


def agree(base: PreTrainedModel, found_N: Tensor, truth_N: Tensor) -> float:
    """How far ``found_N`` lies from the truth: the largest difference; in low precision the mean one."""
    difference_N = (found_N - truth_N).abs()
    return (difference_N.max() if is_exact(base) else difference_N.mean()).item()


def require_causal(base: PreTrainedModel) -> None:
    """Refuse a model in which a later token changes an earlier logit; cached.

    Raises:
        UserError: it is bidirectional, or its forward does not run on token ids alone.
    """
    if base in _causal:
        return
    with torch.no_grad(), evaluation_mode(base), exact_float32():
        try:
            bidirectional = _sees_later_tokens(base)
        except Exception as error:
            raise does_not_run(base, error) from error
    if bidirectional:
        raise UserError(
            f"{type(base).__name__} is bidirectional: a later token changes the logits of earlier ones, so they are no "
            "next-token probabilities.",
            remedy="Use a causal language model, or a config without bidirectional attention (is_causal, is_decoder, "
            "use_bidirectional_attention).",
            field="model_name_or_path",
        )
    _causal.add(base)


def does_not_run(base: PreTrainedModel, error: Exception, tokens: int = 0) -> UserError:
    """What a failure of the model's own forward is, to a user.

    Args:
        tokens: of the rows that it failed on, where short ones have run.
    """
    if is_out_of_memory(error):
        return UserError(
            f"there is not enough memory to run {type(base).__name__}{f' on {tokens:,} tokens' if tokens else ''}: "
            f"{said_by(error)}.",
            remedy="Lower --max_prompt_length or --max_completion_length, end what else takes memory, or use a smaller model.",
        )
    if tokens:
        lengths = {name: size for name, size in regime_lengths(base.config).items() if size < tokens}
        known = ", ".join(f"{name} {size:,}" for name, size in lengths.items()) or "no length below"
        return UserError(
            f"{type(base).__name__} runs on short rows, and not on {tokens:,} tokens, which a prompt and its completion may "
            f"have ({said_by(error)}); its config names {known}.",
            remedy="Lower --max_prompt_length or --max_completion_length to as many tokens as the model has positions for.",
            field="model_name_or_path",
        )
    return UserError(
        f"{type(base).__name__} does not run on token ids alone: {said_by(error)}.",
        remedy="Use a causal language model whose forward needs no other input.",
        field="model_name_or_path",
    )


def said_by(error: Exception) -> str:
    """The kind of an error and its first line."""
    line = first_line(error)[:160]
    return line if line == type(error).__name__ else f"{type(error).__name__}: {line}"


def _sees_later_tokens(base: PreTrainedModel) -> bool:
    """Whether a later token changes an earlier logit, as in a bidirectional model.

    Two sequences of one length differ in their second half. In the first half their logits must be the same, up to the
    rounding of mixtures of experts, whose matrix products have other shapes when tokens are routed otherwise.
    """
    half = 12
    first = random_tokens(base, 2 * half, seed=1)
    second = (*first[:half], *random_tokens(base, half, seed=2))
    change_LV = (plain_logits(base, first, 2 * half) - plain_logits(base, second, 2 * half)).abs()
    earlier, own = change_LV[:half].max().item(), change_LV[half:].max().item()
    if is_exact(base):
        return not earlier <= 1e-4 * own
    return earlier > 0.1 * own or (earlier > 0 and _reaches_back(base, first, half))


def _reaches_back(base: PreTrainedModel, token_ids: Sequence[int], half: int) -> bool:
    """Whether an embedding of the second half has a gradient from a logit of the first: exact, however one rounds."""
    embedded: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = base.get_input_embeddings().register_forward_hook(keep)
    try:
        with torch.enable_grad():
            logits = base(input_ids=torch.tensor([token_ids], device=base.device), use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[0, :half].float().square().sum(), embedded[:1])
    except RuntimeError:  # quantized weights without a backward pass: the difference was small, so call it rounding
        return False
    finally:
        hook.remove()
    return bool(gradient[0, half:].abs().max() > 0)


def _parameters(base: PreTrainedModel) -> set[str]:
    return set(inspect.signature(base.forward).parameters)
