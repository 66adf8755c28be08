"""The whole of this project on one machine: bootstrap server, router, encode and language workers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from embferry.serve.config import Settings
from embferry.serve.config_base import Section
from embferry.serve.supervisor.cluster import Cluster
from embferry.serve.supervisor.handover import child_program
from embferry.serve.supervisor.kept_folder import SharedFolder
from embferry.serve.supervisor.ports import Wanted, wanted_local
from embferry.serve.supervisor.process import ProcessRole, SupervisedProcess

S = TypeVar("S", bound=Section)
LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""The address by which this machine reaches itself, for each "every address" (RFC 6890)."""


class LocalCluster(Cluster):
    """Bootstrap server, router, encode and language workers. A context manager: leaving it ends them all.

    Every process ends with the one that made the cluster, even if that is killed with SIGKILL.

    Args:
        settings: ports of 0 are chosen freely; ``bootstrap_url`` is replaced by the cluster's own.
        logs: a file that the processes' logs are appended to; standard error if None.
        progress: gets one sentence for each process that was started or accepts requests.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        logs: Path | None = None,
        progress: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        settings = settings or Settings()
        serve = settings.serve
        workers = {"encode": serve.encode_workers, "language": serve.language_workers}
        timeout = serve.start_timeout, "serve.start_timeout"
        super().__init__(settings, workers, timeout, logs=logs, progress=progress)
        self.title = settings.public_model_name
        self._inner = _within_machine(settings)
        self._kept = SharedFolder(settings.language)

    def wanted_ports(self) -> list[Wanted]:
        return list(wanted_local(self.settings, self._inner.host))

    @property
    def bootstrap_url(self) -> str:
        """The bootstrap server's URL; empty until it accepts requests."""
        return self.url_of("bootstrap")

    def start(self) -> None:
        self._kept.make()
        super().start()

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self._kept.remove()

    def first(self) -> list[SupervisedProcess]:
        return [self._process("bootstrap")]

    def others(self) -> list[SupervisedProcess]:
        encode = [self._process("encode", number) for number in range(self.settings.serve.encode_workers)]
        language = [self._process("language", number) for number in range(self.settings.serve.language_workers)]
        return [self._process("router"), *encode, *language]

    def settings_of(self, role: ProcessRole, number: int = 0) -> Settings:
        """Returns the settings of a process.

        Bootstrap server and router keep the port they had before a restart. Of several workers whose port is set, each
        has the port after the last one's.

        Args:
            role: of the process.
            number: its number among the workers of that role.
        """
        first_urls = {process.view.role: process.first_url for process in self.supervised if process.first_url}
        changes: dict[str, object] = {}
        if bootstrap := first_urls.get("bootstrap"):
            changes["bootstrap_url"] = bootstrap
        if role == "router":
            changes |= {"host": self.settings.host, "advertise_host": self._inner.reachable_host}
        if role == "encode":
            changes[role] = _numbered(self.settings.encode, "port", number)
            changes["transfer"] = _numbered(self.settings.transfer, "http_port", number)
        elif role == "language":
            changes[role] = self._kept.given_to(_numbered(self.settings.language, "port", number))
        elif role in first_urls:
            port = urlsplit(first_urls[role]).port
            changes[role] = getattr(self.settings, role).model_copy(update={"port": port})
        return self._inner.model_copy(update=changes)

    def _process(self, role: ProcessRole, number: int | None = None) -> SupervisedProcess:
        name = role if number is None else f"{role}-{number}"
        return self.process(name, role, lambda: child_program(role, name, self.settings_of(role, number or 0)))


def _numbered(section: S, port: str, number: int) -> S:
    """Returns the section of one of several workers."""
    first = getattr(section, port)
    return section.model_copy(update={port: first + number}) if first else section


def _within_machine(settings: Settings) -> Settings:
    """Returns the settings of processes that only each other have to reach.

    If the router listens on every address of the machine, the others listen on the loopback address.
    """
    host = LOOPBACK.get(settings.host) if settings.advertise_host is None else None
    return settings if host is None else settings.model_copy(update={"host": host})
