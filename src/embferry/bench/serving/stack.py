"""The servers of one configuration, started and ended together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from . import configurations, corruption, vllm_plugins
from .client import Endpoint
from .configurations import ENVIRONMENT, MODEL, POOL_BYTES, SMALL_POOL_BYTES, Configuration, free_ports, url
from .server import Server, started

EXTRA = {"ignore_eos": True, "return_token_ids": True}
ROUTER_S = 30.0


class Stack:
    """A context manager that starts the servers, and ends them in any case.

    Args:
        configuration: what is started.
        python: the interpreter that has vLLM.
        model: the model's folder.
        folder: for files of this stack alone.
        logs: for the servers' logs.
        say: called with what is being done.
        small: start a language instance with the small pool, too.
        corrupt: let the encoders damage embeddings while the file ``damage`` exists.
        spin: let processes that wait for each other poll, as vLLM does (:func:`.vllm_plugins.idle_workers`).
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
        small: bool,
        corrupt: bool = False,
        spin: bool = False,
    ) -> None:
        self.configuration, self.store, self.damage = configuration, folder / "store", folder / "damage"
        self._python, self._model, self._say = python, model, say
        self._folder, self._logs = folder, logs
        self._ports = free_ports()
        self._small = small and configuration.divided and configuration.connector != "example"
        self._env = os.environ | ENVIRONMENT | {corruption.VARIABLE: str(self.damage)}
        self._plugins = [] if spin else [vllm_plugins.idle_workers]
        if configuration.connector == "mooncake":
            self._plugins.append(vllm_plugins.loads_without_tokens)
        if corrupt and configuration.connector in ("example", "embferry"):
            example = configuration.connector == "example"
            self._plugins.append(corruption.zeroed_tails if example else corruption.flipped_bits)
        self._engines: list[Server] = []
        self._router: Server | None = None
        self.encoders: list[Server] = []

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

    def endpoint(self, max_tokens: int, timeout_s: float, concurrency: int) -> Endpoint:
        where = self._ports.router if self.configuration.divided else self._ports.language
        return Endpoint(url(where), MODEL, max_tokens, timeout_s, concurrency, EXTRA)

    @property
    def metrics(self) -> list[str]:
        """URLs of the servers' metrics."""
        if not self.configuration.divided:
            return []
        ports = [self._ports.router]
        if self.configuration.connector == "embferry":
            ports += self._ports.metrics if self._small else self._ports.metrics[:3]
        return [f"{url(port)}/metrics" for port in ports]

    def route(self, *, small: bool = False, through: Sequence[str] | None = None) -> None:
        """Starts a router, unless one with the same settings runs.

        Args:
            small: to the language instance with the small pool.
            through: URLs in place of the encoders'; by default those of the encoders that run.

        Raises:
            StartError: it does not start.
        """
        if not self.configuration.divided:
            return
        encoders = [encoder.url for encoder in self.encoders if encoder.alive] if through is None else list(through)
        language, peer = (self._ports.small, 3) if small else (self._ports.language, 2)
        command = configurations.router(
            self._python, self.configuration, self._ports, encoders, url(language), self._ports.peers[peer]
        )
        if self._router is not None:
            if self._router.alive and self._router.command == command:
                return
            self._router.end()
        self._router = Server("router", command, url(self._ports.router), self._logs / "router.log", self._env)
        started([self._router], self._say, ROUTER_S)

    def close(self) -> None:
        self._say("ending")
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
            log.unlink()  # of an earlier run; routers of this run append to one log
        path = (str(vllm_plugins.folder(self._folder, *self._plugins)), self._env.get("PYTHONPATH"))
        self._env |= {"PYTHONPATH": os.pathsep.join(filter(None, path))}
        if not self.configuration.divided:
            self._engine("engine", self._ports.language)
        else:
            for index, port in enumerate(self._ports.encoders):
                self.encoders.append(self._engine(f"encoder {index + 1}", port, index))
            self._engine("language", self._ports.language, 2)
            if self._small:
                self._engine("language, small pool", self._ports.small, 3, SMALL_POOL_BYTES)
        started(self._engines, self._say)
        self.route()

    def _engine(self, name: str, port: int, index: int | None = None, pool_bytes: int = POOL_BYTES) -> Server:
        """Starts an engine; ``index`` is its place among the divided ones, None if it is undivided."""
        transfer = None
        if index is not None:
            role: configurations.Role = "ec_producer" if index < len(self._ports.encoders) else "ec_consumer"
            transfer = configurations.transfer(self.configuration, role, self._ports, index, pool_bytes, self.store)
        command = configurations.engine(self._python, self._model, port, transfer)
        log = self._logs / f"{name.replace(' ', '-').replace(',', '')}.log"
        self._engines.append(Server(name, command, url(port), log, self._env))
        return self._engines[-1]
