"""tutelage vllm-command: how to start a vLLM server for a run."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from tutelage.cli.parser import command_parser, length_arguments
from tutelage.models.paths import require_model
from tutelage.ranges import whole
from tutelage.visible import write

__all__ = ["main"]


def main(args: Sequence[str], console: Console) -> None:
    """Print the command that starts a vLLM server for a run with --sampler vllm. Give the settings of the run."""
    parser = command_parser("vllm-command", main.__doc__, length_arguments)
    parser.add_argument("model_name_or_path", metavar="MODEL", help="What the run trains.")
    parser.add_argument("--lora_r", type=whole(1, 2**16), default=16, help="Rank of the LoRA adapter.")
    parser.add_argument("--full", action="store_true", help="The run trains all parameters, without an adapter.")
    parser.add_argument("--host", default="127.0.0.1", help="Address to listen on; 0.0.0.0 for other machines.")
    parser.add_argument("--port", type=whole(1, 65535), default=8000, help="Port to listen on.")
    parser.add_argument(
        "--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="What the server computes in."
    )
    parser.add_argument(
        "--tensor_parallel_size", type=whole(1), default=1, help="Devices that one copy of the model is spread over."
    )
    options = parser.parse_args(args)
    require_model(options.model_name_or_path)
    # Imported now that the arguments are good: the package takes seconds.
    from tutelage.sampling.vllm_command import serve_command

    write(
        serve_command(
            options.model_name_or_path,
            lora_r=None if options.full else options.lora_r,
            longest=options.max_prompt_length + options.max_completion_length,
            host=options.host,
            port=options.port,
            dtype=options.dtype,
            tensor_parallel_size=options.tensor_parallel_size,
        )
    )
