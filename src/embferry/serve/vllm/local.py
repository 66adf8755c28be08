"""``embferry serve --engine vllm``: instances of vLLM and a router before them, on one machine, in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from embferry.models import model_path, packaged_models
from embferry.serve.config import Settings
from embferry.serve.supervisor.handover import settled_child
from embferry.serve.supervisor.slot import ClusterError, ProcessRole, Program, Slot
from embferry.serve.worker.address import bracketed

log = logging.getLogger(__name__)

HOST = "127.0.0.1"
"""Of the instances: only the router has to reach them, and consumers the router."""
CONNECTOR = {
    "ec_connector": "EmbferryConnector",
    "ec_connector_module_path": "embferry.connectors.vllm.connector",
}
LOOK_SECONDS = 0.2
_ROLES: dict[ProcessRole, str] = {"encode": "ec_producer", "language": "ec_consumer"}


def vllm_command() -> str:
    """The ``vllm`` beside the Python that runs, or the one on PATH.

    Raises:
        ClusterError: there is none.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if found is None:
        raise ClusterError(
            f"there is no vllm beside {sys.executable} or on PATH; install embferry into vLLM's environment"
        )
    return found


def instance_command(
    settings: Settings, role: ProcessRole, port: int, metrics_port: int, extra: Sequence[str]
) -> list[str]:
    """How one instance is started. ``extra``: the user's own arguments, which win."""
    connector: dict[str, Any] = {"transports": list(settings.vllm.transports), "metrics_port": metrics_port}
    if role == "language":
        connector["router"] = f"http://{HOST}:{settings.router.port}"
    transfer = {**CONNECTOR, "ec_role": _ROLES[role], "ec_connector_extra_config": connector}
    words = [vllm_command(), "serve", *_model(settings.model), "--host", HOST, "--port", str(port)]
    words += ["--enable-mm-embeds"] if role == "language" else []
    return [*words, "--ec-transfer-config", json.dumps(transfer), *extra]


def _model(name: str) -> list[str]:
    """A model of the package goes by its name; anything else is for vLLM to know."""
    return [str(model_path(name)), "--served-model-name", name] if name in packaged_models() else [name]


class _Local:
    """One run, in one event loop."""

    def __init__(self, settings: Settings, extra: Sequence[str]) -> None:
        mine = settings.vllm
        names: list[tuple[ProcessRole, str]] = [("encode", f"encode-{n}") for n in range(mine.encoders)]
        names += [("language", f"language-{n}") for n in range(mine.languages)]
        router_port, *ports = _free_ports(settings, 1 + 2 * len(names))
        settings = settings.model_copy(update={"router": settings.router.model_copy(update={"port": router_port})})
        programs: dict[str, tuple[ProcessRole, Program]] = {}
        urls: dict[str, list[str]] = {"encode": [], "language": []}
        for number, (role, name) in enumerate(names):
            port, metrics_port = ports[2 * number : 2 * number + 2]
            urls[role].append(f"http://{HOST}:{port}")
            command = instance_command(settings, role, port, metrics_port, extra)
            told = {"command": command, "url": urls[role][-1], "environ": _key(settings)}
            programs[name] = role, Program(("-m", "embferry.serve.vllm.child"), json.dumps(told).encode() + b"\n")
        known = mine.model_copy(update={f"{role}_urls": tuple(found) for role, found in urls.items()})
        self._settings = settings = settings.model_copy(update={"vllm": known})
        programs["router"] = "router", settled_child("router", settings)
        self._began = time.monotonic()
        self._told: set[tuple[str, int, bool]] = set()
        delay = settings.serve.restart_delay
        self._slots = [
            Slot(name, role, lambda program=program: program, delay, None, self._notice)  # type: ignore[misc]  # bound now
            for name, (role, program) in programs.items()
        ]

    async def serve(self, stop: asyncio.Event) -> None:
        """Until ``stop``. No process is left then.

        Raises:
            ClusterError: it cannot be brought up.
        """
        keeping = [asyncio.create_task(slot.keep()) for slot in self._slots]
        stopped = asyncio.create_task(stop.wait())
        ready = asyncio.create_task(self._ready())
        try:
            await asyncio.wait({stopped, ready, *keeping}, return_when=asyncio.FIRST_COMPLETED)
            if stop.is_set():
                return
            if not ready.done():  # the supervision of one has come to an end
                raise ClusterError("; ".join(slot.failure for slot in self._slots if slot.failure))
            ready.result()
            self._say(f"ready: {self._router_url}/v1    Ctrl-C ends everything")
            await stopped
        finally:
            ready.cancel()
            seconds = self._settings.serve.stop_timeout
            await asyncio.gather(*(slot.stop(seconds) for slot in self._slots))
            for task in (stopped, *keeping):
                task.cancel()
            await asyncio.gather(ready, stopped, *keeping, return_exceptions=True)

    async def _ready(self) -> None:
        """Waits until the router has found every instance. Raises ClusterError if that takes too long."""
        deadline = time.monotonic() + self._settings.vllm.instance_timeout
        want = {"encode": self._settings.vllm.encoders, "language": self._settings.vllm.languages}
        while (known := await asyncio.to_thread(_counts, self._router_url)) != want:
            if time.monotonic() > deadline:
                seconds = f"{self._settings.vllm.instance_timeout:g} s (vllm.instance_timeout)"
                raise ClusterError(f"not ready within {seconds}: the router has found {known or 'nothing'} of {want}")
            await asyncio.sleep(LOOK_SECONDS)

    @property
    def _router_url(self) -> str:
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._settings.host, self._settings.host)
        return f"http://{bracketed(host)}:{self._settings.router.port}"

    def _notice(self) -> None:
        """A process has come, answers, or has gone."""
        for slot in self._slots:
            view = slot.view
            seen = (view.name, view.pid, view.ready)
            if view.pid and seen not in self._told:
                self._told.add(seen)
                self._say(
                    f"{view.name} " + (f"answers at {view.url}" if view.ready else f"is starting (pid {view.pid})")
                )

    def _say(self, sentence: str) -> None:
        print(f"{time.monotonic() - self._began:5.1f} s  {sentence}", file=sys.stderr, flush=True)


def _key(settings: Settings) -> dict[str, str]:
    """The router's key is the instances' too: nobody else on this machine is to name an address to them."""
    key = settings.router.api_key
    return {"VLLM_API_KEY": key.get_secret_value()} if key else {}


def run(settings: Settings, extra: Sequence[str] = ()) -> None:
    """Starts everything and serves until SIGINT or SIGTERM.

    Exits with status 1 if it cannot be brought up.
    """
    try:
        asyncio.run(_until_a_signal(settings, extra))
    except ClusterError as error:
        print(f"embferry: {error}", file=sys.stderr)
        sys.exit(1)


async def _until_a_signal(settings: Settings, extra: Sequence[str]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await _Local(settings, extra).serve(stop)
    print("         all processes have ended", file=sys.stderr, flush=True)


def _free_ports(settings: Settings, count: int) -> list[int]:
    """The router's, which may be set, and free ones. They stay the same when a process is started again."""
    with contextlib.ExitStack() as held:
        found = [held.enter_context(socket.create_server((HOST, 0))).getsockname()[1] for _ in range(count)]
    return [settings.router.port or found[0], *found[1:]]


def _counts(url: str) -> dict[str, int]:
    """Instances that the router has found, by role; empty while it is not ready."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=2.0)
    try:
        connection.request("GET", "/ready")
        return dict(json.loads(connection.getresponse().read())["workers"])
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return {}
    finally:
        connection.close()
