"""What a run leaves besides its weights: results.json and the model card."""

from __future__ import annotations

import gc
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from tutelage.evaluation.policy import Evaluation, EvaluationSet
from tutelage.files import write_json

__all__ = [
    "evaluation_record",
    "model_card",
    "peak_memory_bytes",
    "reset_peak_memory",
    "run_record",
    "run_settings",
    "write_results",
]

SCHEMA = 1
_SHOWN_SAMPLES = 12
_TRAINING_FIELDS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
)


def run_record(*, name: str, algorithm: str, model: str, dataset: str, seed: int, **found: Any) -> dict[str, Any]:
    """What results.json holds of a run; of a model that no run of ours made, the fields of training are empty.

    Args:
        name: what tables call the run.
        algorithm: ``base`` for a model as it was found.
        model: the model the run started from.
        dataset: what it was trained on, for people.
        found: further fields, in place of the empty ones.
    """
    record = {
        "schema": SCHEMA,
        "name": name,
        "algorithm": algorithm,
        "model": model,
        "dataset": dataset,
        "seed": seed,
        "start": None,
        "settings": {},
        "demonstration_epochs": 0.0,
        "trained_tokens": 0,
        "sampled_tokens": 0,
        "time_s": {},
        "peak_memory_bytes": peak_memory_bytes(),
        "history": [],
        "evaluation": None,
        "samples": [],
        "selection": [],
    }
    assert found.keys() <= record.keys()
    return record | found


def evaluation_record(evaluation: Evaluation, rows: EvaluationSet) -> dict[str, Any]:
    """The ``evaluation`` and ``samples`` of results.json."""
    shown = []
    for index, demonstration in enumerate(rows.demonstrations[:_SHOWN_SAMPLES]):
        prompt = demonstration.prompt
        record: dict[str, Any] = {
            "row": demonstration.row,
            "prompt": prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}: {m['content']}" for m in prompt),
            "demonstration": demonstration.completion,
        }
        for kind, answers in (("sampled", evaluation.sampled), ("greedy", evaluation.greedy)):
            if answers is not None:
                record[kind] = answers.texts[index]
                record[f"{kind}_score"] = answers.scores[index] if answers.scores is not None else None
        shown.append(record)
    return {"evaluation": {"dataset": rows.source, **evaluation.to_dict()}, "samples": shown}


def write_results(folder: str | Path, record: Mapping[str, Any]) -> Path:
    """Write ``results.json`` into the run's folder; returns its path."""
    path = Path(folder) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return path


def model_card(record: Mapping[str, Any]) -> str:
    """A README.md for the model: algorithm, data, stages and results of the run."""
    settings = record["settings"]
    lines = [
        "---",
        "library_name: " + ("peft" if settings.get("adapter") else "transformers"),
        "tags: [tutelage, " + str(record["algorithm"]) + "]",
        "---",
        "",
        f"# {record['name']}",
        "",
        f"Trained with **{record['algorithm']}** from {_data_kinds(record)} by tutelage, starting from "
        f"`{record['model']}`, on `{record['dataset']}` (seed {record['seed']}, "
        f"{record['demonstration_epochs']:g} passes over the demonstrations).",
        "",
    ]
    if record["algorithm"] == "rft":
        lines += [_rft_stages(record), ""]
    elif record["algorithm"] != "sft":
        stages = sum("pairs/dropped" in row for row in record["history"])
        lines += [
            f"{stages} stages: at the start of each, {settings.get('num_samples')} completion(s) a prompt were sampled "
            f"from the policy as it stood, and the steps of the stage raised the demonstrations over them "
            "(Li et al. 2024, arXiv 2405.17888).",
            "",
        ]
    lines += ["## Settings", "", "| setting | value |", "| --- | --- |"]
    lines += [f"| {name} | {value} |" for name, value in settings.items()]
    lines += ["", "## Results on held-out rows", ""]
    evaluation = record["evaluation"]
    if evaluation is None:
        lines.append("No held-out data was given.")
    else:
        lines += ["| quantity | mean | 95% interval | n |", "| --- | --- | --- | --- |"]
        lines += [
            f"| {name} | {value['mean']:.4g} | {value['low']:.4g} to {value['high']:.4g} | {value['n']} |"
            for name, value in evaluation.items()
            if isinstance(value, Mapping) and "mean" in value
        ]
    return "\n".join([*lines, ""])


def _data_kinds(record: Mapping[str, Any]) -> str:
    ranked = any("preference/accuracy" in row for row in record["history"])
    return "demonstrations and preference pairs" if ranked else "demonstrations alone"


def _rft_stages(record: Mapping[str, Any]) -> str:
    """What the stages did, and which of their policies the weights are."""
    history, settings = record["history"], record["settings"]
    normalized = settings.get("advantages") == "group_normalized"
    estimator = "REINFORCE with group-normalized advantages" if normalized else "leave-one-out REINFORCE"
    stages = sum("reward/loss" in row for row in history)
    ran = sum(row.get("policy/phase") == 1 for row in history)
    text = (
        f"{stages} stages: at the start of each, {settings.get('num_samples')} completion(s) a prompt were sampled from "
        "the policy as it stood, and a reward learned to put the demonstrations above them; in "
        f"{ran} of the stages the policy was then improved with that reward by {estimator} under a KL penalty to the "
        "start (Li et al. 2024, arXiv 2405.17888, Algorithm 1)."
    )
    kept = next((candidate for candidate in record["selection"] if candidate["chosen"]), None)
    if kept is None:
        return text
    if kept["stage"] == 0:
        return f"{text} No stage beat the start: these are its weights."
    return f"{text} These are the weights after {kept['stage']} of them, chosen on validation rows."


def peak_memory_bytes() -> int | None:
    """Most memory the process has held: of the accelerator where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except OSError:  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start measuring anew, where the system can: on an accelerator and on Linux."""
    gc.collect()  # an earlier trainer and its model hold each other
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def run_settings(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """What a reader needs to run it again: the algorithm's own fields, the optimizer's and the adapter's."""
    own = [n for cls in type(args).__mro__ if cls.__module__.startswith("tutelage.") for n in cls.__annotations__]
    names = [name for name in dict.fromkeys([*own, *_TRAINING_FIELDS]) if name in args.__dataclass_fields__]
    settings = {name: _plain(getattr(args, name)) for name in names}
    for adapter in getattr(model, "peft_config", {}).values():
        settings |= {"adapter": str(adapter.peft_type.value), "lora_r": getattr(adapter, "r", None)}
        settings["lora_alpha"] = getattr(adapter, "lora_alpha", None)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else list(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else getattr(value, "value", str(value))
