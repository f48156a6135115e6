"""What a run is: model, data, settings, schedule and versions, recorded when it begins and compared when it goes on."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pyarrow as pa
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import TrainingArguments

from tutelage.errors import UserError
from tutelage.files import read_sealed, write_sealed
from tutelage.groups import Group
from tutelage.models.weights import fingerprint

if TYPE_CHECKING:
    from tutelage.training.trainer import DemonstrationTrainer

__all__ = [
    "MAY_CHANGE",
    "RUN",
    "Data",
    "check_identity",
    "digest_of_groups",
    "digest_of_rows",
    "identity_of",
    "record_identity",
    "recorded_settings",
]

logger = logging.getLogger(__name__)

RUN = "run.json"
"""File in a run's folder that says what the run is."""

FORMAT = 1

MAY_CHANGE: dict[str, tuple[str, ...]] = {
    "where it lies and what it is called": ("output_dir", "run_name", "project"),
    "what is logged": (
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "logging_nan_inf_filter",
        "log_level",
        "log_level_replica",
        "log_on_each_node",
        "disable_tqdm",
        "report_to",
        "skip_memory_metrics",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
    ),
    "when it is saved, and where it is uploaded": (
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "save_each_stage",
        "keep_stages",
        "save_on_each_node",
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_revision",
        "hub_always_push",
    ),
    "when it is evaluated": (
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "eval_on_start",
        "eval_kl",
        "do_train",
        "do_eval",
        "do_predict",
    ),
    "which servers draw the samples, and how they are asked": (
        "vllm_url",
        "vllm_folder",
        "vllm_concurrency",
        "vllm_timeout",
        "vllm_tolerance",
    ),
    "what is done about a collapse": ("on_collapse", "collapse_truncated", "collapse_distinct", "collapse_logp"),
    "how fast it is and what memory it takes": (
        "per_device_eval_batch_size",
        "sampling_batch_size",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "torch_empty_cache_steps",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "local_rank",
    ),
    "how its processes meet": (
        "ddp_backend",
        "ddp_timeout",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
    ),
}
"""Settings that may be others when a run goes on, by what they concern; no other may."""

_EVALUATED = ("verifier", "eval_rows", "eval_samples")
"""What the numbers of an evaluation depend on: it may change as long as nothing was evaluated."""

_READ_ELSEWHERE = ("prompt_dataset", "validation_dataset", "preference_dataset", "layout")
"""Compared by what was read there, or by what was found out."""

_MODELS = ("base_model_name_or_path", "reward_model_name_or_path", "init_reward_from")


@dataclass(frozen=True, slots=True)
class Data:
    """What a run learns from, or is evaluated on.

    Attributes:
        source: what it is called.
        rows: how many; None of a stream.
        sha256: of its tokens; of a stream, of the first ones.
        field: the setting that names it.
    """

    source: str
    rows: int | None
    sha256: str
    field: str


def digest_of_rows(dataset: Dataset | IterableDataset, *, prompts_alone: bool = False) -> tuple[int | None, str]:
    """How many rows of a tokenized dataset have a demonstration, or have none, and a hash of them in order.

    Args:
        prompts_alone: those without a demonstration.

    Returns:
        of a stream, None and a hash of its first 256 rows.
    """
    digest, count = hashlib.sha256(), 0
    if isinstance(dataset, IterableDataset):
        for row in islice(dataset, 256):
            digest.update(json.dumps(row, sort_keys=True).encode())
        return None, digest.hexdigest()
    for table in dataset.with_format("arrow").iter(batch_size=1000):
        table = cast(pa.Table, table)
        lengths = pa.concat_arrays(table.column("demonstration_ids").chunks).value_lengths().to_numpy()
        table = table.filter(pa.array(lengths == 0 if prompts_alone else lengths > 0))
        count += len(table)
        for name in sorted(table.column_names):
            digest.update(name.encode())
            _feed(digest, pa.concat_arrays(table.column(name).chunks) if len(table) else pa.array([]))
    return count, digest.hexdigest()


def _feed(digest: Any, array: pa.Array) -> None:
    """The values of an array, whatever the buffers are that hold them."""
    if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
        digest.update(array.value_lengths().fill_null(-1).cast("int64").to_numpy(zero_copy_only=False).data)
        _feed(digest, array.flatten())
    elif pa.types.is_integer(array.type) or pa.types.is_boolean(array.type):
        digest.update(array.cast("int64").fill_null(-1).to_numpy(zero_copy_only=False).data)
    else:
        digest.update(json.dumps(array.to_pylist(), sort_keys=True, default=str).encode())


def digest_of_groups(groups: Iterable[Group]) -> str:
    """A hash of prompts and completions, in order; what is known of them besides does not count."""
    digest = hashlib.sha256()
    for group in groups:
        completions = [(str(c.role), c.token_ids, c.finished) for c in group.completions]
        digest.update(repr((group.row, group.prompt_ids, completions)).encode())
    return digest.hexdigest()


def identity_of(trainer: DemonstrationTrainer) -> dict[str, Any]:
    """What run.json holds of the run that begins with the policy of a trainer as it stands."""
    dataset, rows, policy = trainer.train_dataset, trainer.evaluation_set, trainer.policy
    assert isinstance(dataset, (Dataset, IterableDataset))
    data = {"training": Data(trainer.source, *digest_of_rows(dataset), "dataset_name")}
    if rows is not None:
        data["evaluation"] = Data(
            trainer.eval_source, len(rows.groups), digest_of_groups(rows.groups), "eval_dataset_name"
        )
    weights = fingerprint(policy.named_parameters())
    return _identity(
        algorithm=trainer.algorithm,
        model={"name": str(trainer.model_name), "weights": weights, "layout": trainer.layout},
        adapter=_adapter_config(policy.active_peft_config) if isinstance(policy, PeftModel) else None,
        data=data | trainer.other_data,
        args=trainer.args,
        schedule=trainer.stages.planned if trainer.stages else {},
        processes=trainer.processes.count,
    )


def _identity(
    *,
    algorithm: str,
    model: Mapping[str, Any],
    adapter: Mapping[str, Any] | None,
    data: Mapping[str, Data],
    args: TrainingArguments,
    schedule: Mapping[str, Any],
    processes: int,
) -> dict[str, Any]:
    """What run.json holds: JSON values.

    Args:
        model: ``name``, ``weights`` (their fingerprint) and ``layout``.
        adapter: its config, where there is one.
        data: by what it is for.
        args: every setting; tokens of the hub are masked.
        schedule: the numbers of steps and stages.
        processes: that share the work; a run may go on with others, if together they take as many rows at a time.
    """
    models = {name: _of_folder(found) for name in _MODELS if (found := getattr(args, name, None))}
    settings = {name: value for name, value in args.to_dict().items() if name not in _MODELS}
    settings["per_device_train_batch_size"] = args.train_batch_size * processes
    return _plain(
        {
            "format": FORMAT,
            "begun": datetime.now().astimezone().isoformat(timespec="seconds"),
            "algorithm": algorithm,
            "model": {**model, **models},
            "adapter": adapter,
            "data": {
                name: {"source": d.source, "rows": d.rows, "sha256": d.sha256, "field": d.field}
                for name, d in data.items()
            },
            "schedule": schedule,
            "processes": processes,
            "settings": settings,
            "versions": _versions(),
        }
    )


def record_identity(folder: Path, what: Mapping[str, Any]) -> None:
    """Write run.json into the run's folder."""
    write_sealed(folder / RUN, what)


def recorded_settings(folder: Path) -> dict[str, Any]:
    """The settings that a run was begun with; none where there is no record, or one that ``check_identity`` will refuse."""
    try:
        return read_sealed(folder / RUN)["settings"]
    except (OSError, UserError, KeyError):
        return {}


def check_identity(folder: Path, now: Mapping[str, Any]) -> None:
    """Compare what a run was begun as with what would go on.

    Raises:
        UserError: there is no record, or it differs in what may not change; it names the field, the old and the new value.
    """
    path = folder / RUN
    try:
        was = read_sealed(path)
    except FileNotFoundError:
        raise UserError(
            "is missing: nothing says what the run was begun with.",
            remedy="Restore it from a copy, or start anew (--overwrite_output_dir, or another --output_dir).",
            file=str(path),
        ) from None
    except UserError as error:
        raise UserError(
            error.problem,
            remedy="Restore it from a copy, or start anew (--overwrite_output_dir, or another --output_dir).",
            file=str(path),
        ) from None
    if was["format"] != FORMAT:
        raise UserError(
            f"has format {was['format']}; this version reads {FORMAT}.", file=str(path), remedy="Start anew."
        )
    if was["settings"].get("save_only_model"):
        raise UserError(
            "the run saved its models alone, without the optimizer, so it cannot go on.",
            remedy="Start anew without --save_only_model; a checkpoint serves as --model_name_or_path.",
            file=str(path),
            field="save_only_model",
        )
    changes = _changes(was, now)
    if changes:
        field, told = changes[0]
        others = f" Others differ too: {', '.join(other for other, _ in changes[1:])}." if len(changes) > 1 else ""
        raise UserError(
            f"the run {told}.{others}",
            remedy="Resume with what it was begun with, or start anew (--overwrite_output_dir, or another --output_dir).",
            file=str(path),
            field=field,
        )
    for name, old in was["versions"].items():
        if old != (new := now["versions"].get(name)):
            logger.warning(
                "the run was begun with %s %s and goes on with %s: numbers may round otherwise", name, old, new
            )


def _changes(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The fields that may not differ and do, each with a sentence."""
    found: list[tuple[str, str]] = []

    def differ(field: str, old: Any, new: Any) -> None:
        found.append((field, f"was begun with {_shown(old)} and would go on with {_shown(new)}"))

    if was["algorithm"] != now["algorithm"]:
        differ("algorithm", was["algorithm"], now["algorithm"])
    if was["model"]["weights"] != now["model"]["weights"]:
        old, new = ({k: m[k] for k in ("name", "weights")} for m in (was["model"], now["model"]))
        differ(
            "model_name_or_path",
            f"the model {old['name']} (weights {old['weights']})",
            f"{new['name']} (weights {new['weights']})",
        )
    for name in ("layout", *_MODELS):
        if was["model"].get(name) != now["model"].get(name):
            differ(name, was["model"].get(name), now["model"].get(name))
    old, new = was["adapter"] or {}, now["adapter"] or {}
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            differ(f"adapter {name}", old.get(name), new.get(name))
    for name in sorted(was["data"].keys() | now["data"].keys()):
        old, new = was["data"].get(name), now["data"].get(name)
        if (old and old["sha256"]) != (new and new["sha256"]) and not (name == "evaluation" and not old):
            field = (old or new)["field"]
            found.append((field, f"was begun with other {name} data: {_data(old)}; it would go on with {_data(new)}"))
    fixed = was["settings"].keys() | now["settings"].keys()
    fixed -= {name for names in MAY_CHANGE.values() for name in names} | {*_READ_ELSEWHERE}
    if not was["data"].get("evaluation"):
        fixed -= {*_EVALUATED}
    for name in sorted(fixed):
        if was["settings"].get(name) != now["settings"].get(name):
            differ(name, was["settings"].get(name), now["settings"].get(name))
    return found


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _data(data: Mapping[str, Any] | None) -> str:
    if not data:
        return "none"
    rows = "a stream" if data["rows"] is None else f"{data['rows']} rows"
    return f"{rows} of {data['source']} (content {data['sha256'][:8]})"


def _adapter_config(config: Any) -> dict[str, Any]:
    """What an adapter's weights depend on, of its config."""
    left_out = (
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "auto_mapping",
        "runtime_config",
        "peft_version",
    )
    return {name: value for name, value in config.to_dict().items() if name not in left_out}


def _of_folder(name: str) -> str:
    """A model by its name; of one on disk also by its content."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix in (".json", ".safetensors", ".npz", ".bin"):
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder)} {hashlib.file_digest(file, 'sha256').hexdigest()}".encode())
    return f"{name} (content {digest.hexdigest()[:8]})"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("tutelage", "torch", "transformers", "peft", "datasets", "accelerate"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    if isinstance(value, Mapping):
        return {str(getattr(key, "value", key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(getattr(value, "value", value))
