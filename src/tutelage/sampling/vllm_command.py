"""How to start a vLLM server for a run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from tutelage.errors import UserError
from tutelage.models.paths import run_part

__all__ = ["serve_command"]

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM makes room for


def serve_command(
    model: str,
    *,
    lora_r: int | None = 16,
    longest: int,
    host: str = "127.0.0.1",
    port: int = 8000,
    dtype: str = "bfloat16",
    tensor_parallel_size: int = 1,
) -> str:
    """The command that starts a server as ``VLLMSampler`` needs it, for a shell.

    Args:
        model: what the run trains; for the folder of an adapter, its base is served.
        lora_r: rank of the adapter that the run trains; None where it trains all parameters. An adapter that is continued
            says its own.
        longest: prompt and completion together (tokens).
        host, port: where it listens.
        dtype: what it computes in.
        tensor_parallel_size: over how many devices one copy of the model is spread.

    Raises:
        UserError: an adapter that names no base, or of a rank that vLLM does not serve.

    >>> print(serve_command("model", lora_r=12, longest=768))
    VLLM_ALLOW_RUNTIME_LORA_UPDATING=True python -m vllm.entrypoints.openai.api_server \\
        --model model --host 127.0.0.1 --port 8000 --dtype bfloat16 \\
        --max-model-len 769 --generation-config vllm --logprobs-mode processed_logprobs \\
        --enable-lora --max-loras 1 --max-lora-rank 16
    """
    base, rank = _base_of(model)
    rank = rank or lora_r
    lines = [
        "python -m vllm.entrypoints.openai.api_server",  # the script `vllm` does not run in every build
        f"--model {shlex.quote(base)} --host {shlex.quote(host)} --port {port} --dtype {dtype}",
        # One token more: a request for the log-probs of given tokens draws one.
        f"--max-model-len {longest + 1} --generation-config vllm --logprobs-mode processed_logprobs",
    ]
    if tensor_parallel_size > 1:
        lines.append(f"--tensor-parallel-size {tensor_parallel_size}")
    if rank is None:
        return "VLLM_SERVER_DEV_MODE=1 " + _joined(lines)
    room = next((room for room in _RANKS if room >= rank), None)
    if room is None:
        raise UserError(f"vLLM serves adapters of rank {_RANKS[-1]} at most, not {rank}.", field="lora_r")
    lines.append(f"--enable-lora --max-loras 1 --max-lora-rank {room}")
    return "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True " + _joined(lines)


def _joined(lines: list[str]) -> str:
    return " \\\n    ".join(lines)


def _base_of(model: str) -> tuple[str, int | None]:
    """The model to serve, and the rank of the adapter that ``model`` is, if it is one."""
    path = Path(run_part(model, "policy")) / "adapter_config.json"
    if not path.is_file():
        return run_part(model, "policy"), None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, rank = config["base_model_name_or_path"], config.get("r")
    except (ValueError, KeyError, TypeError, AttributeError):
        base, rank = None, None
    if not isinstance(base, str) or not isinstance(rank, int):
        raise UserError("is not the config of a LoRA adapter with its base.", file=str(path))
    return base, rank
