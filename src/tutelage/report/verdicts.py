"""Did it help? Each method against its control, in sentences that claim no more than the rows can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tutelage.evaluation.statistics import Interval, paired_difference
from tutelage.report.runs import (
    Run,
    candidates,
    control_of,
    find_run,
    is_control,
    is_start,
    require_distinct_names,
)

__all__ = ["Verdict", "judge", "signed", "verdicts"]

MIN_ROWS = 10  # below that a bootstrap interval is too narrow to be believed
COLLAPSE = 0.10  # a fall of the held-out demonstration log-prob by this share of the start's


@dataclass(frozen=True, slots=True)
class Verdict:
    """A sentence about the runs: what is claimed, what it rests on, and how a page may mark it."""

    claim: str
    evidence: str
    tone: Literal["helped", "hurt", "neutral", "note"]

    @property
    def text(self) -> str:
        return f"{self.claim}: {self.evidence}."


def verdicts(runs: Sequence[Run]) -> list[str]:
    """Plain sentences on whether each method beat its control.

    The control is the run called "continued-sft", or else the run that the method started from. "Helped" is said
    only when the 95% interval of the paired difference excludes zero. Runs whose held-out demonstrations became more
    than 10% less likely (in nats) than under their start are called collapsed. Of a run that chose among policies by a
    learned reward it is said which was kept, and whether training went on to raise that reward while the verifier score
    fell.

    Raises:
        UserError: no runs, or two of the same name.
    """
    return [verdict.text for verdict in judge(runs)]


def judge(runs: Sequence[Run]) -> list[Verdict]:
    """As `verdicts`, with claim, evidence and tone apart."""
    require_distinct_names(runs)
    methods = [run for run in runs if not (is_start(run) or is_control(run))]
    found = [
        verdict
        for method in methods
        for verdict in (*_judge_method(method, runs), _kept(method), _hacked(method))
        if verdict
    ]
    if not methods:
        found.append(Verdict("There is no method to judge", "only the start or the control of a comparison", "note"))
    found += [verdict for run in runs if (verdict := _collapse(run, runs))]
    return [*found, _about_seeds(runs)]


def signed(value: float, digits: int = 2) -> str:
    """A number with a true minus sign, for people to read; never "−0.00".

    >>> signed(-0.0401), signed(-0.001), signed(12)
    ('−0.04', '0.00', '12.00')
    """
    text = f"{value:.{digits}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def _judge_method(method: Run, runs: Sequence[Run]) -> list[Verdict]:
    control, name = control_of(method, runs), method["name"]
    if control is None:
        evidence = "neither a run called continued-sft nor the run that it started from is here to compare it with"
        return [Verdict(f"{name} has no control", evidence, "note")]
    obstacle = _obstacle(method, control)
    if obstacle:
        return [Verdict(f"{name} cannot be judged", obstacle, "note")]
    accuracy = _compare(method, control, "sampled_score", "sampled accuracy") or _compare(
        method, control, "greedy_score", "greedy accuracy"
    )
    likelihood = _compare(method, control, "demonstration_logp", "held-out demonstration log-prob", unit=" nats")
    found = [verdict for verdict in (accuracy, likelihood) if verdict]
    if not found:
        evidence = f"it shares no evaluated rows with {control['name']}"
        return [Verdict(f"{name} cannot be judged", evidence, "note")]
    passes, allowed = method.get("demonstration_epochs"), control.get("demonstration_epochs")
    if passes is not None and allowed is not None and not math.isclose(passes, allowed, rel_tol=0.05):
        evidence = f"{name} made {passes:.3g} demonstration passes, {control['name']} {allowed:.3g}"
        found.append(Verdict("Not an equal budget", evidence, "note"))
    return found


def _obstacle(method: Run, control: Run) -> str | None:
    for run in (method, control):
        if not run["evaluation"]:
            return f"{run['name']} was not evaluated"
    # The held-out data where a run names them; what was trained on may differ.
    ours, theirs = (
        (run["evaluation"].get("dataset", run["dataset"]), run["evaluation"].get("task")) for run in (method, control)
    )
    return None if ours == theirs else f"{control['name']} was evaluated on other data or on another task"


def _compare(method: Run, control: Run, score: str, label: str, unit: str = "") -> Verdict | None:
    pairs = _shared_rows(method, control, score)
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    name, other, n = method["name"], control["name"], len(pairs)
    broken = sum(not math.isfinite(value) for value in (*ours, *theirs))
    if broken:
        evidence = f"{broken} of the values are NaN or infinite"
        return Verdict(f"{name} and {other} cannot be compared by {label}", evidence, "hurt")
    numbers = f"{label} {signed(sum(ours) / n)} against {signed(sum(theirs) / n)}{unit}"
    if n < MIN_ROWS:
        evidence = f"{numbers}, but the rows that both have are only {n}"
        return Verdict(f"Too few rows to compare {name} with {other}", evidence, "note")
    difference = paired_difference(ours, theirs)
    numbers += f", difference {_difference(difference)}"
    if difference.low > 0:
        return Verdict(f"{name} helped over {other}", f"{numbers}, {n} rows", "helped")
    if difference.high < 0:
        return Verdict(f"{name} did worse than {other}", f"{numbers}, {n} rows", "hurt")
    return Verdict(f"{name} did not beat {other}", f"{numbers}; no difference that {n} rows can show", "neutral")


def _shared_rows(a: Run, b: Run, score: str) -> list[tuple[float, float]]:
    """The values of a and b on the rows that have both."""
    ours, theirs = (
        dict(zip(rows["row"], rows[score], strict=True)) if score in rows else {}
        for rows in (run["evaluation"].get("per_row", {}) for run in (a, b))
    )
    return [(value, theirs[row]) for row, value in ours.items() if row in theirs]


def _difference(interval: Interval) -> str:
    plus = "+" if interval.mean > 0 else ""
    return f"{plus}{signed(interval.mean)} (95% interval {signed(interval.low)} to {signed(interval.high)})"


def _collapse(run: Run, runs: Sequence[Run]) -> Verdict | None:
    start = find_run(runs, run.get("start"))
    if not (start and run["evaluation"] and start["evaluation"]):
        return None
    before, after = (each["evaluation"]["demonstration_logp"]["mean"] for each in (start, run))
    if not before - after > COLLAPSE * abs(before):
        return None
    evidence = (
        f"the log-prob of held-out demonstrations fell from {signed(before)} to {signed(after)} nats since "
        f"{start['name']}, by more than {COLLAPSE:.0%}"
    )
    return Verdict(f"{run['name']} collapsed", evidence, "hurt")


def _kept(run: Run) -> Verdict | None:
    """Which of its policies the run kept, and why."""
    found = candidates(run)
    kept = next((candidate for candidate in found if candidate["chosen"]), None)
    if kept is None:
        return None
    start, *later = found
    if kept is not start:
        evidence = (
            f"held-out learned reward {signed(kept['reward'])} at {signed(kept['kl'])} nats KL, objective (reward/scale − β·KL) "
            f"{signed(kept['objective'])} against {signed(start['objective'])} at the start"
        )
        if None not in (kept["verifier_score"], start["verifier_score"]):
            evidence += f", verifier score {signed(kept['verifier_score'])} against {signed(start['verifier_score'])}"
        return Verdict(f"{run['name']} kept the policy after {_stages(kept)}", evidence, "note")
    evidence = f"no stage beat it; its objective (held-out learned reward/scale − β·KL) is {signed(kept['objective'])}"
    if later:
        best = max(later, key=lambda candidate: candidate["objective"])
        evidence += f", that of the best other, after {_stages(best)}, {signed(best['objective'])}"
    return Verdict(f"{run['name']} kept the policy that it started from", evidence, "neutral")


def _hacked(run: Run) -> Verdict | None:
    """A warning where the learned reward of the last policy is surely above the start's and its verifier score surely below."""
    found = candidates(run)
    if not found or None in (found[0]["verifier_score"], found[-1]["verifier_score"]):
        return None
    first, last = found[0], found[-1]
    fell = last.get("verifier_score_high", last["verifier_score"]) < first.get(
        "verifier_score_low", first["verifier_score"]
    )
    if not (last["reward_low"] > first["reward_high"] and fell):
        return None
    rewards = (
        f"{signed(each['reward'])} (95% interval {signed(each['reward_low'])} to {signed(each['reward_high'])})"
        for each in (first, last)
    )
    evidence = (
        f"from the start to the policy after {_stages(last)} the held-out learned reward rose from {' to '.join(rewards)}, but the "
        f"verifier score fell from {signed(first['verifier_score'])} to {signed(last['verifier_score'])}"
    )
    return Verdict(f"Reward hacking in {run['name']}", evidence, "hurt")


def _stages(candidate: dict[str, Any]) -> str:
    return f"{candidate['stage']} stage{'s' if candidate['stage'] != 1 else ''}"


def _about_seeds(runs: Sequence[Run]) -> Verdict:
    seeds = sorted({run["seed"] for run in runs})
    if len(seeds) == 1:
        evidence = "the intervals speak for the choice of rows, not for another training"
        return Verdict(f"One seed ({seeds[0]}) is one seed", evidence, "note")
    listed = ", ".join(map(str, seeds))
    return Verdict(f"The runs differ in their seeds ({listed})", "a difference of two may be the seed's", "note")
