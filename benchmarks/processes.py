"""What a second process brings, and whether memory stays flat while the rows become more.

    python -m benchmarks.processes time --json processes.json
    python -m benchmarks.processes memory --json rows.json

``time``: IRFT on a random Qwen3 of 32,000 tokens with adapters, one thread per process, once in one process and once in two with
the same rows per optimizer step; the two take turns. Seconds per optimizer step, and per prompt for sampling and for reference
log-probs; medians over steps, stages and turns. Two processes that cost nothing take half as long.

``memory``: SFT on 1,000, 10,000 and 100,000 rows with a tiny model, streamed and held in memory, in one process and in two: the
highest resident memory of any of the run's processes. Every run goes over all its rows once.

Both run the command line as a user does and read what it writes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import provenance
from benchmarks.workloads import prepare_model
from tutelage.files import read_json, write_json
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

__all__ = ["main", "per_unit", "ran", "write_rows"]

_LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
_COMMON = ("--use_cpu", "--report_to=none", "--save_strategy=no", "--overwrite_output_dir")
_ROWS_PER_STEP = 8
_STREAMED_ROWS_PER_STEP = 64


def ran(arguments: Sequence[object], processes: int) -> int:
    """Run the command line in so many processes of one thread each; gives the highest resident bytes of any of them.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    launch = [*_LAUNCH, str(processes)] if processes > 1 else []
    command = [sys.executable, *launch, "-m", "tutelage", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=environment)
        _, status, usage = os.wait4(child.pid, 0)  # of the launcher it counts the processes that it waited for, too
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            said.seek(0)
            raise RuntimeError(f"{' '.join(command)} ended with {child.returncode}:\n{said.read()[-4000:]}")
    return usage.ru_maxrss * 1024  # Linux counts in KiB


def write_rows(path: Path, texts: Iterable[tuple[str, str]]) -> None:
    """Prompts and completions as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for prompt, completion in texts:
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def _words(count: int) -> Iterator[tuple[str, str]]:
    """Twelve words of a benchmark's model, and twelve others."""
    numbers = random.Random(0)
    for _ in range(count):
        prompt, answer = (" ".join(f"w{numbers.randrange(4, 3000)}" for _ in range(12)) for _ in range(2))
        yield prompt, f" {answer}"


def _sums(count: int) -> Iterator[tuple[str, str]]:
    for i in range(count):
        yield f"What is {i} + {i}?", f" {2 * i}"


def per_unit(lines: Sequence[dict[str, Any]], rows_per_stage: int) -> dict[str, float]:
    """Medians over a run's metrics.jsonl: seconds per optimizer step, and per prompt of a stage.

    The first step and the first stage set things up and do not count.
    """
    steps = [line for line in lines if line["event"] == "train"]
    found = {"step": statistics.median(line["time/training"] for line in steps[1:])}
    for what in ("sampling", "reference"):
        stages = [line[f"time/{what}"] for line in steps if line[f"time/{what}"] > 0]
        found[f"{what} per prompt"] = statistics.median(stages[1:]) / rows_per_stage
    return found


def _times(folder: Path, model: Path, repeats: int) -> dict[str, Any]:
    """Ratios of one process to two, each the median over turns."""
    rows, stages = 64, 4
    write_rows(folder / "rows.jsonl", _words(rows))
    found: dict[int, list[dict[str, float]]] = {1: [], 2: []}
    for turn in range(repeats):
        for processes in (1, 2) if turn % 2 == 0 else (2, 1):
            output = folder / f"time-{processes}"
            arguments = ["irft", "--model_name_or_path", model, "--dataset_name", folder / "rows.jsonl", *_COMMON]
            arguments += ["--output_dir", output, "--stages_per_epoch", stages, "--use_peft", "--bf16=False"]
            arguments += ["--per_device_train_batch_size", _ROWS_PER_STEP // processes, "--logging_steps=1"]
            arguments += ["--max_completion_length=48", "--num_train_epochs=1", "--dtype=float32"]
            ran(arguments, processes)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            found[processes].append(per_unit(lines, rows // stages))
            print(json.dumps({"processes": processes, **found[processes][-1]}), flush=True)
    medians = {
        n: {name: statistics.median(each[name] for each in turns) for name in turns[0]} for n, turns in found.items()
    }
    ratios = {name: medians[1][name] / medians[2][name] for name in medians[1]}
    return {"seconds": medians, "one process / two": ratios, "turns": found}


def _memory(folder: Path, counts: Sequence[int]) -> Iterator[dict[str, Any]]:
    base = _tiny(folder / "base")
    for streaming in (True, False):
        for processes in (1, 2):
            for count in counts:
                data = folder / f"rows-{count}.jsonl"
                if not data.exists():
                    write_rows(data, _sums(count))
                steps = count // _STREAMED_ROWS_PER_STEP
                arguments = ["sft", "--model_name_or_path", base, "--dataset_name", data, *_COMMON]
                arguments += ["--output_dir", folder / "run", "--bf16=False", "--logging_steps=100"]
                arguments += ["--per_device_train_batch_size", _STREAMED_ROWS_PER_STEP // processes]
                arguments += [
                    "--max_steps",
                    steps,
                    "--dataset_streaming" if streaming else "--dataset_streaming=False",
                ]
                peak = ran(arguments, processes)
                seconds = read_json(folder / "run" / "results.json")["time_s"]["total"]
                yield {
                    "rows": count,
                    "streamed": streaming,
                    "processes": processes,
                    "mebibytes": peak / 2**20,
                    "file_mebibytes": data.stat().st_size / 2**20,
                    "seconds": seconds,
                }


def _tiny(folder: Path) -> Path:
    tokenizer = tiny_tokenizer("zephyr")
    tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a JSON line per point, and write all of them."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.processes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["time", "memory"])
    parser.add_argument("--repeats", type=int, default=3, help="turns of each side of `time`")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000], help="of `memory`")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/tutelage/benchmarks", help="keeps the model of `time`"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    found: dict[str, Any]
    with tempfile.TemporaryDirectory() as folder:
        if options.what == "time":
            found = _times(Path(folder), prepare_model("qwen3-32k", options.cache), options.repeats)
            print(json.dumps(found["one process / two"]))
        else:
            points = []
            for point in _memory(Path(folder), options.rows):
                points.append(point)
                print(json.dumps(point), flush=True)
            found = {"points": points}
    if options.json:
        write_json(options.json, {**provenance("benchmarks.processes"), **found})


if __name__ == "__main__":
    main()
