"""How time and memory of training grow, ours and TRL's: with samples, prompt and completion length, stages, and rows.

    python -m benchmarks.growth --plot docs/growth.png --json growth.json

Each point is a fresh process. A step trains on 8 prompts, 2 at once; a stage runs 8 at once, streamed SFT 32. Time is the median of
the repetitions, memory the peak over the weights.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from benchmarks.__main__ import add_common_options, cache_folder
from benchmarks.provenance import provenance
from benchmarks.sides import compare
from benchmarks.workloads import Work, prepare_model
from tutelage.files import write_json

_STEP = {"ours": "training:ours_step", "TRL": "training:peer_step"}


@dataclass(frozen=True, slots=True)
class Sweep:
    """One field of ``Work`` over a few values; what is drawn is time, memory or both."""

    field: str
    label: str
    values: tuple[int, ...]
    sides: Mapping[str, str]
    shows: tuple[str, ...] = ("seconds", "mebibytes")
    work: Mapping[str, Any] | None = None


SWEEPS = (
    Sweep("samples", "samples per prompt", (1, 2, 4, 8, 16), _STEP),
    Sweep("prompt_tokens", "tokens per prompt", (64, 128, 256, 512, 1024), _STEP),
    Sweep("completion_tokens", "tokens per completion", (32, 64, 128, 256, 512), _STEP),
    Sweep(
        "stages",
        "T, stages for a pass over 64 prompts",
        (1, 2, 4, 8),
        {"ours": "stages:ours_irft_stage"},
        ("seconds",),
        {"prompts": 64, "mixed": True},
    ),
    Sweep(
        "prompts",
        "streamed rows in an epoch of SFT",
        (256, 1024, 4096),
        {"ours": "training:ours_streamed_sft"},
        ("mebibytes",),
        {"prompt_tokens": 16, "completion_tokens": 16},
    ),
)


def measured(sweep: Sweep, start: Work, *, peers: bool, repeats: int, warmups: int) -> list[dict[str, Any]]:
    """A point for each value and side: seconds per repetition and peak memory."""
    points = []
    sides = {name: side for name, side in sweep.sides.items() if peers or name == "ours"}
    turns = {"repeats": repeats, "warmups": warmups, "allocators": ["kept", "unmapped"][: len(sides)]}
    for value in sweep.values:
        work = replace(start, **(sweep.work or {}), **{sweep.field: value})
        for name, found in zip(sides, compare(list(sides.values()), work, **turns), strict=True):
            point = {"value": value, "side": name, "seconds": found.median, "mebibytes": found.peak_bytes / 2**20}
            points.append(point)
            print(json.dumps({"sweep": sweep.field, **point}), flush=True)
    return points


def draw(found: Sequence[Mapping[str, Any]], path: Path, model: str) -> None:
    """All sweeps as small charts: time above, memory below."""
    rows = [
        [(sweep, quantity) for sweep in found if quantity in sweep["shows"]] for quantity in ("seconds", "mebibytes")
    ]
    columns = max(map(len, rows))
    figure, axes = plt.subplots(2, columns, figsize=(3.4 * columns, 6), layout="constrained", squeeze=False)
    for row, charts in zip(axes, rows, strict=True):
        for ax, chart in zip_longest(row, charts):
            if chart is None:
                ax.set_axis_off()
            else:
                _chart(ax, *chart)
    figure.suptitle(
        f"{model}, adapters, CPU: a training step on 8 prompts of 128 tokens with a sample of 64 tokens each, 2 prompts at once;\n"
        "whole stages, and epochs of SFT, where the axis says so"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _chart(ax: Axes, sweep: Mapping[str, Any], quantity: str) -> None:
    for name in dict.fromkeys(point["side"] for point in sweep["points"]):
        points = [point for point in sweep["points"] if point["side"] == name]
        ax.plot([p["value"] for p in points], [p[quantity] for p in points], marker="o", label=name)
    ax.set(xlabel=sweep["label"], ylabel={"seconds": "seconds", "mebibytes": "MiB over the weights"}[quantity])
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend(frameon=False)


def main() -> None:
    """Measure and draw."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.growth", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_common_options(parser, repeats=3)
    parser.add_argument("--model", default="qwen3-32k", help="(default %(default)s)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a PNG")
    fields = [sweep.field for sweep in SWEEPS]
    parser.add_argument(
        "--only", nargs="+", choices=fields, default=fields, metavar="SWEEP", help=f"of {', '.join(fields)}"
    )
    parser.add_argument("--peers", action="store_true", help="TRL's steps too, which takes three times as long")
    options = parser.parse_args()
    start = Work(str(prepare_model(options.model, cache_folder(parser, options))))
    written = provenance("benchmarks.growth") | {"model": options.model, "sweeps": []}
    for sweep in (sweep for sweep in SWEEPS if sweep.field in options.only):
        points = measured(sweep, start, peers=options.peers, repeats=options.repeats, warmups=options.warmups)
        written["sweeps"].append(asdict(replace(sweep, sides=dict(sweep.sides))) | {"points": points})
        if options.json:
            write_json(options.json, written)
        if options.plot:
            draw(written["sweeps"], options.plot, options.model)


if __name__ == "__main__":
    main()
