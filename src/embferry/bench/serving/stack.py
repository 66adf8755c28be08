"""The servers of one configuration: started together, and ended together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from . import configurations, idle_workers, plugins, v1_runner
from .configurations import ENVIRONMENT, MODEL, POOL_BYTES, SMALL_POOL_BYTES, Configuration, free_ports, url
from .driver import Endpoint
from .server import Server, started

EXTRA = {"ignore_eos": True, "return_token_ids": True}
ROUTER_S = 30.0

Report = Callable[[str], None]


class Stack:
    """A context manager: what was started is ended, whatever comes.

    :param folder: for files of this stack alone, which go with it.
    :param logs: for its logs.
    :param small: whether to start the language instance with the small pool, too.
    :param spin: whether processes that wait for each other look without rest, as vLLM has it (:mod:`idle_workers`).
    """

    def __init__(
        self,
        configuration: Configuration,
        python: str,
        model: Path,
        folder: Path,
        logs: Path,
        report: Report,
        *,
        small: bool,
        spin: bool = False,
    ) -> None:
        self.configuration, self.store = configuration, folder / "store"
        self._python, self._model, self._report = python, model, report
        self._folder, self._logs = folder, logs
        self._ports = free_ports()
        self._small = small and configuration.divided and configuration.connector != "example"
        self._env = os.environ | ENVIRONMENT
        self._plugins = [] if spin else [idle_workers]
        if configuration.connector == "mooncake":
            self._plugins.append(v1_runner)
        self._engines: list[Server] = []
        self._router: Server | None = None
        self.encoders: list[Server] = []

    def __enter__(self) -> Stack:
        """:raises StartError: it does not come up."""
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def servers(self) -> str:
        """In words."""
        if not self.configuration.divided:
            return "one engine"
        language = "two language instances, one of them with a small pool" if self._small else "one language instance"
        return f"two encoders, {language}, a router"

    def endpoint(self, max_tokens: int, timeout_s: float, concurrency: int) -> Endpoint:
        where = self._ports.router if self.configuration.divided else self._ports.language
        return Endpoint(url(where), MODEL, max_tokens, timeout_s, concurrency, EXTRA)

    @property
    def metrics(self) -> list[str]:
        """Where its servers tell what they count."""
        if not self.configuration.divided:
            return []
        ports = [self._ports.router]
        if self.configuration.connector == "embferry":
            ports += self._ports.metrics if self._small else self._ports.metrics[:3]
        return [f"{url(port)}/metrics" for port in ports]

    def route(self, *, small: bool = False, through: Sequence[str] | None = None) -> None:
        """A router between these; the one that is there, if it is.

        :param small: to the language instance with the small pool.
        :param through: URLs that stand for the encoders; those themselves, as far as they live, if not given.
        :raises StartError: it does not come up."""
        if not self.configuration.divided:
            return
        encoders = [encoder.url for encoder in self.encoders if encoder.alive]
        language, peer = (self._ports.small, 3) if small else (self._ports.language, 2)
        command = configurations.router(
            self._python,
            self.configuration,
            self._ports,
            list(through) if through is not None else encoders,
            url(language),
            self._ports.peers[peer],
        )
        if self._router is not None:
            if self._router.alive and self._router.command == command:
                return
            self._router.end()
        self._router = Server("router", command, url(self._ports.router), self._logs / "router.log", self._env)
        started([self._router], self._report, ROUTER_S)

    def close(self) -> None:
        self._report("ending")
        servers = [*([self._router] if self._router else []), *self._engines]
        for server in servers:
            server.ask_to_end()
        for server in servers:
            server.end()
        self._engines.clear()
        self._router = None

    def _start(self) -> None:
        self.store.mkdir(parents=True)
        self._logs.mkdir(parents=True, exist_ok=True)
        for log in self._logs.glob("*.log"):
            log.unlink()  # of an earlier run; a router's is continued by the next router
        path = (str(plugins.folder(self._folder, *self._plugins)), self._env.get("PYTHONPATH"))
        self._env |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        if not self.configuration.divided:
            self._engine("engine", self._ports.language)
        else:
            for index, port in enumerate(self._ports.encoders):
                self.encoders.append(self._engine(f"encoder {index + 1}", port, index))
            self._engine("language", self._ports.language, 2)
            if self._small:
                self._engine("language, small pool", self._ports.small, 3, SMALL_POOL_BYTES)
        started(self._engines, self._report)
        self.route()

    def _engine(self, name: str, port: int, index: int | None = None, pool_bytes: int = POOL_BYTES) -> Server:
        """``index``: its place among the divided; None: it is not."""
        transfer = None
        if index is not None:
            role: configurations.Role = "ec_producer" if index < len(self._ports.encoders) else "ec_consumer"
            transfer = configurations.transfer(self.configuration, role, self._ports, index, pool_bytes, self.store)
        command = configurations.engine(self._python, self._model, port, transfer)
        log = self._logs / f"{name.replace(' ', '-').replace(',', '')}.log"
        self._engines.append(Server(name, command, url(port), log, self._env))
        return self._engines[-1]
