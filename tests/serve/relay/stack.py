"""A real stack in which every part reaches every other one through a relay.

The processes listen on 127.0.0.1 and advertise another loopback address, where a relay listens at each of their ports.
"""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from embferry.serve.config import (
    BootstrapSettings,
    EncodeSettings,
    LanguageSettings,
    RouterSettings,
    ServeSettings,
    Settings,
    TransferSettings,
)
from embferry.serve.supervisor import LocalCluster
from embferry.testing.proxy import ChaosProxy
from embferry.testing.stream_faults import Split, Toward
from embferry.trust.greeting import MAGIC
from tests.serve.relay.messages import ControlFrames, HttpRequests
from tests.serve.workers.joined import DEADLINE
from tests.serve.workers.test_processes import START, wait

HERE, ADVERTISED = "127.0.0.1", "127.0.77.1"
PORTS = range(20_000, 32_000)
"""Below those that the kernel hands out, so that a port stays free until its process binds it."""

Hop = str
"""``control``, ``data``, ``encode``, ``language``, ``bootstrap``; ``router`` is the client's own hop."""


class RelayedStack:
    """A running stack. ``relays``: by hop; toward "upstream" is toward the part that listens."""

    def __init__(self, cluster: LocalCluster, relays: dict[Hop, ChaosProxy], transport: str) -> None:
        self.cluster, self.relays, self.transport = cluster, relays, transport

    @property
    def url(self) -> str:
        return f"http://{HERE}:{self.relays['router'].upstream}"

    def whole(self) -> bool:
        """Returns whether the router knows both workers, nothing is held, and no block is in use."""
        ready = self._get(self.url, "/ready")
        languages = [view.url for view in self.cluster.workers if view.role == "language" and view.ready]
        pools = [self._get(f"http://{HERE}:{url.rpartition(':')[2]}", "/debug/pool") for url in languages]
        known = ready.get("workers") == {"encode": 1, "language": 1}
        return known and len(pools) == 1 and all(pool.get("available") == pool["num_blocks"] for pool in pools)

    def restarts(self) -> list[str]:
        """Returns the processes that have ended meanwhile: none may."""
        return [view.name for view in self.cluster.processes if view.starts != 1]

    @staticmethod
    def _get(url: str, path: str) -> dict[str, Any]:
        try:
            return dict(httpx.get(url + path, timeout=DEADLINE, trust_env=False).json())
        except httpx.TransportError:
            return {}


def settings_for(transport: str, ports: dict[Hop, int]) -> Settings:
    """Returns settings with short time-outs and a pool so small that every embedding takes several transfers."""
    return Settings(
        advertise_host=ADVERTISED,
        router=RouterSettings(
            port=ports["router"],
            poll_interval=0.1,
            body_timeout=1.5,
            stall_timeout=2.5,
            connect_timeout=1,
            request_timeout=30,
        ),
        bootstrap=BootstrapSettings(port=ports["bootstrap"], request_timeout=1, lease=2),
        encode=EncodeSettings(port=ports["encode"], unclaimed_timeout=4),
        language=LanguageSettings(port=ports["language"]),
        transfer=TransferSettings(
            transports=(transport,),
            http_port=ports["data"],
            num_blocks=2,
            block_size=4,
            stall_timeout=1,
            transfer_timeout=4,
            waiting_timeout=6,
            bootstrap_timeout=4,
            answer_timeout=2,
            heartbeat_interval=0.2,
            heartbeat_max_failures=10,
            drain_timeout=0.5,
            control_connect_timeout=2,
        ),
        serve=ServeSettings(restart_delay=0.1, start_timeout=START),
    )


@contextlib.contextmanager
def relayed_stack(
    transport: str, logs: Path, changed: Callable[[Settings], Settings] = lambda settings: settings
) -> Iterator[RelayedStack]:
    """Starts a stack whose embeddings travel over ``transport``. ``changed``: returns other settings."""
    with contextlib.ExitStack() as ending:
        relays = {
            hop: ending.enter_context(_relay(_requests))
            for hop in ("bootstrap", "router", "encode", "language", "data")
        }
        settings = changed(settings_for(transport, {hop: relay.port for hop, relay in relays.items()}))
        with LocalCluster(settings, logs=logs) as cluster:
            cluster.wait_ready(START)
            ports = {view.role: _listening(view.pid) for view in cluster.processes}
            (control,) = ports["encode"] - {relay.port for relay in relays.values()}
            relays["control"] = ending.enter_context(_at(control, _frames))
            if transport != "http":  # the receiver listens: for data, or for the side channel of an engine
                (data,) = filter(_greets, ports["language"] - {relays["language"].port})
                relays["data"] = ending.enter_context(_at(data))
            stack = RelayedStack(cluster, relays, transport)
            wait(stack.whole, "a whole stack", START)
            yield stack


def _requests(toward: Toward) -> Split | None:
    return HttpRequests() if toward == "upstream" else None


def _frames(toward: Toward) -> Split | None:
    return ControlFrames()


def _relay(split: Callable[[Toward], Split | None]) -> ChaosProxy:
    """Returns a relay at a port that is free for its process, too."""
    while True:
        port = random.choice(PORTS)
        with contextlib.suppress(OSError):
            socket.create_server((HERE, port)).close()
            return _at(port, split)


def _at(port: int, split: Callable[[Toward], Split | None] = lambda toward: None) -> ChaosProxy:
    return ChaosProxy(port, listen=(ADVERTISED, port), split=split)


def _listening(pid: int) -> set[int]:
    """Returns the ports on which a process listens at HERE."""
    found = psutil.Process(pid).net_connections("tcp")
    listening = [connection.laddr for connection in found if connection.status == psutil.CONN_LISTEN]
    return {address.port for address in listening if address.ip == HERE}


def _greets(port: int) -> bool:
    """Returns whether a port is one of ours: an engine listens too, and says nothing to a stranger."""
    with socket.create_connection((HERE, port)) as sock, contextlib.suppress(TimeoutError):
        sock.settimeout(1.0)
        return sock.recv(len(MAGIC)) == MAGIC
    return False
