"""A small HTTP server with the part of vLLM's interface that is used, for faults: it answers from a tiny model in memory.

What real vLLM does with weights and requests is tested in ``tests/vllm_server``, which ``make test-vllm`` runs.
"""

import copy
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

LOCK = threading.RLock()  # of all stand-ins: torch on two cores


class StandIn(ThreadingHTTPServer):
    """Serves a model.

    Attributes:
        fault: called with each path and body; gives None, a status, "drop" (no answer) or "sleep".
        requests: the body of each request for a completion.
        stale: an adapter that is loaded is taken from the folder of the first one.
        change: what is added to every log-prob (nats), as if the base were another.
    """

    daemon_threads = True

    def __init__(self, model, port=0):
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.adapters, self.longest = model, {}, 4096
        self.fault, self.stale, self.change = lambda path, body: None, False, 0.0
        self.end_at, self.cap, self.reloads = None, None, False
        self.requests, self.loaded, self.paths = [], [], []
        self.busy = self.busiest = 0
        self.delay = 0.0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        pass

    def load(self, name, path):
        with LOCK:
            self.paths.append(path)
            if self.stale and self.adapters:
                self.adapters[name] = next(reversed(self.adapters.values()))
            else:
                self.adapters[name] = PeftModel.from_pretrained(copy.deepcopy(self.model), path).eval()
            self.loaded.append(name)

    def reload(self, path):
        with LOCK:
            self.model = AutoModelForCausalLM.from_pretrained(path).eval()

    def logps(self, model, ids):
        with LOCK, torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1) + self.change


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self._serve(None)

    def do_POST(self):
        self._serve(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _serve(self, body):
        fault = self.server.fault(self.path, body)
        if fault == "drop":
            self.close_connection = True
            return
        if fault == "sleep":
            time.sleep(1.5)
        if isinstance(fault, int):
            self._answer(fault, {"error": {"message": "out of cache"}})
            return
        self._answer(*self._found(body))

    def _found(self, body):
        server = self.server
        if self.path == "/version":
            return 200, {"version": "stand-in"}
        if self.path == "/v1/models":
            models = [{"id": "base", "parent": None, "max_model_len": server.longest}]
            return 200, {"data": models + [{"id": name, "parent": "base"} for name in server.adapters]}
        if self.path == "/v1/load_lora_adapter":
            server.load(body["lora_name"], body["lora_path"])
            return 200, {}
        if self.path == "/v1/unload_lora_adapter":
            return (200, {}) if server.adapters.pop(body["lora_name"], None) else (404, {})
        if self.path == "/collective_rpc" and server.reloads:
            server.reload(body["kwargs"]["weights_path"])
            return 200, {}
        if self.path == "/reset_prefix_cache" and server.reloads:
            return 200, {}
        if self.path == "/v1/completions":
            server.requests.append(body)
            model = server.model if body["model"] == "base" else server.adapters.get(body["model"])
            if model is None:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            server.busy += 1
            server.busiest = max(server.busy, server.busiest)
            time.sleep(server.delay)
            try:
                return 200, {"choices": [complete(server, model, body)]}
            finally:
                server.busy -= 1
        return 404, {"detail": "Not Found"}

    def _answer(self, status, content):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def complete(server, model, body):
    ids, prompt = [], body["prompt"]
    logps, reason = [], "length"
    generator = torch.Generator().manual_seed(body["seed"])
    for _ in range(min(body["max_tokens"], server.cap or body["max_tokens"])):
        at = server.logps(model, prompt + ids)[-1]
        token = int(torch.multinomial((at - server.change).exp(), 1, generator=generator))
        ids.append(token)
        logps.append(float(at[token]))
        if token in body["stop_token_ids"] or token == server.end_at:
            reason = "stop"
            break
    found = {"token_ids": ids, "logprobs": {"token_logprobs": logps}, "finish_reason": reason}
    found["prompt_token_ids"] = prompt
    if "prompt_logprobs" in body:
        own = server.logps(model, prompt)
        found["prompt_logprobs"] = [
            None,
            *({str(token): {"logprob": float(own[place][token])}} for place, token in enumerate(prompt[1:])),
        ]
    return found


@contextmanager
def serving(*models, ports=None):
    """A stand-in for each model."""
    servers = [StandIn(model.eval(), port) for model, port in zip(models, ports or [0] * len(models), strict=True)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield servers
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()
