"""Controls: what a method has to beat, as runs of the library's own algorithms from the same start.

A gain over a start means nothing if more SFT, gentler SFT, or the policy's trust in itself would have given it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tutelage.algorithms.registry import find
from tutelage.errors import UserError
from tutelage.results import RunRecord
from tutelage.training.config import SFT_LEARNING_RATES, DemonstrationConfig, default_of

__all__ = ["CONTROLS", "MATCHED", "Control", "control_config", "controls", "matched"]

MATCHED = ("equal_compute", "equal_score")
"""SFT that is matched to the method when that is done: with as many operations, or stopped where its score is the method's."""

CONTROLS = ("plateau", "gentle", "self_training", *MATCHED)
"""Their names: SFT to its plateau, SFT at a tenth of the rate, the policy distilled into its own likeliest answers; and those
of ``MATCHED``, which go by the rate that the plateau chose."""


@dataclass(frozen=True, slots=True)
class Control:
    """A run to compare a method with.

    Attributes:
        name: of the run.
        control: which of ``CONTROLS`` it belongs to; of several runs of one control the best on validation rows counts.
        algorithm: that it runs.
        settings: what differs from the method's own.
        until_score: the mean score on the evaluation rows at which training stops.
    """

    name: str
    control: str
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    until_score: float | None = None


def controls(name: str, *, adapter: bool) -> list[Control]:
    """The runs of a control.

    Args:
        name: one of ``CONTROLS`` that is none of ``MATCHED``.
        adapter: whether an adapter is trained, and not all parameters: decides the unit of learning rates.
    """
    rate = SFT_LEARNING_RATES["adapter" if adapter else "full"]
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
    if name == "gentle":
        return [Control("gentle-sft", name, "sft", {"learning_rate": rate / 10, "num_train_epochs": 6, **schedule})]
    if name == "self_training":
        learns_nothing = {"reward": "logp", "policy_update": "best_of_n", "reward_gate": "off", "keep_policy": "last"}
        # Imitating samples of the start, or one's own likeliest answers again and again: which is stronger depends on the
        # task, and the second soon gives only short ones.
        return [
            Control(
                f"self-training-{rounds}-round{'s' if rounds > 1 else ''}",
                name,
                "rft",
                {**learns_nothing, "stages_per_epoch": rounds, "samplings_per_stage": 1, **schedule},
            )
            for rounds in (1, 4)
        ]
    assert name == "plateau"
    return [
        Control(
            f"sft-{passes}-passes-rate-{share:g}",
            name,
            "sft",
            {"learning_rate": rate * share, "num_train_epochs": passes, **schedule},
        )
        for passes in (2, _LONGEST_PLATEAU)
        for share in (1.0, 0.3)
    ]


_LONGEST_PLATEAU = 6


def matched(name: str, method: RunRecord, plateau: RunRecord) -> Control:
    """SFT at the plateau's rate that is matched to a method.

    Args:
        name: one of ``MATCHED``.
        method: what it is matched to, evaluated.
        plateau: the run of SFT whose learning rate and cost per pass it goes by.

    Raises:
        UserError: the operations of one of them are not known, or the method's answers have no score.
    """
    rate = {"learning_rate": plateau.settings["learning_rate"], "warmup_steps": 0.1}
    if name == "equal_compute":
        ours, theirs = (run.flops.get("total") for run in (method, plateau))
        if not ours or not theirs or not plateau.demonstration_epochs:
            raise UserError(
                f"the operations of {plateau.name if ours else method.name} were not counted.",
                remedy="Leave equal_compute out.",
                field="controls",
            )
        passes = ours / (theirs / plateau.demonstration_epochs)
        return Control(
            "sft-equal-compute", name, "sft", {**rate, "num_train_epochs": passes, "lr_scheduler_type": "linear"}
        )
    assert name == "equal_score"
    score = method.evaluation and method.evaluation.means.get("score_sampled")
    if score is None:
        raise UserError(
            f"the answers of {method.name} have no score to stop at.",
            remedy="Leave equal_score out.",
            field="controls",
        )
    # Where it stops is not known beforehand, so the rate stays constant; it may take several times the longest plateau.
    constant = {"lr_scheduler_type": "constant_with_warmup", "num_train_epochs": 4 * _LONGEST_PLATEAU}
    return Control("sft-equal-score", name, "sft", {**rate, **constant}, until_score=score.mean)


def control_config(control: Control, method: DemonstrationConfig, output_dir: str) -> DemonstrationConfig:
    """The config of a control: what all algorithms have as the method has it, and the control's own.

    Self-training has the method's prompts and samples too. SFT has its own batches: those of a method are of prompts with
    samples.
    """
    config = find(control.algorithm).config
    names = {entry.name for entry in fields(DemonstrationConfig)}
    names = names | _OF_SAMPLES if control.algorithm == "rft" else names - _OF_BATCHES
    carried = {
        entry.name: getattr(method, entry.name)
        for entry in fields(config)
        if entry.init and entry.name in names and getattr(method, entry.name, None) != default_of(entry)
    }
    own = {"output_dir": output_dir, "run_name": control.name, "push_to_hub": False}
    return config(**{**carried, **control.settings, **own})


_OF_SAMPLES = {
    "num_samples",
    "prompt_dataset",
    "prompt_mix",
    "validation_dataset",
    "validation_rows",
    "truncated_samples",
    "temperature",
    "top_k",
    "top_p",
}
_OF_BATCHES = {"per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"}
