"""Features of an answer given its prompt, from token ids alone: nothing in them is made for one task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from math import log2
from typing import Any

from scipy import sparse

from tutelage.groups import Completion, Group
from tutelage.rewards.vocabulary import Feature, Vocabulary

__all__ = ["PromptIndex", "TextFeatures", "readable_feature", "text_features"]

START, END = -1, -2
"""Stand in bigrams for the start of the answer and for its end, if it finished."""

# Bounds, so that long prompts and answers stay cheap.
ANSWER_POSITIONS = 32
PROMPT_POSITIONS = 64  # from the front, and as many from the end
OCCURRENCES = 4  # of one token in a prompt that are looked at
STEP = 8
LENGTHS = 32
COUNT = 4


class PromptIndex:
    """Where each token of a prompt stands, made once for all answers to it.

    Positions count from the front, from 0, and from the end, from -1; only the first and the last ``PROMPT_POSITIONS``
    and ``OCCURRENCES`` of one token are looked at.
    """

    def __init__(self, prompt_ids: Sequence[int]):
        length = len(prompt_ids)
        self.demanded = Counter(prompt_ids)
        self.front: dict[int, list[int]] = {}
        self.back: dict[int, list[int]] = {}
        self.places: dict[int, list[int]] = {}
        for place, token in enumerate(prompt_ids):
            places = self.places.setdefault(token, [])
            if len(places) < OCCURRENCES:
                places.append(place)
        for token, places in self.places.items():
            if inside := [place for place in places if place < PROMPT_POSITIONS]:
                self.front[token] = inside
        for place in range(length - 1, max(-1, length - 1 - PROMPT_POSITIONS), -1):
            places = self.back.setdefault(prompt_ids[place], [])
            if len(places) < OCCURRENCES:
                places.append(place - length)


def text_features(prompt: PromptIndex, completion: Completion) -> dict[Feature, float]:
    """Named values of an answer; a feature that is not named is 0.

    The end-of-turn token is not among the answer's tokens; that it is there is the feature ``finished``.

    ``token`` and ``bigram``: how often, up to 4; a bigram may begin at the answer's start or reach its end. ``copy i j``:
    answer token i is prompt token j (from the front, or from the end where j is negative). ``uses j``: how often the
    answer has prompt token j, up to 4. ``last j``: its last token is prompt token j. ``step d``: share of neighbors in
    the answer that stand d places apart in the prompt. ``missing``, ``covered``, ``too_often``: shares of the prompt's
    different tokens that the answer has never, as often as the prompt at most, and more often. ``new``: share of its
    tokens that the prompt does not have. ``length`` (relative, log 2), ``length_is n``, ``finished``, ``distinct``
    (share of different tokens), ``repeats`` (share of tokens that repeat the one before), ``repeated_bigrams`` (share).
    """
    tokens = completion.token_ids[:-1] if completion.finished else completion.token_ids
    length = len(tokens)
    counts = Counter(tokens)
    bigrams = Counter(pairwise(tokens))
    found: dict[Feature, float] = {("token", token): min(count, COUNT) for token, count in counts.items()}
    found |= {("bigram", *pair): min(count, COUNT) for pair, count in bigrams.items()}
    found["length",] = log2(1 + length)
    found["finished",] = float(completion.finished)
    if length <= LENGTHS:
        found["length_is", length] = 1.0
    _coverage(found, prompt, counts, length)
    if not length:
        return found
    found["bigram", START, tokens[0]] = 1.0
    if completion.finished:
        found["bigram", tokens[-1], END] = 1.0
    _copies(found, prompt, tokens)
    found["distinct",] = len(counts) / length
    found["repeats",] = sum(a == b for a, b in pairwise(tokens)) / length
    found["repeated_bigrams",] = 1 - len(bigrams) / (length - 1) if length > 1 else 0.0
    return found


def _coverage(found: dict[Feature, float], prompt: PromptIndex, counts: Mapping[int, int], length: int) -> None:
    demanded, different = prompt.demanded, max(1, len(prompt.demanded))  # of an empty prompt nothing is missing
    shared = [token for token in counts if token in demanded]
    over = sum(counts[token] > demanded[token] for token in shared)
    found["too_often",] = over / different
    found["covered",] = (len(shared) - over) / different
    found["missing",] = (len(demanded) - len(shared)) / different
    found["new",] = 1 - sum(counts[token] for token in shared) / length if length else 0.0
    for token in shared:
        times = min(counts[token], COUNT)
        for place in (*prompt.front.get(token, ()), *prompt.back.get(token, ())):
            found["uses", place] = times


def _copies(found: dict[Feature, float], prompt: PromptIndex, tokens: Sequence[int]) -> None:
    front, back, places = prompt.front, prompt.back, prompt.places
    for position, token in enumerate(tokens[:ANSWER_POSITIONS]):
        for place in (*front.get(token, ()), *back.get(token, ())):
            found["copy", position, place] = 1.0
    last = tokens[-1]
    for place in (*front.get(last, ()), *back.get(last, ())):
        found["last", place] = 1.0
    if len(tokens) < 2:
        return
    steps: Counter[int] = Counter()
    before: Sequence[int] = places.get(tokens[0], ())
    for token in tokens[1:]:
        now = places.get(token, ())
        if before and now:
            # each step once, however often the tokens occur
            steps.update({step for old in before for new in now if abs(step := new - old) <= STEP})
        before = now
    for step, count in steps.items():
        found["step", step] = count / (len(tokens) - 1)


class TextFeatures:
    """The set ``text``: counts, copies and coverage of tokens, under a vocabulary of names.

    The names are those that completions to learn from show, so that no two features share a column and each weight can
    be read; hashed names would collide, and could not be read back. At most ``limit`` names: those that the most groups
    show, and none that fewer than ``least`` groups show.

    Args:
        names: of an earlier fit.
    """

    name = "text"
    learned = True
    compares_across_prompts = True

    def __init__(self, *, limit: int = 4096, least: int = 2, names: Iterable[Sequence[str | int]] = ()):
        self.limit, self.least = limit, least
        self.vocabulary = Vocabulary(names)

    def choose(self, groups: Sequence[Group]) -> sparse.csr_array:
        """Take the vocabulary of these groups; returns their features."""
        rows = _rows(groups)
        self.vocabulary = Vocabulary.of(groups, rows, limit=self.limit, least=self.least)
        return self.vocabulary.matrix(rows)

    def matrix(self, groups: Sequence[Group]) -> sparse.csr_array:
        """[C, F] features of completions, groups in order and completions in order within each."""
        return self.vocabulary.matrix(_rows(groups))

    @property
    def width(self) -> int:
        """F."""
        return len(self.vocabulary)

    def readable(self, column: int, text: Callable[[Sequence[int]], str] | None = None) -> str:
        """A feature as people read it; ``text`` decodes token ids."""
        return readable_feature(self.vocabulary.names[column], text)

    def settings(self) -> dict[str, Any]:
        """What makes this set again; JSON."""
        return {"limit": self.limit, "least": self.least, "names": [list(name) for name in self.vocabulary.names]}


def _rows(groups: Sequence[Group]) -> list[dict[Feature, float]]:
    rows = []
    for group in groups:
        prompt = PromptIndex(group.prompt_ids)
        rows += [text_features(prompt, completion) for completion in group.completions]
    return rows


def readable_feature(feature: Feature, text: Callable[[Sequence[int]], str] | None = None) -> str:
    """A feature in words; token ids as text where ``text`` decodes them.

    >>> readable_feature(("copy", 0, -1))
    'answer token 1 is prompt token 1 from the end'
    >>> readable_feature(("bigram", 17, END), lambda ids: "cat")
    "'cat' at the end"
    """

    def token(token_id: Any) -> str:
        return repr(text([token_id])) if text else f"token {token_id}"

    def place(position: Any) -> str:
        return f"prompt token {position + 1}" if position >= 0 else f"prompt token {-position} from the end"

    match feature:
        case ("token", a):
            return token(a)
        case ("bigram", a, b) if a == START:
            return f"{token(b)} at the start"
        case ("bigram", a, b) if b == END:
            return f"{token(a)} at the end"
        case ("bigram", a, b):
            return f"{token(a)} then {token(b)}"
        case ("copy", i, j):
            return f"answer token {int(i) + 1} is {place(j)}"
        case ("uses", j):
            return f"has {place(j)}"
        case ("last", j):
            return f"ends with {place(j)}"
        case ("step", d):
            return f"neighbors {int(d):+d} apart in the prompt"
        case ("length_is", n):
            return f"{n} tokens long"
        case _:
            return str(feature[0]).replace("_", " ")
