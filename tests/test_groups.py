"""Groups: roles, what is known of completions, a prompt alone, and the teacher's view."""

import pytest
import torch

from tutelage.groups import Completion, Group, Role, collate_padded, drop_copies, pair_indices, sum_per_completion
from tutelage.scoring.logps import cached_logps, cached_token_logps, completion_logps, completion_token_logps
from tutelage.testing.models import tiny_model

DEMONSTRATION = Completion((7, 8, 2), Role.DEMONSTRATION, True)
SAMPLE = Completion((9, 2), Role.SAMPLE, True)
OTHER = Completion((9, 9, 9), Role.SAMPLE, False)


def test_what_is_known_of_completions_does_not_tell_them_apart():
    group = Group((1, 5), (DEMONSTRATION, SAMPLE), row=3)
    known = group.with_token_values("reference_logps", [(-1.0, -2.0, -3.0), (-0.5, -0.25)])
    known = known.with_values("reward", [1.0, None])
    assert known == group
    assert hash(known.completions[0]) == hash(DEMONSTRATION)
    assert known.sums("reference_logps") == (-6.0, -0.75)
    assert known.completions[0].values == {"reward": 1.0}
    assert known.completions[1].values == {}
    with pytest.raises(KeyError):
        known.values("reward")
    assert known.select([1]).sums("reference_logps") == (-0.75,)
    assert group.completions[0].token_values == {}, "the group itself stays as it was"


def test_numbers_per_token_must_fit_the_tokens():
    with pytest.raises(ValueError, match="2 old_logps for 3 tokens"):
        Group((1,), (DEMONSTRATION,)).with_token_values("old_logps", [(-1.0, -2.0)])


def test_pairs_go_by_role_and_a_group_may_have_several_demonstrations_or_none():
    second = Completion((6, 2), Role.DEMONSTRATION, True)
    group = Group((1,), (SAMPLE, DEMONSTRATION, OTHER, second))
    assert group.pairs == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert group.demonstrations == (DEMONSTRATION, second)
    assert Group((1,), (SAMPLE, OTHER)).pairs == []
    preferred, rejected = (Completion((4, 2), role, True) for role in (Role.PREFERRED, Role.REJECTED))
    both = [Group((1,), (rejected, preferred)), group]
    assert pair_indices(both) == ([1, 3, 3, 5, 5], [0, 2, 4, 2, 4])


def test_copies_of_any_demonstration_are_dropped_and_nothing_else():
    copy = Completion(DEMONSTRATION.token_ids, Role.SAMPLE, True)
    rejected = Completion(DEMONSTRATION.token_ids, Role.REJECTED, True)
    group = Group((1,), (copy, SAMPLE, DEMONSTRATION, rejected))
    assert drop_copies(group).completions == (SAMPLE, DEMONSTRATION, rejected)
    assert drop_copies(Group((1,), (copy, SAMPLE))).completions == (copy, SAMPLE), (
        "without a demonstration there is none"
    )


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_prompts_alone_stand_among_others(layout):
    model = tiny_model()
    alone = Group((1, 5, 6))
    groups = [alone, Group((1, 5), (DEMONSTRATION, SAMPLE)), alone, Group((4,), (OTHER,))]
    found = completion_logps(model, groups, layout=layout)
    torch.testing.assert_close(found, completion_logps(model, [groups[1], groups[3]], layout=layout))
    with pytest.raises(ValueError, match="at least one completion"):
        collate_padded([alone])


@pytest.mark.parametrize("layout", ["shared_prefix", "padded"])
def test_the_same_completions_under_the_teachers_prompt(layout):
    model = tiny_model()
    group = Group((1, 5), (DEMONSTRATION, SAMPLE), teacher_prompt_ids=(1, 30, 31, 5))
    as_teacher = Group((1, 30, 31, 5), (DEMONSTRATION, SAMPLE))
    own, teacher = (completion_token_logps(model, [group], layout=layout, view=view) for view in ("policy", "teacher"))
    torch.testing.assert_close(teacher.logps_N, completion_token_logps(model, [as_teacher], layout=layout).logps_N)
    torch.testing.assert_close(own.logps_N, completion_token_logps(model, [Group((1, 5), group.completions)]).logps_N)
    assert (own.logps_N - teacher.logps_N).abs().max() > 0.1
    with pytest.raises(ValueError, match="no teacher_prompt_ids"):
        completion_token_logps(model, [as_teacher], view="teacher")


def test_numbers_per_token_sum_to_numbers_per_completion():
    model = tiny_model()
    groups = [Group((1, 5), (DEMONSTRATION, SAMPLE)), Group((4,), (OTHER,))]
    scored = completion_token_logps(model, groups)
    assert scored.completion_ids.tolist() == [0, 0, 0, 1, 1, 2, 2, 2]
    torch.testing.assert_close(scored.sums(), completion_logps(model, groups))
    per_token = cached_token_logps(model, groups)
    assert [[len(c) for c in group] for group in per_token] == [[3, 2], [3]]
    flat = [value for group in per_token for c in group for value in c]
    torch.testing.assert_close(torch.tensor(flat), scored.logps_N.detach())
    sums = torch.tensor([value for group in cached_logps(model, groups) for value in group])
    torch.testing.assert_close(sums, scored.sums().detach())
    known = [g.with_token_values("old_logps", logps) for g, logps in zip(groups, per_token, strict=True)]
    again = completion_token_logps(model, known)
    torch.testing.assert_close(again.known("old_logps"), scored.logps_N.detach())
    torch.testing.assert_close(again.known_sums("old_logps"), scored.sums().detach())
    assert again.of(Role.SAMPLE) == [1, 2]
    values = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    sum_per_completion(values, torch.tensor([1, 0, 1]), 2)[1].backward()
    assert values.grad.tolist() == [1, 0, 1]
