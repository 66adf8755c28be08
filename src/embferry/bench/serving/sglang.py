"""SGLang's configurations, the commands that start them, and its scenarios."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import httpx

from . import sglang_plugins
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
from .stack import POLL_S, Server, Stack, StartError, ended, started
from .workload import Picture, Plan

UNDIVIDED = Configuration("undivided", "SGLang, undivided", "")
CONFIGURATIONS = (
    UNDIVIDED,
    Configuration("zmq_to_scheduler", "SGLang's zmq_to_scheduler", "zmq_to_scheduler"),
    Configuration("zmq-mended", "zmq_to_scheduler, its crash mended", "zmq_to_scheduler"),
    Configuration("zmq_to_tokenizer", "SGLang's zmq_to_tokenizer", "zmq_to_tokenizer"),
    Configuration("mooncake", "SGLang's mooncake", "mooncake"),
    Configuration("ours-shm", "embferry over shm", "embferry", "shm"),
    Configuration("ours-tcp", "embferry over tcp", "embferry", "tcp"),
    Configuration("ours-mooncake", "embferry over mooncake", "embferry", "mooncake"),
    Configuration("ours-nixl", "embferry over nixl", "embferry", "nixl"),
)

PLUGINS: Mapping[str, Sequence[Callable[[], None]]] = {
    "zmq-mended": [sglang_plugins.failed_requests_have_tokens],
    "mooncake": [sglang_plugins.pool_in_host_memory],
}
"""Changes to SGLang, by configuration."""
TWO_RANKS = "language, two ranks"
LANGUAGES: Mapping[Damage, str] = {"small pool": SMALL, "two ranks": TWO_RANKS}
"""The language server of a scenario, if it is not the usual one."""
SMALLEST_MIB = 1
"""The smallest pool that SGLang's mooncake can have."""
RECV_TIMEOUT_S = 20
"""How long SGLang waits for an embedding; 180 s by default."""
LISTED_S = 60.0
"""How long it takes at most until an encoder that answers again is on the language server's list."""

ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "SGLANG_ENCODER_RECV_TIMEOUT": str(RECV_TIMEOUT_S),
    "SGLANG_ENCODER_MAX_BATCH_SIZE": "1",
    "MOONCAKE_PROTOCOL": "tcp",
    "MC_FORCE_TCP": "1",
}
"""Without ``MC_FORCE_TCP``, Mooncake's engine looks for RDMA. There are no batches, because on a CPU an encode takes
time with the square of all pictures of a batch. The rest suits two cores without a network."""

SERVER = (
    *("--host", "127.0.0.1", "--served-model-name", MODEL, "--device", "cpu", "--dtype", "float32"),
    *("--random-seed", "0", "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa"),
    *("--grammar-backend", "none", "--mem-fraction-static", "0.3", "--max-total-tokens", "65536"),
    *("--context-length", str(MAX_MODEL_LEN), "--chunked-prefill-size", "4096", "--max-running-requests", "8"),
    *("--disable-radix-cache", "--disable-overlap-schedule", "--skip-server-warmup"),
)


def command(python: str, model: Path, port: int, *more: str) -> list[str]:
    return [python, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *SERVER, *more]


def plugin(configuration: Configuration, pool_bytes: int, metrics: int | None) -> dict[str, str]:
    """Returns the variables of embferry's plug-in in one server."""
    if configuration.connector != "embferry":
        return {}
    values = {"TRANSPORTS": configuration.transport, "BLOCK_SIZE": str(BLOCK_TOKENS)}
    values |= {"NUM_BLOCKS": str(pool_bytes // TOKEN_BYTES // BLOCK_TOKENS)}
    values |= {} if metrics is None else {"METRICS_PORT": str(metrics)}
    return {"EMBFERRY_SGLANG": "1"} | {f"EMBFERRY_SGLANG_{name}": value for name, value in values.items()}


def _plan(requests: int, seed: int, **more: Any) -> Plan:
    """Returns a workload of pictures that SGLang can encode on a CPU: the time grows with the square of a request's."""
    return Plan(**{"requests": requests, "rate": 1.0, "seed": seed, "max_images": 2, "max_image_tokens": 512} | more)


TOO_LARGE = Picture((5, 0), 896, 1120, 1280)
"""An embedding of 1.25 MiB."""
SCENARIOS = (
    Scenario("fits", "Everything fits", _plan(24, 1)),
    Scenario("stopped", "An encoder stopped", _plan(12, 4), "stopped"),
    Scenario(
        "reused",
        "A request id used again",
        _plan(6, 5, rate=0.25, burstiness_cv=0, max_images=1),
        "id used again",
    ),
    Scenario("hang-up", "A client hangs up", _plan(8, 6), "client hangs up"),
    Scenario("damaged", "A damaged picture", _plan(8, 7), "damaged picture"),
    Scenario("killed", "An encoder killed", _plan(12, 4), "killed"),
    Scenario(
        "pool",
        "A pool smaller than the embedding",
        None,
        "small pool",
        concurrency=1,
        pictures=(TOO_LARGE, FITTING),
    ),
    Scenario("ranks", "Two tensor-parallel ranks", _plan(6, 8), "two ranks"),
)
"""In this order, so that few servers have to be started again."""

_NO_ENCODER = "has no encoder of its own"
_NO_POOL = "has no pool: a message is as long as its embedding"
NOTHING_TO_DAMAGE: dict[tuple[Damage, str], str] = {
    ("killed", "undivided"): _NO_ENCODER,
    ("stopped", "undivided"): _NO_ENCODER,
    ("two ranks", "undivided"): "not done: no embedding travels",
    ("small pool", "zmq_to_scheduler"): _NO_POOL,
    ("small pool", "zmq-mended"): _NO_POOL,
    ("small pool", "zmq_to_tokenizer"): _NO_POOL,
}


class SglangStack(Stack):
    """Two encoders and one language server at a time, because each of its ranks polls; or one server.

    Servers that have ended are started again for the next scenario.
    """

    environment: ClassVar[Mapping[str, str]] = ENVIRONMENT
    extra: ClassVar[Mapping[str, Any]] = {"ignore_eos": True, "return_output_ids_in_sglext": True}

    def start(self) -> None:
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)  # a start takes twice as long without bytecode
        if plugins := PLUGINS.get(self.configuration.name):
            folder = plugin_folder(self.folder, sglang_plugins.GROUP, *plugins)
            self.env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(folder), self.env.get("PYTHONPATH"))))
        *self._encoder_ports, self._port, self._list_port, own, second, language = free_ports(7)
        self._encoder_metrics, self._language_metrics = (own, second), language
        self._language = ""
        self.prepare("")

    @property
    def encoders(self) -> list[Server]:
        return [self.servers[name] for name in ENCODERS] if self.divided else []

    @property
    def port(self) -> int:
        return self._port

    @property
    def metrics(self) -> list[str]:
        if self.configuration.connector != "embferry":
            return []
        ports = [*self._encoder_metrics, *([] if self._language == TWO_RANKS else [self._language_metrics])]
        return [f"{url(port)}/metrics" for port in ports]

    def prepare(self, damage: Damage) -> None:
        if self.divided:
            self._divided(LANGUAGES.get(damage, LANGUAGE))
        elif not self._is_up("server"):
            self.servers["server"] = self.server("server", command(self.python, self.model, self._port), self._port)
            self._ready()

    def _divided(self, language: str) -> None:
        backend = self.configuration.connector if self.configuration.connector != "embferry" else "zmq_to_scheduler"
        common = ("--encoder-transfer-backend", backend)
        begun = False
        for name, port, metrics in zip(ENCODERS, self._encoder_ports, self._encoder_metrics, strict=True):
            if not self._is_up(name):
                arguments = command(self.python, self.model, port, "--encoder-only", *common)
                variables = plugin(self.configuration, POOL_BYTES, metrics)
                self.servers[name], begun = self.server(name, arguments, port, variables), True
        if language != self._language or not self._is_up(language):
            if running := self.servers.pop(self._language, None):
                ended([running])
            self.servers[language], begun = self._language_server(language, common), True
            self._language = language
        if begun:
            self._ready()
        self._wait_until_listed()

    def _language_server(self, name: str, common: tuple[str, ...]) -> Server:
        encoders = ("--encoder-urls", *map(url, self._encoder_ports), "--encoder-bootstrap-port", str(self._list_port))
        ranks = ("--tp", "2") if name == TWO_RANKS else ()
        pool = SMALL_POOL_BYTES if name == SMALL else POOL_BYTES
        variables = {"SGLANG_EMBEDDING_POOL_SIZE_MB": str(max(pool >> 20, SMALLEST_MIB))}
        # The port of the second rank's metrics would be the next one, which may be in use.
        variables |= plugin(self.configuration, pool, None if ranks else self._language_metrics)
        variables |= {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"} if ranks else {}
        arguments = command(self.python, self.model, self._port, "--language-only", *encoders, *common, *ranks)
        return self.server(name, arguments, self._port, variables)

    def _is_up(self, name: str) -> bool:
        """Returns whether a server is there and answers; ends it if it is there and does not."""
        server = self.servers.get(name)
        if server is None:
            return False
        if server.alive and server.is_ready():
            return True
        server.kill()
        return False

    def _ready(self) -> None:
        started([*self.servers.values()], self.say)
        self.warm()

    def _wait_until_listed(self) -> None:
        """Waits until the language server has both encoders on its list: it strikes off those that do not answer."""
        deadline, listed = time.monotonic() + LISTED_S, list[str]()
        while set(listed) != {url(port) for port in self._encoder_ports}:
            if time.monotonic() > deadline:
                raise StartError(f"the language server has only these encoders on its list: {listed}")
            try:
                answer = httpx.get(f"{url(self._list_port)}/list_encoder_urls", timeout=POLL_S, trust_env=False)
                listed = answer.json()["encoder_urls"]
            except httpx.HTTPError:
                time.sleep(POLL_S)


def facts(spin: bool) -> dict[str, str]:
    return {
        "servers": "undivided: one server; divided: two encoders and a language server; each with one thread for "
        "arithmetic, all on the cores above, together with the benchmark",
        "pool": f"{POOL_BYTES >> 20} MiB unless said otherwise",
        "time-out": f"SGLang waits {RECV_TIMEOUT_S} s for an embedding (SGLANG_ENCODER_RECV_TIMEOUT); 180 s by default",
        "waiting": "the scheduler of a language server polls, as SGLang has it, in all configurations",
    }
