"""vLLM's configurations, the commands that start them, and its scenarios."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from . import corruption, vllm_plugins
from .configurations import (
    BLOCK_TOKENS,
    ENCODERS,
    LANGUAGE,
    MAX_MODEL_LEN,
    MODEL,
    POOL_BYTES,
    SMALL,
    SMALL_POOL_BYTES,
    TOKEN_BYTES,
    Configuration,
    Damage,
    free_ports,
    url,
)
from .plugin_folder import plugin_folder
from .scenarios import FITTING, Scenario
from .stack import ROUTER_S, Server, Stack, ended, started
from .workload import Picture, Plan

UNDIVIDED = Configuration("undivided", "vLLM, undivided", "")
CONFIGURATIONS = (
    UNDIVIDED,
    Configuration("example", "vLLM's example connector", "example"),
    Configuration("vllm-mooncake", "vLLM's Mooncake connector", "mooncake"),
    Configuration("ours-shm", "embferry over shm", "embferry", "shm"),
    Configuration("ours-apart", "embferry over shm, encode first", "embferry", "shm", "off", on_request=True),
    Configuration("ours-all", "embferry over shm, videos overlapped", "embferry", "shm", "all", on_request=True),
    Configuration("ours-tcp", "embferry over tcp", "embferry", "tcp"),
    Configuration("ours-mooncake", "embferry over mooncake", "embferry", "mooncake"),
    Configuration("ours-nixl", "embferry over nixl", "embferry", "nixl"),
)

INSTANCES = {
    ENCODERS[0]: ("ec_producer", POOL_BYTES),
    ENCODERS[1]: ("ec_producer", POOL_BYTES),
    LANGUAGE: ("ec_consumer", POOL_BYTES),
    SMALL: ("ec_consumer", SMALL_POOL_BYTES),
}
"""Role and pool of the engines of a divided configuration."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",
}
"""Without ``MC_FORCE_TCP``, Mooncake's engine looks for RDMA. The rest suits two cores without a network."""

KV_BYTES = 256 << 20
"""Holds the longest requests that one engine runs at once. This and the small cache of prepared pictures leave memory
for many engines; the cache holds those of a round."""
ENGINE = (
    *("--host", "127.0.0.1", "--served-model-name", MODEL, "--dtype", "float32", "--seed", "0"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--max-num-batched-tokens", "4096"),
    *("--limit-mm-per-prompt.image", "9", "--limit-mm-per-prompt.video", "1"),
    *("--enforce-eager", "--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(KV_BYTES)),
    *("--mm-processor-cache-gb", "0.25"),
)


class Ports(NamedTuple):
    """Ports of one engine, on the loopback."""

    http: int
    peer: int
    """Port of vLLM's Mooncake connector."""
    metrics: int
    """Port of embferry's metrics."""


def engine(python: str, model: Path, port: int, transfer: dict[str, Any] | None) -> list[str]:
    command = [python, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port), *ENGINE]
    if transfer is not None:
        command += ["--ec-transfer-config", json.dumps(transfer)]
        command += ["--enable-mm-embeds"] if transfer["ec_role"] == "ec_consumer" else []
    return command


def transfer(configuration: Configuration, instance: str, ports: Ports, router: int, store: Path) -> dict[str, Any]:
    """Returns the value of ``--ec-transfer-config`` for one of :data:`INSTANCES`."""
    role, pool_bytes = INSTANCES[instance]
    made: dict[str, Any]
    extra: dict[str, Any]
    if configuration.connector == "example":
        made, extra = {"ec_connector": "ECExampleConnector"}, {"shared_storage_path": str(store)}
    elif configuration.connector == "mooncake":
        made, extra = {"ec_connector": "ECMooncakeConnector", "ec_ip": "127.0.0.1"}, {"mooncake_protocol": "tcp"}
        made |= {"ec_port": ports.peer, "ec_buffer_device": "cpu", "ec_buffer_size": pool_bytes}
    else:
        module = "embferry.connectors.vllm.connector"
        made = {"ec_connector": "EmbferryConnector", "ec_connector_module_path": module}
        extra = {"transports": [configuration.transport], "metrics_port": ports.metrics}
        if role == "ec_consumer":
            blocks = pool_bytes // TOKEN_BYTES // BLOCK_TOKENS
            extra |= {"num_blocks": blocks, "block_size": BLOCK_TOKENS, "router": url(router)}
    return made | {"ec_role": role, "ec_connector_extra_config": extra}


def router(python: str, configuration: Configuration, port: int, encoders: list[str], language: Ports) -> list[str]:
    """Returns the router's command; ``encoders`` are URLs."""
    command = [python, "-c", "from embferry.cli.main import run; run()", "router", "--engine", "vllm"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--connector", configuration.connector, "--encode-urls", ",".join(encoders)]
    command += ["--language-urls", url(language.http)]
    if configuration.connector == "mooncake":
        command += ["--consumer-zmq", f"tcp://127.0.0.1:{language.peer}"]
    return command


TOO_LARGE = Picture((5, 0), 896, 896, 1024)
"""An embedding of 1 MiB."""
_BURSTY = Plan(requests=24, rate=1.0, burstiness_cv=4.9, repeated=0.5, seed=2)
_AGAIN = tuple(Picture((6, n // 2), 420, 756, 405) for n in range(16))
_VIDEOS = tuple(Picture((7, n), 336, 252, 16 * 9 * 12 // 2, frames=16) for n in range(8))
SCENARIOS = (
    Scenario("fits", "Everything fits", Plan(requests=24, rate=1.0, seed=1)),
    Scenario("bursty", "Bursty, half of the pictures repeated", _BURSTY),
    Scenario("again", "A picture, and the same one again", None, concurrency=1, max_tokens=8, pictures=_AGAIN),
    Scenario("video", "Videos", None, concurrency=1, max_tokens=8, pictures=_VIDEOS),
    Scenario("corrupted", "Bytes corrupted on the way", Plan(requests=8, rate=1.0, seed=3), "corrupted"),
    Scenario("killed", "An encoder killed", Plan(requests=24, rate=2.0, seed=4), "killed"),
    Scenario(
        "pool",
        "A pool smaller than the embedding",
        None,
        "small pool",
        timeout_s=180.0,
        concurrency=1,
        pictures=(TOO_LARGE, FITTING),
    ),
)

_OUT_OF_REACH = "not done: the bytes are moved by an engine of another project"
NOTHING_TO_DAMAGE: dict[tuple[Damage, str], str] = {
    ("killed", "undivided"): "has no encoder of its own that could be killed",
    ("corrupted", "undivided"): "no embedding travels",
    ("corrupted", "vllm-mooncake"): _OUT_OF_REACH,
    ("corrupted", "ours-mooncake"): _OUT_OF_REACH,
    ("corrupted", "ours-nixl"): _OUT_OF_REACH,
    ("small pool", "example"): "has no pool: its embeddings are files",
}


class VllmStack(Stack):
    """Two encoders, a language instance and a router, or one engine.

    With the damage "small pool" there is a language instance with the small pool, too. With "corrupted" the encoders
    damage embeddings while the file ``damage`` exists. Unless they may ``spin``, processes that wait for each other
    sleep early (:func:`.vllm_plugins.idle_workers`).
    """

    environment: ClassVar[Mapping[str, str]] = ENVIRONMENT
    extra: ClassVar[Mapping[str, Any]] = {"ignore_eos": True, "return_token_ids": True}

    def start(self) -> None:
        connector = self.configuration.connector
        small = "small pool" in self.damages and connector != "example"
        names = [name for name in INSTANCES if small or name != SMALL] if self.divided else ["engine"]
        self._router_port, *ports = free_ports(1 + 3 * len(names))
        self._ports = {name: Ports(*ports[3 * at : 3 * at + 3]) for at, name in enumerate(names)}
        plugins = [] if self.spin else [vllm_plugins.idle_workers]
        if connector == "mooncake":
            plugins.append(vllm_plugins.loads_without_tokens)
        if "corrupted" in self.damages and connector in corruption.PLUGINS:
            plugins.append(corruption.PLUGINS[connector])
        store = self.folder / "store"
        store.mkdir()
        folder = plugin_folder(self.folder, "vllm.general_plugins", *plugins)
        path = os.pathsep.join(filter(None, (str(folder), self.env.get("PYTHONPATH"))))
        self.env |= {corruption.VARIABLE: str(self.damage), "PYTHONPATH": path}
        for name, own in self._ports.items():
            transfers = transfer(self.configuration, name, own, self._router_port, store) if self.divided else None
            self.servers[name] = self.server(name, engine(self.python, self.model, own.http, transfers), own.http)
        started([*self.servers.values()], self.say)
        self.prepare("")
        self.warm()

    @property
    def encoders(self) -> list[Server]:
        return [self.servers[name] for name in ENCODERS]

    @property
    def port(self) -> int:
        return self._router_port if self.divided else self._ports["engine"].http

    @property
    def metrics(self) -> list[str]:
        ports = [self._router_port] if self.divided else []
        if self.configuration.connector == "embferry":
            ports += [each.metrics for each in self._ports.values()]
        return [f"{url(port)}/metrics" for port in ports]

    def prepare(self, damage: Damage) -> None:
        if damage == "small pool":
            self._route(SMALL, self.encoders[-1:])  # for both requests; the other encoder may have been killed
        elif self.divided:
            self._route(LANGUAGE, [each for each in self.encoders if each.alive])

    def _route(self, language: str, through: Sequence[Server]) -> None:
        """Starts a router to a language instance, unless one with the same settings runs."""
        urls = [each.url for each in through]
        command = router(self.python, self.configuration, self._router_port, urls, self._ports[language])
        running = self.servers.get("router")
        if running is not None:
            if running.alive and running.command == command:
                return
            ended([running])
        overlap = {"EMBFERRY_VLLM_OVERLAP": self.configuration.overlap} if self.configuration.overlap else {}
        self.servers["router"] = self.server("router", command, self._router_port, overlap)
        started([self.servers["router"]], self.say, ROUTER_S)


def facts(spin: bool) -> dict[str, str]:
    sleep = f"sleep after {vllm_plugins.SPIN_S * 1e3:g} ms in all configurations; by default after 1 s"
    return {
        "servers": "undivided: one engine; divided: two encoders, one language instance, a router; each with one "
        "thread for arithmetic, all on the cores above, together with the benchmark",
        "pool": f"{POOL_BYTES >> 20} MiB unless said otherwise; the example connector's files are in the temporary "
        "folder",
        "waiting": "processes of vLLM that wait for each other " + ("poll for 1 s, as vLLM has it" if spin else sleep),
    }
