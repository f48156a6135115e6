"""RewardBench's counts, by hand. (Ties were also held against the package's own function on 300 random sets.)"""

import math

import pytest

from tutelage.evaluation.reward_bench import SECTIONS, TiesRow, best_of, pair_accuracy, section_scores, ties_score


def test_a_tie_is_no_win():
    assert [pair_accuracy(*pair) for pair in ((1, 0), (0, 1), (1, 1))] == [1, 0, 0]


@pytest.mark.parametrize(
    ("chosen", "rejected", "score"),
    [(2.0, [1, 0, -1], 1), (0.0, [1, -1, -1], 0), (1.0, [1, 0, 0], 1 / 2), (1.0, [1, 1, 1], 1 / 4)],
)
def test_best_of_several(chosen, rejected, score):
    assert best_of(chosen, rejected) == score


def test_sections_weigh_rows_and_math_as_much_as_code():
    assert [sum(weights.values()) for weights in SECTIONS.values()] == [358, 456, 740, 1968]
    assert SECTIONS["Reasoning"]["math-prm"] == 1968 / 2
    (section,) = section_scores({"mt-bench-easy": 1.0, "mt-bench-med": 0.5, "of my own": 0.0}).items()
    assert section == ("Chat", (pytest.approx((28 + 0.5 * 40) / 68), False))
    assert section_scores(dict.fromkeys(SECTIONS["Safety"], 0.25)) == {"Safety": (pytest.approx(0.25), True)}
    assert section_scores({"of my own": 1.0}) == {}


def test_ties():
    single = {"1": TiesRow([3.0], [1.0]), "2": TiesRow([0.0], [1.0])}  # margins 2 and −1
    several = {"1": TiesRow([4.0, 3.0], [0.0]), "2": TiesRow([5.0, 1.0], [0.0])}  # margins 3 and 1, spreads 1 and 4
    accuracy = 0.3 * 0.5 + 0.3 * 1.0
    preferred, hard = 0.2 * 0.5, 0.2 * 0.5  # 3 > 1 and 2 > 1 for the first alone
    margin = 0.01 * (math.tanh(2 / 1 - 1) + math.tanh(-1 / 4 - 1)) / 2
    assert ties_score(single, several) == pytest.approx(accuracy + preferred + hard + margin)


def test_ties_of_one_kind_alone_count_as_half_lost():
    assert ties_score({"1": TiesRow([3.0], [1.0])}, {}) == pytest.approx(0.3)
    assert ties_score({}, {"1": TiesRow([3.0, 3.0], [1.0])}) == pytest.approx(0.3)


def test_equal_right_answers_have_no_ratio():
    rows = {"1": TiesRow([3.0, 3.0], [1.0])}
    assert ties_score({"1": TiesRow([3.0], [1.0])}, rows) == pytest.approx(1.0)
