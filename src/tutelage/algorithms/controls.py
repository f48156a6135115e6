"""Controls: what a method has to beat, as runs of the library's own algorithms from the same start.

A gain over a start means nothing if more SFT, gentler SFT, or the policy's trust in itself would have given it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from tutelage.algorithms.registry import find
from tutelage.training.config import SFT_LEARNING_RATES, DemonstrationConfig, default_of

__all__ = ["CONTROLS", "Control", "control_config", "controls"]

CONTROLS = ("plateau", "gentle", "self_training")
"""Their names: SFT to its plateau, SFT at a tenth of the rate, and the policy distilled into its own likeliest answers."""


@dataclass(frozen=True, slots=True)
class Control:
    """A run to compare a method with.

    Attributes:
        name: of the run.
        control: which of ``CONTROLS`` it belongs to; of several runs of one control the best on validation rows counts.
        algorithm: that it runs.
        settings: what differs from the method's own.
    """

    name: str
    control: str
    algorithm: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def controls(name: str, *, adapter: bool) -> list[Control]:
    """The runs of a control.

    Args:
        name: one of ``CONTROLS``.
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
        for passes in (2, 6)
        for share in (1.0, 0.3)
    ]


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
