"""Sampling on vLLM servers: token ids and settings out, token ids and log-probs back."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

from peft import LoraConfig, PeftModel
from torch import nn

from tutelage.errors import UserError
from tutelage.files import storing
from tutelage.groups import Group
from tutelage.models.loading import base_causal_lm
from tutelage.models.weights import fingerprint
from tutelage.sampling.base import Sample, SamplingParams, in_order, stream_seed
from tutelage.sampling.dispatch import Dispatcher, Patience
from tutelage.sampling.freshness import compare
from tutelage.sampling.vllm_server import ServerFault, VLLMServer, completion_request, prompt_logps_of, sample_of
from tutelage.visible import visible

__all__ = ["VLLMSampler", "check_adapter"]

logger = logging.getLogger(__name__)

_PROBED, _PROBE_TOKENS = 16, 64  # prompts of the probe, and tokens of each completion
_PROBE_STAGE = 1 << 23  # names the probe in the random stream; stages count from 0

_OWN_FOLDER = re.compile(r"(adapter|policy)-[0-9a-f]{16}(\.tmp)?")
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq")  # ways to begin an adapter

_Score = Callable[[Sequence[Group]], list]


def check_adapter(policy: nn.Module) -> None:
    """Refuse an adapter that vLLM does not serve.

    Raises:
        UserError: it is not plain LoRA.
    """
    if not isinstance(policy, PeftModel):
        return
    config = policy.active_peft_config
    problem = None
    if not isinstance(config, LoraConfig):
        problem = f"is {getattr(config.peft_type, 'value', config.peft_type)}"
    elif config.use_dora:
        problem = "is DoRA"
    elif config.modules_to_save or config.trainable_token_indices:
        problem = "holds whole modules or tokens (modules_to_save, trainable_token_indices)"
    elif config.bias != "none":
        problem = f"trains biases ({config.bias})"
    elif str(config.init_lora_weights).startswith(_CHANGE_THE_BASE):
        problem = f"begins as '{config.init_lora_weights}', with a change of its base"
    if problem:
        raise UserError(
            f"the adapter {problem}, which vLLM does not serve.",
            remedy="Use plain LoRA, or --sampler transformers.",
            field="sampler",
        )


@dataclass(slots=True)
class _Held:
    """What a server holds.

    Attributes:
        base: its name for the model that it was started with.
        longest: prompt and completion together (tokens); None where it does not say.
        model: the name to ask for.
        weights: fingerprint of the weights that it was handed last; None of its own.
        is_verified: whether they were found to be those.
        cannot_reload: why it did not take weights anew, where it did not.
        earlier: the trainer's log-probs of the probe under other weights, which it held then.
    """

    base: str
    longest: int | None
    model: str
    weights: str | None = None
    is_verified: bool = False
    cannot_reload: str = ""
    earlier: tuple[float, ...] | None = None


class VLLMSampler:
    """Draws completions on vLLM servers that were started with the policy's base.

    An adapter is handed over with the server's own runtime LoRA loading, each time under a new name; all parameters with
    its own weight reload, which it offers in its development mode. A server is handed the weights before its first
    request, and again after it failed.

    Args:
        servers: share the work.
        folder: adapters and weights are written there; the servers see it under the same path.
        concurrency: requests that a server has at a time.
        tolerance: mean difference of log-probs between server and trainer that is taken for rounding (nats per token).
        patience: with servers that fail.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        folder: Path,
        *,
        concurrency: int = 64,
        tolerance: float = 0.1,
        patience: Patience | None = None,
    ):
        self.servers, self.folder, self.tolerance = list(servers), folder.absolute(), tolerance
        place = f"{socket.gethostname()} {self.folder}"
        self._mark = f"tutelage-{hashlib.sha256(place.encode()).hexdigest()[:8]}-"
        self._dispatcher: Dispatcher = Dispatcher(
            self.servers, concurrency=concurrency, admit=self._admit, patience=patience
        )
        self._held: dict[VLLMServer, _Held] = {}
        self._handed = 0
        self._weights: str | None = None
        self._is_adapter = False
        self._policy: nn.Module | None = None
        self._probe: list[Group] = []
        self._trainer: tuple[float, ...] | None = None  # log-probs of the probe under the weights that were taken last
        self._trainer_base: tuple[float, ...] | None = None  # and under the base of an adapter
        self._longest = 0
        self._lock = threading.Lock()
        self.gap: float | None = None

    # --- weights ----------------------------------------------------------------------------------------------------

    def take_weights(self, policy: nn.Module) -> None:
        """Write the policy's weights for the servers, unless they are those of the last call."""
        weights = fingerprint((n, p) for n, p in policy.named_parameters() if p.requires_grad)
        if weights == self._weights:
            return
        self._policy, self._weights, self._trainer, self.gap = policy, weights, None, None
        self._is_adapter = isinstance(policy, PeftModel)
        self._handed += 1
        for old in self._written():
            shutil.rmtree(old, ignore_errors=True)
        self._write(policy)

    @property
    def _path(self) -> Path:
        return self.folder / f"{'adapter' if self._is_adapter else 'policy'}-{self._weights}"

    @property
    def _name(self) -> str:
        return f"{self._mark}{self._handed}-{self._weights}"

    def _written(self) -> list[Path]:
        return [path for path in self.folder.glob("*") if _OWN_FOLDER.fullmatch(path.name)]

    def _write(self, policy: nn.Module) -> None:
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        with storing(temporary):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            if isinstance(policy, PeftModel):
                active = str(policy.active_adapter)
                policy.save_pretrained(str(temporary), selected_adapters=[active], save_embedding_layers=False)
                os.replace(temporary if active == "default" else temporary / active, self._path)
                shutil.rmtree(temporary, ignore_errors=True)
            else:
                base_causal_lm(policy).save_pretrained(temporary)
                os.replace(temporary, self._path)

    def release(self) -> None:
        """Unload the adapter and remove what was written."""
        for server, held in self._held.items():
            if held.model != held.base:
                with suppress(ServerFault):
                    server.unload_adapter(held.model)
            server.close()
        self._held.clear()
        self._weights = None
        for path in self._written():
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            self.folder.rmdir()

    def _admit(self, server: VLLMServer, failed: bool) -> None:
        """Have a server hold the weights, and compare log-probs where they are known."""
        held = self._held.get(server)
        if held is None or failed:
            held = self._held[server] = self._look(server, held)
        if held.longest is not None and held.longest < self._longest:
            raise UserError(
                f"the vLLM server {server.url} takes {held.longest} tokens (--max-model-len), where prompt and completion may "
                f"have {self._longest}.",
                remedy="Start it as `tutelage vllm-command` prints.",
                field="vllm_url",
            )
        if self._weights is not None and held.weights != self._weights:
            self._hand_over(server, held)
        elif not self._is_adapter:
            held.is_verified = False  # a server that was started anew meanwhile goes by the same name
        if self._trainer is not None and not held.is_verified:
            self._compare(server, held)

    def _look(self, server: VLLMServer, before: _Held | None) -> _Held:
        """What a server says of itself; adapters that a killed run left there are unloaded."""
        models = server.models()
        base = next((model for model in models if model.parent is None), None)
        if base is None:
            raise ServerFault("serves no model", again=False)
        found = _Held(base.name, base.max_model_len, base.name)
        if before is None:
            logger.info(
                "vLLM server %s: version %s, model %s", server.url, server.version(), visible(base.name, lines=False)
            )
        else:
            found.earlier = before.earlier
        for name in (model.name for model in models if model.name.startswith(self._mark)):
            if before and name == before.model:
                found.model, found.weights = name, before.weights
            else:
                with suppress(ServerFault):
                    server.unload_adapter(name)
        return found

    def _hand_over(self, server: VLLMServer, held: _Held) -> None:
        held.is_verified = False
        if not self._is_adapter:
            self._reload(server, held)
            held.weights = self._weights
            return
        old = held.model
        try:
            server.load_adapter(self._name, str(self._path))
        except ServerFault as fault:
            if fault.status is None or fault.status in (429, 503):
                raise
            raise UserError(  # of an adapter that it has no room for, vLLM says 500
                f"the vLLM server {server.url} did not take the adapter {self._path}: it {fault}.",
                remedy="Start it as `tutelage vllm-command` prints, where it sees that folder under the same path "
                "(--vllm_folder names another one).",
                field="vllm_url",
            ) from fault
        held.model, held.weights = self._name, self._weights
        if old != held.base:
            with suppress(ServerFault):
                server.unload_adapter(old)

    def _reload(self, server: VLLMServer, held: _Held) -> None:
        held.cannot_reload = ""
        try:
            server.reload_weights(str(self._path))
        except ServerFault as fault:
            if fault.again and fault.status is None:
                raise
            held.cannot_reload = str(fault)  # it may hold them nevertheless: at the start, or started anew with them

    # --- are they those? --------------------------------------------------------------------------------------------

    def verify(self, groups: Sequence[Group], params: SamplingParams, score: _Score) -> None:
        """See ``RemoteSampler.verify``. The probe is drawn once, and its tokens are scored after each hand-over."""
        if not self._probe:
            prompts = [group.prompt_ids for group in groups[:_PROBED]]
            length = min(_PROBE_TOKENS, params.max_completion_length)
            plain = SamplingParams(max_completion_length=length, stop_ids=params.stop_ids, seed=params.seed)
            drawn = self.sample(prompts, plain, stage=_PROBE_STAGE)
            self._probe = [
                Group(prompt, tuple(sample.completion for sample in samples))
                for prompt, samples in zip(prompts, drawn, strict=True)
            ]
        if self._trainer is not None:
            return
        if self._trainer_base is None and isinstance(self._policy, PeftModel):
            with self._policy.disable_adapter():
                self._trainer_base = _flat(score(self._probe))
        self._trainer = _flat(score(self._probe))
        for held in self._held.values():
            held.is_verified = False

    def _compare(self, server: VLLMServer, held: _Held) -> None:
        assert self._trainer is not None
        earlier = held.earlier or self._trainer_base
        found = compare(self._logps(server, held.model), self._trainer, earlier)
        if problem := found.problem(self.tolerance):
            raise self._stale(server, held, problem)
        if earlier is None or found.is_new:  # small changes add up until they can be seen
            held.earlier = self._trainer
        held.is_verified = True
        with self._lock:
            self.gap = max(found.gap, self.gap or 0.0)

    def require_gap(self, gap: float) -> None:
        """See ``RemoteSampler.require_gap``."""
        if not gap <= self.tolerance:
            raise UserError(
                f"the log-probs of samples from vLLM differ from the trainer's by {gap:.3g} nats per token, above "
                f"--vllm_tolerance {self.tolerance:g}: a server holds other weights.",
                remedy="Start the servers as `tutelage vllm-command` prints, with this run's model, and go on with --resume.",
                field="vllm_url",
            )

    def _stale(self, server: VLLMServer, held: _Held, problem: str) -> UserError:
        remedy = (
            "Start it as `tutelage vllm-command` prints, with this run's model, and go on with --resume; a larger "
            "--vllm_tolerance takes more for rounding."
        )
        if held.cannot_reload:
            problem += f" (asked to reload them, it {held.cannot_reload})"
            remedy = (
                "Without an adapter the weights are new in each stage: start it with VLLM_SERVER_DEV_MODE=1, as `tutelage "
                f"vllm-command --full` prints, or start it anew with {self._path} as its model, and go on with --resume."
            )
        return UserError(
            f"the vLLM server {server.url} holds other weights than the trainer: {problem}.",
            remedy=remedy,
            field="vllm_url",
        )

    def _logps(self, server: VLLMServer, model: str) -> tuple[float, ...]:
        """A server's log-probs of the probe's tokens, one after the other."""
        found = []
        for group in self._probe:
            for completion in group.completions:
                tokens = (*group.prompt_ids, *completion.token_ids)
                body = completion_request(
                    model, tokens, SamplingParams(max_completion_length=1), seed=0, prompt_logps=True
                )
                found += prompt_logps_of(server.complete(body), tokens, len(group.prompt_ids))
        return tuple(found)

    # --- samples ----------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        rows: Sequence[int] | None = None,
        stage: int = 0,
        on_finished: Callable[[int, list[Sample]], None] | None = None,
    ) -> list[list[Sample]]:
        """See ``Sampler.sample``.

        Raises:
            UserError: as ``stream``.
        """
        stream = self.stream(prompts, params, num_samples=num_samples, rows=rows, stage=stage)
        return in_order(stream, len(prompts), on_finished)

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        *,
        num_samples: int = 1,
        rows: Sequence[int] | None = None,
        stage: int = 0,
        on_wait: Callable[[], None] = lambda: None,
    ) -> Generator[tuple[int, list[Sample]], None, None]:
        """See ``RemoteSampler.stream``.

        Raises:
            UserError: no server is left; a server holds other weights, has settings of its own, or takes fewer tokens; or
                a request failed too often.
        """
        rows = range(len(prompts)) if rows is None else rows
        # One more, for the token that a request for the probe's log-probs draws.
        self._longest = max(map(len, prompts), default=0) + params.max_completion_length
        requests = [
            partial(self._one, prompt, params, stream_seed(params.seed, stage, row, draw))
            for prompt, row in zip(prompts, rows, strict=True)
            for draw in range(num_samples)
        ]
        drawn: dict[int, dict[int, Sample]] = {}
        with closing(self._dispatcher.run(requests, on_wait)) as answers:
            for number, sample in answers:
                place, draw = divmod(number, num_samples)
                own = drawn.setdefault(place, {})
                own[draw] = sample
                if len(own) == num_samples:
                    yield place, [own[draw] for draw in range(num_samples)]
                    del drawn[place]

    def _one(self, prompt: Sequence[int], params: SamplingParams, seed: int, server: VLLMServer) -> Sample:
        try:
            choice = server.complete(completion_request(self._held[server].model, prompt, params, seed=seed))
        except ServerFault as fault:
            if fault.status == 404:  # started anew, without the adapter
                raise ServerFault(str(fault), again=True, lost=True) from fault
            raise
        return sample_of(choice, prompt, params)


def _flat(logps: Sequence[Sequence[Sequence[float]]]) -> tuple[float, ...]:
    return tuple(chain.from_iterable(chain.from_iterable(logps)))
