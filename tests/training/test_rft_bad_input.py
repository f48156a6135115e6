"""RFT on tiny models: bad input."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from rft_runs import QUICK, make, run, saved
from training_runs import assert_same_weights
from tutelage.algorithms import RFTConfig
from tutelage.algorithms.controls import control_config, controls
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

BAD_SETTINGS = {
    "one sample": ({"num_samples": 1}, r"'num_samples'.*1 is too few"),
    "replay": ({"replay_stages": 1}, r"'replay_stages'.*--reward_replay_stages"),
    "fp16": ({"fp16": True}, r"'fp16'.*--bf16"),
    "no pass": ({"reward_epochs": 0}, r"'reward_epochs': must be at least 1, not 0"),
    "no step": ({"reward_steps": 0}, r"'reward_steps': must be at least 1"),
    "no kept row": ({"validation_rows": 0}, r"'validation_rows': must be at least 1"),
    "beta below 0": ({"beta": -0.1}, r"'beta': must be at least 0"),
    "warm-up below 0": ({"reward_warmup_stages": -1}, r"'reward_warmup_stages': must be at least 0"),
    "no reward rate": ({"reward_learning_rate": 0.0}, r"'reward_learning_rate': must be above 0"),
    "smoothing": ({"reward_label_smoothing": 0.5}, r"'reward_label_smoothing': .*below 0.5"),
    "saturation": ({"reward": "model", "saturation": 0.5}, r"'saturation': .*above 0.5"),
    "clip range": ({"clip_range": 0.0}, r"'clip_range': must be above 0"),
    "reference": ({"reference": "stage"}, r"'reference': must be one of initial"),
    "reward loss": ({"reward_loss": "hinge"}, r"'reward_loss': must be one of logistic, linear"),
    "reward negatives": ({"reward_negatives": "all"}, r"'reward_negatives': must be one or several of"),
    "early stopping": ({"early_stopping": "yes"}, r"'early_stopping': must be one of"),
    "cut samples": ({"truncated_samples": "keep"}, r"'truncated_samples': must be one of floor, score, drop"),
    "advantages": ({"advantages": "none"}, r"'advantages': must be one of"),
    "kl": ({"kl": "none"}, r"'kl': must be one of reward, loss"),
    "reward": ({"reward": "human"}, r"'reward': must be one of features, model, likelihood, logp, auto"),
    "gate": ({"reward_gate": "on"}, r"'reward_gate': must be one of yardsticks, chance, off"),
    "scaling": ({"reward_scaling": "up"}, r"'reward_scaling': must be one of spread, down_only"),
    "combine": ({"reward_combine": "max"}, r"'reward_combine': must be one of mean, mean_minus_std, min"),
    "keep": ({"keep_policy": "first"}, r"'keep_policy': must be one of best, last"),
    "update": ({"policy_update": "ppo"}, r"'policy_update': must be one of gradient, best_of_n"),
    "no negatives": ({"reward_negatives": ","}, r"'reward_negatives': must be one or several of"),
    "one fold": ({"num_folds": 1}, r"'num_folds': must be at least 2, not 1"),
    "no fold batch": ({"fold_batch_size": 0}, r"'fold_batch_size': must be at least 1, not 0"),
    "no fold epochs": ({"fold_epochs": 0.0}, r"'fold_epochs': must be above 0, not 0"),
    "no fold rate": ({"fold_learning_rate": -1.0}, r"'fold_learning_rate': must be above 0, not -1"),
    "no draw": ({"samplings_per_stage": 0}, r"'samplings_per_stage': must be at least 1, not 0"),
    "no member": ({"reward_ensemble": 0}, r"'reward_ensemble': must be at least 1, not 0"),
    "no prompts": ({"prompt_mix": 0.0}, r"'prompt_mix': must be above 0 and at most 1, not 0"),
    "too many prompts": ({"prompt_mix": 1.5}, r"'prompt_mix': must be above 0 and at most 1, not 1.5"),
    "below nothing": ({"drop_below": -0.1}, r"'drop_below': must be at least 0 and below 1, not -0.1"),
    "below all": ({"drop_below": 1.0}, r"'drop_below': must be at least 0 and below 1, not 1"),
    "negative replay": ({"reward_replay_stages": -1}, r"'reward_replay_stages': must be at least 0, not -1"),
    "two ways": (
        {"validation_dataset": "rows.jsonl", "validation_rows": 4},
        r"'validation_rows': the validation rows are given by --validation_dataset.*Leave --validation_rows out",
    ),
    "ensemble of auto": (
        {"reward": "auto", "reward_ensemble": 2},
        r"'reward_ensemble': there is no ensemble of the reward 'auto'",
    ),
    "ensemble of likelihood": (
        {"reward": "likelihood", "reward_ensemble": 2},
        r"'reward_ensemble': there is no ensemble of",
    ),
    "nothing of its own": (
        {"reward_negatives": "own", "prompt_mix": 1.0},
        r"'reward_negatives': the policy samples for no demonstrated prompt",
    ),
    **{
        f"{name} of {reward}": (
            {"reward": reward, name: value},
            rf"'{name}': only a neural reward takes it, and the reward is '{reward}'.*--reward model",
        )
        for reward, name, value in [
            ("features", "preference_dataset", "pairs.jsonl"),
            ("auto", "preference_dataset", "pairs.jsonl"),
            ("likelihood", "reward_model_name_or_path", "model"),
            ("features", "init_reward_from", "reward"),
            ("features", "reward_steps", 3),
        ]
    },
    **{
        f"features of {reward}": (
            {"reward": reward, "reward_features": "hidden"},
            rf"'reward_features': only a reward on features takes it, and the reward is '{reward}'",
        )
        for reward in ("model", "auto", "likelihood")
    },
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_settings_that_make_no_sense(tmp_path, case):
    settings, said = BAD_SETTINGS[case]
    with pytest.raises(UserError, match=said):
        RFTConfig(output_dir=str(tmp_path), **settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"reward_features": "words"}, r"'reward_features': 'words' is not a set of features"),
        ({"reward_features": "text,text"}, r"'reward_features': 'text,text' names a set twice"),
        ({"reward_features": ""}, r"'reward_features': '' names no set"),
        ({"reward_features": "no_such_module:function"}, r"'reward_features': .*cannot be imported"),
        ({"base_model_name_or_path": "/nowhere/at/all"}, r"/nowhere/at/all, .*no such folder"),
    ],
    ids=str,
)
def test_features_and_bases_that_are_not_there(training, settings, said):
    with pytest.raises(UserError, match=said):
        make(training, **{"reward": "features", "reward_negatives": "initial", **settings})


@pytest.mark.parametrize(
    "settings", [{"reward": "model", "reward_steps": 3}, {"reward_features": "text,logp"}], ids=str
)
def test_a_control_leaves_out_what_has_no_effect(tmp_path, settings):
    control = controls("self_training", adapter=True)[0]
    config = control_config(control, RFTConfig(output_dir=str(tmp_path), **settings), str(tmp_path / "control"))
    assert config.reward == "logp"


def test_a_base_is_not_named_beside_an_adapter(training):
    with pytest.raises(UserError, match=r"'base_model_name_or_path': the model before SFT is the adapter's base"):
        make(training, adapter=True, reward="features", base_model_name_or_path=saved(training))


def test_more_folds_than_prompts(training):
    for settings in ({"reward": "features", "reward_negatives": "out_of_fold"}, {"reward": "likelihood"}):
        with pytest.raises(UserError, match=r"'num_folds': 16 different prompts cannot be divided into 17 folds"):
            make(training, num_folds=17, **settings)
    make(training, num_folds=17, reward="features", reward_negatives="initial")


def test_too_few_rows(training):
    with pytest.raises(
        UserError, match=r"sums.jsonl, field 'validation_rows': 4 of 7 rows would be held out as validation rows"
    ):
        make(training, data=training.rows(7), options={"source": "sums.jsonl"})
    with pytest.raises(UserError, match="16 of 20 rows"):
        make(training, validation_rows=None)
    with pytest.raises(UserError, match="2 stages do not fit into an epoch of 1"):
        make(training, data=training.rows(8))
    with pytest.raises(UserError, match=r"every row is also a validation row"):
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
