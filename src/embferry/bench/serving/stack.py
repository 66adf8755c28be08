"""The servers of one configuration, started and ended together."""

from __future__ import annotations

import os
import re
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Self

import httpx

from embferry.trust.trust import KEY_ENV, KEY_FILE_ENV

from ..processes import Child, cpu_seconds
from . import answers
from .client import Endpoint
from .configurations import MODEL, Configuration, Damage, url
from .workload import Picture, Request

WARM = (Request(0, 0.0, (Picture((9, 0), 420, 756, 405),)), Request(1, 0.0, (Picture((9, 1), 420, 756, 405),)))
WARM_TIMEOUT_S = 60.0
ROUTER_S = 30.0
START_S, END_S, POLL_S = 300.0, 15.0, 0.5
REASON = re.compile(r"^(?:.*\s)?((?:\w+\.)*\w*(?:Error|Exception|Refused|Invalid)\b: .*)")
"""The last line of a traceback, after any prefix that a log adds."""


class StartError(Exception):
    """A server did not start; the text says why."""


class Server(Child):
    """A running server. Its ``url`` answers ``/health`` when it is ready."""

    def __init__(self, name: str, command: Sequence[str], url: str, log: Path, env: Mapping[str, str]) -> None:
        super().__init__(command, log.open("ab+"), signal.SIGTERM, env=dict(env))
        self.name, self.command, self.url = name, list(command), url
        self.wanted = True  # False once it was ended on purpose
        self._client = httpx.Client(timeout=5, trust_env=False)  # making one takes longer than a request

    def is_ready(self) -> bool:
        """Returns whether the server answers.

        Raises:
            StartError: it has ended.
        """
        if not self.alive:
            raise StartError(f"{self.name} ended with {self.process.returncode}: {first_error(self.lines())}")
        try:
            return self._client.get(f"{self.url}/health").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        self.wanted = False
        super().kill()
        self._client.close()

    def signal(self, number: int) -> None:
        """Sends a signal to the server and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Its processes stand still meanwhile."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)


def started(servers: Sequence[Server], report: Callable[[str], None], within_s: float = START_S) -> None:
    """Waits until all servers are ready.

    Raises:
        StartError: one has ended, or takes too long.
    """
    waiting, deadline = list(servers), time.monotonic() + within_s
    while waiting:
        report("starting " + ", ".join(server.name for server in waiting))
        waiting = [server for server in waiting if not server.is_ready()]
        if waiting and time.monotonic() > deadline:
            names = ", ".join(server.name for server in waiting)
            raise StartError(f"{names} not ready after {within_s:g} s: {first_error(waiting[0].lines())}")
        time.sleep(POLL_S if waiting else 0)


def ended(servers: Sequence[Server], within_s: float = END_S) -> None:
    """Asks all servers to end; kills what has not ended in time."""
    for server in servers:
        server.process.send_signal(signal.SIGTERM)
    for server in servers:
        server.end(within_s)


def first_error(lines: Sequence[str]) -> str:
    """Returns the first error in a log, or else its last line."""
    errors = [found[1] for line in lines if (found := REASON.match(line))]
    return (errors or [line.strip() for line in reversed(lines) if line.strip()] or ["its log is empty"])[0][:300]


class Stack(ABC):
    """The servers of a configuration: a context manager that starts them, and ends them in any case.

    Args:
        configuration: What carries the embeddings.
        python: The interpreter that has the engine.
        model: Folder of the model.
        folder: Holds the files of this stack alone; it is made.
        logs: Holds the servers' logs.
        say: Called with what is being done.
        damages: What the scenarios will do.
        spin: Let processes that wait for each other poll, if the engine has them do so by default.
    """

    environment: ClassVar[Mapping[str, str]]
    """Variables of the servers."""
    extra: ClassVar[Mapping[str, Any]]
    """Fields of the requests' bodies beyond OpenAI's."""

    def __init__(
        self,
        configuration: Configuration,
        python: str,
        model: Path,
        folder: Path,
        logs: Path,
        say: Callable[[str], None],
        *,
        damages: Collection[Damage] = (),
        spin: bool = False,
    ) -> None:
        self.configuration, self.divided = configuration, bool(configuration.connector)
        self.python, self.model, self.folder, self.say = python, model, folder, say
        self.damages, self.spin, self.damage = damages, spin, folder / "damage"
        self.servers: dict[str, Server] = {}
        # Instances with connectors of other projects cannot prove a cluster key; everything is on the loopback address.
        kept = {name: value for name, value in os.environ.items() if name not in (KEY_ENV, KEY_FILE_ENV)}
        self.env = kept | dict(self.environment)
        self._logs = logs

    def __enter__(self) -> Self:
        """Starts the servers.

        Raises:
            StartError: one does not start.
        """
        try:
            self.folder.mkdir(parents=True)
            self._logs.mkdir(parents=True, exist_ok=True)
            for log in self._logs.glob("*.log"):
                log.unlink()  # of an earlier run; servers that are started again append to one log
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.say("ending")
        ended([*self.servers.values()])
        self.servers.clear()

    @abstractmethod
    def start(self) -> None:
        """Starts the servers that most scenarios need.

        Raises:
            StartError: one does not start.
        """

    @abstractmethod
    def prepare(self, damage: Damage) -> None:
        """Starts or replaces what a scenario needs and what is not there.

        Raises:
            StartError: a server does not start.
        """

    @property
    @abstractmethod
    def encoders(self) -> list[Server]:
        """The encoders; none if the engine is undivided."""

    @property
    @abstractmethod
    def port(self) -> int:
        """The port that answers chats."""

    @property
    @abstractmethod
    def metrics(self) -> list[str]:
        """URLs of the servers' metrics."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all servers, and their children, so far."""
        return cpu_seconds({server.process.pid for server in self.servers.values()})

    def endpoint(self, max_tokens: int, timeout_s: float, concurrency: int) -> Endpoint:
        return Endpoint(url(self.port), MODEL, max_tokens, timeout_s, concurrency, dict(self.extra))

    def server(self, name: str, command: Sequence[str], port: int, more: Mapping[str, str] | None = None) -> Server:
        """Starts a process; ``more`` are variables of its environment."""
        log = self._logs / f"{name.replace(' ', '-').replace(',', '')}.log"
        return Server(name, command, url(port), log, self.env | dict(more or {}))

    def warm(self) -> None:
        """Asks two questions, because the first ones take longer.

        Raises:
            StartError: there is no answer.
        """
        try:
            answers.ask(self.endpoint(4, WARM_TIMEOUT_S, 1), WARM)
        except ValueError as error:
            raise StartError(f"started, and then: {error}") from None
