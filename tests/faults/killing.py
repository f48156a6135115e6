"""Kills training commands and resumes them: a process of its own, which imports once and forks for each command.

    python killing.py kill FOLDER SEED KILLS
    python killing.py full FOLDER SEED WRITES

Half of the kills come at events of writing (a file opened for writing, renamed, removed, a folder made), or a moment after one; the
other half at random moments, counted in the process's own time, so that a busy machine changes nothing. No handler of Python
runs: the signal's default ends the process as SIGKILL does. A chain is killed and resumed until it comes to its end, and must
then have left the same bytes as the run that nobody killed. Prints what it did as JSON.
"""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1]))

from training_runs import Training  # noqa: E402
from tutelage.cli import main  # noqa: E402
from tutelage.cli import train as _imported  # noqa: E402, F401

COMMON = [
    *("--bf16=False", "--use_cpu", "--report_to=none", "--logging_steps=1", "--per_device_train_batch_size=4"),
    *("--num_train_epochs=1", "--learning_rate=1e-3", "--max_completion_length=6", "--save_strategy=steps"),
    *("--stages_per_epoch=2", "--sampling_batch_size=2", "--max_prompt_length=64"),
]
COMMANDS = {
    "irft": [
        *("irft", *COMMON, "--save_steps=2", "--replay_stages=1", "--use_peft", "--lora_dropout=0.1", "--lora_r=4"),
        *("--keep_stages=1", "--save_total_limit=1"),
    ],
    "rft": [
        *(
            "rft",
            *COMMON,
            "--save_steps=1",
            "--num_samples=2",
            "--validation_rows=4",
            "--gradient_accumulation_steps=1",
        ),
        *("--fold_epochs=1", "--reward_gate=off", "--samplings_per_stage=1", "--beta=0.01"),
    ],
}
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def prepare(folder):
    """A tiny model and its data on disk."""
    training = Training(folder)
    training.model().save_pretrained(folder / "base")
    training.tokenizer.save_pretrained(folder / "base")
    lines = [json.dumps(row) + "\n" for row in training.rows(20)]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")


def arguments(folder, algorithm, out):
    base, data = folder / "base", folder / "data.jsonl"
    named = [f"--model_name_or_path={base}", f"--dataset_name={data}", f"--output_dir={out}"]
    return [*COMMANDS[algorithm], *named]


class Events:
    """Counts what this process writes below a folder; may die at one of them, or a moment after.

    Args:
        fails: from then on nothing can be written any more, instead.
    """

    def __init__(self, folder, at=None, after=0.0, fails=False):
        self.folder, self.at, self.after, self.fails, self.seen = str(folder), at, after, fails, 0
        sys.addaudithook(self)

    def __call__(self, event, args):
        if event == "open":
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR):
                return
        elif event in WRITES:
            path = args[0]
        else:
            return
        if not isinstance(path, (str, os.PathLike)) or not str(path).startswith(self.folder):
            return
        self.seen += 1
        if self.fails and event in ("open", "os.mkdir") and self.seen >= self.at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        if self.seen == self.at and not self.fails:
            if self.after:
                signal.setitimer(signal.ITIMER_REAL, self.after)
            else:
                os.kill(os.getpid(), signal.SIGKILL)


def run(args, out, *, at=None, after=0.0, seconds=None, fails=False, largest=None):
    """One command in a process of its own: its code, its events and what it printed; None if it was killed."""
    reading, writing = os.pipe()
    log = out.with_name(out.name + ".log")
    child = os.fork()
    if child == 0:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        events = Events(out, at, after, fails)
        if largest is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, resource.RLIM_INFINITY))
        if seconds is not None:
            signal.setitimer(signal.ITIMER_PROF, seconds)
        code = main(args)
        signal.setitimer(signal.ITIMER_PROF, 0)
        os.write(writing, json.dumps([code, events.seen]).encode())
        os._exit(code)
    os.close(writing)
    _, status = os.waitpid(child, 0)
    with os.fdopen(reading) as file:
        told = file.read()
    if os.WIFSIGNALED(status):
        return None
    assert told, f"the command died by itself:\n{log.read_text()[-3000:]}"
    return [*json.loads(told), log.read_text()]


def without_times(value):
    """JSON without what a clock decides, or how often the run was resumed: the last line of a log is of one process."""
    if isinstance(value, dict):
        return {name: without_times(entry) for name, entry in value.items() if not _is_of_a_clock(name)}
    if isinstance(value, list):
        return [without_times(entry) for entry in value if not (isinstance(entry, dict) and "train_runtime" in entry)]
    return value


def _is_of_a_clock(name):
    told = (
        "time",
        "second",
        "seconds",
        "runtime",
        "peak_memory",
        "flops",  # a cost, as seconds are: work that a kill undid was done twice, or by a process that nobody asks
        "begun",
        "sha256",
        "bytes",
        "_id",
        "id",
        "model",
        "output_dir",
        "probes",  # of the model, by this process: of sampling if it sampled
    )
    return name.endswith(told) or name.startswith(("time", "seconds"))


def left(out):
    """What a run left, by name, without what a clock decides."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if path.is_dir() or path.name in ("report.html", "README.md", "training_args.bin", "run.json"):
            found[name] = None
        elif path.name == "metrics.jsonl":
            found[name] = without_times([json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()])
        elif path.suffix == ".json":
            found[name] = without_times(json.loads(path.read_text(encoding="utf-8").replace(str(out), "OUT")))
        else:
            found[name] = path.read_bytes().replace(str(out).encode(), b"OUT")
    return found


def differences(found, expected):
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if name not in found or name not in expected or found[name] != expected[name]]


def unharmed(folder):
    """Of each algorithm: what it leaves, how often it writes, and its seconds."""
    found = {}
    for algorithm in COMMANDS:
        out = folder / f"{algorithm}-whole"
        begun = children_seconds()
        code, events, log = run(arguments(folder, algorithm, out), out)
        assert code == 0, log
        found[algorithm] = (left(out), events, children_seconds() - begun)
    return found


def children_seconds():
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def chains(folder, seed, kills):
    draw, whole = random.Random(seed), unharmed(folder)
    told = {
        "kills": 0,
        "at_events": 0,
        "chains": dict.fromkeys(COMMANDS, 0),
        "events": {n: w[1] for n, w in whole.items()},
    }
    while told["kills"] < kills:
        algorithm = min(COMMANDS, key=lambda name: told["chains"][name])
        number = told["chains"][algorithm] = told["chains"][algorithm] + 1
        expected, events, seconds = whole[algorithm]
        out, history, resume = folder / f"{algorithm}-{number}", [], []
        while told["kills"] < kills and len(history) < 5:
            at_event = told["at_events"] * 2 <= told["kills"]
            how = (
                {"at": draw.randint(1, max(2, events // 2)), "after": draw.choice([0.0, 0.0002, 0.002])}
                if at_event
                else {"seconds": draw.uniform(0.01, seconds * 0.7)}
            )
            history.append(how)
            ended = run([*arguments(folder, algorithm, out), *resume], out, **how)
            resume = ["--resume"]
            if ended:
                history.pop()
                break
            told["kills"] += 1
            told["at_events"] += at_event
        else:
            ended = run([*arguments(folder, algorithm, out), "--resume"], out)
        assert ended, "not killed, and not ended"
        assert ended[0] == 0, ended[2][-4000:]
        other = differences(left(out), expected)
        assert not other, f"{out} after {history}: {other}"
    return told


def full_disks(folder, seed, writes):
    draw, whole = random.Random(seed), unharmed(folder)
    told = {"refused": 0, "harmless": 0}
    for algorithm, (expected, events, _) in whole.items():
        limits = [{"at": draw.randint(1, events), "fails": True} for _ in range(writes)]
        for number, limit in enumerate([*limits, {"largest": 20_000}, {"largest": 3_000}]):
            out = folder / f"{algorithm}-full-{number}"
            args = arguments(folder, algorithm, out)
            code, _, log = run(args, out, **limit)
            if code:
                error = [line for line in log.splitlines() if line.startswith("tutelage: error: ")]
                assert (code, len(error)) == (2, 1), (limit, log[-3000:])
                assert "Traceback" not in log, (limit, log[-3000:])
                assert "cannot be written" in error[0], (limit, error)
            told["refused" if code else "harmless"] += 1
            code, _, log = run([*args, "--resume"], out)
            assert code == 0, (limit, log[-4000:])
            other = differences(left(out), expected)
            assert not other, f"{out} after {limit}: {other}"
    return told


if __name__ == "__main__":
    mode, folder, seed, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    begun = time.process_time()
    prepare(folder)
    told = {"kill": chains, "full": full_disks}[mode](folder, seed, number)
    print(json.dumps(told | {"cpu_seconds": time.process_time() - begun + children_seconds()}))
