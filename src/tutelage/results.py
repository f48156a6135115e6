"""The record of a run: what results.json holds. It is written and read here and nowhere else.

::

    RunRecord          one run: what it was, what it cost, what was logged
      Curve            how a logged number is drawn
      EvaluationRecord findings on held-out rows: means as Interval, and the values of each row
        RewardQualityRecord  how a reward ranks the answers, and the best of n by it (BestOfRecord)
      RetentionRecord  findings on rows of another task, before training and after
      SampleRecord     a prompt with the model's answers (AnswerRecord)
      CandidateRecord  a policy that the run chose from

The record describes itself: the curves to draw and the words of the model card come with it, so that a report needs
neither the algorithm nor torch. Numbers are never NaN: see `RunRecord.to_dict`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from tutelage.errors import UserError
from tutelage.files import plain, write_json

__all__ = [
    "SCHEMA",
    "AlgorithmInfo",
    "AnswerRecord",
    "BestOfRecord",
    "CandidateRecord",
    "Curve",
    "EvaluationRecord",
    "Interval",
    "RetentionRecord",
    "RewardQualityRecord",
    "RunRecord",
    "SampleRecord",
    "load_results",
    "results_beside",
    "run_id",
    "told_of_probes",
    "write_results",
]

SCHEMA = 2
_MAY_BE_ABSENT = {"may_be_absent": True}
"""Of fields that files of this schema may lack, because they were added to it later; they then have their default."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its confidence interval.

    Attributes:
        mean: mean over the rows.
        low, high: bounds of the interval, in the unit of the mean.
        n: number of rows.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """The four numbers by name, as results.json holds them; ``Interval(**d)`` reads them back."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Curve:
    """How one key of a run's history is drawn.

    Attributes:
        key: the key in the history.
        title, unit: what a reader sees.
        group: the heading that the curve stands under.
        faint: key of a second curve in the same frame, drawn faintly; the unit says what it is.
        over: what the axis counts. Stages where there is one value per stage, for stages may share a step.
    """

    key: str
    title: str
    unit: str = ""
    group: str = ""
    faint: str | None = None
    over: Literal["step", "stage"] = "step"


@dataclass(frozen=True, slots=True)
class AlgorithmInfo:
    """What an algorithm says of itself, to people.

    Attributes:
        name: on the command line.
        summary: what it does, in one line.
        page: its page below ``docs``.
        card: what a model card says of a run, one paragraph; "" for nothing.
        curves: what it logs besides what every algorithm does.
    """

    name: str
    summary: str
    page: str
    card: Callable[[RunRecord], str] = lambda record: ""
    curves: tuple[Curve, ...] = ()


@dataclass(slots=True)
class BestOfRecord:
    """The verifier's expected score of the answer that is picked among n, with its interval over prompts.

    Attributes:
        n: answers to pick from.
        reward, logp: the pick has the largest reward, the largest log-prob under the policy itself.
        mean: a random pick.
        oracle: the best by the verifier.
    """

    n: int
    reward: Interval
    logp: Interval
    mean: Interval
    oracle: Interval


@dataclass(slots=True)
class RewardQualityRecord:
    """How a reward ranks the policy's own answers, by the verifier.

    Attributes:
        prompts, answers: prompts, and answers to each.
        auc: by ``reward``, ``logp`` (own log-prob) and ``length``: how often a right answer has more of it than a wrong
            one to the same prompt, over the prompts that have both; none where no prompt has.
        best_of: for n = 1, 2, 4, …
        correlations: of the reward with ``logp`` and ``length`` within prompts; without those that have no variation.
    """

    prompts: int
    answers: int
    auc: dict[str, Interval]
    best_of: list[BestOfRecord]
    correlations: dict[str, float]


@dataclass(slots=True)
class EvaluationRecord:
    """What was found on held-out rows.

    Attributes:
        dataset: where the rows come from.
        task: name of the verifier, if there was one.
        rows: the rows' numbers.
        means: mean and 95% interval of each quantity; ``docs/evaluation.md`` says what each is.
        length_mean: tokens of the sampled answers.
        truncated_fraction: share of the sampled answers that reached the length limit.
        per_row: values by name, each in the order of ``rows``: ``demonstration_logp`` (nats per sequence), and of the
            answers ``sampled_score``, ``greedy_score`` (the verifier's) and ``sampled_right``, ``greedy_right`` (1 where
            the score is full, else 0), which of several sampled answers are the row's means; ``distinct_right`` and
            ``kl`` where they are known. None where the number was NaN or infinite.
        notes: what a reader has to know about the numbers, such as a quantity that has no mean.
        samples_per_row: sampled answers of each row; None where none were drawn.
        reward_quality: of the learned reward, where several answers of each row have its reward and a verifier's score.
    """

    dataset: str
    task: str | None
    rows: list[int]
    means: dict[str, Interval]
    length_mean: float | None = None
    truncated_fraction: float | None = None
    per_row: dict[str, list[float | None]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    samples_per_row: int | None = field(default=None, metadata=_MAY_BE_ABSENT)
    reward_quality: RewardQualityRecord | None = field(default=None, metadata=_MAY_BE_ABSENT)


@dataclass(slots=True)
class RetentionRecord:
    """What training did to another task.

    Attributes:
        before, after: findings on the task's rows of the start and of the trained policy.
        change: of each quantity that both have, after minus before, paired by row.
    """

    before: EvaluationRecord
    after: EvaluationRecord
    change: dict[str, Interval]


@dataclass(slots=True)
class AnswerRecord:
    """An answer of the model, with the verifier's score if there is a verifier."""

    text: str
    score: float | None = None


@dataclass(slots=True)
class SampleRecord:
    """A held-out row with the answers that were drawn for it: at temperature 1, and greedily."""

    row: int
    prompt: str
    demonstration: str | None
    sampled: AnswerRecord | None = None
    greedy: AnswerRecord | None = None


@dataclass(slots=True)
class CandidateRecord:
    """A policy that the run chose from, seen through its samples for the validation rows and the last reward.

    Attributes:
        stage: the number of stages that made it; 0 is the start.
        reward, reward_low, reward_high: mean reward of its samples, with the 95% bounds.
        kl: to the start (nats per sequence).
        objective: reward/scale − β·KL, by which the run chose.
        verifier_score, verifier_score_low, verifier_score_high: the verifier's mean score; None without a verifier.
        chosen: whether the run kept it.
    """

    stage: int
    reward: float
    reward_low: float
    reward_high: float
    kl: float
    objective: float
    verifier_score: float | None
    verifier_score_low: float | None
    verifier_score_high: float | None
    chosen: bool


@dataclass(slots=True)
class RunRecord:
    """One run; of a model that no run of ours made, the fields of training are empty.

    Attributes:
        name: what tables and verdicts call the run. Nothing else depends on it.
        algorithm: ``base`` for a model as it was found.
        model: name or path of the model that the run started from; of ``base``, the model itself.
        dataset: what it was trained on; None for ``base``.
        seed: of training and of the answers.
        id: names the run for other runs. By default a digest of what was trained, from which model and with which
            losses, without ``name``, times and evaluation: a renamed, moved or newly evaluated run keeps it.
        start: ``id`` of the run whose output this one started from; None if that was no run's output.
        settings: the algorithm's fields, the optimizer's and the adapter's.
        demonstration_epochs: passes over the demonstrations; None for ``base``.
        trained_tokens, sampled_tokens: completion tokens.
        time_s: seconds by kind of work, and their ``total``.
        peak_memory_bytes: most memory held at once, where the system tells.
        history: every line that was logged, with its ``step``. None where a number was NaN or infinite.
        curves: how to draw what this algorithm logs; what all algorithms log, the report knows by itself.
        card: sentences of the model card on what the algorithm did.
        evaluation, samples: on held-out rows, if there were any.
        selection: the policies that the run chose from, by stage.
        flops: floating-point operations by kind of work, and their ``total``: an estimate (``docs/evaluation.md``).
            Empty where they were not counted.
        retention: what training did to another task, if rows of one were given.
        probes: what was tried on the model itself before it was used, and found: ``layout`` (which layouts give a plain
            forward's log-probs, up to which lengths, whether it is causal, the lengths in its config, the seconds it
            took) and ``sampling`` (likewise for decoding).
        best_stage: which policy was chosen by held-out rows: ``stages`` that made it, ``metric``, its ``value``, those of the
            last policy (``last_stages``, ``last_value``), and whether that had ``collapsed``. Empty where none was chosen.
        unfinished: of a run that has not ended, how far it is; "" of one that has.
    """

    name: str
    algorithm: str
    model: str
    dataset: str | None
    seed: int
    id: str = ""
    start: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    demonstration_epochs: float | None = None
    trained_tokens: int = 0
    sampled_tokens: int = 0
    time_s: dict[str, float] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)
    card: str = ""
    evaluation: EvaluationRecord | None = None
    samples: list[SampleRecord] = field(default_factory=list)
    selection: list[CandidateRecord] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=dict, metadata=_MAY_BE_ABSENT)
    retention: RetentionRecord | None = field(default=None, metadata=_MAY_BE_ABSENT)
    probes: dict[str, Any] = field(default_factory=dict, metadata=_MAY_BE_ABSENT)
    best_stage: dict[str, Any] = field(default_factory=dict, metadata=_MAY_BE_ABSENT)
    unfinished: str = field(default="", metadata=_MAY_BE_ABSENT)

    def __post_init__(self):
        if not self.id:
            losses = [row["loss"] for row in self.history if "loss" in row]
            told = [self.algorithm, self.model, self.start, self.dataset, self.seed, self.settings, losses]
            told += [self.trained_tokens, self.sampled_tokens]
            self.id = sha256(json.dumps(plain(told), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types, with the schema's number.

        JSON has no NaN and no infinity. Where a value may be missing (in ``history``, ``settings`` and ``per_row``) such
        a number becomes None; anywhere else it is an error.

        Raises:
            UserError: a number that must be finite is not.
        """
        return {"schema": SCHEMA, **_written(RunRecord, self, "")}

    @staticmethod
    def from_dict(data: Any, *, file: str | None = None) -> RunRecord:
        """The inverse of ``to_dict``. Fields that this version does not know are left out.

        Raises:
            UserError: another schema, a field that is missing or of the wrong type; it names ``file`` and the field.
        """
        found = data.get("schema") if isinstance(data, dict) else None
        if found != SCHEMA:
            raise UserError(
                f"results of schema {found!r}, but this version reads schema {SCHEMA}.",
                file=file,
                field="schema",
                remedy="Read it with the version of tutelage that wrote it, or run again.",
            )
        try:
            return _read(RunRecord, data, "")
        except _Mismatch as error:
            raise UserError(
                f"{error.problem}.", file=file, field=error.place, remedy="Run again, or restore the file from a copy."
            ) from None


def write_results(folder: str | Path, record: RunRecord) -> Path:
    """Write ``results.json`` into the run's folder; returns its path.

    Raises:
        UserError: see ``RunRecord.to_dict``.
    """
    path = Path(folder) / "results.json"
    content = record.to_dict()
    json.dumps(content, allow_nan=False)  # a ValueError is a fault of ours, and no file that others cannot read
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
    return path


def load_results(directory_or_file: str | Path) -> RunRecord:
    """The results.json of a run.

    Args:
        directory_or_file: the run's directory, or its results.json.

    Raises:
        UserError: no such file, not JSON, another schema, or a field that is missing or of the wrong type.
    """
    path = Path(directory_or_file)
    if path.is_dir():
        path = path / "results.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
    except FileNotFoundError:
        raise UserError(
            "no such file.",
            file=str(path),
            remedy="Give the output directory of a run that has finished, or its results.json.",
        ) from None
    except ValueError as error:  # not UTF-8, or not JSON
        raise UserError(
            f"not a JSON file ({error}).", file=str(path), remedy="Run again, or restore the file from a copy."
        ) from None
    return RunRecord.from_dict(data, file=str(path))


def run_id(model: str | Path) -> str | None:
    """The ``id`` of the run that wrote a model, read from the results.json beside it; None if there is none.

    Args:
        model: a run's folder, the ``policy`` inside one, or the name of any other model.
    """
    path = results_beside(model)
    try:
        return load_results(path).id if path else None
    except UserError:  # of another version: the run is known by its path alone
        return None


def results_beside(model: str | Path) -> Path | None:
    """The results.json of the run that wrote a model; None if there is none. ``model`` as for ``run_id``."""
    folder = Path(model)
    places = (folder, folder.parent) if folder.name == "policy" else (folder,)
    return next((path for place in places if (path := place / "results.json").is_file()), None)


def told_of_probes(record: RunRecord) -> dict[str, str]:
    """What the probes of a run's model found, as a line each; nothing that differs from one machine to another."""
    layout, sampling = (record.probes.get(name) or {} for name in ("layout", "sampling"))
    told = {}
    if layout:
        told["probe of the layout"] = "causal; " + "; ".join(
            f"{each['layout']} up to {each['up_to_tokens'][0]:,} tokens per row, {each['up_to_tokens'][1]:,} per group"
            for each in layout.get("layouts", ())
        )
        told["lengths in the model's config"] = ", ".join(
            f"{name} {length:,}" for name, length in (layout.get("lengths_in_config") or {}).items()
        )
    if sampling:
        told["probe of sampling"] = "; ".join(
            f"{each['way']} up to {each['up_to_tokens']:,} tokens per row" for each in sampling.get("ways", ())
        )
    return {name: line for name, line in told.items() if line}


# --- to JSON and back --------------------------------------------------------------------------------------------------


class _Mismatch(Exception):
    """What is wrong with a value, and where it stands."""

    def __init__(self, problem: str, place: str):
        self.problem, self.place = problem, place


@cache
def _types(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _optional(kind: Any) -> Any:
    """T of ``T | None``, else None."""
    if get_origin(kind) not in (Union, UnionType):
        return None
    (inner,) = (each for each in get_args(kind) if each is not NoneType)
    return inner


def _at(place: str, name: str | int) -> str:
    if isinstance(name, int):
        return f"{place}[{name}]"
    return f"{place}.{name}" if place else name


def _written(kind: Any, value: Any, place: str) -> Any:
    """A value of a type as JSON types."""
    inner = _optional(kind)
    if inner is not None:
        absent = value is None or (inner is float and not math.isfinite(value))
        return None if absent else _written(inner, value, place)
    if is_dataclass(kind):
        types = _types(kind)  # type: ignore[arg-type]
        return {f.name: _written(types[f.name], getattr(value, f.name), _at(place, f.name)) for f in fields(kind)}
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        return [_written(inner, each, _at(place, index)) for index, each in enumerate(value)]
    if get_origin(kind) is dict:
        _, inner = get_args(kind)
        return {str(name): _written(inner, each, _at(place, name)) for name, each in value.items()}
    if kind in (int, float) and not math.isfinite(value):
        raise UserError(
            f"{value} cannot stand in results.json.",
            field=place,
            remedy="It is the mean or the cost of something that went wrong before: look at the lines of the log.",
        )
    return float(value) if kind is float else plain(value)


def _read(kind: Any, value: Any, place: str) -> Any:
    """A value of a type from JSON types.

    Raises:
        _Mismatch: it is not of that type.
    """
    inner = _optional(kind)
    if inner is not None:
        return None if value is None else _read(inner, value, place)
    if kind is Any:
        return value
    if is_dataclass(kind):
        _require(value, dict, "an object", place)
        types = _types(kind)  # type: ignore[arg-type]
        optional = {f.name for f in fields(kind) if f.metadata.get("may_be_absent")}
        missing = next((name for name in types if name not in value and name not in optional), None)
        if missing:
            raise _Mismatch("is missing", _at(place, missing))
        found = {name: _read(each, value[name], _at(place, name)) for name, each in types.items() if name in value}
        if kind is EvaluationRecord:
            _require_lengths(found, place)
        return kind(**found)  # type: ignore[operator]
    if get_origin(kind) is list:
        (inner,) = get_args(kind)
        _require(value, list, "a list", place)
        return [_read(inner, each, _at(place, index)) for index, each in enumerate(value)]
    if get_origin(kind) is dict:
        _, inner = get_args(kind)
        _require(value, dict, "an object", place)
        return {name: _read(inner, each, _at(place, name)) for name, each in value.items()}
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise _Mismatch(f"is {value!r}, not one of {', '.join(get_args(kind))}", place)
        return value
    if kind is bool:
        return _require(value, bool, "true or false", place)
    if isinstance(value, bool):  # Python counts it among the integers
        raise _Mismatch(f"is {value!r}, not {'a text' if kind is str else 'a number'}", place)
    if kind is float:
        return float(_require(value, int | float, "a number", place))
    return _require(value, kind, "a text" if kind is str else "a whole number", place)


def _require(value: Any, kind: Any, called: str, place: str) -> Any:
    if not isinstance(value, kind):
        shown = value if isinstance(value, str | int | float | NoneType) else type(value).__name__
        raise _Mismatch(f"is {shown!r}, not {called}", place)
    return value


def _require_lengths(found: dict[str, Any], place: str) -> None:
    """One value per row."""
    for name, values in found["per_row"].items():
        if len(values) != len(found["rows"]):
            problem = f"holds {len(values)} values for {len(found['rows'])} rows"
            raise _Mismatch(problem, _at(_at(place, "per_row"), name))


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number in JSON")
