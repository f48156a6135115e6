"""Features of text: what each says of an answer, bounds, the vocabulary."""

import time

import pytest

from rewards.planted import completion, reversed_prompts
from tutelage.groups import Completion, Group, Role
from tutelage.rewards.text_features import PromptIndex, TextFeatures, readable_feature, text_features

PROMPT = (1, 10, 11, 12, 11, 3)


def features(tokens, finished=True, prompt=PROMPT):
    return text_features(PromptIndex(prompt), completion(tokens, finished=finished))


def test_counts_of_tokens_and_bigrams():
    found = features([20, 21, 20, 21])
    assert found["token", 20] == found["token", 21] == 2
    assert (found["bigram", 20, 21], found["bigram", 21, 20]) == (2, 1)
    assert features([20] * 9)["token", 20] == 4


def test_the_end_of_turn_is_no_token_and_the_end_is_one_of_those_that_finished():
    whole, cut = features([20, 21]), features([20, 21], finished=False)
    assert ("token", 2) not in whole
    assert (whole["finished",], cut["finished",]) == (1, 0)
    assert whole["bigram", -1, 20] == cut["bigram", -1, 20] == 1
    assert whole["bigram", 21, -2] == 1
    assert ("bigram", 21, -2) not in cut
    assert {name: value for name, value in whole.items() if name not in (("finished",), ("bigram", 21, -2))} == {
        name: value for name, value in cut.items() if name != ("finished",)
    }


def test_copies_know_positions_from_both_ends():
    found = features([12, 20, 11])
    copies = {name[1:] for name in found if name[0] == "copy"}
    assert copies == {(0, 3), (0, -3), (2, 2), (2, 4), (2, -4), (2, -2)}
    assert {name[1] for name in found if name[0] == "last"} == {2, 4, -4, -2}
    assert {name[1] for name in found if name[0] == "uses"} == {3, -3, 2, 4, -4, -2}


def test_steps_through_the_prompt():
    """Backwards through 10, 11, 12, 13."""
    found = features([13, 12, 11, 10], prompt=(1, 10, 11, 12, 13))
    assert found["step", -1] == 1
    assert {name for name in found if name[0] == "step"} == {("step", -1)}


def test_coverage():
    """Of five different tokens of the prompt: 10 too often, 11 as often as there, 1, 12 and 3 missing; 20 is new."""
    found = features([10, 10, 11, 20])
    assert found["too_often",] == pytest.approx(1 / 5)
    assert found["covered",] == pytest.approx(1 / 5)
    assert found["missing",] == pytest.approx(3 / 5)
    assert found["new",] == pytest.approx(1 / 4)


def test_of_an_empty_prompt_nothing_is_missing():
    found = features([20, 21], prompt=())
    assert {found[name,] for name in ("too_often", "covered", "missing")} == {0}
    assert found["new",] == 1
    assert not [name for name in found if name[0] in ("copy", "uses", "last", "step")]


def test_length_and_repeats():
    found = features([20, 20, 20, 21])
    assert found["length_is", 4] == 1
    assert found["distinct",] == 2 / 4
    assert found["repeats",] == 2 / 4
    assert found["repeated_bigrams",] == pytest.approx(1 / 3)


def test_an_answer_that_is_nothing_but_its_end():
    found = text_features(PromptIndex(PROMPT), Completion((2,), Role.SAMPLE, finished=True))
    assert (found["length",], found["missing",], found["finished",]) == (0, 1, 1)


def test_long_ones_are_bounded():
    found = features(range(1000, 3000), prompt=tuple(range(1000, 3000)))
    positions = [name[1:] for name in found if name[0] == "copy"]
    assert max(i for i, _ in positions) < 32
    assert {j >= 0 for _, j in positions} == {True}  # the first answer tokens are far from the prompt's end
    assert ("length_is", 2000) not in found


def test_names_that_the_most_groups_show():
    groups = [Group((1, 9), (completion([20, 20 + i]), completion([30]))) for i in range(1, 4)]
    chosen = TextFeatures(limit=3)
    chosen.choose(groups)
    assert chosen.width == 3
    everything = TextFeatures()
    matrix = everything.choose(groups)
    names = everything.vocabulary.names
    assert ("token", 20) in names
    assert ("token", 21) not in names  # one group alone shows it
    assert matrix.shape == (6, len(names))
    assert matrix.toarray()[:, names.index(("token", 20))].tolist() == [1, 0] * 3


def test_settings_make_the_same_features():
    groups, _ = reversed_prompts(10)
    made = TextFeatures()
    made.choose(groups)
    again = TextFeatures(**made.settings())
    assert (again.matrix(groups) != made.matrix(groups)).nnz == 0
    assert again.width > 50


def test_every_kind_of_feature_can_be_read():
    groups, _ = reversed_prompts(10)
    made = TextFeatures()
    made.choose(groups)
    texts = [made.readable(column, lambda ids: f"<{ids[0]}>") for column in range(made.width)]
    assert len(set(texts)) == made.width
    assert readable_feature(("bigram", 10, 11), lambda ids: f"<{ids[0]}>") == "'<10>' then '<11>'"


def test_a_short_answer_costs_microseconds():
    """The bound is wide: a slow machine must not fail it, and features made once per answer and token would."""
    groups, _ = reversed_prompts(100)
    made = TextFeatures()
    made.choose(groups)
    began = time.perf_counter()
    made.matrix(groups)
    assert (time.perf_counter() - began) / 700 < 1e-3
