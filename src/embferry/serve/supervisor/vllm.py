"""``embferry serve --engine vllm``: instances of vLLM and the router before them, on one machine, in the foreground."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from embferry.models import model_path, packaged_models
from embferry.serve.config import Settings
from embferry.serve.http.address import bracketed
from embferry.serve.http.api_keys import new_key
from embferry.serve.supervisor import temporary
from embferry.serve.supervisor.cluster import Cluster
from embferry.serve.supervisor.descendants import adopt_orphans, descendants, end_descendants
from embferry.serve.supervisor.handover import child_program
from embferry.serve.supervisor.process import OFFLINE, ClusterError, ProcessRole, Program, SupervisedProcess
from embferry.serve.supervisor.reserved_ports import ReservedPorts
from embferry.serve.supervisor.serve import run_cluster
from embferry.serve.supervisor.vllm_arguments import told_in, values
from embferry.serve.supervisor.vllm_child import CHILD_SHARE
from embferry.traces.otlp import url_of
from embferry.trust.trust import Trust

HOST = "127.0.0.1"
"""The instances' address: only the router has to reach them, and consumers the router."""
CONNECTOR = {"ec_connector": "EmbferryConnector", "ec_connector_module_path": "embferry.connectors.vllm.connector"}
MIDDLEWARE = "embferry.serve.vllm.instance_digests.InstanceDigests"
"""Checks what the router sends to an instance, by its import path."""
INSTANCES_SHARE = 0.5
"""The part of ``serve.stop_timeout`` that is kept for the instances, however long the router's last answers take."""
TRACES = "otlp-traces-endpoint"
"""The option of vLLM with the URL for its own spans."""
TRACKER_SECONDS = 5.0
"""Seconds for the resource trackers of an instance whose process was killed."""
_KV: dict[ProcessRole, dict[str, Any]] = {
    "prefill": {"kv_role": "kv_producer", "kv_connector_extra_config": {"kv_lease_duration": 120}},
    "decode": {"kv_role": "kv_consumer"},
}
"""The transfer of keys and values. A prefill instance keeps them for so many seconds until a decode instance has queued
the request, which may have to decode a long video before; later, it would fetch those of another request."""


def run(settings: Settings, extra: Sequence[str] = ()) -> None:
    """Starts everything and serves until SIGINT or SIGTERM. Ends with status 1 if it cannot be brought up."""
    run_cluster(lambda progress: VllmCluster(settings, extra, progress=progress))


def vllm_command() -> str:
    """Returns the path of ``vllm``: beside the running Python, or on PATH.

    Raises:
        ClusterError: there is none.
    """
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if os.access(beside, os.X_OK) else shutil.which("vllm")
    if found is None:
        where = f"there is no vllm beside {sys.executable} or on PATH"
        raise ClusterError(f"{where}; install embferry into vLLM's environment")
    return found


@dataclass(frozen=True, slots=True)
class Place:
    """Where one instance is.

    Attributes:
        name: of the instance, for logs.
        folder: for its temporary files.
        ports: of its server, its metrics and its transfer of keys and values.
        router: the router's URL for instances that answer.
        host: the address on which it listens and at which others reach it.
    """

    name: str
    folder: Path
    ports: Sequence[int]
    router: str
    host: str = HOST

    @property
    def url(self) -> str:
        """The URL of its server."""
        return f"http://{bracketed(self.host)}:{self.ports[0]}"


def instance_program(settings: Settings, role: ProcessRole, place: Place, extra: Sequence[str]) -> Program:
    """Returns the process of one instance, :mod:`.vllm_child`. ``extra``: the user's own arguments, which win."""
    told: dict[str, Any] = {
        "command": instance_command(settings, role, place, extra),
        "url": place.url,
        "environ": _environ(settings, place.name, place.ports[2], extra),
    }
    told["seconds"] = CHILD_SHARE * settings.serve.stop_timeout
    told["log"] = [settings.log_level, settings.log_format, place.name]
    told["folder"] = str(place.folder)
    return Program(("-m", "embferry.serve.supervisor.vllm_child"), json.dumps(told).encode() + b"\n")


def instance_command(settings: Settings, role: ProcessRole, place: Place, extra: Sequence[str]) -> list[str]:
    """Returns the command of one instance. ``extra``: the user's own arguments, which win."""
    host, (port, metrics_port, *_) = place.host, place.ports
    connector: dict[str, Any] = {"transports": list(settings.vllm.transports), "metrics_port": metrics_port}
    if host != HOST:
        connector["host"] = host
    if role == "encode" and settings.cache.url is not None:
        connector["cache"] = settings.cache.model_dump()
    if role != "encode":
        connector["router"] = place.router
    traces = settings.traces.endpoint
    if traces is not None and role != "encode":
        connector["traces_endpoint"] = traces
    ec_role = "ec_producer" if role == "encode" else "ec_consumer"
    transfer = {**CONNECTOR, "ec_role": ec_role, "ec_connector_extra_config": connector}
    words = [vllm_command(), "serve", *_model(settings, extra), "--host", host, "--port", str(port)]
    words += ["--enable-mm-embeds"] if role != "encode" else []
    if traces is not None and not _traces_itself(extra):
        words += ["--otlp-traces-endpoint", url_of(traces)]
    if role in _KV:
        words += ["--kv-transfer-config", json.dumps({"kv_connector": "NixlConnector", **_KV[role]})]
    return [*words, "--middleware", MIDDLEWARE, "--ec-transfer-config", json.dumps(transfer), *extra]


def _traces_itself(extra: Sequence[str]) -> bool:
    """Returns whether the user's own arguments say where vLLM sends its spans."""
    given = values(extra)
    return TRACES in given or any(TRACES in told_in(file) for file in given.get("config", ())[:1])


def served_name(settings: Settings, extra: Sequence[str]) -> str:
    """Returns the model's name in the HTTP API: the first that the user's own arguments give, or else the settings'."""
    return next(_given_names(extra), settings.public_model_name)


def _model(settings: Settings, extra: Sequence[str]) -> list[str]:
    """Returns the arguments for the model: by path for a packaged one; any other name is vLLM's to resolve."""
    name = settings.model
    words = [str(model_path(name)) if name in packaged_models() else name]
    return words if any(_given_names(extra)) else [*words, "--served-model-name", settings.public_model_name]


def _given_names(extra: Sequence[str]) -> Iterator[str]:
    """Yields the names in arguments for ``vllm serve``, then those in ``--config``."""
    given = values(extra)
    yield from given.get("served-model-name", ())
    for file in given.get("config", ())[:1]:
        names = told_in(file).get("served-model-name") or ()
        yield from map(str, names if isinstance(names, list) else [names])


class VllmCluster(Cluster):
    """Instances of vLLM and the router before them.

    Args:
        settings: the router's port may be 0.
        extra: more arguments for each ``vllm serve``.
        progress: as for :class:`Cluster`.
    """

    title = "vLLM"

    def __init__(self, settings: Settings, extra: Sequence[str], *, progress: Callable[[str], None]) -> None:
        vllm = settings.vllm
        workers: dict[ProcessRole, int] = {"encode": vllm.encoders}
        workers |= {"prefill": vllm.prefills, "decode": vllm.decodes} if vllm.decodes else {"language": vllm.languages}
        names = [(role, f"{role}-{number}") for role, count in workers.items() for number in range(count)]
        self._ports = ReservedPorts(HOST, 1 + 3 * len(names))
        free_port, *ports = self._ports.numbers
        router = settings.router.model_copy(update={"port": settings.router.port or free_port})
        if router.api_keys_file is not None and router.api_key is None:
            router = router.model_copy(update={"api_key": SecretStr(new_key())})  # for the instances
        settings = settings.model_copy(update={"router": router})
        self._folder, self._folder_lock = temporary.new_root(), -1
        self._programs: dict[str, tuple[ProcessRole, Program]] = {}
        own_url = f"{Trust.of_environment().scheme}://{HOST}:{settings.router.port}"
        urls: dict[ProcessRole, list[str]] = {role: [] for role in workers}
        metrics: list[str] = []
        for (role, name), port, metrics_port, kv_port in zip(names, ports[::3], ports[1::3], ports[2::3], strict=True):
            place = Place(name, self._folder / name, (port, metrics_port, kv_port), own_url)
            urls[role].append(place.url)
            metrics.append(f"http://{HOST}:{metrics_port}")
            self._programs[name] = role, instance_program(settings, role, place, extra)
        known: dict[str, Any] = {f"{role}_urls": tuple(found) for role, found in urls.items()}
        known["connector_metrics_urls"] = tuple(metrics)
        settings = settings.model_copy(update={"vllm": vllm.model_copy(update=known)})
        self._programs["router"] = "router", child_program("router", "router", settings)
        self._ending_orphans = threading.Lock()
        self._strangers = {one.pid for one in descendants()}  # children of the program that makes the cluster
        # The router before vLLM takes the names that the instances serve; this one is for what people are shown.
        named = settings.router.model_copy(update={"served_model_name": served_name(settings, extra)})
        settings = settings.model_copy(update={"router": named})
        expected = {str(role): count for role, count in workers.items()}
        super().__init__(settings, expected, (vllm.instance_timeout, "vllm.instance_timeout"), progress=progress)

    def start(self) -> None:
        adopt_orphans()
        temporary.remove_abandoned(self._folder)
        try:
            self._folder_lock = temporary.hold(self._folder)
        except OSError as error:
            raise ClusterError(f"there is no place for temporary files: {self._folder}: {error.strerror}") from error
        super().start()

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            self._ports.release()
            if self._folder_lock >= 0:
                lock, self._folder_lock = self._folder_lock, -1
                temporary.release(self._folder, lock)

    def ends(self) -> tuple[list[SupervisedProcess], list[SupervisedProcess], float]:
        """Returns the router, whose answers need the instances, and then these."""
        routers = [process for process in self.supervised if process.view.role == "router"]
        return routers, [process for process in self.supervised if process not in routers], INSTANCES_SHARE

    def first(self) -> list[SupervisedProcess]:
        return []

    def others(self) -> list[SupervisedProcess]:
        return [self._process(name, role, program) for name, (role, program) in self._programs.items()]

    def _process(self, name: str, role: ProcessRole, program: Program) -> SupervisedProcess:
        return self.process(name, role, lambda: program, lambda: self._clean_up(name))

    def _clean_up(self, name: str) -> None:
        """Ends what a process has left that was killed. Runs on its thread, before it is started again."""
        with self._ending_orphans:
            deadline = time.monotonic() + TRACKER_SECONDS
            end_descendants(0, deadline, lambda: {one.pid() for one in self.supervised} | self._strangers)
        temporary.remove(self._folder / name)


def _environ(settings: Settings, name: str, kv_port: int, extra: Sequence[str]) -> dict[str, str]:
    """Returns the environment of an instance: the port at which it tells others where its keys and values are.

    It has the router's API key, so that no other user of this machine can name an address to it. It may download its
    model, unless the user forbids that; our own workers may not.

    Its spans go where those of the router go, in the same form, under a name of their own.
    """
    key = settings.router.api_key
    made = {"VLLM_NIXL_SIDE_CHANNEL_PORT": str(kv_port), OFFLINE: os.environ.get(OFFLINE, "0")}
    if settings.traces.endpoint is not None and not _traces_itself(extra):
        made |= {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
        made |= {} if "OTEL_SERVICE_NAME" in os.environ else {"OTEL_SERVICE_NAME": f"vllm-{name}"}
    return made | ({"VLLM_API_KEY": key.get_secret_value()} if key else {})
