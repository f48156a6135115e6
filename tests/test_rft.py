"""RFT on tiny models: the loss, who moves when, the gate, the validation rows, the choice, what is exported."""

import copy
import json
import math
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from peft import PeftModel, get_peft_model
from transformers import AutoModelForSequenceClassification

from conftest import Training
from test_trainer import SGD, Snapshots, assert_same_weights, distance, history, weights
from tutelage.algorithms import RFTConfig
from tutelage.cli import main
from tutelage.data import Tokenization
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.loading import base_causal_lm, load_model, load_tokenizer
from tutelage.sampling import TransformersSampler
from tutelage.sampling.base import Sample
from tutelage.scoring.logps import TokenLogps, cached_logps, completion_logps
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer
from tutelage.training.reward_phase import INITIAL_POLICY
from tutelage.training.selection import Candidate, compare
from tutelage.training.trainer import Step

# Two stages of two steps on 16 rows, 4 kept. Random policies do not end by themselves, so that a reward finds soon
# enough what demonstrations have and samples have not.
QUICK = {
    "stages_per_epoch": 2,
    "num_samples": 2,
    "validation_rows": 4,
    "reward_warmup_stages": 0,
    "reward_learning_rate": 1e-2,
    "reward_batch_size": 4,
    "reward_epochs": 1,
    "early_stopping": "never",
    "truncated_samples": "score",
    "beta": 0.01,
}


def make(training, *, adapter=False, data=None, options=None, **settings):
    options = {"peft_config": training.lora() if adapter else None, **(options or {})}
    data = training.rows(20) if data is None else data
    return training.trainer("rft", data=data, options=options, **{**QUICK, **settings})


def run(training, **arguments):
    trainer = make(training, **arguments)
    trainer.train()
    return trainer


def phases(trainer):
    return history(trainer, "policy/phase")


def saved(training, name="base", model=None):
    """Folder of a model with the tokenizer, which an adapter can name."""
    (model or training.model()).save_pretrained(training.folder / name)
    training.tokenizer.save_pretrained(training.folder / name)
    return str(training.folder / name)


def spread(completion):
    """A reward in [0, 1) that is as good as random, but always the same."""
    return sum((place + 1) * token for place, token in enumerate(completion.token_ids)) % 97 / 97


def plant(trainer, of):
    """Give the reward's answers: ``of(completion)``. The fit goes on behind it."""
    trainer.reward.scores = lambda groups: [tuple(of(c) for c in group.completions) for group in groups]
    return trainer


def over_samples(completion):
    """Demonstrations are over samples, which differ."""
    return 2.0 if completion.role == Role.DEMONSTRATION else spread(completion)


class Scripted:
    """A sampler whose answers are given: (tokens, whether it finished) of each sample of a row."""

    def __init__(self, answers):
        self.answers = answers

    def take_weights(self, policy):
        pass

    def sample(self, prompts, params, *, num_samples=1, rows=None, stage=0, on_finished=None):
        return [[Sample(ids, (0.0,) * len(ids), finished) for ids, finished in self.answers(row)] for row in rows]


def trained_on(trainer):
    """What the policy phase and the reward phase see, as they see it: two lists of groups."""
    policy, reward = [], []
    loss, rewards = trainer.objective.loss, trainer.stages.phase.fitter._rewards
    trainer.objective.loss = lambda tokens, step: policy.extend(tokens.groups) or loss(tokens, step)
    trainer.stages.phase.fitter._rewards = lambda groups: reward.extend(groups) or rewards(groups)
    return policy, reward


# --- the loss ----------------------------------------------------------------------------------------------------------

BETA, CLIP = 0.3, 0.2
NOW = [[-3.0, -5.0, -2.0], [-4.0, -4.5]]  # log π, of two prompts with three samples and two
OLD = [[-3.1, -4.0, -2.0], [-4.3, -4.5]]  # the ratios: 1.105, 0.368, 1; 1.350, 1
REFERENCE = [[-3.5, -4.0, -2.2], [-4.0, -5.0]]
REWARDS = [[1.0, 0.2, 0.4], [0.5, -0.5]]


def by_hand(advantages, kl):
    """Loss and gradient of each sample, in plain numbers."""
    losses, gradients = [], []
    for now, old, reference, rewards in zip(NOW, OLD, REFERENCE, REWARDS, strict=True):
        shaped = [
            r - (BETA * (logp - start) if kl == "reward" else 0)
            for r, logp, start in zip(rewards, now, reference, strict=True)
        ]
        n, mean = len(shaped), sum(shaped) / len(shaped)
        if advantages == "leave_one_out":
            advantage = [value - (sum(shaped) - value) / (n - 1) for value in shaped]
        else:
            deviation = math.sqrt(sum((value - mean) ** 2 for value in shaped) / (n - 1))
            advantage = [(value - mean) / (deviation + 1e-4) for value in shaped]
        for a, logp, before, start in zip(advantage, now, old, reference, strict=True):
            ratio = math.exp(logp - before)
            clipped = (a > 0 and ratio > 1 + CLIP) or (a < 0 and ratio < 1 - CLIP)
            loss = -a * (max(min(ratio, 1 + CLIP), 1 - CLIP) if clipped else ratio)
            gradient = 0.0 if clipped else -a * ratio
            if kl == "loss":
                loss, gradient = loss + BETA * (logp - start) ** 2 / 2, gradient + BETA * (logp - start)
            losses.append(loss)
            gradients.append(gradient)
    return losses, gradients


@pytest.mark.parametrize("kl", ["reward", "loss"])
@pytest.mark.parametrize("advantages", ["leave_one_out", "group_normalized"])
def test_the_loss_of_a_step_by_hand(training, advantages, kl):
    trainer = make(training, advantages=advantages, kl=kl, beta=BETA, clip_range=CLIP)
    groups = [
        Group(
            (1,),
            tuple(
                Completion(
                    (5, i),
                    Role.SAMPLE,
                    True,
                    {"old_logps": (before / 4, before * 3 / 4), "reference_logps": (start, 0.0)},
                    {"scaled_reward": reward},
                )
                for i, (before, start, reward) in enumerate(zip(old, reference, rewards, strict=True))
            ),
        )
        for old, reference, rewards in zip(OLD, REFERENCE, REWARDS, strict=True)
    ]
    logps_C = torch.tensor([value for row in NOW for value in row], requires_grad=True)
    tokens = TokenLogps(groups, (logps_C / 2).repeat_interleave(2), torch.arange(5).repeat_interleave(2))
    assert trainer.objective.counts(groups) == {"samples": 5}
    loss = trainer.objective.loss(tokens, Step({"samples": 10}, 0, lambda *_: None))  # one of two micro-batches
    loss.backward()
    losses, gradients = by_hand(advantages, kl)
    assert loss.item() == pytest.approx(sum(losses) / 10, rel=1e-4)
    assert logps_C.grad.tolist() == pytest.approx([gradient / 10 for gradient in gradients], rel=1e-4, abs=1e-7)
    assert any(gradient == 0 for gradient in gradients) or kl == "loss", "one of them is clipped"


@pytest.mark.parametrize("adapter", [False, True])
def test_the_policy_phase_equals_a_loop_written_out(training, adapter):
    """From the record of a stage and the rewards in it: two steps of SGD on −Σ A ρ / samples."""
    trainer = make(training, adapter=adapter, stages_per_epoch=1, max_steps=1, data=training.rows(8), **SGD)
    plant(trainer, over_samples)
    policy = copy.deepcopy(trainer.policy)
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    groups = [group.select([1, 2]) for group in trainer.stages.store.groups(0)]
    found = [line["rewards"] for line in trainer.stages.store.lines(0, "rewards")]
    assert found == [[2.0, *map(spread, group.completions)] for group in groups]
    logps = completion_logps(policy, groups)
    rewards = torch.tensor(found)[:, 1:]
    advantages = (rewards - rewards.flip(1)).flatten()  # of two samples; the policy is π_0 yet, so no KL
    (-(logps * advantages).sum() / 8).backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert distance(policy, snapshots.models[0]) > 1e-4
    assert_same_weights(snapshots.models[1], policy, 1e-5)


# --- who moves, and when -------------------------------------------------------------------------------------------------


def test_the_base_and_the_start_stay_as_they_are(training):
    trainer = make(training, adapter=True, num_train_epochs=2)
    frozen = {name: value for name, value in weights(trainer.policy).items() if "lora" not in name}
    start = [parameter.detach().clone() for parameter in trainer.stages.rollout.initial.parameters]
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    assert 1 in phases(trainer)
    assert distance(snapshots.models[0], snapshots.models[-1]) > 1e-4
    found = weights(trainer.policy)
    assert frozen
    assert all(torch.equal(found[name], value) for name, value in frozen.items())
    assert all(map(torch.equal, trainer.stages.rollout.initial.parameters, start))


def test_the_reference_of_an_sft_adapter_is_the_base_with_that_adapter(training):
    sft = training.run(
        "sft",
        model=load_model(saved(training)),
        name="sft",
        learning_rate=1e-2,
        options={"peft_config": training.lora()},
    )
    sft.save_model()
    start = load_model(sft.args.output_dir)
    trainer = training.trainer(
        "rft", model=load_model(sft.args.output_dir), data=training.rows(20), name="rft", **{**QUICK, "beta": 0.1}
    )
    trainer.train()
    assert phases(trainer) == [1, 1]
    for stage in (0, 1):
        groups = trainer.stages.store.groups(stage)
        found = torch.tensor([group.sums("reference_logps") for group in groups])
        torch.testing.assert_close(found, torch.tensor(cached_logps(start, groups)), atol=1e-4, rtol=0)
        with start.disable_adapter():
            assert (found - torch.tensor(cached_logps(start, groups))).abs().mean() > 0.1
    old = torch.tensor([group.sums("old_logps") for group in trainer.stages.store.groups(1)])
    assert (old - found).abs().mean() > 1e-3, "the policy had moved by then"


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_the_policy_stays_while_the_reward_warms_up(training, optimizer):
    snapshots = Snapshots()
    trainer = make(training, reward_warmup_stages=1, weight_decay=0.1, options={"callbacks": [snapshots]}, **optimizer)
    reward = [parameter.detach().clone() for parameter in trainer.reward.parameters]
    trainer.train()
    assert phases(trainer) == [0, 1]
    assert_same_weights(snapshots.models[2], snapshots.models[0])
    assert distance(snapshots.models[3], snapshots.models[0]) > 1e-5
    assert any(not torch.equal(a, b) for a, b in zip(trainer.reward.parameters, reward, strict=True))


@pytest.mark.parametrize("optimizer", [{"optim": "adamw_torch"}, {"optim": "sgd", "optim_args": "momentum=0.9"}])
def test_a_policy_phase_left_out_moves_nothing_by_momentum_or_decay(training, optimizer):
    snapshots = Snapshots()
    trainer = make(training, weight_decay=0.1, options={"callbacks": [snapshots]}, **optimizer)
    plant(trainer, lambda c: over_samples(c) if trainer.stage == 0 else -over_samples(c))
    trainer.train()
    assert phases(trainer) == [1, 0]
    assert distance(snapshots.models[1], snapshots.models[0]) > 1e-5
    assert_same_weights(snapshots.models[4], snapshots.models[2])


# --- the gate ------------------------------------------------------------------------------------------------------------


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "tutelage.training.reward_phase"]


@pytest.mark.parametrize(
    ("reward", "said"),
    [
        (lambda c: -over_samples(c), r"does not beat chance on the validation rows: accuracy 0.00"),
        (spread, r"does not beat chance.*: accuracy 0\.\d\d \(0\.\d\d to"),
        (lambda c: 1.0, "the reward is the same for all samples"),
    ],
)
def test_a_reward_that_knows_nothing_moves_no_policy(training, caplog, reward, said):
    trainer = plant(make(training), reward)
    start = copy.deepcopy(trainer.policy)
    trainer.train()
    assert phases(trainer) == [0, 0]
    assert trainer.state.global_step == 4, "the run goes on"
    assert_same_weights(trainer.policy, start)
    first, second = warnings_of(caplog)
    assert re.search("stage 0: the policy stays as it is: .*" + said, first)
    assert second.startswith("stage 1: ")
    reason = json.loads((trainer.stages.store.path(1) / "reward.json").read_text(encoding="utf-8"))["reason"]
    assert re.search(said, reason)


def test_a_warm_up_is_no_warning_and_a_saturated_reward_is_one(training, caplog):
    trainer = run(training, reward_warmup_stages=9, early_stopping="saturated", saturation=0.51, reward_epochs=4)
    assert phases(trainer) == [0, 0]
    said = warnings_of(caplog)
    assert said
    assert all("reward phase ended after" in line for line in said)
    assert history(trainer, "reward/saturated") == [float(f"stage {s}" in " ".join(said)) for s in (0, 1)]
    assert all(steps < 8 for steps in history(trainer, "reward/steps") if steps)


def test_samples_that_are_all_cut_teach_nothing_and_that_is_said(training, caplog):
    trainer = run(
        training, truncated_samples="floor", options={"sampler": Scripted(lambda row: [ANSWERS[1], ((7,) * 8, False)])}
    )
    assert history(trainer, "samples/truncated_fraction") == [1, 1]
    assert phases(trainer) == [0, 0]
    assert "raise --max_completion_length or use --truncated_samples score" in warnings_of(caplog)[0]
    assert not (trainer.stages.store.path(0) / "reward.safetensors").exists()


# --- validation rows ---------------------------------------------------------------------------------------------


def talks(count):
    return Dataset.from_list(
        [
            {
                "messages": [
                    {"role": role, "content": f"{i} {turn} {role}"}
                    for turn in range(2)
                    for role in ("user", "assistant")
                ]
            }
            for i in range(count)
        ]
    )


@pytest.mark.parametrize("kind", ["rows", "stream", "repeated stream", "repeated rows", "all turns"])
def test_kept_rows_train_neither_policy_nor_reward(training, kind):
    rows, settings = training.rows(20), {}
    if kind == "repeated rows":
        rows = Dataset.from_list([*rows, *rows])
    if kind == "all turns":
        rows, settings = talks(12), {"turns": "all"}
    if "stream" in kind:
        rows, settings = rows.to_iterable_dataset(), {"max_steps": 4 if kind == "stream" else 8}
    if kind == "repeated stream":
        rows = rows.repeat(3)
    trainer = make(training, data=rows, **settings)
    plant(trainer, over_samples)
    policy, reward = trained_on(trainer)
    trainer.train()
    assert set(phases(trainer)) == {1}
    # The policy phase trains on samples alone, so there the prompt tells.
    kept = {group.prompt_ids for group in trainer.stages.phase.candidates.rows.groups}
    assert len(kept) == (8 if kind == "all turns" else 4)
    assert all(len(seen) > 8 and kept.isdisjoint(group.prompt_ids for group in seen) for seen in (policy, reward))
    everything = 24 if kind == "all turns" else 20
    assert len({group.prompt_ids for group in reward}) == everything - len(kept), "all others do"
    recorded = {group.prompt_ids for group in trainer.stages.store.groups(0, "validation")}
    assert recorded == kept


def test_how_many_rows_are_kept(training):
    settings = {**QUICK, "validation_rows": None}
    assert len(training.trainer("rft", data=training.rows(40), **settings).stages.phase.candidates.rows.groups) == 16
    assert len(training.trainer("rft", data=training.rows(200), **settings).stages.phase.candidates.rows.groups) == 20
    assert (
        len(training.trainer("rft", data=training.rows(1300), **settings).stages.phase.candidates.rows.groups) == 128
    )
    other = training.trainer("rft", data=training.rows(40), seed=1, **settings).stages.phase.candidates.rows.groups
    assert other != training.trainer("rft", data=training.rows(40), **settings).stages.phase.candidates.rows.groups


# --- the choice ----------------------------------------------------------------------------------------------------------


class Judged:
    """A reward that gives every candidate's samples the value it is told, and every demonstration more."""

    def __init__(self, trainer, values):
        self.trainer, self.values = trainer, values
        trainer.reward.scores = self.scores

    def scores(self, groups):
        stage = next((s for s, c in self.trainer.stages.phase.candidates.by_stage.items() if c.groups is groups), None)
        value = None if stage is None else self.values(self.trainer.stage).get(stage, 0.0)
        return [
            tuple(
                99.0 if c.role == Role.DEMONSTRATION else spread(c) if value is None else value for c in g.completions
            )
            for g in groups
        ]


def judged_run(training, values, **settings):
    snapshots = Snapshots()
    trainer = make(training, stages_per_epoch=4, adapter=True, options={"callbacks": [snapshots]}, **settings)
    Judged(trainer, values)
    trainer.train()
    assert phases(trainer) == [1] * 4
    return trainer, snapshots.models


def chosen(trainer):
    (stage,) = [entry["stage"] for entry in trainer.stages.phase.selection if entry["chosen"]]
    return stage


@pytest.mark.parametrize("best", [0, 1, 4])
def test_the_best_candidate_is_what_is_exported(training, best):
    trainer, models = judged_run(training, lambda stage: {best: 5.0}, beta=0.0)
    assert [entry["stage"] for entry in trainer.stages.phase.selection] == [0, 1, 2, 3, 4]
    assert [entry["reward"] for entry in trainer.stages.phase.selection] == [
        5.0 * (stage == best) for stage in range(5)
    ]
    assert chosen(trainer) == best
    assert_same_weights(trainer.policy, models[best])
    assert all(distance(models[best], model) > 1e-5 for stage, model in enumerate(models) if stage != best)
    groups = trainer.stages.store.groups(best, "validation")
    found = torch.tensor(cached_logps(trainer.policy, groups))
    torch.testing.assert_close(found, torch.tensor([g.sums("old_logps") for g in groups]), atol=1e-4, rtol=0)


def test_the_start_wins_where_nothing_beats_it(training):
    trainer, models = judged_run(training, lambda stage: {}, beta=0.0)
    assert chosen(trainer) == 0
    assert_same_weights(trainer.policy, models[0])


def test_reward_is_weighed_against_kl(training):
    """A β so large that the KL decides, though later stages have more reward."""
    trainer, models = judged_run(
        training, lambda stage: {s: 0.01 * s for s in range(5)}, beta=50.0, learning_rate=1e-2
    )
    for entry in trainer.stages.phase.selection:
        assert entry["objective"] == pytest.approx(entry["reward"] - 50.0 * entry["kl"], abs=1e-4)
    best = max(trainer.stages.phase.selection, key=lambda entry: entry["objective"])
    assert best["kl"] < trainer.stages.phase.selection[-1]["kl"]
    assert trainer.stages.phase.selection[0]["kl"] == 0
    assert (best["stage"], best["chosen"]) == (chosen(trainer), True)
    assert_same_weights(trainer.policy, models[best["stage"]])


def test_a_reward_that_changes_its_mind_finds_the_start_again(training):
    """It prefers the start, then a candidate whose weights are gone by then, and in the end the start among those left."""
    values = {1: {0: 5.0}, 2: {0: 5.0, 1: 0.0, 2: 1.0}, 3: {0: 5.0, 1: 9.0, 2: 0.0, 3: 1.0}}
    last = {0: 5.0, 1: 9.0, 2: 0.0, 3: 1.0, 4: 0.0}
    trainer = None

    def of(stage):
        return last if trainer is not None and 4 in trainer.stages.phase.candidates.by_stage else values.get(stage, {})

    snapshots = Snapshots()
    trainer = make(training, stages_per_epoch=4, beta=0.0, options={"callbacks": [snapshots]})
    Judged(trainer, of)
    trainer.train()
    assert chosen(trainer) == 0
    assert_same_weights(trainer.policy, snapshots.models[0])
    assert [entry["reward"] for entry in trainer.stages.phase.selection] == [5.0, 9.0, 0.0, 1.0, 0.0]


def test_candidates_are_compared_on_one_scale():
    """Scaled each by its own spread, the second would look worse, though each of its samples has the higher reward."""

    def candidate(stage, *samples):
        zero = {"reference_logps": (0.0,), "old_logps": (0.0,)}
        completions = [Completion((9,), Role.DEMONSTRATION, True, zero, {"reward": 20.0})]
        completions += [Completion((i + 1,), Role.SAMPLE, True, zero, {"reward": r}) for i, r in enumerate(samples)]
        return Candidate(stage, [Group((1,), tuple(completions))] * 4)

    both = [candidate(0, 10.0, 10.5), candidate(1, 11.0, 17.0)]
    first, second = compare(both, [c.groups for c in both], beta=0.1, truncated_samples="score")
    assert second.reward.mean > first.reward.mean
    assert second.objective > first.objective
    scale = math.sqrt((0.125 + 18.0) / 2)  # variances of two samples: 0.5² / 2 and 6² / 2
    assert first.objective == pytest.approx(10.25 / scale)
    assert second.objective == pytest.approx(14.0 / scale)


# --- cut samples ---------------------------------------------------------------------------------------------------------

ANSWERS = [((9, 10, 2), True), ((9, 11, 8), False), ((9, 12, 2), True)]
PLANTED = {(9, 10, 2): 0.1, (9, 11, 8): 0.3, (9, 12, 2): 0.2}


@pytest.mark.parametrize(
    ("truncated_samples", "rewards", "compared"),
    [("floor", [0.1, 0.1, 0.2], 2), ("score", [0.1, 0.3, 0.2], 3), ("drop", [0.1, 0.2], 2)],
)
def test_cut_samples(training, truncated_samples, rewards, compared):
    trainer = make(
        training,
        truncated_samples=truncated_samples,
        num_samples=3,
        options={"sampler": Scripted(lambda row: ANSWERS)},
    )
    plant(trainer, lambda c: PLANTED.get(c.token_ids, 0.9))
    policy, reward = trained_on(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert len(policy) == len(reward) == 16
    assert all(group.values("scaled_reward") == pytest.approx(rewards) for group in policy)
    assert all(len(group.completions) == 1 + compared for group in reward)
    assert {c.role for group in policy for c in group.completions} == {Role.SAMPLE}
    # In the choice among policies a sample that was left out counts as the worst of all, 0.1.
    mean = (0.1 + 0.3 + 0.2) / 3 if truncated_samples == "score" else (0.1 + 0.1 + 0.2) / 3
    assert history(trainer, "validation/reward")[0] == pytest.approx(mean)


def test_a_prompt_with_one_sample_left_is_left_out(training):
    cut = [ANSWERS[0], ((9, 11, 8), False)]
    trainer = make(
        training, truncated_samples="drop", options={"sampler": Scripted(lambda row: cut if row % 2 else [cut[0]] * 2)}
    )
    plant(trainer, lambda c: PLANTED.get(c.token_ids, 0.9))
    policy, _ = trained_on(trainer)
    trainer.train()
    assert phases(trainer) == [1, 1]
    assert policy
    assert all(group.row % 2 == 0 for group in policy)


def test_rewards_are_scaled_down_by_their_spread_and_never_up(training):
    trainer = make(training, num_samples=3, options={"sampler": Scripted(lambda row: ANSWERS)})
    plant(trainer, lambda c: 100 * PLANTED.get(c.token_ids, 0.9))
    policy, _ = trained_on(trainer)
    trainer.train()
    assert [group.values("scaled_reward") for group in policy] == [
        pytest.approx((1.0, 3.0, 2.0))
    ] * 16  # the spread is 10
    assert history(trainer, "scale") == pytest.approx([10, 10])
    lines = trainer.stages.store.lines(0, "rewards")
    assert [line["rewards"][1:] for line in lines] == [pytest.approx((10, 30, 20))] * 8


# --- what the reward learns from -----------------------------------------------------------------------------------------

PAIRS = [{"prompt": f"Is {i}?", "chosen": f" Yes, {i}.", "rejected": f" No, {i}."} for i in range(6)]


def test_preference_pairs_teach_the_reward(training):
    options = {"preference_dataset": Dataset.from_list(PAIRS)}
    trainer = run(training, options=options, demonstration_weight=0.0, num_train_epochs=2, reward_epochs=4)
    assert len(trainer.stages.phase.fitter.preferences) == 6
    assert history(trainer, "preference/accuracy")[-1] == 1.0
    groups = trainer.stages.phase.fitter.preferences
    assert {group.completions[0].role for group in groups} == {Role.PREFERRED}
    without = run(training, name="without", reward_epochs=4)
    assert not history(without, "preference/accuracy")
    assert any(
        not torch.equal(a, b) for a, b in zip(trainer.reward.parameters, without.reward.parameters, strict=True)
    )


def test_preference_data_without_a_pair(training):
    options = {"preference_dataset": training.rows(4), "preference_source": "pairs.jsonl"}
    with pytest.raises(UserError, match=r"pairs.jsonl, field 'preference_dataset': there is no preference pair in it"):
        make(training, options=options)


@pytest.mark.parametrize("adapter", [False, True])
def test_the_reward_may_learn_from_samples_of_the_start(training, adapter):
    """They are what sampling the start gives, once the policy is another; and they are counted."""
    trainer = make(training, adapter=adapter, reward_pairs="demonstration_vs_sample+initial")
    plant(trainer, over_samples)
    start = copy.deepcopy(trainer.policy)
    _, reward = trained_on(trainer)
    trainer.train()
    assert not (trainer.stages.store.path(0) / "initial.jsonl").exists(), "the policy was the start"
    groups = trainer.stages.store.groups(1)
    drawn = TransformersSampler(start, pad_token_id=trainer.tokenization.pad_id).sample(
        [group.prompt_ids for group in groups],
        trainer.stages.rollout.params,
        num_samples=2,
        rows=[group.row for group in groups],
        stage=INITIAL_POLICY + 1,
    )
    found = trainer.stages.store.groups(1, "initial")
    assert [g.completions[1:] for g in found] == [tuple(sample.completion for sample in row) for row in drawn]
    assert [g.completions[0] for g in found] == [g.completions[0] for g in groups]
    assert len(reward) == 8 + 8 + 8
    assert {g.completions for g in found} < {g.completions for g in reward}
    sampled = [*trainer.stages.store.groups(0), *groups, *found]
    sampled += [g for stage in (0, 1, 2) for g in trainer.stages.store.groups(stage, "validation")]
    assert trainer.costs.sampled_tokens == sum(len(c.token_ids) for g in sampled for c in g.completions[1:])


def test_the_reward_may_learn_again_from_earlier_samples(training):
    trainer = make(training, stages_per_epoch=4, reward_replay_stages=2)
    plant(trainer, over_samples)
    _, reward = trained_on(trainer)
    trainer.train()
    own = [{group.completions for group in trainer.stages.store.groups(stage)} for stage in range(4)]
    assert [len(groups) for groups in own] == [4] * 4
    ends = [0, 4, 12, 24, 36]
    for stage in range(4):
        fitted = [group.completions for group in reward[ends[stage] : ends[stage + 1]]]
        assert len(fitted) == 4 * min(3, stage + 1)
        assert set(fitted) == set().union(*own[max(0, stage - 2) : stage + 1])
    assert len(reward) == 36


@pytest.mark.parametrize("adapter", [False, True])
def test_batch_one_accumulated_four_times_is_batch_four(training, adapter):
    settings = {"adapter": adapter, **SGD, "reward_learning_rate": 0.05, "num_train_epochs": 2, "beta": 0.1}
    runs, ends = [], []
    for size in (1, 4):
        snapshots = Snapshots()
        options = {"preference_dataset": Dataset.from_list(PAIRS), "callbacks": [snapshots]}
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        runs.append(run(training, name=str(size), options=options, **sizes, **settings))
        ends.append(snapshots.models)
    one, four = runs
    assert phases(one) == phases(four)
    assert 1 in phases(one)
    assert one.state.global_step == four.state.global_step == 8
    assert distance(ends[0][0], ends[0][-1]) > 1e-4
    assert_same_weights(ends[0][-1], ends[1][-1], 1e-5)
    start = make(training, name="start", adapter=adapter).reward.parameters
    assert max((a - b).abs().max() for a, b in zip(one.reward.parameters, start, strict=True)) > 1e-2
    for found, expected in zip(one.reward.parameters, four.reward.parameters, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert chosen(one) == chosen(four)


# --- bad input -----------------------------------------------------------------------------------------------------------

BAD_SETTINGS = {
    "one sample": ({"num_samples": 1}, r"'num_samples'.*1 is too few"),
    "replay": ({"replay_stages": 1}, r"'replay_stages'.*--reward_replay_stages"),
    "fp16": ({"fp16": True}, r"'fp16'.*--bf16"),
    "no pass": ({"reward_epochs": 0}, r"'reward_epochs': must be at least 1, not 0"),
    "no step": ({"reward_steps": 0}, r"'reward_steps': must be at least 1"),
    "no kept row": ({"validation_rows": 0}, r"'validation_rows': must be at least 1"),
    "beta below 0": ({"beta": -0.1}, r"'beta': must not be below 0"),
    "warm-up below 0": ({"reward_warmup_stages": -1}, r"'reward_warmup_stages': must not"),
    "no reward rate": ({"reward_learning_rate": 0.0}, r"'reward_learning_rate': must be above 0"),
    "smoothing": ({"reward_label_smoothing": 0.5}, r"'reward_label_smoothing': .*below 0.5"),
    "saturation": ({"saturation": 0.5}, r"'saturation': .*above 0.5"),
    "clip range": ({"clip_range": 0.0}, r"'clip_range': must be above 0"),
    "reference": ({"reference": "stage"}, r"'reference': must be one of initial"),
    "reward loss": ({"reward_loss": "hinge"}, r"'reward_loss': must be one of logistic, linear"),
    "reward pairs": ({"reward_pairs": "all"}, r"'reward_pairs': must be one of"),
    "early stopping": ({"early_stopping": "yes"}, r"'early_stopping': must be one of"),
    "cut samples": ({"truncated_samples": "keep"}, r"'truncated_samples': must be one of floor, score, drop"),
    "advantages": ({"advantages": "none"}, r"'advantages': must be one of"),
    "kl": ({"kl": "none"}, r"'kl': must be one of reward, loss"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_make_no_sense(tmp_path, case):
    settings, said = BAD_SETTINGS[case]
    with pytest.raises(UserError, match=said):
        RFTConfig(output_dir=str(tmp_path), **settings)


def test_too_few_rows(training):
    with pytest.raises(
        UserError, match=r"sums.jsonl, field 'validation_rows': 4 of 7 rows would be kept from training"
    ):
        make(training, data=training.rows(7), options={"source": "sums.jsonl"})
    with pytest.raises(UserError, match="16 of 20 rows"):
        make(training, validation_rows=None)
    with pytest.raises(UserError, match="2 stages do not fit into an epoch of 1"):
        make(training, data=training.rows(8))
    with pytest.raises(UserError, match=r"every row is also among those kept"):
        make(training, data=Dataset.from_list([training.rows(1)[0]] * 20))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("base", "the reward's base differs"),
        ("rank", r"another shape.*--lora_r"),
        ("missing", "no reward is there"),
        ("full", "needs a model with an adapter"),
    ],
)
def test_rewards_that_cannot_be_gone_on_from(training, change, said):
    earlier = make(training, adapter=True, name="earlier")
    earlier.export(training.folder / "earlier")
    folder = training.folder / "earlier" / ("nothing" if change == "missing" else "reward")
    options = {"peft_config": None if change == "full" else training.lora(r=2 if change == "rank" else 4)}
    model = training.model(seed=1) if change == "base" else training.model()
    settings = {**QUICK, "init_reward_from": str(folder)}
    with pytest.raises(UserError, match=rf"{folder}, field 'init_reward_from': .*{said}"):
        training.trainer("rft", model=model, data=training.rows(20), options=options, **settings)


def test_a_reward_goes_on_from_an_earlier_one(training):
    earlier = run(training, adapter=True, name="earlier")
    earlier.export(training.folder / "earlier")
    later = make(training, adapter=True, name="later", init_reward_from=str(training.folder / "earlier" / "reward"))
    fresh = make(training, adapter=True, name="fresh")
    for found, expected in zip(later.reward.parameters, earlier.reward.parameters, strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)
    assert any(not torch.equal(a, b) for a, b in zip(fresh.reward.parameters, later.reward.parameters, strict=True))
    assert_same_weights(later.policy, fresh.policy)


def test_a_seed_decides_the_adapter_of_a_separate_reward(training):
    """And an adapter that an earlier run left on the policy decides its shape."""
    name = saved(training, "small", training.model(hidden_size=16, num_hidden_layers=1, head_dim=4))
    first = make(training, adapter=True, reward_model_name_or_path=name)
    torch.rand(7)
    second = make(training, adapter=True, reward_model_name_or_path=name)
    assert all(map(torch.equal, first.reward.parameters, second.reward.parameters))
    other = make(training, adapter=True, reward_model_name_or_path=name, seed=7)
    assert not all(map(torch.equal, first.reward.parameters, other.reward.parameters))
    start = get_peft_model(training.model(), training.lora(r=2, target_modules=["q_proj"]))
    continued = make(training, data=training.rows(20), model=start, reward_model_name_or_path=name)
    assert [tuple(p.shape) for p in continued.reward.parameters] == [(2, 16), (16, 2), (1, 16)]


def test_a_reward_model_with_another_tokenizer(training):
    other = tiny_tokenizer("llama3")
    tiny_model(vocab_size=len(other)).save_pretrained(training.folder / "other")
    other.save_pretrained(training.folder / "other")
    with pytest.raises(UserError, match=r"'reward_model_name_or_path': the tokenizer of .*other is not the policy's"):
        make(training, reward_model_name_or_path=str(training.folder / "other"))


@pytest.mark.parametrize("rate", [1e30, 1e38], ids=["loss", "reward"])
@pytest.mark.parametrize("passes", [1, 4])
def test_a_reward_that_is_not_finite_stops_the_run(training, rate, passes):
    trainer = make(
        training,
        reward_learning_rate=rate,
        reward_epochs=passes,
        save_strategy="steps",
        save_steps=1,
        reward_loss="linear",
    )
    start = copy.deepcopy(trainer.policy)
    with pytest.raises(NonFiniteLossError, match=r"of the reward|reward of a completion"):
        trainer.train()
    assert_same_weights(trainer.policy, start)
    written = {path.name for path in (training.folder / "run").rglob("*")}
    assert not written & {"reward.safetensors", "reward-optimizer.pt", "scored.jsonl", "policy", "reward"}
    assert not any(name.startswith("checkpoint") for name in written)


# --- what is exported ----------------------------------------------------------------------------------------------------

SETUPS = ["adapter", "full", "full, tied", "adapter, tied", "separate, adapter", "separate, full"]


@pytest.fixture(scope="module", params=SETUPS)
def exported(request, tmp_path_factory):
    """A run that is over and has written its policy and its reward."""
    training = Training(tmp_path_factory.mktemp("exported"))
    architecture = {"architecture": "gemma3", "num_hidden_layers": 3} if "tied" in request.param else {}
    policy = saved(training, model=training.model(pad_token_id=None, **architecture))
    settings = {}
    if "separate" in request.param:
        small = training.model("gpt_neox", hidden_size=16, num_hidden_layers=1, pad_token_id=None)
        settings["reward_model_name_or_path"] = saved(training, "small", small)
    options = {"peft_config": training.lora() if "adapter" in request.param else None}
    trainer = training.trainer(
        "rft",
        model=load_model(policy),
        data=training.rows(20),
        options=options,
        max_completion_length=6,
        **{**QUICK, "num_train_epochs": 2, **settings},
    )
    plant(trainer, over_samples)  # so that the policy moves
    trainer.train()
    del trainer.reward.scores
    trainer.export(training.folder / "out")
    assert phases(trainer) == [1] * 4
    return trainer, training.folder / "out"


def test_the_exported_policy_is_the_trainers(exported):
    trainer, folder = exported
    policy = load_model(str(folder), dtype=torch.float32)
    groups = trainer.stages.store.groups(0)
    found, expected = (torch.tensor(cached_logps(model, groups)) for model in (policy, trainer.policy))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert len(load_tokenizer(str(folder))) == len(trainer.tokenization.tokenizer)
    base, theirs = base_causal_lm(policy), base_causal_lm(trainer.policy)
    tied = theirs.config.tie_word_embeddings
    assert (base.get_input_embeddings().weight.data_ptr() == base.get_output_embeddings().weight.data_ptr()) == tied


def test_a_merged_policy_is_the_same_one(exported, tmp_path):
    """Merged into its base, saved and loaded without peft; embeddings that were tied still are."""
    trainer, folder = exported
    policy = load_model(str(folder / "policy"))
    whole = policy.merge_and_unload() if isinstance(policy, PeftModel) else policy
    whole.save_pretrained(tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"))
    assert not isinstance(merged, PeftModel)
    groups = trainer.stages.phase.candidates.rows.groups
    found, expected = (torch.tensor(cached_logps(model, groups)) for model in (merged, trainer.policy))
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
    tied = merged.config.tie_word_embeddings
    assert (merged.get_input_embeddings().weight is merged.get_output_embeddings().weight) == tied


def test_each_exported_adapter_names_its_base(exported):
    trainer, folder = exported
    for part in ("policy", "reward"):
        config = folder / part / "adapter_config.json"
        if config.exists():
            of = trainer.policy if part == "policy" else trainer.reward.model
            name = json.loads(config.read_text(encoding="utf-8"))["base_model_name_or_path"]
            assert name == base_causal_lm(of).name_or_path
    shared = trainer.reward.model is trainer.policy
    assert shared == (base_causal_lm(trainer.reward.model).name_or_path == base_causal_lm(trainer.policy).name_or_path)


def test_the_same_completion_gets_one_reward_everywhere(exported, tmp_path, capsys):
    """While fitting, from the trainer, from `tutelage score` and from transformers alone."""
    trainer, folder = exported
    rows = [{"prompt": f"What is {i} + {i}?", "completion": f" The answer is the number {2 * i}"} for i in range(4)]
    rows += [{"prompt": "Yes?", "completion": " No"}]
    data, output = tmp_path / "rows.jsonl", tmp_path / "scored.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["score", "--reward", str(folder), "--dataset_name", str(data), "--output", str(output)]) == 0, (
        capsys.readouterr().err
    )
    scored = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    found = torch.tensor([line["completions"][0]["reward"] for line in scored])
    groups = [
        Group(
            trainer.tokenization.prompt_ids(row["prompt"]),
            (trainer.tokenization.completion(row["prompt"], row["completion"], Role.DEMONSTRATION),),
        )
        for row in rows
    ]
    assert {group.completions[0].finished for group in groups} == {True, False}
    expected = trainer.reward.score(groups)
    trainer.reward.model.eval()
    with torch.no_grad(), trainer.reward.active():
        fitted = trainer.reward.rewards(groups)
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "reward", num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        alone = torch.cat(
            [plain.eval()(torch.tensor([[*g.prompt_ids, *g.completions[0].token_ids]])).logits[:, 0] for g in groups]
        )
    assert expected.std() > 1e-2
    for other in (found, fitted, alone):
        torch.testing.assert_close(other, expected, atol=1e-5, rtol=1e-5)


# --- a task whose right answer is known ----------------------------------------------------------------------------------

WORDS = [" the", " is", " and", " that"]
QUESTIONS = [f"{i}?" for i in range(10, 42)]


@pytest.fixture(scope="module")
def guesser(tmp_path_factory):
    """A model that answers each question with one of four words, about equally often."""
    training = Training(tmp_path_factory.mktemp("guesser"))
    rows = [{"prompt": question, "completion": word} for question in QUESTIONS for word in WORDS]
    trainer = training.run(
        "sft",
        data=Dataset.from_list(rows),
        num_train_epochs=6,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        lr_scheduler_type="linear",
        logging_steps=1000,
    )
    trainer.export(training.folder / "guesser")
    return str(training.folder / "guesser")


@pytest.fixture
def marks(tmp_path, monkeypatch):
    """A verifier: whether the answer is the first word."""
    source = f"""
        def right(text, row):
            return float(text == {WORDS[0]!r})
    """
    (tmp_path / "tutelage_rft_marks.py").write_text(textwrap.dedent(source))
    monkeypatch.syspath_prepend(tmp_path)
    return "tutelage_rft_marks:right"


def chances(model, training, words):
    tokenization = Tokenization(training.tokenizer, max_completion_length=8)
    groups = [
        Group(
            tokenization.prompt_ids(question),
            tuple(tokenization.completion(question, word, Role.SAMPLE) for word in words),
        )
        for question in QUESTIONS
    ]
    return torch.tensor(cached_logps(model, groups)).exp().mean(0).tolist()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_planted_answer_is_learned(training, guesser, marks, seed):
    """Demonstrations always give the first word; the reward finds it, and the policy follows."""
    before = chances(load_model(guesser), training, WORDS)
    assert all(0.1 < chance < 0.5 for chance in before)
    rows = [{"prompt": question, "completion": WORDS[0]} for question in QUESTIONS]
    trainer = run(
        training,
        model=load_model(guesser),
        adapter=True,
        data=Dataset.from_list(rows),
        seed=seed,
        verifier=marks,
        num_train_epochs=3,
        num_samples=4,
        validation_rows=8,
        reward_warmup_stages=1,
        learning_rate=5e-3,
        truncated_samples="floor",
        reward_epochs=4,
        beta=0.1,
    )
    after = chances(trainer.policy, training, WORDS)
    assert after[0] > before[0] + 0.2
    verifier_scores = {entry["stage"]: entry["verifier_score"] for entry in trainer.stages.phase.selection}
    assert verifier_scores[chosen(trainer)] > verifier_scores[0] + 0.1
    assert history(trainer, "validation/verifier_score")[0] == pytest.approx(verifier_scores[0])
    assert history(trainer, "validation/verifier_gap")[-1] > 0
    assert trainer.record(name="x").selection == trainer.stages.phase.selection


# --- the command line ----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(training, capsys):
    """Runs a command that must succeed; returns what it printed, on one line."""

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        shown, error = capsys.readouterr()
        assert code == 0, error
        return " ".join(shown.split())

    return call


class FakeHub:
    def __init__(self):
        self.files = []

    def create_repo(self, name, **kwargs):
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, *, folder_path, ignore_patterns, **kwargs):
        files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        self.files += filter_repo_objects(files, ignore_patterns=ignore_patterns)


def test_the_command_line(training, command, monkeypatch, guesser, marks):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr("tutelage.training.trainer.upload_folder", hub.upload_folder)
    data, pairs, out = (training.folder / name for name in ("rows.jsonl", "pairs.jsonl", "out"))
    rows = [{"prompt": question, "completion": WORDS[0]} for question in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    length = ["--max_completion_length", 6, "--dtype", "float32"]
    arguments = ["rft", "--model_name_or_path", guesser, "--dataset_name", data, "--output_dir", out, "--use_peft"]
    arguments += ["--validation_rows", 8, "--reward_warmup_stages", 1, "--verifier", marks, "--bf16", "false", *length]
    arguments += ["--per_device_train_batch_size", 4, "--num_train_epochs", 1, "--stages_per_epoch", 3]
    arguments += ["--preference_dataset", pairs, "--eval_dataset_name", data, "--eval_rows", 8, "--logging_steps", 1]
    arguments += ["--reward_learning_rate", 1e-2, "--learning_rate", 1e-3]
    shown = command(*arguments, "--push_to_hub")
    assert str(out / "report.html") in shown.replace(" ", "")
    for file in ("policy/adapter_model.safetensors", "reward/adapter_model.safetensors", "reward/reward.json"):
        assert (out / file).exists()
        assert file in hub.files
    assert "README.md" in hub.files
    assert not [file for file in hub.files if "stages" in file or "checkpoint" in file or "results" in file]
    assert "chosen" in (out / "README.md").read_text() or "these are its weights" in (out / "README.md").read_text()
    record = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert record["algorithm"] == "rft"
    assert sum(entry["chosen"] for entry in record["selection"]) == 1
    assert all(entry["verifier_score"] is not None for entry in record["selection"])
    assert record["evaluation"]["means"]["reward_accuracy"]["n"] <= 8
    assert "verifier score" in (out / "report.html").read_text(encoding="utf-8").lower()

    weights_of = {name: (out / name / "adapter_model.safetensors").read_bytes() for name in ("policy", "reward")}
    command(*arguments, "--resume")
    again = json.loads((out / "results.json").read_text(encoding="utf-8"))
    assert again["selection"] == record["selection"]
    assert (again["trained_tokens"], again["sampled_tokens"]) == (record["trained_tokens"], record["sampled_tokens"])
    for name, content in weights_of.items():
        assert (out / name / "adapter_model.safetensors").read_bytes() == content

    evaluation = training.folder / "evaluation"
    command("evaluate", "--model_name_or_path", out, "--dataset_name", data, "--output_dir", evaluation, *length)
    found = json.loads((evaluation / "out" / "results.json").read_text(encoding="utf-8"))["evaluation"]
    assert len(found["rows"]) == len(QUESTIONS)
    scored = training.folder / "scored.jsonl"
    shown = command("score", "--reward", out / "reward", "--dataset_name", pairs, "--output", scored)
    assert "accuracy, preferred over rejected" in shown
    assert len(scored.read_text(encoding="utf-8").splitlines()) == 6


def test_passes_go_over_the_samples_of_a_stage_again(training):
    """Each pass trains on the same scored samples; from the second on the policy is no longer the one that drew them."""
    trainer, seen = make(training, policy_epochs=3, per_device_train_batch_size=4, **SGD), []
    step_of, loss = trainer._step_of, trainer.objective.loss

    def seen_by_loss(tokens, step):
        seen[-1][1].append((tokens.sums().detach() - tokens.known_sums("old_logps")).abs().max().item())
        return loss(tokens, step)

    def noted(batches):
        seen.append((trainer.stage, [], frozenset(group for batch in batches for group in batch)))
        return step_of(batches)

    trainer.objective.loss, trainer._step_of = seen_by_loss, noted
    trainer.train()
    assert trainer.state.global_step == 12
    for stage in (0, 1):
        steps = [(distances, groups) for at, distances, groups in seen if at == stage]
        assert [groups for _, groups in steps[:2]] * 3 == [groups for _, groups in steps], (
            "the same, in the same order"
        )
        moved = [max(distances) for distances, _ in steps if distances]
        assert len(moved) == 6, "each step of the policy phase had something to train on"
        assert moved[0] < 1e-4 < 1e-3 < moved[2]


def test_streamed_data_have_one_pass(training):
    data = training.rows(20).to_iterable_dataset()
    with pytest.raises(UserError, match="policy_epochs"):
        make(training, data=data, policy_epochs=2, max_steps=4)


def test_neither_rows_nor_pairs_of_a_kept_prompt_train(training):
    """The natural call gives the same file twice; a reward that knew the kept answers would pass any gate."""
    rows = [
        {"prompt": f"Is {i}?", "chosen": answer, "rejected": " No"}
        for i in range(20)
        for answer in (" It is.", " So it is.")
    ]
    data = Dataset.from_list(rows)
    trainer = make(training, data=data, options={"preference_dataset": data})
    kept = {group.prompt_ids for group in trainer.stages.phase.candidates.rows.groups}
    assert kept
    assert kept.isdisjoint(tuple(row["prompt_ids"]) for row in trainer.train_dataset)
    assert trainer.stages.phase.fitter.preferences
    assert kept.isdisjoint(pair.prompt_ids for pair in trainer.stages.phase.fitter.preferences)


def test_a_preference_dataset_that_nobody_loads_is_an_error(training):
    with pytest.raises(UserError, match="given no preference data"):
        make(training, preference_dataset="pairs.jsonl")
