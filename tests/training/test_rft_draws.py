"""Draws inside a stage: who draws, what the reward sees, what lies on disk, and that a killed run ends the same."""

import json
import shutil

import pytest
import torch
from datasets import Dataset
from test_resume import CountingSampler, KillAt, Killed
from test_rft_resume import assert_equal
from transformers.trainer_utils import get_last_checkpoint

from rft_runs import QUICK, readable
from training_runs import Snapshots, Training, history, weights
from tutelage.errors import UserError
from tutelage.groups import Role
from tutelage.sampling import TransformersSampler
from tutelage.scoring.logps import cached_token_logps
from tutelage.training.folds import Folds

# 16 rows with a demonstration and 16 without: 8 steps in two stages of four.
PROMPTS = Dataset.from_dict({"prompt": [f"Is {i} more than {i + 1}?" for i in range(16)]})
SETTINGS = {
    **QUICK,
    "reward": "features",
    "reward_negatives": "own,initial,out_of_fold",
    "reward_gate": "off",
    "reward_replay_stages": None,
    "reward_scaling": "spread",
    "samplings_per_stage": None,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "linear",
    "fold_learning_rate": 1e-2,
    "fold_epochs": 1.0,
    "reward_epochs": 1,
}


def make(training, name="run", *, callbacks=(), prompts=PROMPTS, **settings):
    options = {"callbacks": list(callbacks), "prompt_dataset": prompts}
    trainer = training.trainer(
        "rft",
        model=training.model(attention_dropout=0.1),
        name=name,
        data=training.rows(20),
        options=options,
        **readable({**SETTINGS, **settings}),
    )
    trainer.stages.rollout.sampler = CountingSampler(trainer)
    return trainer


@pytest.mark.parametrize(
    ("per_stage", "draws"), [(None, [0, 1, 2, 3]), (2, [0, 2]), (1, [0]), (4, [0, 1, 2, 3])], ids=str
)
def test_each_draw_is_from_the_policy_as_it_then_stands(training, per_stage, draws):
    snapshots = Snapshots()
    trainer = make(training, callbacks=[snapshots], samplings_per_stage=per_stage)
    trainer.train()
    assert history(trainer, "policy/phase") == [1, 1]
    assert trainer.state.global_step == 8
    store, seen = trainer.stages.store, []
    params = trainer.args.sampling_params(trainer.tokenization.stop_ids(trainer.conversational))
    for stage in (0, 1):
        for index, step in enumerate(draws):
            groups = store.groups(stage, draw=index)
            model = snapshots.models[4 * stage + step]
            sampler = TransformersSampler(model, batch_size=64, pad_token_id=trainer.tokenization.pad_id)
            plain = [group.select(group.places(Role.DEMONSTRATION)) for group in groups]
            number = stage * len(draws) + index
            drawn = sampler.sample(
                [g.prompt_ids for g in plain], params, num_samples=2, rows=[g.row for g in plain], stage=number
            )
            assert [[s.completion.token_ids for s in samples] for samples in drawn] == [
                [c.token_ids for c in group.samples] for group in groups
            ]
            expected = cached_token_logps(model, groups)
            for group, logps in zip(groups, expected, strict=True):
                for completion, values in zip(group.completions, logps, strict=True):
                    assert completion.token_values["old_logps"] == pytest.approx(values, abs=1e-4)
            seen += [group.row for group in groups]
        assert not store.path(stage, len(draws)).exists()
        assert (store.path(stage) / "reward.json").exists()
        assert not (store.path(stage, 1) / "reward.json").exists()
    assert sorted(seen) == sorted(trainer.train_dataset["row"])
    last = cached_token_logps(snapshots.models[0], store.groups(1, draw=len(draws) - 1))
    known = store.groups(1, draw=len(draws) - 1)
    assert (
        max(
            abs(a - b)
            for group, logps in zip(known, last, strict=True)
            for c, values in zip(group.completions, logps, strict=True)
            for a, b in zip(c.token_values["old_logps"], values, strict=True)
        )
        > 0.05
    ), "the policy had moved"


def test_a_reward_is_fitted_once_per_stage_and_scores_all_draws(training):
    trainer, fits, scored = make(training), [], []
    learner, phase = trainer.stages.phase.learner, trainer.stages.phase
    fit, score = learner.fit, phase._scored
    learner.fit = lambda comparisons, **options: fits.append(options["stage"]) or fit(comparisons, **options)
    phase._scored = lambda stage, groups: scored.append(stage) or score(stage, groups)
    trainer.train()
    assert fits == [0, 1]
    assert scored == [0] * 4 + [1] * 4
    rewards = [line for draw in range(4) for line in trainer.stages.store.lines(1, "rewards", draw)]
    groups = [group for draw in range(4) for group in trainer.stages.store.groups(1, draw=draw)]
    assert [line["row"] for line in rewards] == [group.row for group in groups]
    again = trainer.reward.scores(groups)
    assert [tuple(line["rewards"]) for line in rewards] == [pytest.approx(values) for values in again]


def test_a_stage_that_leaves_the_policy_alone_samples_all_the_same(training):
    """Its samples are negatives of later stages; nothing is scored but the first draw."""
    trainer = make(training, reward_warmup_stages=1)
    trainer.train()
    assert history(trainer, "policy/phase") == [0, 1]
    store = trainer.stages.store
    assert len(store.sampled(0)) == 16
    assert (store.path(0) / "rewards.jsonl").exists()
    assert not (store.path(0, 1) / "rewards.jsonl").exists()


def test_too_many_draws(training):
    with pytest.raises(
        UserError, match=r"'samplings_per_stage': 2 stages of 5 samplings do not fit into an epoch of 8"
    ):
        make(training, samplings_per_stage=5)
    make(training, samplings_per_stage=4)


def test_passes_go_over_the_samples_of_each_draw_again(training):
    trainer, seen = make(training, policy_epochs=2, samplings_per_stage=2), []
    step_of = trainer._step_of
    trainer._step_of = lambda batches: seen.append(frozenset(g.row for b in batches for g in b)) or step_of(batches)
    trainer.train()
    assert trainer.state.global_step == 16
    assert [seen[start : start + 2] for start in range(0, 16, 4)] == [
        seen[start + 2 : start + 4] for start in range(0, 16, 4)
    ]
    assert len(set().union(*seen)) == 32
    assert len(list(trainer.stages.store.folder.glob("stage-*/**/samples.jsonl"))) == 4


# --- killed and resumed -------------------------------------------------------------------------------------------------

SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
REWARDS = {
    "features": {},
    "model": {"reward": "model"},
    "ensemble of features": {"reward_ensemble": 2, "reward_negatives": "own,initial"},
    "ensemble of models": {"reward": "model", "reward_ensemble": 2, "reward_negatives": "own,initial"},
    "auto": {"reward": "auto", "reward_negatives": "own,initial"},
    "likelihood": {"reward": "likelihood"},
    "logp": {"reward": "logp", "policy_update": "best_of_n"},
}
PASSES = {"policy_epochs": 2, "samplings_per_stage": 2}


def state(trainer):
    """Whatever a resumed run must have in common with one that nobody killed."""
    store = trainer.stages.store
    files = {
        str(path.relative_to(store.folder)): path.read_bytes()
        for name in ("samples", "rewards", "validation")
        for path in sorted(store.folder.glob(f"**/{name}.jsonl"))
    }
    facts = {}
    for path in sorted(store.folder.glob("*/reward.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        facts[path.parent.name] = {k: v for k, v in found.items() if not k.endswith("seconds")}
    return {
        "steps": trainer.state.global_step,
        "weights": weights(trainer.policy),
        "rewards": trainer.reward.scores(store.groups(1))
        if hasattr(trainer.reward, "scores")
        else trainer.reward.score(store.groups(1)),
        "selection": trainer.stages.phase.selection,
        "tokens": trainer.costs.state_dict()["tokens"],
        "files": files,
        "facts": facts,
    }


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    """Runs that nobody killed, by their settings."""
    made = {}

    def whole(name, settings):
        if name not in made:
            trainer = make(Training(tmp_path_factory.mktemp("whole")), **SAVED, **settings)
            trainer.train()
            assert history(trainer, "policy/phase") == [1, 1], "so that the policy moves"
            made[name] = state(trainer)
        return made[name]

    return whole


def ends_as(training, expected, settings):
    resumed = make(training, **SAVED, **settings)
    last = get_last_checkpoint(resumed.args.output_dir)
    resumed.train(resume_from_checkpoint=last)
    assert_equal(state(resumed), expected)
    return resumed


@pytest.mark.parametrize(("reward", "step"), [("features", 1), *((reward, 6) for reward in REWARDS)])
def test_killed_between_draws(training, wholes, reward, step):
    expected = wholes(reward, REWARDS[reward])
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt("on_step_begin", step)], **SAVED, **REWARDS[reward]).train()
    ends_as(training, expected, REWARDS[reward])


@pytest.mark.parametrize("reward", ["features", "model"])
def test_killed_inside_a_draw(training, wholes, reward):
    """While it samples: two of its four prompts are on disk."""
    settings = {**REWARDS[reward], "sampling_batch_size": 1}
    expected = wholes(f"{reward}, few at a time", settings)
    killed = make(training, **SAVED, **settings)
    killed.stages.rollout.sampler = CountingSampler(killed, die_in=6, after=2)
    with pytest.raises(Killed):
        killed.train()
    assert killed.stages.store.path(1, 2).joinpath("samples.jsonl.part").exists()
    resumed = ends_as(training, expected, settings)
    assert len(resumed.stages.rollout.sampler.rows[6]) == 2


@pytest.mark.parametrize("step", [3, 9, 14])
def test_killed_inside_the_passes_over_a_draw(training, wholes, step):
    expected = wholes("passes", PASSES)
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt("on_step_begin", step)], **SAVED, **PASSES).train()
    ends_as(training, expected, PASSES)


@pytest.mark.parametrize(
    ("reward", "stage"), [("features", 0), ("features", 1), ("ensemble of features", 1), ("ensemble of models", 1)]
)
def test_killed_in_the_fit(training, wholes, reward, stage):
    """After it has changed the reward, before that is on disk; of an ensemble, in its second member."""
    expected, settings = wholes(reward, REWARDS[reward]), REWARDS[reward]
    killed = make(training, **SAVED, **settings)
    learner = killed.stages.phase.learner
    last = learner.members[-1] if "ensemble" in reward else learner
    fit = last.fit

    def strike(comparisons, **options):
        found = fit(comparisons, **options)
        if options["stage"] == stage:
            raise Killed
        return found

    last.fit = strike
    with pytest.raises(Killed):
        killed.train()
    ends_as(training, expected, settings)


@pytest.mark.parametrize("place", ["initial", "fold", "its samples"])
def test_killed_in_the_negatives(training, wholes, place):
    expected = wholes("features", {})
    killed = make(training, **SAVED)
    negatives = killed.stages.phase.negatives
    if place == "fold":
        train = Folds._train

        def strike(folds, weights, groups, fold, on_step):
            if fold == 1:
                raise Killed
            return train(folds, weights, groups, fold, on_step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Folds, "_train", strike)
            with pytest.raises(Killed):
                killed.train()
    else:
        draw, dies = negatives.rollout.draw, {"initial": 0, "its samples": 2}[place]

        def strike(groups, *, stage, **options):
            if stage == (1 << 22) + dies:
                raise Killed
            return draw(groups, stage=stage, **options)

        negatives.rollout.draw = strike
        with pytest.raises(Killed):
            killed.train()
    ends_as(training, expected, {})


def test_a_finished_run_that_is_resumed_is_the_same(training, wholes):
    expected = wholes("features", {})
    make(training, **SAVED).train()
    resumed = ends_as(training, expected, {})
    assert resumed.stages.rollout.sampler.rows == {}


def test_a_draw_that_is_gone_is_an_error(training):
    """Inside it the policy that drew is no more."""
    with pytest.raises(Killed):
        make(training, callbacks=[KillAt("on_step_begin", 3)], **SAVED, **PASSES).train()
    resumed = make(training, **SAVED, **PASSES)
    shutil.rmtree(resumed.stages.store.path(0))
    with pytest.raises(UserError, match=r"samples\.jsonl is damaged or missing"):
        resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))


def test_states_that_differ_are_told_apart():
    """Of the helper: what it compares is not always equal."""
    with pytest.raises(AssertionError):
        assert_equal({"weights": torch.zeros(2)}, {"weights": torch.ones(2)})
