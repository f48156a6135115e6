"""The feature reward: its sets, on disk, read, and in other programs."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer

from rewards.planted import auc, completion, reversed_prompts
from tutelage.data import Tokenization
from tutelage.errors import UserError
from tutelage.groups import Completion, Group, Role
from tutelage.rewards import Comparisons, FeatureReward
from tutelage.rewards.feature_sets import FeatureParts, feature_sets
from tutelage.rewards.hidden_features import HiddenFeatures, HiddenSource
from tutelage.scoring.hidden import completion_hidden_states
from tutelage.scoring.logps import cached_token_logps
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

TRAINING, _ = reversed_prompts(24, samples=4)
TEST, TRUTH = reversed_prompts(10, seed=1, samples=4)
COMPARISONS = Comparisons({"out_of_fold": TRAINING})


def vowels(prompt, completion):
    """A function as a user writes it: of texts."""
    return {"same start": float(completion.split()[0] == prompt.split()[-3]), "long": len(completion) / 10}


def broken(prompt, completion):
    return {"bad": float("nan")}


def parts(model=None, **options):
    model = tiny_model() if model is None else model
    return FeatureParts(
        text=lambda ids: " ".join(map(str, ids)),
        hidden=HiddenSource(lambda: model),
        logps=lambda groups: cached_token_logps(model, groups),
        **options,
    )


def fitted(names, with_parts=None):
    reward = FeatureReward.of(names, with_parts or parts())
    reward.fit(COMPARISONS)
    return reward


def with_logps(groups, of):
    """Groups whose completions know log-probs: one number per token, ``of`` each completion."""
    return [
        group.with_token_values("old_logps", [[of(c)] * len(c.token_ids) for c in group.completions])
        for group in groups
    ]


# --- scores ---------------------------------------------------------------------------------------------------------


def test_an_unfitted_reward_is_0_everywhere():
    reward = FeatureReward.of("text,hidden", parts())
    assert reward.score(TEST).tolist() == [0] * 50
    assert reward.score([]).tolist() == []
    assert reward.explain(TEST[0], 0) == []


def test_scores_are_by_group_and_in_units_of_their_spread():
    reward = fitted("text")
    flat = reward.score(TRAINING)
    assert flat.dtype == torch.float32
    assert [s for scores in reward.scores(TRAINING) for s in scores] == flat.tolist()
    assert reward.score(TEST[:1]).tolist() == pytest.approx(reward.score(TEST)[:5].tolist())
    spread = torch.tensor([torch.tensor(scores[1:]).var() for scores in reward.scores(TRAINING)]).mean().sqrt()
    assert 0.5 < spread < 2  # about 1: the reward's own unit is of held-out prompts


@pytest.mark.parametrize(
    ("names", "across"), [("text", True), ("text,hidden", False), (f"text,{__name__}:vowels", True)]
)
def test_what_compares_across_prompts(names, across):
    assert FeatureReward.of(names, parts()).compares_across_prompts == across


def test_a_combination_is_the_sum_of_its_sets():
    together, text, hidden = (fitted(names).score(TEST) for names in ("text,hidden", "text", "hidden"))
    torch.testing.assert_close(together, text + hidden, atol=1e-5, rtol=1e-5)


# --- hidden ---------------------------------------------------------------------------------------------------------


def test_hidden_features_are_mean_states_of_the_layers():
    model = tiny_model()
    matrix = HiddenFeatures(HiddenSource(lambda: model), depths=(1 / 3, 1)).choose(TEST)
    means = completion_hidden_states(model, TEST, layers=(1, 3)).means()
    torch.testing.assert_close(torch.tensor(matrix), means.transpose(0, 1).flatten(1).double(), atol=1e-5, rtol=1e-5)


def test_hidden_features_of_a_policy_are_its_bases():
    torch.manual_seed(0)
    policy = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    found = HiddenFeatures(HiddenSource(lambda: policy)).choose(TEST)
    torch.testing.assert_close(found, HiddenFeatures(HiddenSource(tiny_model)).choose(TEST), atol=1e-5, rtol=1e-5)


def test_states_are_computed_once():
    calls = []
    source = HiddenSource(lambda: calls.append(1) or tiny_model())
    first = HiddenFeatures(source).choose(TEST)
    again = HiddenFeatures(source).choose([TEST[1], TEST[0]])
    assert len(calls) == 1
    assert (again == first[[*range(5, 10), *range(5)]]).all()


def test_a_cache_that_is_full_gives_the_same(monkeypatch):
    monkeypatch.setattr("tutelage.rewards.hidden_features._CACHED", 2000)
    small = HiddenSource(tiny_model)
    found = [HiddenFeatures(small).choose(TEST) for _ in range(2)]
    assert 0 < len(small._cache) < 10
    monkeypatch.undo()
    for states in found:
        torch.testing.assert_close(states, HiddenFeatures(HiddenSource(tiny_model)).choose(TEST), atol=1e-5, rtol=1e-5)


def test_hidden_states_teach_what_they_hold():
    """A rule that a random model's states show: the answer's first token."""
    groups = [
        Group(
            g.prompt_ids, (completion([70, 71], Role.DEMONSTRATION), *(completion([t, 71]) for t in (80, 81))), g.row
        )
        for g in TRAINING
    ]
    reward = FeatureReward.of("hidden", parts())
    assert reward.fit(Comparisons({"own": groups}))["accuracy/own"] > 0.9


# --- logp -----------------------------------------------------------------------------------------------------------


def test_logp_is_standardized_and_never_learned():
    """Improbable demonstrations do not make improbable good."""
    different = [g for g in TRAINING if any(c.token_ids != g.completions[0].token_ids for c in g.samples)]
    groups = with_logps(different, lambda c: -9.0 if c.role == Role.DEMONSTRATION else -c.token_ids[0] / 20)
    plain, both = FeatureReward.of("text"), FeatureReward.of("text,logp")
    plain.fit(Comparisons({"own": groups}))
    facts = both.fit(Comparisons({"own": groups}))
    sums = torch.tensor([total for group in groups for total in group.sums("old_logps")])
    samples = [torch.tensor(group.sums("old_logps")[1:]) for group in groups]
    spread = torch.stack([found.var() for found in samples]).mean().sqrt()
    expected = plain.score(groups) + (sums - torch.cat(samples).mean()) / spread
    torch.testing.assert_close(both.score(groups), expected, atol=1e-4, rtol=1e-4)
    assert facts["accuracy/own"] > 0.9  # of what is learned: log-probs of training prompts say what was memorized


def test_logps_that_are_not_known_come_from_the_policy():
    known = with_logps(TRAINING, lambda c: -c.token_ids[0] / 20)
    reward = FeatureReward.of("text,logp")
    reward.fit(Comparisons({"own": known}))
    with pytest.raises(UserError, match=r"field 'logp_model'.*need the policy"):
        reward.score(TEST)
    model = tiny_model()
    told = FeatureReward.of("text,logp", parts(model))
    told.fit(Comparisons({"own": known}))
    logps = [[sum(found) for found in of_group] for of_group in cached_token_logps(model, TEST)]
    given = [
        group.with_token_values(
            "old_logps",
            [[total, *[0.0] * (len(c.token_ids) - 1)] for total, c in zip(totals, group.completions, strict=True)],
        )
        for group, totals in zip(TEST, logps, strict=True)
    ]
    torch.testing.assert_close(told.score(TEST), reward.score(given), atol=1e-4, rtol=1e-4)


# --- a user's function ----------------------------------------------------------------------------------------------


def test_a_function_of_texts():
    reward = fitted(f"{__name__}:vowels")
    spoken = reward.explain(TEST[0], 0)
    assert {said.feature for said in spoken} <= {"same start", "long"}
    assert reward.score(TEST).std() > 0


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("words", r"'words' is not a set of features.*Write text, hidden"),
        ("", "names no set"),
        ("text,text", "names a set twice"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError: No module named"),
        (f"{__name__}:no_such", "cannot be imported"),
        (f"{__name__}:TEST", "is not a function"),
    ],
)
def test_a_set_that_is_none(names, message):
    with pytest.raises(UserError, match=message):
        feature_sets(names, parts())


def test_a_function_that_fails_is_told_with_its_row():
    with pytest.raises(UserError, match=rf"row 1, field 'reward_features'.*{__name__}:broken.*'bad' is NaN"):
        fitted(f"{__name__}:broken")


def test_hidden_needs_a_model():
    with pytest.raises(UserError, match=r"field 'base_model'.*need the base model"):
        FeatureReward.of("text,hidden")


# --- reading --------------------------------------------------------------------------------------------------------


def test_explanations_add_up():
    reward = fitted("text")
    group = TEST[0]
    for place, score in enumerate(reward.scores([group])[0]):
        spoken = reward.explain(group, place, top=10_000)
        offset = sum(said.contribution for said in spoken) - score
        assert all(said.contribution == pytest.approx(said.value * said.weight) for said in spoken)
        assert offset == pytest.approx(
            sum(said.contribution for said in reward.explain(group, 0, top=10_000)) - reward.scores([group])[0][0],
            abs=1e-4,
        )
    sizes = [abs(said.contribution) for said in reward.explain(group, 0)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(sizes) == 10


def test_the_planted_rule_can_be_read():
    """The last prompt token first: a wrong answer lacks copies that the right one has."""
    spoken = fitted("text").explain(TEST[0], 0, top=30, text=lambda ids: f"<{ids[0]}>")
    copies = [said for said in spoken if "is prompt token" in said.feature]
    assert copies
    assert all(said.contribution > 0 for said in copies)


def test_hidden_states_are_told_by_layer_and_within_the_prompt():
    reward = fitted("hidden")
    told = [reward.explain(TEST[0], place) for place in range(5)]
    assert {said.feature for said in told[0]} == {f"hidden states at depth {d}" for d in ("0.33", "0.50", "0.67")}
    scores = torch.tensor(reward.scores(TEST[:1])[0])
    sums = torch.tensor([sum(said.contribution for said in spoken) for spoken in told])
    torch.testing.assert_close(sums, scores - scores.mean(), atol=1e-4, rtol=1e-4)


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["text", "hidden", f"text,hidden,{__name__}:vowels,logp"])
def test_what_is_saved_scores_alike(names, tmp_path):
    reward = fitted(names)
    reward.save(tmp_path / "reward", max_prompt_length=7)
    again = FeatureReward.load(tmp_path / "reward", parts())
    assert again.score(TEST).equal(reward.score(TEST))
    assert again.facts == reward.facts
    assert sorted(path.name for path in (tmp_path / "reward").iterdir()) == [
        "feature_reward.json",
        "feature_reward.safetensors",
    ]


def test_another_model_is_refused(tmp_path):
    fitted("hidden").save(tmp_path)
    with pytest.raises(UserError, match=r"field 'base_model'.*other hidden states"):
        FeatureReward.load(tmp_path, parts(tiny_model(seed=1))).score(TEST)


@pytest.mark.parametrize("name", ["feature_reward.json", "feature_reward.safetensors"])
def test_a_torn_reward_is_one_clear_error(name, tmp_path):
    fitted("text").save(tmp_path)
    torn = tmp_path / name
    torn.write_bytes(torn.read_bytes()[:20])
    with pytest.raises(UserError, match="cannot be read"):
        FeatureReward.load(tmp_path)


def test_weights_of_another_save_are_refused(tmp_path):
    fitted("text").save(tmp_path / "a")
    other = FeatureReward.of("text")
    other.fit(Comparisons({"own": TRAINING[:10]}))
    other.save(tmp_path / "b")
    (tmp_path / "a" / "feature_reward.safetensors").replace(tmp_path / "b" / "feature_reward.safetensors")
    with pytest.raises(UserError, match="not of one save"):
        FeatureReward.load(tmp_path / "b")


def test_models_are_loaded_when_they_are_needed_and_named_when_they_are_missing(tmp_path):
    folder, base = tmp_path / "run" / "reward", tmp_path / "base"
    tiny_model().save_pretrained(base)
    reward = fitted("text,hidden")
    reward.save(folder)
    with pytest.raises(UserError, match=r"field 'base_model'.*'hidden' need a model.*--base_model"):
        FeatureReward.from_pretrained(tmp_path / "run").score(TEST)
    reward.save(folder, base_model=str(base))
    loaded = []
    again = FeatureReward.from_pretrained(
        folder, load=lambda name: loaded.append(name) or AutoModelForCausalLM.from_pretrained(name)
    )
    assert loaded == []
    torch.testing.assert_close(again.score(TEST), reward.score(TEST), atol=1e-4, rtol=1e-4)
    again.score(TRAINING)
    assert loaded == [str(base)]


# --- in other programs ----------------------------------------------------------------------------------------------


def test_the_last_layer_alone_is_a_model_for_sequence_classification(tmp_path):
    model = tiny_model()
    reward = FeatureReward([HiddenFeatures(HiddenSource(lambda: model), depths=(1.0,), pooling="last")])
    reward.fit(COMPARISONS)
    lost = reward.save_as_classifier(tmp_path, tiny_tokenizer("gemma3"))
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    with torch.no_grad():
        rows = [group.prompt_ids + c.token_ids for group in TEST for c in group.completions]
        scores = torch.cat([plain(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    assert scores.std() > 0.1
    torch.testing.assert_close(scores + lost, reward.score(TEST), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", ["text", "hidden"])
def test_other_features_are_no_model(names, tmp_path):
    with pytest.raises(UserError, match=r"only a fitted reward on 'hidden' alone"):
        fitted(names).save_as_classifier(tmp_path, tiny_tokenizer("gemma3"))


@pytest.mark.parametrize("conversational", [False, True])
def test_trl_calls_it(conversational, tmp_path):
    """GRPO hands over the tokens it sampled; they are scored after our prompt, finished or not."""
    tokenizer = tiny_tokenizer("llama3")
    model = tiny_model(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    tokenization = Tokenization(tokenizer)
    prompt = [{"role": "user", "content": "How many?"}] if conversational else "How many apples are there?"
    reward = fitted("hidden", parts(tiny_model(vocab_size=len(tokenizer))))
    function = reward.as_reward_func(tokenization)
    calls = []

    def recorded(**arguments):
        found = function(**arguments)
        calls.append((arguments["completion_ids"], found))
        return found

    trainer = GRPOTrainer(
        model,
        reward_funcs=[function, recorded],
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=6,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt}] * 4),
        processing_class=tokenizer,
    )
    trainer.train()
    ((ids, found),) = calls
    ends = tokenization.stop_ids(conversational)
    samples = tuple(Completion(tuple(row), Role.SAMPLE, row[-1] in ends) for row in ids)
    expected = reward.score([Group(tokenization.prompt_ids(prompt), samples)])
    assert len(set(found)) > 1
    torch.testing.assert_close(torch.tensor(found), expected)
    assert "rewards/feature_reward/mean" in trainer.state.log_history[0]


def test_the_reward_ranks_what_it_has_not_seen():
    assert auc(fitted("text"), TEST, TRUTH) > 0.9
