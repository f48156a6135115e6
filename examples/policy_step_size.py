"""How far does a policy phase move the policy, and does it help? Learning rates, batch sizes and passes on the same samples.

    python examples/policy_step_size.py --model OUT/sft --run OUT/rft --stages 0 1 --task word_sequence_reversal \\
        --dataset_name HELD_OUT --max_completion_length 32 --try 5e-6,2,1 5e-6,8,4 5e-5,8,1

Takes the samples that an RFT run with a neural reward (--reward model) drew from its start (in its warm-up stages) and
scores them with the reward of the last of these stages. Then runs a policy phase from the same start for each ``rate,batch,passes`` (learning rate; batch in prompts).
Shows accuracy, learned reward and KL to the start on fresh samples for held-out prompts, and the held-out log-prob.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from tutelage.data import Tokenization, load_dataset
from tutelage.evaluation.policy import EvaluationSet
from tutelage.groups import Group, Role
from tutelage.losses import leave_one_out_advantages, policy_gradient_loss
from tutelage.models.loading import load_model, load_tokenizer
from tutelage.models.weights import WeightSet, load_weights
from tutelage.rewards import ExplicitReward
from tutelage.rewards.comparisons import reward_scale
from tutelage.sampling import SamplingParams, TransformersSampler
from tutelage.scoring.logps import cached_logps, completion_logps
from tutelage.training.store import StageStore


def mixed_precision() -> torch.autocast:
    """The precision that the trainers compute in."""
    return torch.autocast("cpu", torch.bfloat16)


def numbers(groups: list[Group], name: str) -> torch.Tensor:
    """[C] the values called ``name`` of all completions."""
    known = (group.values(name) if name == "reward" else group.sums(name) for group in groups)
    return torch.tensor([value for values in known for value in values])


def policy_phase(model, groups: list[Group], *, rate: float, batch: int, passes: int, beta: float) -> None:
    """Leave-one-out REINFORCE with clipped ratios and the KL in the reward, as in ``RFTTrainer``."""
    scale = reward_scale([group.values("reward") for group in groups])
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    model.train()
    for number in range(passes):
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(number)).tolist()
        for start in range(0, len(order), batch):
            chosen = [groups[index] for index in order[start : start + batch]]
            with mixed_precision():
                logps = completion_logps(model, chosen)
            old = numbers(chosen, "old_logps")
            shaped = numbers(chosen, "reward") / scale - beta * (logps - old).detach()
            parts = shaped.split([len(group.completions) for group in chosen])
            advantages = torch.cat([leave_one_out_advantages(part) for part in parts])
            optimizer.zero_grad()
            policy_gradient_loss(logps, old, advantages).mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()


def look(model, start: WeightSet, reward: ExplicitReward, rows: EvaluationSet) -> tuple[float, float, float, float]:
    """Accuracy by the verifier, learned reward, KL to the start and held-out log-prob (both nats per sequence)."""
    tokenization = rows.tokenization
    params = SamplingParams(tokenization.max_completion_length, tokenization.stop_ids(False))
    model.eval()
    with mixed_precision():
        drawn = TransformersSampler(model, batch_size=64, pad_token_id=tokenization.pad_id).sample(
            [group.prompt_ids for group in rows.groups], params, num_samples=2
        )
        groups = [
            replace(group, completions=tuple(sample.completion for sample in samples))
            for group, samples in zip(rows.groups, drawn, strict=True)
        ]
        now, demonstrations = cached_logps(model, groups), cached_logps(model, rows.groups)
    with start.active(), mixed_precision():
        then = cached_logps(model, groups)
    scores = [rows.verify(place, c.token_ids) >= 1 for place, group in enumerate(groups) for c in group.completions]
    return (
        float(np.mean(scores)),
        reward.score(groups).mean().item(),
        float(np.mean(np.array(now) - np.array(then))),
        float(np.mean(demonstrations)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="The model that the run started from.")
    parser.add_argument("--run", required=True, help="Output folder of the RFT run.")
    parser.add_argument("--stages", type=int, nargs="+", default=[0], help="Warm-up stages whose samples to use.")
    parser.add_argument("--dataset_name", required=True, help="Held-out rows.")
    parser.add_argument("--rows", type=int, default=100, help="Evaluate on the first ROWS held-out rows.")
    parser.add_argument("--task", required=True, help="The reasoning-gym task, for its verifier.")
    parser.add_argument("--max_completion_length", type=int, default=32)
    parser.add_argument("--beta", type=float, default=0.1, help="Weight of the KL.")
    parser.add_argument("--try", dest="tries", nargs="+", required=True, metavar="RATE,BATCH,PASSES")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    model = load_model(options.model, dtype=None)
    tokenization = Tokenization(load_tokenizer(options.model), 512, options.max_completion_length, "error")
    data = load_dataset(options.dataset_name)
    rows = EvaluationSet.of(data, tokenization, verifier=f"reasoning_gym:{options.task}", limit=options.rows)  # type: ignore[arg-type]
    store = StageStore(Path(options.run) / "stages", {})
    groups = [group for stage in options.stages for group in store.groups(stage)]
    reward = ExplicitReward.fresh(model, shared=True, pad_token_id=tokenization.pad_id, autocast=mixed_precision)
    load_weights(reward.parameters, store.path(options.stages[-1]) / "reward.safetensors")
    samples = [
        group.with_values("reward", values).select(group.places(Role.SAMPLE))
        for group, values in zip(groups, reward.scores(groups), strict=True)
    ]
    start = WeightSet(model)
    view = Table(title=f"{len(samples)} prompts, {len(samples[0].completions)} samples each")
    for column in ("rate, batch, passes", "accuracy", "learned reward", "KL to the start", "held-out log-prob"):
        view.add_column(column)
    for name in ("start", *options.tries):
        if name != "start":
            rate, batch, passes = name.split(",")
            with torch.no_grad():
                for slot, first in zip(
                    (p for p in model.parameters() if p.requires_grad), start.parameters, strict=True
                ):
                    slot.copy_(first)
            policy_phase(model, samples, rate=float(rate), batch=int(batch), passes=int(passes), beta=options.beta)
        view.add_row(name, *(f"{value:.3f}" for value in look(model, start, reward, rows)))
    Console(width=120).print(view)


if __name__ == "__main__":
    main()
