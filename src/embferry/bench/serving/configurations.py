"""The configurations that are compared, and the commands that start them."""

from __future__ import annotations

import json
import random
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

Connector = Literal["", "example", "mooncake", "embferry"]

MODEL = "tiny"
MAX_MODEL_LEN = 12288
"""Holds nine pictures of 1,280 tokens, the question and the answer."""
BLOCK_TOKENS = 16
TOKEN_BYTES = 1024
"""An embedding of the tiny model: 256 values of float32 a token."""
POOL_BYTES, SMALL_POOL_BYTES = 64 << 20, 64 << 10
PORTS = (15_000, 32_000)


class Configuration(msgspec.Struct, frozen=True):
    name: str
    title: str
    connector: Connector
    """Empty for one engine, undivided."""
    transport: str = ""
    """The transport, if the connector is embferry's."""


UNDIVIDED = Configuration("undivided", "vLLM, undivided", "")
CONFIGURATIONS = (
    UNDIVIDED,
    Configuration("example", "vLLM's example connector", "example"),
    Configuration("vllm-mooncake", "vLLM's Mooncake connector", "mooncake"),
    Configuration("ours-shm", "embferry over shm", "embferry", "shm"),
    Configuration("ours-tcp", "embferry over tcp", "embferry", "tcp"),
    Configuration("ours-mooncake", "embferry over mooncake", "embferry", "mooncake"),
    Configuration("ours-nixl", "embferry over nixl", "embferry", "nixl"),
)

ENCODERS, LANGUAGE, SMALL = ("encoder 1", "encoder 2"), "language", "language, small pool"
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
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HOST_IP": "127.0.0.1",
    "OMP_NUM_THREADS": "1",
    "MC_FORCE_TCP": "1",
}
"""Without ``MC_FORCE_TCP``, Mooncake's engine looks for RDMA. The rest suits two cores without a network."""

ENGINE = (
    *("--host", "127.0.0.1", "--served-model-name", MODEL, "--dtype", "float32", "--seed", "0"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--max-num-seqs", "8", "--max-num-batched-tokens", "4096"),
    *("--limit-mm-per-prompt.image", "9", "--limit-mm-per-prompt.video", "0"),
    *("--enforce-eager", "--no-enable-prefix-caching"),
)


class Ports(NamedTuple):
    """Ports of one engine, on the loopback."""

    http: int
    peer: int
    """Port of vLLM's Mooncake connector."""
    metrics: int
    """Port of embferry's metrics."""


def free_ports(count: int) -> list[int]:
    """Returns free ports below those that the kernel gives to connections, which may be taken at any time."""
    held: list[socket.socket] = []
    for port in random.sample(range(*PORTS), 1000):
        with suppress(OSError):
            held.append(socket.create_server(("127.0.0.1", port)))
        if len(held) == count:
            break
    numbers = [sock.getsockname()[1] for sock in held]
    for sock in held:
        sock.close()
    return numbers


def url(port: int) -> str:
    return f"http://127.0.0.1:{port}"


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
