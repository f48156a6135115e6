"""Controls: what a method has to beat, as runs of the library's own algorithms from the same start.

A gain over a start means nothing if more SFT, gentler SFT, or the policy's trust in itself would have given it too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from tutelage.algorithms.registry import find
from tutelage.training.config import SFT_LEARNING_RATES, DemonstrationConfig

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


def controls(name: str, *, adapter: bool, takes_prompts: bool) -> list[Control]:
    """The runs of a control.

    Args:
        name: one of ``CONTROLS``.
        adapter: whether an adapter is trained, and not all parameters: decides the unit of learning rates.
        takes_prompts: the method samples for prompts, so that self-training can have the same.
    """
    rate = SFT_LEARNING_RATES["adapter" if adapter else "full"]
    schedule = {"lr_scheduler_type": "linear", "warmup_steps": 0.1}
    if name == "gentle":
        return [Control("gentle-sft", name, "sft", {"learning_rate": rate / 10, "num_train_epochs": 6, **schedule})]
    if name == "self_training":
        learns_nothing = {"reward": "logp", "policy_update": "best_of_n", "reward_gate": "off", "keep_policy": "last"}
        of_a_reward = (
            "preference_dataset",
            "reward_model_name_or_path",
            "init_reward_from",
            "reward_steps",
            "drop_below",
        )
        learns_nothing |= {
            "reward_features": "text",
            "reward_ensemble": 1,
            "reward_warmup_stages": 0,
            **dict.fromkeys(of_a_reward),
        }
        # One round of samples: a policy that goes on to imitate its own likeliest answers soon gives only short ones.
        rounds = {"stages_per_epoch": 1, "samplings_per_stage": 1}
        own = {"learning_rate": rate / 6} if not takes_prompts else {}
        return [Control("self-training", name, "rft", {**learns_nothing, **rounds, **own, **schedule})]
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
    """The config of a control: the method's settings where its algorithm has them, and its own."""
    config = find(control.algorithm).config
    carried = {
        entry.name: getattr(method, entry.name)
        for entry in fields(config)
        if entry.init and hasattr(method, entry.name) and getattr(method, entry.name) != _default(entry)
    }
    own = {"output_dir": output_dir, "run_name": control.name, "push_to_hub": False}
    if control.algorithm == "sft":  # the batches of a method are of prompts with samples
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps"):
            carried.pop(name, None)
    return config(**{**carried, **control.settings, **own})


def _default(entry: Field[Any]) -> Any:
    return entry.default if entry.default_factory is MISSING else entry.default_factory()
