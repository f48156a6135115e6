"""Many requests over several servers: bounded, overlapping, tried again, moved to others."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from tutelage.errors import UserError
from tutelage.sampling.vllm_server import ServerFault, VLLMServer

__all__ = ["Dispatcher", "Patience"]

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_TICK = 0.2  # seconds between looks at whether the run is to end


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server that fails is waited for.

    Attributes:
        tries: failures in a row after which it is out.
        first, longest: seconds before the next attempt: doubled after each failure, up to the longest.
    """

    tries: int = 7
    first: float = 1.0
    longest: float = 30.0

    def seconds(self, failures: int) -> float:
        """To wait after so many failures in a row.

        >>> [Patience().seconds(failures) for failures in (1, 2, 7)]
        [1.0, 2.0, 30.0]
        """
        return min(self.longest, self.first * 2 ** (failures - 1))


class _Line:
    """One server while requests are sent to it, shared by its threads.

    It is admitted before its first request and again after a failure. A failure is counted once, by the thread that meets
    it first; the others wait meanwhile. An answered request ends the count.
    """

    def __init__(self, server: VLLMServer, patience: Patience, admit: Callable[[VLLMServer, bool], None]):
        self.server, self.patience, self._admit = server, patience, admit
        self.failures, self.is_out, self.fault = 0, False, ""
        self._is_admitted, self._epoch, self._back_at = False, 0, 0.0
        self._lock = threading.Lock()

    def enter(self, stop: threading.Event) -> int | None:
        """Wait until it may be asked; gives a number for ``failed``, or None where it is out or the work is over."""
        while not stop.is_set() and not self.is_out:
            with self._lock:
                wait = 0.0 if self._is_admitted else self._back_at - time.monotonic()
                if not self._is_admitted and not self.is_out and wait <= 0:
                    try:
                        self._admit(self.server, self.failures > 0)
                        self._is_admitted = True
                    except ServerFault as fault:
                        if stop.is_set():
                            return None
                        if not fault.again:
                            raise
                        self._count(fault)
                if self._is_admitted:
                    return self._epoch
            stop.wait(min(max(wait, 0.0), _TICK))
        return None

    def is_still(self, epoch: int) -> bool:
        """Whether it has not failed since."""
        return epoch == self._epoch

    def answered(self, epoch: int) -> None:
        """A request of ``epoch`` was answered."""
        if epoch == self._epoch:
            self.failures = 0

    def failed(self, epoch: int, fault: ServerFault) -> None:
        """A request of ``epoch`` failed."""
        with self._lock:
            if epoch == self._epoch:
                self._count(fault)

    def _count(self, fault: ServerFault) -> None:
        self.failures += 1
        self._epoch += 1
        self.fault = str(fault)
        self._is_admitted, self.is_out = False, self.failures >= self.patience.tries
        seconds = self.patience.seconds(self.failures)
        self._back_at = time.monotonic() + seconds
        told = "it is left out" if self.is_out else f"trying again in {seconds:g} seconds"
        logger.warning("vLLM server %s %s; %s", self.server.url, fault, told)


class Dispatcher(Generic[Result]):
    """Sends requests to servers, each of which takes the next one as soon as it is free.

    A server that fails is waited for (``Patience``) while the others go on. A request that failed is tried again, by
    whichever server is free first.

    Args:
        servers: at least one.
        concurrency: requests that a server has at a time.
        admit: called with a server before its first request of a run, and before the next one after a failure, which the
            second argument says. It raises ``ServerFault`` if the server cannot be used yet. One thread calls it for a
            server at a time.
        patience: with servers and requests.
    """

    def __init__(
        self,
        servers: Sequence[VLLMServer],
        *,
        concurrency: int,
        admit: Callable[[VLLMServer, bool], None] = lambda server, failed: None,
        patience: Patience | None = None,
    ):
        self.servers, self.concurrency = list(servers), concurrency
        self.admit, self.patience = admit, patience or Patience()

    def run(
        self, requests: Sequence[Callable[[VLLMServer], Result]], on_wait: Callable[[], None] = lambda: None
    ) -> Generator[tuple[int, Result], None, None]:
        """The place and the answer of each request, as they come in. Requests go on while the caller works.

        Args:
            on_wait: called several times a second while nothing has come in; it may raise.

        Raises:
            UserError: every server is out, or one request failed as often as it may be tried; or what a request or
                ``admit`` raised besides ``ServerFault``.
        """
        if not requests:
            return
        todo: deque[tuple[int, int]] = deque((place, 1) for place in range(len(requests)))
        done: SimpleQueue[tuple[int, Result] | BaseException] = SimpleQueue()
        stop, lines = threading.Event(), [_Line(server, self.patience, self.admit) for server in self.servers]
        limit = self.patience.tries * (len(lines) + 1)  # a server that fails for everybody is out before
        left = threading.Semaphore(0)  # one permit per request that waits
        for _ in todo:
            left.release()

        def work(line: _Line) -> None:
            try:
                while (epoch := line.enter(stop)) is not None:
                    left.acquire()
                    if stop.is_set():
                        return
                    if not line.is_still(epoch):  # it failed while this thread waited for a request
                        left.release()
                        continue
                    place, attempt = todo.popleft()
                    try:
                        done.put((place, requests[place](line.server)))
                        line.answered(epoch)
                    except ServerFault as fault:
                        if stop.is_set():  # its connection was closed under it
                            return
                        if not fault.again:
                            raise self._refused(line.server, fault) from fault
                        line.failed(epoch, fault)
                        if attempt >= limit and not all(each.is_out for each in lines):
                            raise self._given_up(line.server, fault, attempt) from fault
                        todo.appendleft((place, attempt + 1))
                        left.release()
                if all(each.is_out for each in lines):
                    raise self._all_out(lines)
            except ServerFault as fault:  # of its admission, which no attempt would better
                done.put(self._refused(line.server, fault))
            except BaseException as error:
                done.put(error)

        count = min(self.concurrency, len(requests))
        threads = [threading.Thread(target=work, args=(line,), daemon=True) for line in lines for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for _ in requests:
                while True:
                    try:
                        found = done.get(timeout=_TICK)
                        break
                    except Empty:
                        on_wait()
                if isinstance(found, BaseException):
                    raise found
                yield found
        finally:
            stop.set()
            for _ in threads:
                left.release()
            for server in self.servers:
                server.close()
            for thread in threads:
                thread.join(timeout=5)

    def _refused(self, server: VLLMServer, fault: ServerFault) -> UserError:
        return UserError(
            f"the vLLM server {server.url} {fault}.",
            remedy="Start it as `tutelage vllm-command` prints, and go on with --resume.",
            field="vllm_url",
        )

    def _given_up(self, server: VLLMServer, fault: ServerFault, attempts: int) -> UserError:
        return UserError(
            f"a request failed {attempts} times; at last the vLLM server {server.url} {fault}.",
            remedy="See the server's own log, and go on with --resume: finished samples are kept.",
            field="vllm_url",
        )

    def _all_out(self, lines: Sequence[_Line]) -> UserError:
        told = "; ".join(f"{line.server.url} {line.fault}" for line in lines)
        return UserError(
            f"no vLLM server is left after {self.patience.tries} attempts: {told}.",
            remedy="Start them again, and go on with --resume: finished samples are kept.",
            field="vllm_url",
        )
