"""Negatives that are not the policy's own: who draws them, once per run, and what they cost."""

import json

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from test_resume import KillAt, Killed
from transformers.trainer_utils import get_last_checkpoint

from rft_runs import QUICK, readable, saved
from training_runs import SETTINGS
from tutelage.errors import UserError
from tutelage.groups import Role
from tutelage.models.weights import WeightSet
from tutelage.sampling import TransformersSampler
from tutelage.training.folds import Folds
from tutelage.training.negatives import _DRAW, NEGATIVES, parse_negatives
from tutelage.training.reward_config import RewardStageConfig
from tutelage.training.rollout import Rollout

FEATURES = {
    "reward": "features",
    "reward_negatives": "own,initial,out_of_fold",
    "reward_gate": "off",
    "keep_policy": "last",
    "fold_learning_rate": 1e-2,
    "validation_rows": None,
}


def make(training, *, model=None, adapter=False, **settings):
    """A run whose start is not what any base would be."""
    if model is None:
        model = training.model()
    if adapter:
        with torch.random.fork_rng():
            torch.manual_seed(1)
            model = get_peft_model(model, training.lora())
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.3 * torch.randn_like(parameter)
    data = settings.pop("data", None) or training.rows(16)
    options = settings.pop("options", {})
    return training.trainer(
        "rft", model=model, data=data, options=options, **readable({**QUICK, **FEATURES, **settings})
    )


def drawn_by(trainer, groups, *, stage, weights=None, model=None):
    """Tokens of the samples that a policy draws for these groups, found without the trainer's rollout."""
    policy = model or trainer.policy
    sampler = TransformersSampler(policy, batch_size=64, pad_token_id=trainer.tokenization.pad_id)
    params = trainer.args.sampling_params(trainer.tokenization.stop_ids(trainer.conversational))
    rollout = Rollout(sampler, params, trainer.scorer, num_samples=2)
    plain = [group.select(group.places(Role.DEMONSTRATION)) for group in groups]
    found = rollout.draw(plain, stage=stage, weights=weights)
    return [[c.token_ids for c in group.samples] for group in found]


def tokens_of(groups):
    return [[c.token_ids for c in group.samples] for group in groups]


def test_kinds():
    assert parse_negatives("out_of_fold,own , initial") == NEGATIVES == ("own", "initial", "out_of_fold")
    assert parse_negatives("initial") == ("initial",)
    for bad in ("", " , ", "own,theirs"):
        with pytest.raises(
            UserError, match=r"'reward_negatives': must be one or several of own, initial, out_of_fold"
        ):
            parse_negatives(bad)


@pytest.mark.parametrize("kind", ["adapter", "named base", "start"])
def test_samples_of_the_initial_model(training, kind):
    settings = {"reward_negatives": "initial"}
    if kind == "named base":
        settings["base_model_name_or_path"] = saved(training, model=training.model(seed=5))
    trainer = make(training, adapter=kind == "adapter", **settings)
    found = trainer.stages.phase.negatives.groups()
    assert list(found) == ["initial"]
    base = {"adapter": training.model(), "named base": training.model(seed=5), "start": training.model()}[kind]
    expected = drawn_by(trainer, found["initial"], stage=_DRAW, model=base)
    assert tokens_of(found["initial"]) == expected
    assert (expected == drawn_by(trainer, found["initial"], stage=_DRAW)) == (kind == "start")
    assert [(g.row, g.prompt_ids) for g in found["initial"]] == [
        (row["row"], tuple(row["prompt_ids"])) for row in trainer.train_dataset
    ]


def test_out_of_fold_rows_are_answered_by_the_policy_that_never_saw_them(training):
    trainer = make(training, reward_negatives="out_of_fold", num_folds=3)
    found = trainer.stages.phase.negatives.groups()["out_of_fold"]
    assert sorted(group.row for group in found) == list(range(16))
    of_row = {g.row: fold for g, fold in zip(_folds(trainer).groups, _folds(trainer).of_group, strict=True)}
    for fold in range(3):
        members = [group for group in found if of_row[group.row] == fold]
        weights = _folds(trainer).weights(fold)
        assert tokens_of(members) == drawn_by(trainer, members, stage=_DRAW + 1 + fold, weights=weights)
        assert tokens_of(members) != drawn_by(trainer, members, stage=_DRAW + 1 + fold)


def _folds(trainer):
    return trainer.stages.phase.negatives.folds()


def test_own_alone_draws_nothing(training):
    trainer = make(training, reward_negatives="own")
    trainer.train()
    assert trainer.stages.phase.negatives.groups() == {}
    assert not (trainer.stages.store.folder / "negatives").exists()


def test_they_are_drawn_once_and_counted_once(training):
    trainer, calls = make(training), []
    draw = trainer.stages.rollout.draw
    trainer.stages.rollout.draw = lambda groups, **options: calls.append(options["stage"]) or draw(groups, **options)
    trainer.train()
    assert [stage for stage in calls if stage >= _DRAW] == [_DRAW, _DRAW + 1, _DRAW + 2]
    store = trainer.stages.store
    negatives = [g for groups in trainer.stages.phase.negatives.groups().values() for g in groups]
    own = [g for stage in range(2) for g in store.sampled(stage)]
    assert trainer.costs.sampled_tokens == sum(len(c.token_ids) for g in [*negatives, *own] for c in g.samples)
    folds = [json.loads(path.read_text(encoding="utf-8"))["tokens"] for path in store.folder.glob("*/fold-?.json")]
    assert len(folds) == 2
    trained = sum(len(c.token_ids) for g in own for c in g.samples)
    assert trainer.costs.policy_tokens == sum(folds) + trained
    assert trainer.costs.seconds["negatives"] > 0


@pytest.mark.parametrize("step", [0, 1, 3])
def test_a_resumed_run_reads_and_counts_them_once(training, step, monkeypatch):
    settings = {"save_strategy": "steps", "save_steps": 1, "samplings_per_stage": 1}
    whole = make(training, name="whole", **settings)
    whole.train()
    with pytest.raises(Killed):
        make(training, options={"callbacks": [KillAt("on_step_begin", step)]}, **settings).train()
    resumed = make(training, **settings)
    monkeypatch.setattr(Folds, "_train", lambda *args: pytest.fail("they are trained already"))
    resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    assert resumed.costs.state_dict()["tokens"] == whole.costs.state_dict()["tokens"]
    for name in ("initial", "out_of_fold-0", "out_of_fold-1"):
        paths = [run.stages.store.folder / "negatives" / f"{name}.jsonl" for run in (whole, resumed)]
        assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("kinds", ["initial", "out_of_fold"])
@pytest.mark.parametrize("change", ["answer", "more", "fewer", "temperature"])
def test_those_of_something_else_are_refused(training, kinds, change):
    make(training, reward_negatives=kinds).stages.phase.negatives.groups()
    settings = {"temperature": 0.5} if change == "temperature" else {}
    rows = training.rows(16).to_list()
    changed = {
        "answer": [{**rows[0], "completion": " no"}, *rows[1:]],
        "more": training.rows(17).to_list(),
        "fewer": rows[:12],
        "temperature": rows,
    }[change]
    other = make(training, reward_negatives=kinds, data=Dataset.from_list(changed), **settings)
    with pytest.raises(UserError, match=r"negatives/.*: the (negatives|folds) (were drawn|are of).*Resume with the"):
        other.stages.phase.negatives.groups()


def test_negatives_of_a_run_that_goes_on_come_from_its_start(training):
    """Their folder is lost, and the policy has moved by then."""
    settings = {"reward_negatives": "initial", "save_strategy": "steps", "save_steps": 1}
    with pytest.raises(Killed):
        make(training, options={"callbacks": [KillAt("on_step_begin", 2)]}, learning_rate=0.05, **settings).train()
    resumed = make(training, learning_rate=0.05, **settings)
    folder = resumed.stages.store.folder / "negatives"
    before = (folder / "initial.jsonl").read_bytes()
    (folder / "initial.jsonl").unlink()
    resumed.train(resume_from_checkpoint=get_last_checkpoint(resumed.args.output_dir))
    assert WeightSet(resumed.policy).parameters[0].sub(resumed.stages.rollout.initial.parameters[0]).abs().max() > 1e-3
    assert (folder / "initial.jsonl").read_bytes() == before


@pytest.mark.parametrize("settings", [{}, {"reward": "likelihood", "reward_negatives": "own"}], ids=str)
def test_streamed_data_have_none(training, settings):
    with pytest.raises(UserError, match=r"'reward_negatives': of streamed data .*--reward_negatives own"):
        make(training, data=training.rows(16).to_iterable_dataset(), max_steps=4, **settings)
    make(training, data=training.rows(16).to_iterable_dataset(), max_steps=4, reward_negatives="own")


def test_the_defaults_ask_for_all_of_them(tmp_path):
    config = RewardStageConfig(output_dir=str(tmp_path), **{key: SETTINGS[key] for key in ("use_cpu", "bf16")})
    assert parse_negatives(config.reward_negatives) == NEGATIVES
