"""The servers of one configuration, started and ended together."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx

from embferry.trust.trust import KEY_ENV, KEY_FILE_ENV

from ..processes import Child
from . import configurations, corruption, vllm_plugins
from .client import Endpoint
from .configurations import ENCODERS, INSTANCES, LANGUAGE, MODEL, SMALL, Configuration, Ports, free_ports, url

EXTRA = {"ignore_eos": True, "return_token_ids": True}
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
        super().kill()
        self._client.close()


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


class Stack:
    """A context manager that starts the servers, and ends them in any case.

    With ``small`` there is a language instance with the small pool, too. With ``corrupt`` the encoders damage
    embeddings while the file ``damage`` exists. With ``spin`` processes that wait for each other poll, as vLLM does
    (:func:`.vllm_plugins.idle_workers`). Files of this stack alone are in ``folder``.
    """

    def __init__(
        self,
        configuration: Configuration,
        python: str,
        model: Path,
        folder: Path,
        logs: Path,
        say: Callable[[str], None],
        *,
        small: bool = False,
        corrupt: bool = False,
        spin: bool = False,
    ) -> None:
        self.configuration, self.damage, self.divided = configuration, folder / "damage", bool(configuration.connector)
        self._python, self._model, self._folder, self._logs, self._say = python, model, folder, logs, say
        small = small and configuration.connector != "example"
        names = [name for name in INSTANCES if small or name != SMALL] if self.divided else ["engine"]
        self._router_port, *ports = free_ports(1 + 3 * len(names))
        self._ports = {name: Ports(*ports[3 * at : 3 * at + 3]) for at, name in enumerate(names)}
        self._plugins = [] if spin else [vllm_plugins.idle_workers]
        if configuration.connector == "mooncake":
            self._plugins.append(vllm_plugins.loads_without_tokens)
        if corrupt and configuration.connector in corruption.PLUGINS:
            self._plugins.append(corruption.PLUGINS[configuration.connector])
        self._engines: dict[str, Server] = {}
        self._router: Server | None = None

    def __enter__(self) -> Stack:
        """Starts the servers.

        Raises:
            StartError: one does not start.
        """
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def encoders(self) -> list[Server]:
        return [self._engines[name] for name in ENCODERS]

    def endpoint(self, max_tokens: int, timeout_s: float, concurrency: int) -> Endpoint:
        where = self._router_port if self.divided else self._ports["engine"].http
        return Endpoint(url(where), MODEL, max_tokens, timeout_s, concurrency, EXTRA)

    @property
    def metrics(self) -> list[str]:
        """URLs of the servers' metrics."""
        ports = [self._router_port] if self.divided else []
        if self.configuration.connector == "embferry":
            ports += [each.metrics for each in self._ports.values()]
        return [f"{url(port)}/metrics" for port in ports]

    def route(self, language: str = LANGUAGE, through: Sequence[Server] = ()) -> None:
        """Starts a router to a language instance, unless one with the same settings runs.

        Raises:
            StartError: it does not start.
        """
        if not self.divided:
            return
        encoders = [each.url for each in through or self.encoders if through or each.alive]
        command = configurations.router(
            self._python, self.configuration, self._router_port, encoders, self._ports[language]
        )
        if self._router is not None:
            if self._router.alive and self._router.command == command:
                return
            ended([self._router])
        self._router = Server("router", command, url(self._router_port), self._logs / "router.log", self._env)
        started([self._router], self._say, ROUTER_S)

    def close(self) -> None:
        self._say("ending")
        ended([*([self._router] if self._router else []), *self._engines.values()])
        self._engines.clear()
        self._router = None

    def _start(self) -> None:
        store = self._folder / "store"
        store.mkdir(parents=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        for log in self._logs.glob("*.log"):
            log.unlink()  # of an earlier run; routers of this run append to one log
        path = (str(vllm_plugins.folder(self._folder, *self._plugins)), os.environ.get("PYTHONPATH"))
        # Instances of vLLM with its own connectors cannot prove a cluster key; everything is on the loopback address.
        kept = {name: value for name, value in os.environ.items() if name not in (KEY_ENV, KEY_FILE_ENV)}
        self._env = kept | configurations.ENVIRONMENT | {corruption.VARIABLE: str(self.damage)}
        self._env |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        for name, ports in self._ports.items():
            transfer = None
            if self.divided:
                transfer = configurations.transfer(self.configuration, name, ports, self._router_port, store)
            command = configurations.engine(self._python, self._model, ports.http, transfer)
            log = self._logs / f"{name.replace(' ', '-').replace(',', '')}.log"
            self._engines[name] = Server(name, command, url(ports.http), log, self._env)
        started([*self._engines.values()], self._say)
        self.route()
