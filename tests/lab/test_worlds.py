"""The planted worlds: what the judge says of the demonstrator, what is apart from what, and what corruption does."""

from collections import Counter
from itertools import pairwise, permutations, product

import numpy as np
import pytest

from tutelage.errors import UserError
from tutelage.lab.mixture import mixture_row, retention_rows
from tutelage.lab.vocabulary import lab_tokenizer
from tutelage.lab.worlds import CORRUPTIONS, WORLDS, World, WorldOptions, generator

RIGHT_OR_WRONG = [name for name in WORLDS if name != "compose"]


def world(name, seed=0, phase="reporting", **options):
    return World(name, seed, phase, WorldOptions(**{"demonstrations": 64, "prompts": 50, "test": 64, **options}))


def scores(world, rows):
    return [world.judge(row, row.answer) for row in rows]


@pytest.mark.parametrize("name", RIGHT_OR_WRONG)
def test_the_judge_agrees_with_the_demonstrator(name):
    made = world(name)
    assert set(scores(made, made.demonstrations())) == {1.0}
    assert set(scores(made, made.test())) == {1.0}


@pytest.mark.parametrize("name", WORLDS)
def test_quality_is_what_was_asked_for(name):
    good, half, poor = (np.mean(scores(w, w.demonstrations())) for w in (world(name, quality=q) for q in (1, 0.5, 0)))
    assert good > half > poor
    if name in RIGHT_OR_WRONG:
        assert poor == 0
        assert 0.25 < half < 0.75


def test_the_open_ended_scale_is_the_demonstrators():
    made = world("compose", demonstrations=256)
    assert np.mean(scores(made, made.demonstrations())) == pytest.approx(1, abs=0.15)
    assert max(scores(made, made.demonstrations())) > 1.2  # graded, without a top


def test_the_judge_of_arrange_counts_all_orders():
    made = world("arrange")
    row = made.demonstrations()[0]
    colors = made.task.colors
    right = [order for order in permutations(row.content) if all(colors[a] != colors[b] for a, b in pairwise(order))]
    assert right
    assert sum(made.judge(row, order) for order in permutations(row.content)) == len(right)
    assert made.judge(row, (*right[0], right[0][0])) == 0
    assert made.judge(row, right[0][:-1]) == 0


def test_the_judge_of_navigate_walks_the_graph():
    made = world("navigate")
    for row in made.demonstrations()[:20]:
        start, goal, forbidden = row.content
        assert row.answer[0] == start
        assert row.answer[-1] == goal
        assert forbidden not in row.answer
        assert made.judge(row, (start, forbidden, goal)) == 0
        assert made.judge(row, row.answer[:-1]) == 0


def test_different_seeds_plant_different_things():
    assert WORLDS["arrange"](0).colors != WORLDS["arrange"](1).colors
    assert WORLDS["navigate"](0).neighbors != WORLDS["navigate"](1).neighbors
    assert WORLDS["compose"](0).successors != WORLDS["compose"](1).successors


@pytest.mark.parametrize("name", WORLDS)
def test_the_same_seed_gives_the_same_rows(name):
    first, second = world(name, corrupted=0.3), world(name, corrupted=0.3)
    assert first.demonstrations() == second.demonstrations()
    assert first.prompts() == second.prompts()
    assert first.test() == second.test()
    assert first.validation() == second.validation()
    assert first.demonstrations() != world(name, seed=1, corrupted=0.3).demonstrations()


@pytest.mark.parametrize("name", WORLDS)
def test_no_prompt_serves_two_purposes(name):
    seen = set()
    for phase, seed in product(("tuning", "reporting"), (0, 1)):
        made = world(name, seed, phase)
        parts = {
            "training": [row.text for row in made.demonstrations()] + made.prompts(),
            "validation": [row.text for row in made.validation()],
            "test": [row.text for row in made.test()],
        }
        for part, texts in parts.items():
            assert len(set(texts)) == len(texts)
            # Seeds may share a prompt of one purpose: they plant different answers.
            seen |= {(text, phase, part) for text in texts}
    purposes = Counter(text for text, _, _ in seen)
    assert set(purposes.values()) == {1}


def test_more_demonstrations_begin_with_the_fewer():
    few, many = world("reverse", demonstrations=10), world("reverse", demonstrations=20)
    assert many.demonstrations()[:10] == few.demonstrations()


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_share_of_corrupted_rows_and_their_kinds(name, share):
    rows = world(name, corrupted=share).demonstrations()
    kinds = Counter(row.corruption for row in rows)
    assert kinds[None] == round((1 - share) * len(rows))
    if share:
        assert set(kinds) - {None} == set(CORRUPTIONS)
        assert max(kinds[k] for k in CORRUPTIONS) - min(kinds[k] for k in CORRUPTIONS) <= 1


@pytest.mark.parametrize("name", RIGHT_OR_WRONG)
def test_what_corruption_does(name):
    made, clean = world(name, corrupted=1.0), {row.text: row for row in world(name).demonstrations()}
    for row in made.demonstrations():
        before = clean[row.text].answer
        if row.corruption == "truncated":
            assert row.answer == before[: len(row.answer)]
            assert len(row.answer) < len(before)
        elif row.corruption == "overlong":
            assert row.answer[: len(before)] == before
            assert len(row.answer) > len(before)
        assert made.judge(row, row.answer) == 0 or row.corruption in ("truncated", "overlong")


def test_training_never_sees_the_mark():
    row = world("arrange", corrupted=1.0).demonstrations()[0]
    assert set(row.demonstration) == {"prompt", "completion"}
    assert not any(kind in str(row.demonstration) for kind in CORRUPTIONS)


def test_a_world_that_is_too_small_says_so():
    with pytest.raises(UserError, match=r"'navigate' has \d+ different training prompts for tuning, not 5064"):
        world("navigate", phase="tuning", prompts=5000).prompts()
    with pytest.raises(UserError, match="no world 'chess'"):
        world("chess")
    with pytest.raises(UserError, match=r"field 'corrupted': must be between 0 and 1, not 1.5"):
        world("reverse", corrupted=1.5)


def test_every_word_has_a_token_of_its_own():
    tokenizer = lab_tokenizer()
    texts = [row.text + " ".join(row.answer) for name in WORLDS for row in world(name).demonstrations()]
    texts += [prompt + answer for prompt, answer in retention_rows(20, 0)]
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids


def test_the_base_model_never_sees_what_it_is_asked_for_later():
    rng = generator("a test")
    seen = {prompt for prompt, _ in (mixture_row(rng) for _ in range(5000))}
    assert not seen & {prompt for prompt, _ in retention_rows(300, 0)}
    assert not any(prompt.split()[0] in WORLDS for prompt in seen)
    assert not any(prompt.startswith("backward s") and len(prompt.split()) == 7 for prompt in seen)
