"""Verdicts: each method against its control, claiming no more than the rows can show."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tutelage.evaluation.statistics import paired_difference
from tutelage.report.runs import (
    candidates,
    controls_of,
    is_graded,
    is_method,
    require_distinct_names,
    same_place,
    starts_of,
)
from tutelage.results import CandidateRecord, EvaluationRecord, Interval, RunRecord

__all__ = ["Verdict", "judge", "scientific", "signed", "verdicts"]

MIN_ROWS = 10  # below that a bootstrap interval is too narrow to be believed
MIN_DIFFERING = 6  # with fewer, even all of them on one side, a sign test cannot reach 5%
ROUNDING = 1e-5  # differences below this share of the values compared may be rounding
COLLAPSE = 0.10  # a fall of the held-out demonstration log-prob by this share of the start's
SAME_SCORE = 0.02  # target scores that differ by no more are called equal, in points of the verifier
SAME_COMPUTE = 0.10  # so are numbers of operations that differ by no more than this share of the larger


def _target(run: RunRecord) -> EvaluationRecord | None:
    return run.evaluation


def _other_task(run: RunRecord) -> EvaluationRecord | None:
    return run.retention and run.retention.after


_Of = Callable[[RunRecord], EvaluationRecord | None]
"""Which evaluation of a run is compared."""


@dataclass(frozen=True, slots=True)
class _Words:
    """What is said of a method and a control where the method's number is surely higher, unclear, surely lower."""

    higher: str = "helped over"
    unclear: str = "did not beat"
    lower: str = "did worse than"
    condition: str = ""

    def claim(self, method: str, verb: str, control: str) -> str:
        return f"{method} {verb} {control}{self.condition}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence about the runs: what is claimed, what it rests on, and how a page may mark it."""

    claim: str
    evidence: str
    tone: Literal["helped", "hurt", "neutral", "note"]

    @property
    def text(self) -> str:
        return f"{self.claim}: {self.evidence}."


def verdicts(runs: Sequence[RunRecord]) -> list[str]:
    """Plain sentences on whether each method beat its control.

    The control is a run of ``sft`` or of self-training from the same start, or else the start itself. Of several, a method has to beat the
    one that is best by the very number at hand, on the rows that both have. Names and the order of the runs decide
    nothing.

    "Helped" is said only when the 95% interval of the paired difference excludes zero and has a width. Runs whose
    held-out demonstrations became more than 10% less likely (in nats) than under their start are called collapsed. Of a
    run that chose among policies by a learned reward it is said which was kept, and whether training went on to raise
    that reward while the verifier score fell. Of what was forgotten of another task it is only said against a control that
    reached the same target score, or took the same compute.

    A run that has not ended is not judged; it is said how far it is.

    Raises:
        UserError: no runs, or two of the same name.
    """
    return [verdict.text for verdict in judge(runs)]


def judge(runs: Sequence[RunRecord]) -> list[Verdict]:
    """As `verdicts`, with claim, evidence and tone apart."""
    require_distinct_names(runs)
    on, runs = [run for run in runs if run.unfinished], [run for run in runs if not run.unfinished]
    found = [Verdict(f"{run.name} is not finished", run.unfinished, "note") for run in on]
    return found + _judge_finished(runs) if runs else found


def _judge_finished(runs: Sequence[RunRecord]) -> list[Verdict]:
    methods = [run for run in runs if is_method(run)]
    found = [
        verdict
        for method in methods
        for verdict in (*_judge_method(method, runs), _kept(method), _hacked(method))
        if verdict
    ]
    if not methods:
        found.append(Verdict("There is no method to judge", "only the start or the control of a comparison", "note"))
    found += [verdict for run in runs for verdict in (_best_stage(run), _collapse(run, runs)) if verdict]
    return [*found, _about_seeds(runs)]


def signed(value: float, digits: int = 2) -> str:
    """A number with a proper minus sign; never "−0.00".

    >>> signed(-0.0401), signed(-0.001), signed(12)
    ('−0.04', '0.00', '12.00')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def scientific(value: float) -> str:
    """A large number for people to read.

    >>> scientific(2.345e15)
    '2.3 · 10^15'
    """
    if value < 1000:
        return f"{value:.3g}"
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits} · 10^{int(exponent)}"


def _judge_method(method: RunRecord, runs: Sequence[RunRecord]) -> list[Verdict]:
    name, controls = method.name, controls_of(method, runs) or starts_of(method, runs)
    controls = sorted(controls, key=lambda control: control.id)
    if not controls:
        evidence = "neither a control from the same start nor the start itself is here to compare it with"
        return [Verdict(f"{name} has no control", evidence, "note")]
    obstacles = {control.name: _obstacle(method, control) for control in controls}
    controls = [control for control in controls if obstacles[control.name] is None]
    if not controls:
        evidence = "; ".join(dict.fromkeys(obstacle for obstacle in obstacles.values() if obstacle))
        return [Verdict(f"{name} cannot be judged", evidence, "note")]
    found, against = [], []
    for comparison in (
        _answers(method, controls, "sampled") or _answers(method, controls, "greedy"),
        _compare(method, controls, "demonstration_logp", "held-out demonstration log-prob", unit=" nats"),
    ):
        if comparison:
            found.append(comparison[0])
            against.append(comparison[1])
    if not found:
        evidence = f"it shares no evaluated rows with {', '.join(control.name for control in controls)}"
        return [Verdict(f"{name} cannot be judged", evidence, "note")]
    for control in {control.name: control for control in against}.values():
        found += _unequal(method, control)
    return found + _retention(method, controls)


def _retention(method: RunRecord, controls: Sequence[RunRecord]) -> list[Verdict]:
    """What the method kept of another task, against controls that reached the same target score, or took the same compute.

    Nothing is said where no control did: a run that learned less has forgotten less.
    """
    controls = [control for control in controls if _same_other_task(method, control)]
    found = []
    equal = {"an equal target score": _same_score, "equal compute": _same_compute}
    for what, told in equal.items():
        fair = {control.name: shown for control in controls if (shown := told(method, control))}
        words = _Words("forgot less than", "did not forget less than", "forgot more than", f" at {what}")
        having = [control for control in controls if control.name in fair]
        comparison = _answers(method, having, "sampled", _other_task, words) or _answers(
            method, having, "greedy", _other_task, words
        )
        comparison = comparison or _compare(
            method, having, "demonstration_logp", "log-prob", " nats", _other_task, words
        )
        if comparison:
            verdict, control = comparison
            evidence = f"on the other task {verdict.evidence}; {fair[control.name]}"
            found.append(Verdict(verdict.claim, evidence, verdict.tone))
    return found


def _same_other_task(method: RunRecord, control: RunRecord) -> bool:
    ours, theirs = _other_task(method), _other_task(control)
    return (
        ours is not None
        and theirs is not None
        and ours.task == theirs.task
        and same_place(ours.dataset, theirs.dataset)
    )


def _same_score(method: RunRecord, control: RunRecord) -> str | None:
    """The two target scores, where they are equal; None where they are not, or no verifier scored both."""
    for kind in ("sampled", "greedy"):
        pairs = _shared_rows(method, control, f"{kind}_score")
        if pairs and all(math.isfinite(value) for pair in pairs for value in pair):
            ours, theirs = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
            # Not by a rounding of the mean over the bound.
            same = len(pairs) >= MIN_ROWS and abs(ours - theirs) <= SAME_SCORE + 1e-9
            return f"target score {signed(ours)} against {signed(theirs)}" if same else None
    return None


def _same_compute(method: RunRecord, control: RunRecord) -> str | None:
    """The two numbers of operations, where they are equal; None where they are not, or one is not known."""
    ours, theirs = (run.flops.get("total", 0.0) for run in (method, control))
    if not ours or not theirs or abs(ours - theirs) > SAME_COMPUTE * max(ours, theirs):
        return None
    return f"{scientific(ours)} operations against {scientific(theirs)}"


def _unequal(method: RunRecord, control: RunRecord) -> list[Verdict]:
    """What besides the algorithm differs between the two."""
    found, passes, allowed = [], method.demonstration_epochs, control.demonstration_epochs
    if passes is not None and allowed is not None and not math.isclose(passes, allowed, rel_tol=0.05):
        evidence = f"{method.name} made {passes:.3g} demonstration passes, {control.name} {allowed:.3g}"
        found.append(Verdict("Not an equal budget", evidence, "note"))
    ours, theirs = method.dataset, control.dataset
    if control.algorithm == "sft" and ours is not None and theirs is not None and not same_place(ours, theirs):
        evidence = f"{method.name} was trained on {ours}, {control.name} on {theirs}"
        found.append(Verdict("Not the same data", evidence, "note"))
    return found


def _obstacle(method: RunRecord, control: RunRecord) -> str | None:
    if method.evaluation is None or control.evaluation is None:
        return f"{(method if method.evaluation is None else control).name} was not evaluated"
    ours, theirs = method.evaluation, control.evaluation
    if ours.task == theirs.task and same_place(ours.dataset, theirs.dataset):
        return None
    return f"{control.name} was evaluated on other data or on another task"


def _answers(
    method: RunRecord,
    controls: Sequence[RunRecord],
    kind: Literal["sampled", "greedy"],
    of: _Of = _target,
    words: _Words = _Words(),
) -> tuple[Verdict, RunRecord] | None:
    """By the verifier's score where it gives part of a point, else by the share of right answers."""
    if is_graded(map(of, [method, *controls]), kind):
        return _compare(method, controls, f"{kind}_score", f"{kind} score", "", of, words)
    return _compare(method, controls, f"{kind}_right", f"{kind} accuracy", "", of, words)


def _compare(
    method: RunRecord,
    controls: Sequence[RunRecord],
    key: str,
    label: str,
    unit: str = "",
    of: _Of = _target,
    words: _Words = _Words(),
) -> tuple[Verdict, RunRecord] | None:
    """The verdict by one number, and the control that it is against; None where no rows are shared.

    Against the strongest control: a method that is said to help has to beat each of them.
    """
    pairs = {control.name: _shared_rows(method, control, key, of) for control in controls}
    having = [control for control in controls if pairs[control.name]]
    if not having:
        return None

    def strength(control: RunRecord) -> tuple:
        theirs = [value for _, value in pairs[control.name]]
        broken = not all(map(math.isfinite, theirs))
        return len(theirs) >= MIN_ROWS, not broken, 0.0 if broken else sum(theirs) / len(theirs), control.id, theirs

    control = max(having, key=strength)
    verdict = _verdict(method, control, pairs[control.name], label, unit, words)
    if len(having) > 1:
        evidence = f"{verdict.evidence}; {control.name} is the strongest of {len(having)} controls by this number"
        verdict = Verdict(verdict.claim, evidence, verdict.tone)
    return verdict, control


def _verdict(
    method: RunRecord,
    control: RunRecord,
    pairs: Sequence[tuple[float, float]],
    label: str,
    unit: str,
    words: _Words,
) -> Verdict:
    name, other, n = method.name, control.name, len(pairs)
    ours, theirs = zip(*pairs, strict=True)
    broken = sum(not math.isfinite(value) for value in (*ours, *theirs))
    if broken:
        evidence = f"{broken} of the values are NaN or infinite"
        return Verdict(f"{name} and {other} cannot be compared by {label}{words.condition}", evidence, "hurt")
    means = [sum(values) / n for values in (ours, theirs)]
    if n < MIN_ROWS:
        numbers = f"{label} {signed(means[0])} against {signed(means[1])}{unit}"
        evidence = f"{numbers}, but the rows that both have are only {n}"
        return Verdict(f"Too few rows to compare {name} with {other}{words.condition}", evidence, "note")
    difference = paired_difference(ours, theirs)
    digits = _digits(difference)
    numbers = f"{label} {signed(means[0], digits)} against {signed(means[1], digits)}{unit}"
    resolution = ROUNDING * max(map(abs, means))
    if max(abs(difference.low), abs(difference.high)) <= resolution:
        evidence = f"{numbers}, equal up to rounding over {n} rows"
        return Verdict(f"No difference between {name} and {other}{words.condition}", evidence, "note")
    if difference.high - difference.low <= 1e-9 * max(map(abs, (*means, difference.mean))):
        evidence = (
            f"{numbers}, and each of the {n} rows differs by the same {signed(difference.mean, digits)}: an interval of "
            "width zero shows nothing"
        )
        return Verdict(f"No verdict on {name} against {other}{words.condition}", evidence, "note")
    numbers += f", difference {_difference(difference, digits)}"
    if difference.low <= 0 <= difference.high:
        claim = words.claim(name, words.unclear, other)
        return Verdict(claim, f"{numbers}; no difference that {n} rows can show", "neutral")
    differing = sum(abs(a - b) > ROUNDING * max(abs(a), abs(b)) for a, b in pairs)
    if differing < MIN_DIFFERING:
        evidence = f"{numbers}, but only {differing} of {n} rows differ"
        return Verdict(f"Too few rows differ between {name} and {other}{words.condition}", evidence, "note")
    if difference.low > 0:
        return Verdict(words.claim(name, words.higher, other), f"{numbers}, {n} rows", "helped")
    return Verdict(words.claim(name, words.lower, other), f"{numbers}, {n} rows", "hurt")


def _shared_rows(a: RunRecord, b: RunRecord, key: str, of: _Of = _target) -> list[tuple[float, float]]:
    """The values of a and b on the rows that have both; NaN where a record holds None."""
    ours, theirs = _by_row(of(a), key), _by_row(of(b), key)
    return [(value, theirs[row]) for row, value in ours.items() if row in theirs]


def _by_row(found: EvaluationRecord | None, key: str) -> dict[int, float]:
    if found is None or key not in found.per_row:
        return {}
    values = (math.nan if value is None else value for value in found.per_row[key])
    return dict(zip(found.rows, values, strict=True))


def _digits(difference: Interval) -> int:
    """Decimals that tell the mean from its bounds and, where it excludes zero, that it does; at least 2.

    >>> _digits(Interval(0.0012, 0.0010, 0.0014, 100)), _digits(Interval(0.2, 0.1, 0.3, 100))
    (4, 2)
    """
    shown = [(difference.high - difference.low) / 2]
    if not difference.low <= 0 <= difference.high:
        shown.append(min(abs(difference.low), abs(difference.high)))
    return min(12, max([2, *(-math.floor(math.log10(value)) for value in shown if value > 0)]))


def _difference(interval: Interval, digits: int) -> str:
    plus = "+" if interval.mean > 0 else ""
    low, high = signed(interval.low, digits), signed(interval.high, digits)
    return f"{plus}{signed(interval.mean, digits)} (95% interval {low} to {high})"


def _collapse(run: RunRecord, runs: Sequence[RunRecord]) -> Verdict | None:
    starts = [start for start in starts_of(run, runs) if _obstacle(run, start) is None]
    for start in sorted(starts, key=lambda start: start.id):
        pairs = _shared_rows(run, start, "demonstration_logp")
        if not pairs:
            continue
        after, before = (sum(values) / len(pairs) for values in zip(*pairs, strict=True))
        if before - after > COLLAPSE * abs(before):
            evidence = (
                f"the log-prob of held-out demonstrations fell from {signed(before)} to {signed(after)} nats since "
                f"{start.name}, by more than {COLLAPSE:.0%}"
            )
            return Verdict(f"{run.name} collapsed", evidence, "hurt")
    return None


def _best_stage(run: RunRecord) -> Verdict | None:
    """Which stage's policy the run exported, where it chose by held-out rows."""
    best = run.best_stage
    if not best:
        return None
    why = "; the last one had collapsed" if best["collapsed"] else ""
    evidence = (
        f"its {best['metric']} on the held-out rows is {signed(best['value'])}, against {signed(best['last_value'])} after "
        f"{best['last_stages']}{why}. The rows that chose it flatter it"
    )
    plural = "" if best["stages"] == 1 else "s"
    return Verdict(f"{run.name} kept the policy after {best['stages']} stage{plural}", evidence, "note")


def _kept(run: RunRecord) -> Verdict | None:
    """Which of its policies the run kept, and why."""
    found = candidates(run)
    kept = next((candidate for candidate in found if candidate.chosen), None)
    if kept is None:
        return None
    start, *later = found
    if kept is not start:
        evidence = (
            f"learned reward {signed(kept.reward)} on validation rows at {signed(kept.kl)} nats KL, objective (reward/scale "
            f"− β·KL) {signed(kept.objective)} against {signed(start.objective)} at the start"
        )
        if kept.verifier_score is not None and start.verifier_score is not None:
            evidence += f", verifier score {signed(kept.verifier_score)} against {signed(start.verifier_score)}"
        return Verdict(f"{run.name} kept the policy after {_stages(kept)}", evidence, "note")
    evidence = f"no stage beat it; its objective (learned reward/scale − β·KL) is {signed(kept.objective)}"
    if later:
        best = max(later, key=lambda candidate: candidate.objective)
        evidence += f", that of the best other, after {_stages(best)}, {signed(best.objective)}"
    return Verdict(f"{run.name} kept the policy that it started from", evidence, "neutral")


def _hacked(run: RunRecord) -> Verdict | None:
    """A warning where the last policy's learned reward surely lies above the start's and its verifier score below."""
    found = candidates(run)
    if not found:
        return None
    first, last = found[0], found[-1]
    scores = _score_interval(first), _score_interval(last)
    if scores[0] is None or scores[1] is None:
        return None
    rewards = (first.reward_low, first.reward_high), (last.reward_low, last.reward_high)
    if not (_above(rewards[1], rewards[0]) and _above(scores[0], scores[1])):
        return None
    shown = (
        f"{signed(each.reward)} (95% interval {signed(each.reward_low)} to {signed(each.reward_high)})"
        for each in (first, last)
    )
    evidence = (
        f"from the start to the policy after {_stages(last)} the learned reward of validation samples rose from "
        f"{' to '.join(shown)}, but the verifier score fell from {signed(first.verifier_score or 0.0)} to "
        f"{signed(last.verifier_score or 0.0)}"
    )
    return Verdict(f"Reward hacking in {run.name}", evidence, "hurt")


def _score_interval(candidate: CandidateRecord) -> tuple[float, float] | None:
    if candidate.verifier_score_low is None or candidate.verifier_score_high is None:
        return None
    return candidate.verifier_score_low, candidate.verifier_score_high


def _above(upper: tuple[float, float], lower: tuple[float, float]) -> bool:
    """Whether one interval lies above another; one of width zero knows no spread and shows nothing."""
    return upper[0] > lower[1] and upper[1] > upper[0] and lower[1] > lower[0]


def _stages(candidate: CandidateRecord) -> str:
    return f"{candidate.stage} stage{'s' if candidate.stage != 1 else ''}"


def _about_seeds(runs: Sequence[RunRecord]) -> Verdict:
    seeds = sorted({run.seed for run in runs})
    if len(seeds) == 1:
        evidence = "the intervals speak for the choice of rows, not for another training"
        return Verdict(f"One seed ({seeds[0]}) is one seed", evidence, "note")
    listed = ", ".join(map(str, seeds))
    return Verdict(f"The runs differ in their seeds ({listed})", "a difference of two may be the seed's", "note")
