"""Command-line arguments: those of TRL and transformers, and our own."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import torch
from transformers.hf_argparser import string_to_bool
from trl import ModelConfig, ScriptArguments, TrlParser, get_peft_config, get_quantization_config

from tutelage.cli.config_file import read_fields, refuse_unasked_code
from tutelage.cli.help import help_text
from tutelage.cli.parser import CommandParser, take_config, usage_error
from tutelage.errors import UserError
from tutelage.models.paths import run_part
from tutelage.models.precision import Precision, choose_precision, given_precision, model_size
from tutelage.ranges import check_ranges, number, whole
from tutelage.training.config import DemonstrationConfig
from tutelage.training.identity import recorded_settings
from tutelage.visible import write

__all__ = ["DataArguments", "ModelArguments", "parse"]


MODEL_RANGES = {"lora_r": whole(1, 2**16), "lora_alpha": whole(1), "lora_dropout": number(0, 1, below=True)}
"""The numbers that trl's fields of ``ModelArguments`` take."""


@dataclass
class DataArguments(ScriptArguments):
    """Which data to use, and what to do if the output folder is in use."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Demonstrations: a hub name, a folder, or a .json, .jsonl, .csv or .parquet file (also .gz)."
        },
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "Held-out rows, in the same formats. By default nothing is evaluated."}
    )
    retention_dataset: str | None = field(
        default=None,
        metadata={
            "help": (
                "Rows of another task, in the same formats: evaluated before training and after, to see what was "
                "forgotten. --eval_rows limits them too."
            )
        },
    )
    retention_verifier: str | None = field(
        default=None, metadata={"help": "Scores answers to --retention_dataset; written as --verifier is."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Resume the run in --output_dir from its last checkpoint and samples."}
    )
    controls: list[str] = field(
        default_factory=list,
        metadata={
            "help": (
                "Afterwards train what the method has to beat, from the same start and data, and judge it against that: "
                "plateau (SFT at several rates and passes, the best on validation rows), gentle (SFT at a tenth of the "
                "rate), self_training (the policy distilled into its own likeliest answers to the --prompt_dataset, in one "
                "round or four, the better on validation rows), equal_compute and equal_score (SFT at the plateau's rate, "
                "with as many operations as the method, and stopped at its score on the held-out rows), or all."
            )
        },
    )
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Replace the run in --output_dir."})
    dry_run: bool = field(
        default=False,
        metadata={
            "help": "Check settings, data, output folder, memory and disk, say what a stage will take, and leave nothing on disk. "
            "The model is loaded, and a few rows are timed."
        },
    )


@dataclass
class ModelArguments(ModelConfig):
    """Which model to use, and with which adapter."""

    dtype: str | None = field(
        default=None,
        metadata={
            "help": (
                "Precision in which weights are loaded. By default float32 for weights that are trained, because "
                "small updates round to zero in bfloat16. Weights that are frozen under an adapter keep the stored "
                "precision, or get float32 where this machine is faster in it and has the memory."
            ),
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Modules that get LoRA weights; 'all-linear' is every linear layer except the head."},
    )
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that comes with the model."})

    def __post_init__(self):
        check_ranges(self, MODEL_RANGES)
        super().__post_init__()
        self.precision: Precision | None = None

    def settle_precision(self, *, bf16: bool | None = None, fp16: bool = False, use_cpu: bool = False) -> Precision:
        """Decide what to compute in, once; ``load`` follows it.

        Args:
            bf16, fp16: what the user said; None if nothing. Then --dtype decides if it is 16 bits wide, else a
                measurement on products of the model's shape.
            use_cpu: train there although there is an accelerator.
        """
        if fp16 or bf16 is not None:
            dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
            self.precision = given_precision(dtype, "--fp16" if fp16 else "--bf16")
        elif self.load_in_4bit or self.load_in_8bit or self.dtype in ("auto", "bfloat16", "float16"):
            setting = "--dtype" if self.dtype else "--load_in_4bit" if self.load_in_4bit else "--load_in_8bit"
            self.precision = given_precision(torch.bfloat16, setting)
        else:
            size = model_size(
                self.require_name(), revision=self.model_revision, trust_remote_code=self.trust_remote_code
            )
            self.precision = choose_precision(
                size,
                device="cpu" if use_cpu else None,
                frozen=bool((self.use_peft or self.continues_adapter) and self.dtype is None),
            )
        return self.precision

    @property
    def continues_adapter(self) -> bool:
        """Whether the model is an adapter, which training continues on its frozen base."""
        return (Path(run_part(self.require_name(), "policy")) / "adapter_config.json").exists()

    def load(self) -> Any:
        """The model these arguments name.

        Raises:
            UserError: none is named, or it cannot be loaded.
        """
        from tutelage.models.loading import load_model, loading

        name = self.require_name()
        options = {}
        if self.load_in_4bit or self.load_in_8bit:
            self.dtype = self.dtype or "bfloat16"  # what the quantized products are computed in
        with loading(
            "the model", "Use one of the two.", field="load_in_4bit" if self.load_in_4bit else "load_in_8bit"
        ):
            quantization = get_quantization_config(self)
        if quantization is not None:
            options["quantization_config"] = quantization
        return load_model(
            name,
            dtype=self.dtype if self.dtype in (None, "auto") else getattr(torch, self.dtype),
            whole=not self.use_peft,
            computing=(self.precision or self.settle_precision()).dtype,
            revision=self.model_revision,
            attn_implementation=self.attn_implementation,
            trust_remote_code=self.trust_remote_code,
            **options,
        )

    def require_name(self) -> str:
        """The model's name or path; ``UserError`` without one."""
        if not self.model_name_or_path:
            raise UserError("no model is given.", remedy="Add --model_name_or_path MODEL.", field="model_name_or_path")
        return self.model_name_or_path

    def peft_config(self) -> Any:
        """The adapter these arguments describe, if any."""
        return get_peft_config(self)


class _TrainParser(TrlParser):
    def add_argument(self, *names: Any, **options: Any) -> Any:
        if getattr(options.get("type"), "__name__", "") == "string_to_bool" and "nargs" not in options:
            # A flag that may also be unset, such as --bf16, stands alone too.
            options = {"nargs": "?", "const": True, **options}
        return super().add_argument(*names, **options)

    def error(self, message: str) -> NoReturn:
        raise usage_error(self.prog, message)


def parse(command: str, config: type[DemonstrationConfig], args: Sequence[str]) -> tuple[Any, ...]:
    """Parse a command line and its ``--config`` file into data, model and training arguments.

    Raises:
        UserError: a config file that cannot be read, an unknown argument, a bad value, or no output folder.
        SystemExit: after printing the help (code 0).
    """
    kinds = (DataArguments, ModelArguments, config)
    if not {"-h", "--help", "--help_all"}.isdisjoint(args):
        write(help_text(command, *kinds, everything="--help_all" in args))
        sys.exit(0)
    parser = _TrainParser(kinds, prog=f"tutelage {command}", allow_abbrev=False)  # type: ignore[arg-type]
    path, args = take_config(args)
    if path is not None:
        from_file, others = _config_arguments(path, args, kinds)
        parser.set_defaults_with_config(**others)
        args = [*from_file, *args]
    precision, settled = _settle_precision(command, args)
    parsed, unknown = _parsed(parser, [*args, *settled])
    if unknown:
        name = unknown[0].split("=")[0]
        remedy = _closest(name.lstrip("-").replace("-", "_"), kinds, "--") or f"tutelage {command} --help lists them."
        raise UserError(f"unknown argument '{name}'.", remedy=remedy)
    if not any(arg.startswith(("--output_dir", "--output-dir")) for arg in args):
        raise UserError("no output folder is given.", remedy="Add --output_dir OUT.", field="output_dir")
    parsed[1].precision = precision
    return tuple(parsed)


def _parsed(parser: TrlParser, args: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The dataclasses of a parser, and the arguments that none of them knows."""
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            args, return_remaining_strings=True, look_for_args_file=False
        )
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(" ".join(str(error).split())) from error
    return parsed, unknown


def _settle_precision(command: str, args: Sequence[str]) -> tuple[Precision | None, list[str]]:
    """What to compute in, and the argument that says so where the user did not.

    It is settled before the training arguments are made: transformers hands their precision to accelerate at once.
    """
    (model,), rest = _parsed(_TrainParser((ModelArguments,), prog=f"tutelage {command}", allow_abbrev=False), args)  # type: ignore[arg-type]
    if not model.model_name_or_path:
        return None, []
    parser = CommandParser(prog=f"tutelage {command}", add_help=False, allow_abbrev=False)
    for name in ("bf16", "fp16", "use_cpu", "resume"):
        parser.add_argument(f"--{name}", type=string_to_bool, nargs="?", const=True)
    parser.add_argument("--output_dir", "--output-dir")
    said, _ = parser.parse_known_args(rest)
    told = said.bf16 is not None or said.fp16
    recorded = recorded_settings(Path(said.output_dir)) if said.resume and said.output_dir and not told else {}
    bf16 = recorded.get("bf16", said.bf16)  # what was measured when the run began
    precision = model.settle_precision(bf16=bf16, fp16=bool(said.fp16), use_cpu=bool(said.use_cpu))
    return precision, [] if told else [f"--bf16={precision.dtype is torch.bfloat16}"]


def _config_arguments(path: str, args: Sequence[str], kinds: Iterable[type]) -> tuple[list[str], dict[str, Any]]:
    """A config file as command-line arguments, so that its values meet the same checks, and what cannot be written so.

    Args:
        args: the command line, which has to ask for what the file may not.

    Raises:
        UserError: the file cannot be read, is no mapping, has an unknown key or a value of another kind, or asks for code.
    """
    found = read_fields(path)
    refuse_unasked_code(path, found, args)
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    from_file, others = [], {}
    for name, entry in found.items():
        if name not in _names(kinds):
            raise UserError("unknown field.", file=path, field=name, remedy=_closest(name, kinds))
        taken = _kinds(hints[name])
        value = entry.value
        for kind in (dict, list):
            if isinstance(value, kind) and kind not in taken:
                wanted = next((said for each, said in _CALLED.items() if each in taken), "a text")
                raise UserError(f"must be {wanted}, not {_CALLED[kind]}.", file=path, row=entry.line, field=name)
        if isinstance(value, list) and str not in get_args(hints[name]):
            members = [str(each) for each in (entry.text if str in taken else value)]  # type: ignore[union-attr]
            bad = next((each for each in members if each.startswith("--") or each == "None"), None)
            if bad is not None:
                raise UserError(
                    "must be a list of plain values.", file=path, row=entry.line, field=name, remedy=f"Not {bad!r}."
                )
            from_file += [f"--{name}", *members]
        elif isinstance(value, (dict, list)):
            others[name] = value
        else:  # YAML makes other things of texts: no is false, 0042 is 34
            from_file.append(f"--{name}={entry.text if not taken & {bool, int, float} else value}")
    return from_file, others


_CALLED = {list: "a list", dict: "a mapping", int: "a number", float: "a number", bool: "true or false", str: "a text"}


def _kinds(hint: Any) -> set[Any]:
    """The plain types in a hint: {str, list} of ``list[str] | None``."""
    inner = get_args(hint)
    own = {get_origin(hint) or hint} & {bool, int, float, str, dict, list}
    return own.union(*map(_kinds, inner)) if inner else own


def _names(kinds: Iterable[type]) -> list[str]:
    return [entry.name for kind in kinds for entry in fields(kind) if entry.init]


def _closest(name: str, kinds: Iterable[type], dashes: str = "") -> str | None:
    close = get_close_matches(name, _names(kinds), n=1)
    return f"Did you mean {dashes}{close[0]}?" if close else None
