"""Tasks of short prompts and answers with a verifier, for the examples that compare methods on a real model."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from typing import Any

from tutelage.evaluation.verifiers import Verifier, load_verifier, reasoning_gym_rows

KINDS = {
    "animal": "cat dog horse sheep tiger mouse",
    "color": "red blue green black white pink",
    "fruit": "apple lemon grape peach cherry melon",
    "tool": "hammer saw drill axe shovel knife",
}
KIND_OF = {word: kind for kind, words in KINDS.items() for word in words.split()}


@dataclass(frozen=True)
class Task:
    """A reasoning-gym task with its long instruction left out, or ``arrange``.

    Attributes:
        gym: its name there; None for ``arrange``.
        options: of its generator; for ``arrange`` the number of words of a kind.
        cut: what stands before the line of the question that is kept; by default it is the first.
        say: what is written before that part.
        spaced: letters are separated by spaces, so that each is a token.
        tokens: the longest answer that is sampled.
    """

    gym: str | None
    options: Mapping[str, int] = field(default_factory=dict)
    cut: str = ""
    say: str = "Input"
    spaced: bool = False
    tokens: int = 24

    def rows(self, count: int, seed: int) -> list[dict[str, str]]:
        """Rows without a prompt in common."""
        if self.gym is None:
            made = arrange_rows(count, seed, **self.options)
        else:
            made = [self._short(row) for row in reasoning_gym_rows(self.gym, 3 * count, 1000 * seed, **self.options)]
        rows = list({row["prompt"]: row for row in made}.values())[:count]
        assert len(rows) == count, f"only {len(rows)} different prompts"
        return rows

    def _short(self, row: dict[str, str]) -> dict[str, str]:
        question = row["prompt"].removeprefix("Question: ").removesuffix("\nAnswer:")
        kept = question[question.rindex(self.cut) + len(self.cut) if self.cut else 0 :].split("\n")[0].strip()
        answer = row["completion"].strip()
        if self.spaced:
            kept, answer = " ".join(re.sub(r"[\s,]", "", kept)), " ".join(answer)
        extra = {"gym": str(self.gym), "spaced": str(self.spaced), "entry": row["entry"]}
        return {"prompt": f"{self.say}: {kept}\nAnswer:", "completion": f" {answer}", **extra}


TASKS = {
    "arrange": Task(None, {"words": 6}),
    "arrange_16": Task(None, {"words": 4}),
    "palindrome": Task("palindrome_generation", {"min_length": 6, "max_length": 9}, "letters: ", "Letters", True),
    "word_sorting": Task("word_sorting", {"min_words": 3, "max_words": 5}, "Now, ", "Task"),
    "number_sorting": Task(
        "number_sorting",
        {"min_numbers": 4, "max_numbers": 5, "min_value": 0, "max_value": 99, "max_decimals": 0},
        "Sort ",
        "Sort",
        tokens=48,
    ),
    "number_filtering": Task("number_filtering", {"max_numbers": 4, "max_decimals": 1, "max_value": 99}, tokens=32),
    "countdown": Task(
        "countdown",
        {"min_numbers": 3, "max_numbers": 3, "min_value": 1, "max_value": 9, "min_target": 1, "max_target": 30},
    ),
}


def arrange_rows(count: int, seed: int, words: int) -> list[dict[str, str]]:
    """Six of the first ``words`` of each of four kinds, in an order without two of one kind side by side: there are many."""
    rng, rows = random.Random(f"arrange/{seed}"), []
    known = sorted(word for line in KINDS.values() for word in line.split()[:words])
    while len(rows) < 2 * count:
        asked = rng.sample(known, 6)
        orders = (rng.sample(asked, 6) for _ in range(200))
        answer = next((order for order in orders if is_arranged(order)), None)
        if answer is not None and not is_arranged(asked):
            prompt = f"Words: {' '.join(asked)}\nAnswer:"
            rows.append({"prompt": prompt, "completion": f" {' '.join(answer)}", "gym": "None", "spaced": "False"})
    return rows


def is_arranged(words: Sequence[str]) -> bool:
    """Whether no two neighbors are of one kind."""
    return all(KIND_OF.get(a) != KIND_OF.get(b) for a, b in pairwise(words))


def judge(text: str, row: Mapping[str, Any]) -> float:
    """The verifier: 1 for a right answer, else 0."""
    if row["gym"] == "None":
        asked = row["prompt"].removeprefix("Words: ").removesuffix("\nAnswer:").split()
        return float(sorted(text.split()) == sorted(asked) and is_arranged(text.split()))
    answer = text.replace(" ", "") if row["spaced"] == "True" else text.strip()
    return float(gym_verifier(row["gym"])(answer, row) >= 1)


def echoes(prompt: str, completion: str) -> dict[str, float]:
    """Features for a reward: which of the answer's first words is which of its last."""
    words = completion.split()
    ends = range(min(6, len(words)))
    return {
        f"word {i} = word -{j + 1}": 1.0
        for i in ends
        for j in ends
        if i + j < len(words) - 1 and words[i] == words[-1 - j]
    }


@cache
def gym_verifier(task: str) -> Verifier:
    return load_verifier(f"reasoning_gym:{task}")
