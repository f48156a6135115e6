"""What probes found of a model, for the record of a run."""

from __future__ import annotations

from typing import Any

from torch import nn

from tutelage.sampling.probe import sampling_facts
from tutelage.scoring.layout import probe_facts

__all__ = ["model_probes"]


def model_probes(model: nn.Module) -> dict[str, Any]:
    """``RunRecord.probes`` of a model as far as it was used: how rows are laid out, and how it is sampled."""
    found = {"layout": probe_facts(model), "sampling": sampling_facts(model)}
    return {name: facts for name, facts in found.items() if facts}
