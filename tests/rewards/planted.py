"""Planted preferences: prompts, demonstrations that follow a rule, samples that break it at times."""

import random

from tutelage.groups import Completion, Group, Role

END = 2
FRAME = (1, 5), (6, 7)  # what a template puts around a prompt


def completion(tokens, role=Role.SAMPLE, finished=True, **known):
    return Completion((*tokens, END) if finished else tuple(tokens), role, finished, known)


def reversed_prompts(count, *, seed=0, samples=6, first_row=0):
    """Five symbols, to be reversed: groups, and for each sample whether it is right."""
    draw = random.Random(seed)
    groups, right = [], []
    for row in range(first_row, first_row + count):
        prompt = draw.sample(range(10, 26), 5)
        answers = [_broken(prompt[::-1], draw) for _ in range(samples)]
        group = Group((*FRAME[0], *prompt, *FRAME[1]), (completion(prompt[::-1], Role.DEMONSTRATION),), row)
        groups.append(group.add(completion(answer) for answer in answers))
        right.append([answer == prompt[::-1] for answer in answers])
    return groups, right


def _broken(tokens, draw):
    """Right in half of the cases."""
    tokens = list(tokens)
    if draw.random() < 0.5:
        i, j = draw.sample(range(len(tokens)), 2)
        tokens[i], tokens[j] = tokens[j], tokens[i]
    return tokens


def auc(reward, groups, right):
    """How often a right sample is over a wrong one of its prompt."""
    wins = []
    for group, scores, truth in zip(groups, reward.scores(groups), right, strict=True):
        found = [scores[place] for place in group.places(Role.SAMPLE)]
        good = [score for score, is_right in zip(found, truth, strict=True) if is_right]
        bad = [score for score, is_right in zip(found, truth, strict=True) if not is_right]
        wins += [(a > b) + (a == b) / 2 for a in good for b in bad]
    return sum(wins) / len(wins)


def samples_alone(groups):
    return [group.select(group.places(Role.SAMPLE)) for group in groups]
