"""One state, three actions: what SFT, SPIN and IRFT do to a policy when every probability is known.

Li et al. (2024, arXiv 2405.17888) use a toy example of this kind to argue for learning a reward instead of only imitating.
The numbers and the analysis here are our own. The policy is a softmax over three logits, and every loss is the exact
expectation over all (demonstration, sample) pairs: no sampling, no language model, no noise.

    python examples/one_state_three_actions.py

All methods start at π_0 and take STEPS gradient steps. T stages split these steps; SPIN is T = 1. At the start of a stage, the
expected gradient of the logistic IRFT loss is β/2 times that of SFT, because the samples contribute
E_{ỹ~π}[∇ log π(ỹ)] = 0. IRFT's step size is therefore 2/β times that of SFT, which makes the first step of every stage an SFT
step. Any difference comes from the rest of the stage, where the samples no longer come from the current policy.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from tutelage.losses import irft_loss, sft_loss

START = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)  # π_0
DEMONSTRATED = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)  # how often each action is shown; c never is
STEPS, STEP_SIZE, BETA = 200, 0.5, 0.1
STAGES = (1, 5, 20, 50, STEPS)


def descend(logps: Tensor, loss: Callable[[Tensor], Tensor], *, steps: int, step_size: float) -> Tensor:
    """Log-probs [3] of the policy after ``steps`` gradient steps on its logits."""
    logits = logps.clone().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss(logits.log_softmax(0)), logits)
        logits = (logits - step_size * gradient).detach().requires_grad_()
    return logits.log_softmax(0).detach()


def sft(logps: Tensor) -> Tensor:
    return descend(logps, lambda logps: DEMONSTRATED @ sft_loss(logps), steps=STEPS, step_size=STEP_SIZE)


def irft(logps: Tensor, stages: int) -> Tensor:
    demonstration, sample = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T  # all nine pairs
    for _ in range(stages):
        opponent = logps  # π_t: where the samples of this stage come from, and its reference
        pair_probabilities = DEMONSTRATED[demonstration] * opponent.exp()[sample]

        def loss(logps: Tensor, opponent: Tensor = opponent, weights: Tensor = pair_probabilities) -> Tensor:
            pairs = logps[demonstration], logps[sample], opponent[demonstration], opponent[sample]
            return weights @ irft_loss(*pairs, beta=BETA)

        logps = descend(logps, loss, steps=STEPS // stages, step_size=STEP_SIZE * 2 / BETA)
    return logps


def inverse_rl(bound: float) -> Tensor:
    """Log-probs [3] of maximum-likelihood inverse RL: π ∝ π_0 exp(r/β), with the reward r clamped to ±bound."""
    reward = torch.zeros(3, dtype=torch.float64)
    for _ in range(STEPS):
        policy = (START.log() + reward / BETA).softmax(0)
        reward = (reward + STEP_SIZE * BETA * (DEMONSTRATED - policy)).clamp(-bound, bound)
    return (START.log() + reward / BETA).log_softmax(0)


def main() -> dict[str, list[float]]:
    """Print the table. Returns π(a), π(b), π(c) of each row, by name."""
    start = START.log()
    policies = {"π_0, the start": START, "demonstrations": DEMONSTRATED, "SFT": sft(start).exp()}
    for stages in STAGES:
        policies[f"{'SPIN, ' if stages == 1 else 'IRFT, '}T = {stages}"] = irft(start, stages).exp()
    policies["inverse RL, |r| ≤ β"] = inverse_rl(bound=BETA).exp()

    table = Table("policy", title=f"{STEPS} exact gradient steps, β = {BETA}")
    for heading in ("π(a)", "π(b)", "π(c), never shown", "log-prob (nats)"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, policy in policies.items():
        logp = torch.special.xlogy(DEMONSTRATED, policy).sum()  # 0 log 0 = 0; nats per demonstration
        table.add_row(name, *(f"{p:.4f}" for p in policy.tolist()), f"{logp:.3f}")
    console = Console()
    console.print(table)
    console.print(
        "Stale samples drive SPIN past the demonstrations onto a single action. Fresher samples bring IRFT back to them. "
        "With one stage per step IRFT is SFT, which loses the action that was never shown just as fast. Keeping more "
        "probability on that action takes a bound on the reward."
    )
    return {name: policy.tolist() for name, policy in policies.items()}


if __name__ == "__main__":
    main()
