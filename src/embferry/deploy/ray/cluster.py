"""The Ray cluster under ``embferry serve --on ray``: one that there is, or one of this machine alone."""

from __future__ import annotations

import logging
import os
import socket

import ray

from embferry.protocol.errors import TransportError
from embferry.serve.config import Settings
from embferry.serve.security import check_part
from embferry.trust import Key, Trust
from embferry.trust.trust import KEY_ENV

CONNECT_SECONDS = 5.0
STORE_BYTES = 100 << 20
"""Bytes of such a cluster's object store, through which no embedding goes."""
HEAD = "node:__internal_head__"
"""The resource by which Ray marks the first node."""
PRESTART_ENV = "RAY_prestart_worker_first_driver"
"""Whether Ray starts a Python process for each processor at once, before there is anything to run in it."""
PREALLOCATE_ENV = "RAY_preallocate_plasma_memory"
"""Whether Ray gets the memory of the object store at the start. Otherwise it gets each page at its first use: where
``/dev/shm`` is full by then, the kernel kills the node's main process by SIGBUS."""
MUCH = 1e10
"""The amount of each resource that the settings name, on a cluster of one node, where there is nothing to choose."""


def connect(settings: Settings) -> None:
    """Connects this process to the cluster, or starts one.

    Raises:
        ConfigError: workers would listen where strangers reach them, and there is no cluster key.
        TransportError: the cluster cannot be reached.
    """
    if settings.ray.address is None:
        _start(settings)
        return
    try:
        _check_reachable(settings.ray.address)
        ray.init(address=settings.ray.address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError) as error:
        where = f"the Ray cluster at {settings.ray.address} ({settings.place('ray', 'address')})"
        raise TransportError(f"{where} cannot be reached: {error}", retryable=False) from error
    for node in ray.nodes():
        if node["Alive"]:
            own = settings.model_copy(update={"host": node["NodeManagerAddress"]})
            check_part(own, "a worker on that node")


def _check_reachable(address: str) -> None:
    """Raises OSError if nothing listens at an address with a port: Ray would go on trying for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()


def _start(settings: Settings) -> None:
    """Starts a cluster that ends with this process, and has room for as many workers as there may be.

    Ray gives its only node an address that others can reach, also if it is asked for the loopback address. So the
    cluster gets a key of its own, unless the user has one. The node and its replicas inherit it from this process.
    """
    own = settings.ray
    cpus = own.routers * own.router_cpus + own.max_encoders * own.encoder_cpus + own.max_languages * own.language_cpus
    names = {**own.router_resources, **own.encoder_resources, **own.language_resources}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(PRESTART_ENV, "0")
    os.environ.setdefault(PREALLOCATE_ENV, "1")
    if Trust.of_environment().keys is None:
        os.environ[KEY_ENV] = Key.new().written()
    ray.init(
        address="local",
        num_cpus=max(int(cpus) + 1, os.cpu_count() or 1),
        resources=dict.fromkeys(names, MUCH),
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        logging_level=logging.WARNING,
    )


def head_address() -> str:
    """Returns the address of the first node, on which there is a proxy in any case."""
    return next(str(node["NodeManagerAddress"]) for node in ray.nodes() if HEAD in node["Resources"])
