"""vLLM's servers behind the proxy in ``examples/``, which takes what producers answer for opaque."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.ports import free_port

from .engines import ENVIRONMENT, Content, picture
from .split import TEXT, transfer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

ROOT = Path(__file__).parents[2]
START_S, ANSWER_S, POLL_S = 600.0, 300.0, 0.2
"""Guards against a server that hangs, not expectations; the pause between two looks at it."""
SERVE = (
    *("--dtype", "float32", "--enforce-eager", "--seed", "0", "--served-model-name", "tiny"),
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs", "4"),
    *("--no-enable-prefix-caching", "--limit-mm-per-prompt.image", "4", "--limit-mm-per-prompt.video", "0"),
)
VARIABLES = ENVIRONMENT | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1"}  # for /reset_encoder_cache
del VARIABLES["VLLM_ENABLE_V1_MULTIPROCESSING"]


class Stage:
    """Two producers, a consumer, and the proxy."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        from embferry.models.tiny_qwen import make

        make(folder / "model")
        self._folder, self._stack = folder, stack
        self.metrics = {name: free_port() for name in ("first", "second", "consumer")}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.urls = {name: f"http://127.0.0.1:{self._start_server(name)}" for name in self.metrics}
        port = str(free_port())
        self.urls["proxy"] = f"http://127.0.0.1:{port}"
        servers = [self.urls[name] for name in ("consumer", "first", "second")]
        self._start("proxy", sys.executable, str(ROOT / "examples" / "vllm_proxy.py"), port, *servers)
        for name, path in (*((name, "/health") for name in self.metrics), ("proxy", "/")):
            self._wait(name, path)

    def ask(self, *content: Content, at: str = "proxy", params: dict[str, Any] | None = None) -> list[int]:
        """Returns the tokens of the answer."""
        more = {"max_tokens": 16, "ignore_eos": True, "return_token_ids": True}
        answer = self._post(at, *content, TEXT, **more, **({"ec_transfer_params": params} if params else {}))
        tokens: list[int] = answer["choices"][0]["token_ids"]
        return tokens

    def undivided(self, *content: Content) -> list[int]:
        """Returns the answer of the consumer without any producer. It forgets the pictures afterwards."""
        tokens = self.ask(*content, at="consumer")
        httpx.post(self.urls["consumer"] + "/reset_encoder_cache", timeout=ANSWER_S, trust_env=False).raise_for_status()
        return tokens

    def encode(self, name: str, item: Content) -> dict[str, Any]:
        """Returns a producer's answer for one picture."""
        params: dict[str, Any] = self._post(name, item, max_tokens=1)["ec_transfer_params"]
        return params

    def counted(self, name: str, metric: str) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.metrics[name]}/metrics", trust_env=False).text
        found = re.findall(rf"^embferry_connector_{re.escape(metric)} (\S+)$", text, re.MULTILINE)
        return sum(map(float, found))

    def fetched(self) -> float:
        return self.counted("consumer", 'transfers_total{outcome="success"}')

    def kill(self, name: str) -> None:
        os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def _post(self, at: str, *content: Content, **more: Any) -> dict[str, Any]:
        parts = [{key: value for key, value in part.items() if key != "uuid"} for part in content]
        asked = {"model": "tiny", "messages": [{"role": "user", "content": parts}], "temperature": 0, **more}
        url = self.urls[at] + "/v1/chat/completions"
        answer = httpx.post(url, json=asked, timeout=ANSWER_S, trust_env=False)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def _start_server(self, name: str) -> int:
        port = free_port()
        role = "ec_consumer" if name == "consumer" else "ec_producer"
        config = transfer(role, transports=["tcp"], metrics_port=self.metrics[name])
        words = ("serve", str(self._folder / "model"), "--port", str(port), "--host", "127.0.0.1", *SERVE)
        vllm = str(Path(sys.executable).with_name("vllm"))
        self._start(name, vllm, *words, "--ec-transfer-config", json.dumps(config))
        return port

    def _start(self, name: str, *words: str) -> None:
        with (self._folder / f"{name}.log").open("w") as log:
            started = subprocess.Popen(
                words, stdout=log, stderr=log, env=os.environ | VARIABLES, start_new_session=True
            )
        self.processes[name] = started
        self._stack.callback(self._end, started)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _wait(self, name: str, path: str) -> None:
        """Waits until a server answers."""
        deadline = time.monotonic() + START_S
        while True:
            log = self._folder / f"{name}.log"
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            assert self.processes[name].poll() is None, log.read_text()[-3000:]
            with suppress(httpx.HTTPError):
                httpx.get(self.urls[name] + path, trust_env=False, timeout=5)
                return
            time.sleep(POLL_S)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with ExitStack() as stack:
        yield Stage(tmp_path_factory.mktemp("proxy"), stack)


def test_a_proxy_in_turns(stage: Stage) -> None:
    first, second = picture(1), picture(2)
    for items in ([first], [first, second], [second, second], [picture(3), first, picture(4)]):
        whole, before = stage.undivided(*items), stage.fetched()
        assert stage.ask(*items) == whole
        assert stage.fetched() - before <= len(items)
    assert stage.fetched() == 4, "each picture came from a producer once"
    encoded = [stage.counted(name, "items_encoded_total") for name in ("first", "second")]
    assert all(encoded), "both have encoded"

    item = picture(5)
    answers = [stage.encode("first", item) for _ in range(2)]
    assert answers[0] == answers[1], "llm-d refuses a request if two answers for one picture differ"
    whole = stage.undivided(item)
    assert stage.ask(item, at="consumer", params=answers[0]) == whole
    assert stage.counted("consumer", "encoded_here_total") == 0

    item = picture(6)
    params, whole = stage.encode("second", item), stage.undivided(item)
    stage.kill("second")
    assert stage.ask(item, at="consumer", params=params) == whole
    assert stage.counted("consumer", "encoded_here_total") == 1, "the consumer has the pixels"
    for seed in (7, 8):  # one of them is the lost producer's turn
        whole = stage.undivided(picture(seed))
        assert stage.ask(picture(seed)) == whole
    assert stage.counted("consumer", "requests_failed_total") == 0
