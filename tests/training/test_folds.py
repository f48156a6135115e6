"""Out-of-fold policies: who sees which rows, what they start from, and what lies on disk."""

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from test_resume import Killed
from transformers import get_linear_schedule_with_warmup

from rft_runs import saved
from training_runs import assert_same_weights
from training_runs import weights as weights_of
from tutelage.errors import NonFiniteLossError, UserError
from tutelage.groups import Completion, Group, Role
from tutelage.models.weights import WeightSet
from tutelage.scoring.logps import cached_logps, completion_token_logps
from tutelage.training.folds import Folds, FoldSettings, base_weights, check_base, fold_of_prompts

SETTINGS = FoldSettings(num_folds=2, epochs=2.0, learning_rate=1e-2, batch_size=3, seed=3)


def demonstrations(count=8, *, answers=(), prompts=None):
    """Rows with an answer of two or three tokens; ``answers`` changes those of some rows."""
    rows = []
    for row in range(count):
        tokens = (10 + row, 30 + row, 2) if row % 2 else (10 + row, 2)
        tokens = (55, 56, 2) if row in answers else tokens
        prompt = (1, 5 + row) if prompts is None else prompts[row]
        rows.append(Group(prompt, (Completion(tokens, Role.DEMONSTRATION, True),), row))
    return rows


def folds(training, folder, groups, *, model=None, settings=SETTINGS):
    policy = model or training.model()
    start = WeightSet(policy)
    return Folds(policy, lambda: start, groups, training.folder / folder, settings)


def assert_equal(found, expected):
    assert all(torch.equal(a, b) for a, b in zip(found.parameters, expected.parameters, strict=True))


def differ(found, expected):
    return any(not torch.equal(a, b) for a, b in zip(found.parameters, expected.parameters, strict=True))


def test_rows_of_one_prompt_are_in_one_fold():
    rows = demonstrations(60, prompts=[(1, 5 + row % 20) for row in range(60)])
    found = fold_of_prompts(rows, 3, seed=1)
    of_prompt = {group.prompt_ids: fold for group, fold in zip(rows, found, strict=True)}
    assert found == [of_prompt[group.prompt_ids] for group in rows]
    assert sorted(list(of_prompt.values()).count(fold) for fold in range(3)) == [6, 7, 7]
    assert found != fold_of_prompts(rows, 3, seed=2)
    with pytest.raises(UserError, match=r"'num_folds': 20 different prompts cannot be divided into 21 folds"):
        fold_of_prompts(rows, 21)


@pytest.mark.parametrize("seen", [False, True])
def test_a_policy_depends_on_the_rows_of_the_other_folds_alone(training, seen):
    first = folds(training, "first", demonstrations())
    changed = [row for row, fold in enumerate(first.of_group) if (fold != 0) == seen][:1]
    second = folds(training, "second", demonstrations(answers=changed))
    assert second.of_group == first.of_group
    assert differ(second.weights(0), first.weights(0)) == seen


def test_the_policy_itself_stays_as_it_is(training):
    found = folds(training, "folds", demonstrations())
    before = weights_of(found.policy)
    assert differ(found.weights(1), WeightSet(found.policy))
    assert_same_weights(found.policy, before)


def test_training_is_adamw_with_warm_up_and_linear_decay(training):
    """Written out. The order of the rows is the only thing taken over: as long as a pass lasts, each row comes once."""
    seen, rows = [], demonstrations()
    found = folds(training, "folds", rows)
    options, original = {"pad_token_id": 0, "layout": "auto"}, completion_token_logps

    def spied(model, batch, **given):
        seen.append([group.row for group in batch])
        return original(model, batch, **given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tutelage.training.folds.completion_token_logps", spied)
        weights = found.weights(0)
    others = [group for group, fold in zip(rows, found.of_group, strict=True) if fold != 0]
    assert [len(batch) for batch in seen] == [3, 3, 3]  # two passes over four rows, three at a time
    flat = [row for batch in seen for row in batch]
    assert sorted(flat[:4]) == [group.row for group in others]
    assert len(set(flat[4:8])) == 4

    policy = training.model()
    own = WeightSet(policy)
    optimizer = torch.optim.AdamW(own.parameters, lr=1e-2, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 3)
    for batch in seen:
        with own.active():
            logps = completion_token_logps(policy, [rows[row] for row in batch], **options).logps_N
            (-logps.sum() / len(logps)).backward()
        torch.nn.utils.clip_grad_norm_(own.parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for value, expected in zip(weights.parameters, own.parameters, strict=True):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-5)
    tokens = sum(len(rows[row].completions[0].token_ids) for row in flat)
    assert f'"tokens": {tokens}' in (found.folder / "fold-0.json").read_text(encoding="utf-8")


def test_a_loss_that_is_not_finite_is_an_error(training):
    found = folds(training, "folds", demonstrations(), settings=dataclasses.replace(SETTINGS, learning_rate=1e30))
    with pytest.raises(NonFiniteLossError, match=r"the loss of fold 0 is .* at step \d.*--fold_learning_rate"):
        found.weights(0)
    assert not (found.folder / "fold-0.safetensors").exists()


def test_what_is_on_disk_is_taken_and_must_be_of_the_same_data_and_settings(training, monkeypatch):
    first = folds(training, "folds", demonstrations())
    expected = [first.weights(fold) for fold in range(2)]
    again = folds(training, "folds", demonstrations())
    monkeypatch.setattr(Folds, "_train", lambda *args: pytest.fail("it is trained already"))
    for fold in range(2):
        assert_equal(again.weights(fold), expected[fold])
    for other in (
        folds(training, "folds", demonstrations(answers=[3])),
        folds(training, "folds", demonstrations(9)),
        folds(training, "folds", demonstrations(), settings=dataclasses.replace(SETTINGS, epochs=3.0)),
    ):
        with pytest.raises(UserError, match=r"folds\.json: the folds are of other demonstrations.*Resume with"):
            other.weights(0)


@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_killed_in_the_second_fold_it_ends_the_same(training, kind):
    def made(folder):
        model = training.model(attention_dropout=0.1)
        return folds(
            training,
            folder,
            demonstrations(),
            model=get_peft_model(model, training.lora(lora_dropout=0.5)) if kind == "adapter" else model,
        )

    def strike(done):
        if done == 2:
            raise Killed

    with torch.random.fork_rng():  # peft draws where an adapter begins
        torch.manual_seed(0)
        whole = made("whole")
        torch.manual_seed(0)
        killed = made("killed")
        torch.manual_seed(0)
        resumed = made("killed")
    expected = [whole.weights(fold) for fold in range(2)]
    killed.weights(0)
    with pytest.raises(Killed):
        killed.weights(1, strike)
    assert not (killed.folder / "fold-1.safetensors").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folds, "_train", lambda *args: pytest.fail("the first fold is there"))
        assert_equal(resumed.weights(0), expected[0])
    assert_equal(resumed.weights(1), expected[1])


# --- where they start ---------------------------------------------------------------------------------------------------


def trained_adapter(training, **config):
    """A policy whose adapter is not zero."""
    policy = get_peft_model(training.model(), training.lora(**config))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(1)
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter)
    return policy


@pytest.mark.parametrize("config", [{}, {"use_dora": True}, {"init_lora_weights": "gaussian"}], ids=str)
def test_a_fresh_adapter_is_the_base_and_leaves_the_policy_alone(training, config):
    policy, groups = trained_adapter(training, **config), demonstrations()
    assert isinstance(policy, PeftModel)
    before = weights_of(policy)
    trained = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    with torch.no_grad():
        with policy.disable_adapter():
            expected = cached_logps(policy, groups)
        moved = cached_logps(policy, groups)
    state = torch.random.get_rng_state()
    weights = base_weights(policy, None, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    with weights.active():
        found = cached_logps(policy, groups)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=1e-5, rtol=1e-5)
    assert (torch.tensor(moved) - torch.tensor(expected)).abs().max() > 0.1
    assert_same_weights(policy, before)
    assert policy.active_adapter == "default"
    assert list(policy.peft_config) == ["default"]
    assert [name for name, parameter in policy.named_parameters() if parameter.requires_grad] == trained
    assert_equal(weights, base_weights(policy, None, seed=0))
    assert differ(weights, base_weights(policy, None, seed=1))


def test_without_a_name_the_base_of_a_whole_model_is_the_start(training):
    """Also when the policy has moved since."""
    policy = training.model()
    start = WeightSet(policy)
    expected = weights_of(policy)
    with torch.no_grad():
        policy.get_input_embeddings().weight += 1
    found = base_weights(policy, None, start=start, seed=0)
    with found.active():
        assert_same_weights(policy, expected)


def test_a_named_base_of_a_whole_model(training):
    name = saved(training, model=training.model(seed=7))
    policy = training.model()
    found = base_weights(policy, name, start=WeightSet(policy), seed=0)
    with found.active():
        assert_same_weights(policy, training.model(seed=7))
    assert_same_weights(policy, training.model())
    other = saved(training, "other", model=training.model(hidden_size=16, head_dim=4))
    with pytest.raises(UserError, match=r"other, field 'base_model_name_or_path': .*differs.*trained from"):
        base_weights(policy, other, start=WeightSet(policy), seed=0)


def test_bases_that_cannot_be_had(training):
    plain = trained_adapter(training)
    check_base(plain, None, needed=True)
    with pytest.raises(ValueError, match="neither a start"):
        base_weights(training.model(), None, seed=0)
    check_base(training.model(), "someone/somewhere", needed=True)
    with pytest.raises(UserError, match=r"nothing, field 'base_model_name_or_path': no such folder"):
        check_base(training.model(), str(training.folder / "nothing"), needed=True)
    with pytest.raises(UserError, match=r"'base_model_name_or_path': the model before SFT is the adapter's base"):
        check_base(plain, "somewhere", needed=False)
    pissa = get_peft_model(training.model(), training.lora(init_lora_weights="pissa"))
    check_base(pissa, None, needed=False)
    with pytest.raises(UserError, match=r"an adapter that begins as 'pissa' does not leave"):
        check_base(pissa, None, needed=True)
