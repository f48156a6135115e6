"""Settings of sampling: in the training process, or on vLLM servers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tutelage.errors import UserError
from tutelage.ranges import number, whole
from tutelage.sampling.vllm_server import parse_urls
from tutelage.training.config import DemonstrationConfig

__all__ = ["SamplerConfig"]


@dataclass
class SamplerConfig(DemonstrationConfig):
    """Settings that say what draws the samples."""

    sampler: str = field(
        default="transformers",
        metadata={
            "help": (
                "What draws the samples: the model in this process, or the vLLM servers of --vllm_url. Evaluation on "
                "held-out rows stays in this process."
            ),
            "choices": ["transformers", "vllm"],
        },
    )
    vllm_url: str | None = field(
        default=None,
        metadata={
            "help": (
                "Running vLLM servers, http://host:port, several separated by commas: they share the work. "
                "`tutelage vllm-command MODEL` prints how to start one."
            )
        },
    )
    vllm_folder: str | None = field(
        default=None,
        metadata={
            "help": (
                "Folder in which the weights of each stage are handed to the servers, which have to see it under the same "
                "path. By default 'vllm' in --output_dir."
            )
        },
    )
    vllm_concurrency: Annotated[int, whole(1, 4096)] = field(
        default=64, metadata={"help": "Requests that a vLLM server has at a time."}
    )
    vllm_timeout: Annotated[float, number(0, above=True)] = field(
        default=600.0,
        metadata={"help": "Seconds that a vLLM server may take for one request, before another attempt is made."},
    )
    vllm_tolerance: Annotated[float, number(0, above=True)] = field(
        default=0.1,
        metadata={
            "help": (
                "Log-probs of a vLLM server that differ from the trainer's by more than this on average (nats per token) are "
                "those of other weights, and the run stops. Compared after each hand-over, and logged as sampler/logp_gap."
            )
        },
    )

    def __post_init__(self):
        super().__post_init__()
        if self.sampler == "vllm" and not self.vllm_url:
            raise UserError(
                "--sampler vllm has no server.", remedy="Add --vllm_url http://host:port.", field="vllm_url"
            )
        if self.vllm_url is not None:
            if self.sampler != "vllm":
                raise UserError("has no effect without --sampler vllm.", remedy="Add that.", field="vllm_url")
            parse_urls(self.vllm_url)
