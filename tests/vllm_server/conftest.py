"""Real vLLM servers, started as ``tutelage vllm-command`` prints. ``make test-vllm`` says where vLLM is."""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from tutelage.sampling.vllm_command import serve_command
from tutelage.testing.models import tiny_model
from tutelage.testing.tokenizers import tiny_tokenizer

WHERE = os.environ.get("TUTELAGE_VLLM")  # the bin folder of an environment with vLLM
LONGEST = 200
# What a model's makers, or who starts a server, may have written: none of it may reach a sample.
GREEDY = {"temperature": 0.05, "top_k": 1, "top_p": 0.2, "min_p": 0.5, "repetition_penalty": 3.0, "max_new_tokens": 3}


def pytest_collection_modifyitems(items):
    if WHERE is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="needs real vLLM; run make test-vllm"))


class Server:
    """A vLLM server of our own. ``start`` and ``kill`` may be called in turns."""

    def __init__(self, model, log, *, full=False, dtype="float32", extra=""):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = serve_command(str(model), lora_r=None if full else 16, longest=LONGEST, port=self.port, dtype=dtype)
        self.command, self.log, self.process = f"{command} --enforce-eager {extra}", log, None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        own = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                shell=True,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **own, "PATH": f"{WHERE}:{os.environ['PATH']}"},
            )
        for _ in range(1200):
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).close()
                return
            except OSError:
                assert self.process.poll() is None, self.log.read_text(errors="replace")[-3000:]
                time.sleep(0.5)
        raise AssertionError("the server did not start within ten minutes")

    def kill(self):
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


@contextmanager
def started(*args, **options):
    server = Server(*args, **options)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A small random model on disk, whose generation config would have it sample greedily."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = tiny_tokenizer("zephyr")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model("llama", vocab_size=len(tokenizer), head_dim=32, initializer_range=0.1, **shape)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    written = {"do_sample": True, "eos_token_id": list(range(3, 60)), "bos_token_id": 1, **GREEDY}
    (folder / "generation_config.json").write_text(json.dumps(written))
    return folder


@pytest.fixture(scope="session")
def gemma():
    """Gemma 3 270M, as the quickstart converts it."""
    folder = Path.home() / ".cache" / "tutelage" / "gemma-3-270m"
    if not (folder / "config.json").exists():
        pytest.skip("needs the model of make quickstart")
    return folder


@pytest.fixture(scope="module")
def leaking(small, tmp_path_factory):
    """A server of the small model that was told to take the generation config, and more of the kind."""
    extra = f"--generation-config auto --override-generation-config '{json.dumps(GREEDY)}'"
    with started(small, tmp_path_factory.mktemp("log") / "leaking.log", extra=extra) as server:
        yield server


@pytest.fixture(scope="module")
def served(small, tmp_path_factory):
    """A server of the small model, as the command prints."""
    with started(small, tmp_path_factory.mktemp("log") / "served.log") as server:
        yield server
