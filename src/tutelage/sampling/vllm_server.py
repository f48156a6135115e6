"""One vLLM server over HTTP: what is asked of it, and what its answers mean."""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tutelage.errors import UserError
from tutelage.sampling.base import Sample, SamplingParams
from tutelage.visible import visible

__all__ = [
    "ServedModel",
    "ServerFault",
    "VLLMServer",
    "completion_request",
    "parse_urls",
    "prompt_logps_of",
    "sample_of",
]

_OPEN = 10.0  # seconds that a connection may take to open
_AGAIN = (408, 409, 425, 429)  # answers besides 5xx that another attempt may not get


class ServerFault(Exception):
    """A server did not do what it was asked.

    Args:
        text: what happened, one sentence without its end.
        again: another attempt, or another server, may do better.
        lost: the connection failed, so the server may have been started anew since.
        status: of the answer; None without one.
    """

    def __init__(self, text: str, *, again: bool, lost: bool = False, status: int | None = None):
        super().__init__(text)
        self.again, self.lost, self.status = again, lost, status


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A model or an adapter that a server answers as.

    Attributes:
        name: to ask for it.
        parent: the model that an adapter belongs to; None of a model.
        max_model_len: longest prompt and completion together (tokens); None where the server does not say.
    """

    name: str
    parent: str | None
    max_model_len: int | None


def parse_urls(text: str) -> list[str]:
    """Addresses of servers, separated by commas.

    Raises:
        UserError: none, one twice, or one that is no http address.

    >>> parse_urls("http://a:8000, http://b:8000/")
    ['http://a:8000', 'http://b:8000']
    """
    urls = [url.strip().rstrip("/") for url in text.split(",") if url.strip()]
    remedy = "Write --vllm_url http://host:port, several separated by commas."
    if not urls:
        raise UserError("names no server.", remedy=remedy, field="vllm_url")
    for url in urls:
        try:
            parts = urlsplit(url)
            usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        except ValueError:  # a port that is none
            usable, parts = False, urlsplit("")
        if not usable or parts.query or parts.fragment or parts.username is not None:
            raise UserError(f"'{url}' is not the address of a server.", remedy=remedy, field="vllm_url")
        if parts.path.rstrip("/").endswith("/v1"):
            raise UserError(f"'{url}' ends with /v1.", remedy="Leave /v1 out.", field="vllm_url")
    if len(set(urls)) < len(urls):
        raise UserError("names a server twice.", remedy=remedy, field="vllm_url")
    return urls


class VLLMServer:
    """The public interface of one vLLM server. Threads may share it: each has a connection of its own.

    Args:
        url: as of ``parse_urls``.
        timeout: seconds that it may take to answer a request.
        key: sent as a bearer token; by default the variable ``VLLM_API_KEY``, which the server reads too.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, key: str | None = None):
        parts = urlsplit(url)
        self.url, self.timeout = url, timeout
        self._kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port, self._path = str(parts.hostname), parts.port, parts.path
        key = os.environ.get("VLLM_API_KEY") if key is None else key
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._own = threading.local()
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    # --- what it is asked -------------------------------------------------------------------------------------------

    def version(self) -> str:
        """Of vLLM."""
        return visible(self._json("GET", "/version").get("version"), lines=False)

    def models(self) -> list[ServedModel]:
        """What it serves, adapters included."""
        found = self._json("GET", "/v1/models").get("data")
        if not isinstance(found, list):
            raise ServerFault("does not list its models", again=False)
        return [ServedModel(str(m.get("id")), m.get("parent"), m.get("max_model_len")) for m in found]

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The first choice of a completion."""
        choices = self._json("POST", "/v1/completions", body).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise ServerFault("answered without a completion", again=True)
        return choices[0]

    def load_adapter(self, name: str, path: str) -> None:
        """Have it read an adapter from a folder that it can see."""
        self.ask("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})

    def unload_adapter(self, name: str) -> None:
        """Have it forget an adapter."""
        self.ask("POST", "/v1/unload_lora_adapter", {"lora_name": name})

    def reload_weights(self, path: str) -> None:
        """Have it read all weights from a folder that it can see; a server offers that in its development mode alone."""
        self.ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
        self.ask("POST", "/reset_prefix_cache", {})

    # --- how --------------------------------------------------------------------------------------------------------

    def ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> bytes:
        """The body of an answer.

        Raises:
            ServerFault: there is none, or it is an error.
        """
        content, status = self._exchange(
            method, self._path + path, None if body is None else json.dumps(body).encode()
        )
        if status == 200:
            return content
        again = status >= 500 or status in _AGAIN
        raise ServerFault(f"answered {status}: {_told(content)}", again=again, status=status)

    def _exchange(self, method: str, path: str, body: bytes | None) -> tuple[bytes, int]:
        connection, is_new = self._connection()
        try:
            connection.request(method, path, body, self._headers)
            answer = connection.getresponse()
            return answer.read(), answer.status
        except (OSError, http.client.HTTPException) as error:
            self._drop(connection)
            if isinstance(error, TimeoutError):
                raise ServerFault(f"did not answer within {self.timeout:g} seconds", again=True, lost=True) from error
            if isinstance(error, (ConnectionResetError, BrokenPipeError)) and not is_new:
                return self._exchange(method, path, body)  # servers close connections that nobody used for seconds
            raise ServerFault(f"cannot be reached ({_reason(error)})", again=True, lost=True) from error

    def close(self) -> None:
        """Close every connection, those that other threads wait at too: the server then gives their requests up."""
        with self._lock:
            connections, self._open = list(self._open), set()
        for connection in connections:
            _shut(connection)

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        try:
            found = json.loads(self.ask(method, path, body))
        except ValueError as error:
            raise ServerFault("answered with what is not JSON", again=True) from error
        if not isinstance(found, dict):
            raise ServerFault("answered with something else than an object", again=True)
        return found

    def _connection(self) -> tuple[http.client.HTTPConnection, bool]:
        """This thread's connection, and whether it was opened just now."""
        connection = getattr(self._own, "connection", None)
        if connection is not None and connection.sock is not None and connection in self._open:
            return connection, False
        connection = self._kind(self._host, self._port, timeout=min(_OPEN, self.timeout))
        try:
            connection.connect()
        except OSError as error:
            raise ServerFault(f"cannot be reached ({_reason(error)})", again=True, lost=True) from error
        connection.sock.settimeout(self.timeout)
        self._own.connection = connection
        with self._lock:
            self._open.add(connection)
        return connection, True

    def _drop(self, connection: http.client.HTTPConnection) -> None:
        self._own.connection = None
        with self._lock:
            self._open.discard(connection)
        connection.close()


def _shut(connection: http.client.HTTPConnection) -> None:
    """End a connection under a thread that may be reading from it."""
    with suppress(OSError):
        if connection.sock is not None:
            connection.sock.shutdown(socket.SHUT_RDWR)


def _reason(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _told(content: bytes) -> str:
    """What an answer that is an error says of itself."""
    text = content.decode("utf-8", "replace")
    with suppress(ValueError, AttributeError):
        found = json.loads(text)
        inner = found.get("error", found)
        text = str(inner.get("message") or inner.get("detail") or text)
    return visible(" ".join(text.split())[:300], lines=False) or "nothing"


# --- requests and answers ---------------------------------------------------------------------------------------------

_WHOLE_DISTRIBUTION = {
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "n": 1,
    "stop": [],
    "bad_words": [],
    "logit_bias": None,
    "allowed_token_ids": None,
    "truncate_prompt_tokens": None,
    "add_special_tokens": False,
    "skip_special_tokens": False,
    "stream": False,
    "echo": False,
}
"""Every setting that changes what is drawn, said explicitly: a server takes its own default, or the model's
``generation_config``, for what a request does not say."""


def completion_request(
    model: str, prompt: Sequence[int], params: SamplingParams, *, seed: int, prompt_logps: bool = False
) -> dict[str, Any]:
    """The body of a request for one completion of token ids.

    Args:
        model: the name of the model or adapter at the server.
        seed: of this completion, below 2⁶³.
        prompt_logps: the log-probs of the prompt's tokens too.
    """
    return {
        **_WHOLE_DISTRIBUTION,
        "model": model,
        "prompt": list(prompt),
        "max_tokens": params.max_completion_length,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "seed": seed,
        "ignore_eos": True,  # end-of-turn ids are the run's own
        "stop_token_ids": sorted(params.stop_ids),
        "logprobs": 0,  # of the token that was drawn
        "return_token_ids": True,
        **({"prompt_logprobs": 0} if prompt_logps else {}),
    }


def sample_of(choice: Mapping[str, Any], prompt: Sequence[int], params: SamplingParams) -> Sample:
    """The sample in an answer to ``completion_request``.

    Raises:
        ServerFault: it is incomplete.
        UserError: a setting of the server changed it: another prompt, or an end where the run would not have it end.
    """
    as_printed = "Start it as `tutelage vllm-command` prints, without defaults of its own."
    if choice.get("prompt_token_ids") not in (None, list(prompt)):
        raise UserError("the server changed the tokens of a prompt.", remedy=as_printed, field="vllm_url")
    ids, logps = choice.get("token_ids"), (choice.get("logprobs") or {}).get("token_logprobs")
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        raise ServerFault(f"gave a request up (finish_reason {reason})", again=True)
    if not isinstance(ids, list) or not ids:
        raise UserError(
            "the server's answer has no token ids.",
            remedy="Use a version of vLLM that knows return_token_ids (0.10.2 or newer).",
            field="vllm_url",
        )
    if not isinstance(logps, list) or len(logps) != len(ids) or not all(_is_logp(value) for value in logps):
        raise ServerFault("answered without the log-prob of each token", again=True)
    finished = ids[-1] in params.stop_ids
    early = any(token in params.stop_ids for token in ids[:-1])
    if early or not (finished or (reason == "length" and len(ids) == params.max_completion_length)):
        raise UserError(
            f"the server ended a completion in its own way: after {len(ids)} of {params.max_completion_length} tokens, at "
            f"token {ids[-1]} ({reason}), where the run's end-of-turn tokens are {sorted(params.stop_ids)}.",
            remedy=as_printed,
            field="vllm_url",
        )
    return Sample(tuple(ids), tuple(map(float, logps)), finished)


def prompt_logps_of(choice: Mapping[str, Any], prompt: Sequence[int], start: int) -> tuple[float, ...]:
    """Log-probs of the prompt's tokens from ``start`` on, in an answer to a request with ``prompt_logps`` (nats).

    Raises:
        ServerFault: they are not there.
    """
    found = choice.get("prompt_logprobs")
    try:
        logps = tuple(float(found[place][str(prompt[place])]["logprob"]) for place in range(start, len(prompt)))  # type: ignore[index]
    except (TypeError, KeyError, IndexError, ValueError) as error:
        raise ServerFault("answered without the log-probs of the prompt", again=True) from error
    return logps


def _is_logp(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)
