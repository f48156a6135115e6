"""Tutelage beside what one would use instead: time, memory, and how far from what the machine allows.

    python -m benchmarks all
    python -m benchmarks step sft_step --models qwen3-32k --json results.json
    python -m benchmarks step sampling --models qwen3-32k --baseline FOLDER

Both sides of a row have the same model, tokens and precision, each in a fresh process, and take turns on the same machine; see
``benchmarks.sides``. Targets are shown as met or missed; missing one is no error.

With --baseline the second side is not the peer but our side of the same row from another checkout of this repository
(``git worktree add FOLDER COMMIT``). The table shows how many times as long the baseline takes: above 1, this checkout is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from benchmarks.allocator import ALLOCATORS
from benchmarks.provenance import commit, provenance
from benchmarks.roofline import measured_lower_bound
from benchmarks.sides import HERE, Measured, check_checkout, compare
from benchmarks.training import MOST_TURNS
from benchmarks.workloads import MODELS, Work, prepare_model
from tutelage.errors import UserError
from tutelage.files import write_json

__all__ = ["ROWS", "Row", "add_common_options", "cache_folder", "cases", "main", "result"]

_GEMMA, _SMALL = MODELS
_PARAMETERS = ("adapters", "full")
_TARGET_LOWER_BOUND_SHARE = 0.5
_COLUMNS = {
    "row": 12,
    "model, trained": 22,
    "ours": 25,
    "peer": 25,
    "time": 18,
    "memory": 18,
    "lower bound / ours": 18,
}
_BASELINE_COLUMNS = {"row": 12, "model, trained": 22, "new": 25, "old, the baseline": 25, "time, old / new": 20}
_BASELINE_COLUMNS |= {"processor time, old / new": 26, "memory, old / new": 18}


@dataclass(frozen=True, slots=True)
class Row:
    """One comparison.

    Attributes:
        name: on the command line.
        about: what is compared with what, for a reader of the table.
        sides: ours and the peer's, "module:function" below ``benchmarks``.
        work: fields of ``Work`` that differ from its defaults.
        parameters: "adapters", "full" or both.
        time, memory: what ours over the peer's should be at the most, by model; a model without a target has none.
        lower_bound: of ``benchmarks.roofline.LOWER_BOUNDS``, if there is one.
        peer_allocator: of ``benchmarks.allocator``, what the peer is fastest with and stays within memory.
    """

    name: str
    about: str
    sides: tuple[str, str]
    work: Mapping[str, Any] = field(default_factory=dict)
    parameters: tuple[str, ...] = ("adapters",)
    time: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, float] = field(default_factory=dict)
    lower_bound: str | None = None
    peer_allocator: str = "kept"

    @property
    def peer_is_ours(self) -> bool:
        """Whether both sides are tutelage's."""
        return all(":ours" in side for side in self.sides)


def _both(target: float) -> dict[str, float]:
    return dict.fromkeys(MODELS, target)


ROWS = (
    Row(
        "step",
        "an optimizer step on 8 prompts with demonstration and sample: IRFT, and TRL's DPO",
        ("training:ours_step", "training:peer_step"),
        parameters=("adapters", "full"),
        time={_GEMMA: 1 / 5, _SMALL: 1 / 2},
        memory={_GEMMA: 1 / 3},
        lower_bound="step",
        peer_allocator="unmapped",
    ),
    Row(
        "step_n4",
        "the same with 4 samples per prompt, which are 4 pairs for DPO",
        ("training:ours_step", "training:peer_step"),
        {"samples": 4, "micro_batch": 8},
        time={_GEMMA: 1 / 8},
        lower_bound="step",
        peer_allocator="unmapped",
    ),
    Row(
        "sft_step",
        "an optimizer step on 8 demonstrations: our SFT, and TRL's",
        ("training:ours_sft", "training:peer_sft"),
        {"micro_batch": 8},
        parameters=("adapters", "full"),
        time={_GEMMA: 1 / 2},
        lower_bound="sft",
        peer_allocator="unmapped",
    ),
    Row(
        "sdft_step",
        "an optimizer step on given samples of 8 prompts: our SDFT, and TRL's, forward KL over the whole vocabulary",
        ("training:ours_sdft", "training:peer_sdft"),
        time={_GEMMA: 1 / 4},
        memory={_GEMMA: 1 / 2},
        peer_allocator="unmapped",
    ),
    Row(
        "sampling",
        "seconds per token, up to 64 tokens for 64 prompts of mixed lengths: our sampler, and transformers' generate",
        ("stages:ours_sampling", "stages:peer_sampling"),
        {"prompts": 64, "mixed": True},
        time={_GEMMA: 1 / 4, _SMALL: 1 / 1.5},
        lower_bound="decoding",
    ),
    Row(
        "irft_stage",
        "a whole stage of IRFT on 64 prompts: ours, and generate with TRL's DPO",
        ("stages:ours_irft_stage", "stages:peer_irft_stage"),
        {"prompts": 64, "mixed": True},
        time=_both(1 / 4),
        peer_allocator="switched",
    ),
    Row(
        "rft_stage",
        "a whole stage of RFT on 16 prompts with 4 samples: ours, and TRL's reward trainer with RLOO",
        ("stages:ours_rft_stage", "stages:peer_rft_stage"),
        {"prompts": 16, "samples": 4, "mixed": True},
        time=_both(1 / 2.5),
        memory=_both(1 / 2),
        peer_allocator="switched",
    ),
    Row(
        "irft_vs_sft",
        "our step of IRFT, its reference log-probs given, and our step of SFT on as many completion tokens (16 "
        "demonstrations): the ratio is that of seconds per trained token",
        ("training:ours_step", "training:ours_sft_same_tokens"),
        time=_both(1.15),
    ),
)
"""The table, in its order."""


def cases(
    names: Sequence[str], models: Sequence[str], trained: Sequence[str] = _PARAMETERS
) -> Iterator[tuple[Row, str, str]]:
    """The rows asked for in the table's order, each with a model and which parameters are trained, of ``trained``."""
    for row in ROWS:
        if row.name in names or "all" in names:
            for model in models:
                for parameters in row.parameters:
                    if parameters in trained:
                        yield row, model, parameters


def result(
    row: Row, model: str, parameters: str, ours: Measured, peer: Measured, lower_bound: Mapping[str, Any] | None
) -> dict[str, Any]:
    """A line of the table, as it stands in the JSON file; ratios are ours over the peer's.

    ``median_s``, ``min_s`` and ``max_s`` are seconds per repetition, or per token where ``tokens`` are known.
    """
    return {
        "name": row.name,
        "about": row.about,
        "model": model,
        "parameters": parameters,
        "ratio_time": ours.median / peer.median,
        "target_time": row.time.get(model),
        "ratio_memory": ours.peak_bytes / peer.peak_bytes,
        "target_memory": row.memory.get(model),
        "lower_bound_share": lower_bound and lower_bound["seconds"] / (ours.median * (lower_bound["tokens"] or 1)),
        "target_lower_bound_share": _TARGET_LOWER_BOUND_SHARE if lower_bound else None,
        "ours": _side(ours),
        "peer": _side(peer),
        "lower_bound": lower_bound,
    }


def _side(measured: Measured) -> dict[str, Any]:
    times = measured.per_token(measured.seconds)
    return {
        "median_s": measured.median,
        "min_s": min(times),
        "max_s": max(times),
        **dataclasses.asdict(measured),
    }


def baseline_result(row: Row, model: str, parameters: str, new: Measured, old: Measured) -> dict[str, Any]:
    """A line of the table of --baseline; ratios are the baseline's time over this checkout's, turn by turn.

    A turn of one side and the turn of the other that follows it meet nearly the same machine, so the median of their ratios
    is steadier than the ratio of medians.
    """
    return {
        "name": row.name,
        "about": row.about,
        "model": model,
        "parameters": parameters,
        "ratio_time": _ratios(old.per_token(old.seconds), new.per_token(new.seconds)),
        "ratio_cpu_time": _ratios(old.per_token(old.cpu_seconds), new.per_token(new.cpu_seconds)),
        "ratio_memory": old.peak_bytes / new.peak_bytes,
        "new": _side(new),
        "baseline": _side(old),
    }


def _ratios(old: Sequence[float], new: Sequence[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(old, new, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


# --- what is shown --------------------------------------------------------------------------------------------------


def _show(console: Console, line: Mapping[str, Any]) -> None:
    """A line of the table and the peer's settings; it is shown as soon as it is known, so it is a table of its own."""
    cells = (
        Text(line["name"]),
        Text(f"{line['model']}, {line['parameters']}"),
        _spread(line["ours"]),
        _spread(line["peer"]),
        _against(line["ratio_time"], "≤", line["target_time"]),
        _against(line["ratio_memory"], "≤", line["target_memory"]),
        _against(line["lower_bound_share"], "≥", line["target_lower_bound_share"]),
    )
    console.print(_table(cells, _COLUMNS))
    settings = ", ".join(f"{name} {value}" for name, value in line["peer"]["settings"].items())
    console.print(Text(f"{line['about']}\npeer: {settings}", style="dim"))


def _show_baseline(console: Console, line: Mapping[str, Any]) -> None:
    """A line of the table of --baseline."""
    cells = (
        Text(line["name"]),
        Text(f"{line['model']}, {line['parameters']}"),
        _spread(line["new"]),
        _spread(line["baseline"]),
        *(
            Text("{median:.2f} [{min:.2f}–{max:.2f}]".format_map(line[key]))
            for key in ("ratio_time", "ratio_cpu_time")
        ),
        Text(f"{line['ratio_memory']:.2f}"),
    )
    console.print(_table(cells, _BASELINE_COLUMNS))


def _table(cells: Iterable[Text], columns: Mapping[str, int]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    for width in columns.values():
        table.add_column(width=width)
    table.add_row(*cells)
    return table


def _spread(side: Mapping[str, Any]) -> Text:
    """Median, least and most."""
    factor, unit = (1000, "ms/token") if side["tokens"] else (1, "s")
    median, least, most = (_short(side[key] * factor) for key in ("median_s", "min_s", "max_s"))
    return Text(f"{median} {unit} [{least}–{most}]")


def _short(value: float) -> str:
    """Three digits that count, and no exponent."""
    return f"{float(f'{value:.3g}'):g}"


def _against(value: float | None, sign: str, target: float | None) -> Text:
    """A value, its target, and whether it is met."""
    if value is None:
        return Text("")
    if target is None:
        return Text(f"{value:.2f}")
    met = value <= target if sign == "≤" else value >= target
    return Text(f"{value:.2f} {sign} {target:.2f} {'met' if met else 'missed'}", style="green" if met else "red")


def add_common_options(parser: argparse.ArgumentParser, *, repeats: int) -> None:
    """What every measurement with ``compare`` takes."""
    parser.add_argument("--repeats", type=int, default=repeats, help="repetitions that count (default %(default)s)")
    parser.add_argument("--warmups", type=int, default=1, help="repetitions before them (default %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="written after every row")
    parser.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="keeps the models; by default in the user's cache"
    )


def cache_folder(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """Where the models are kept; stops with a message where the options make no sense."""
    if options.repeats < 1 or not 0 <= options.warmups <= MOST_TURNS - options.repeats:
        parser.error(f"--repeats must be at least 1, and {MOST_TURNS} together with --warmups at the most")
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return options.cache or root / "tutelage" / "benchmarks"


def main() -> None:
    """Measure the rows asked for, one after the other."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [row.name for row in ROWS]
    parser.add_argument(
        "rows", nargs="+", choices=["all", *names], metavar="NAME", help=f"all, or of {', '.join(names)}"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument(
        "--parameters",
        nargs="+",
        choices=_PARAMETERS,
        default=_PARAMETERS,
        metavar="WHICH",
        help="which parameters are trained: adapters, full; by default both, where a row has both",
    )
    parser.add_argument(
        "--peer_allocator",
        choices=ALLOCATORS,
        help="of the peers' processes; by default what each row is fastest with",
    )
    parser.add_argument(
        "--micro_batch",
        type=int,
        choices=(1, 2, 4, 8),
        metavar="N",
        help="prompts, or pairs, of a step at once; by default the row's own",
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="FOLDER",
        help="another checkout of this repository, whose side of each row runs in the peer's place",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="of each side; by default as many as torch chooses")
    add_common_options(parser, repeats=5)
    options = parser.parse_args()
    cache = cache_folder(parser, options)
    columns = _BASELINE_COLUMNS if options.baseline else _COLUMNS
    if options.baseline:
        options.baseline = options.baseline.resolve()
        try:
            check_checkout(options.baseline)
        except UserError as error:
            parser.error(f"--baseline: {error}")
    console = Console(width=None if sys.stdout.isatty() else sum(columns.values()) + len(columns))
    console.print(_table((Text(name, style="bold") for name in columns), columns))
    written = provenance("benchmarks") | {"rows": []}
    if options.baseline:
        written["baseline"] = commit(options.baseline)
    turns = {"repeats": options.repeats, "warmups": options.warmups, "threads": options.threads}
    for row, model, parameters in cases(options.rows, options.models, options.parameters):
        given = {"micro_batch": options.micro_batch} if options.micro_batch else {}
        work = Work(str(prepare_model(model, cache)), adapters=parameters == "adapters", **{**row.work, **given})
        if options.baseline:
            new, old = compare([row.sides[0]] * 2, work, checkouts=(HERE, options.baseline), **turns)
            written["rows"].append(baseline_result(row, model, parameters, new, old))
            _show_baseline(console, written["rows"][-1])
            if options.json:
                write_json(options.json, written)
            continue
        allocator = row.peer_allocator
        if options.peer_allocator and not row.peer_is_ours:  # ours ask for "kept" by themselves
            allocator = options.peer_allocator
        ours, peer = compare(row.sides, work, allocators=("kept", allocator), **turns)
        peer = dataclasses.replace(peer, settings=peer.settings | {"allocator": allocator})
        tokens = statistics.median(ours.tokens) if ours.tokens else 0
        lower_bound = measured_lower_bound(row.lower_bound, work, tokens) if row.lower_bound else None
        written["rows"].append(result(row, model, parameters, ours, peer, lower_bound))
        _show(console, written["rows"][-1])
        if options.json:
            write_json(options.json, written)


if __name__ == "__main__":
    main()
