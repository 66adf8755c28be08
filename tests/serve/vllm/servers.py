"""Real instances of ``vllm serve``.

``embferry serve --engine vllm`` starts two encoders, a language instance and the router. A server without any connector
gives the answers of the undivided model. All have a cluster key, and the router has an API key beside it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from embferry.serve.http.proofs import ProvedRequests
from embferry.serve.supervisor.vllm import MIDDLEWARE
from embferry.trust.keys import ClusterKeys, Key
from embferry.trust.requests import INSTANCE
from tests.ports import free_port
from tests.serve.digested import digested

START_S, CONDITION_S = 900.0, 120.0
ENCODERS = 2
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "EMBFERRY_VLLM_OVERLAP": "pictures",
}
VLLM = (
    *("--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager", "--seed", "0"),
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs", "4"),
    *("--no-enable-prefix-caching", "--limit-mm-per-prompt.image", "4", "--limit-mm-per-prompt.video", "1"),
)
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
MORE = {"ignore_eos": True, "return_token_ids": True}
KEY, API_KEY = Key.new(), "unused"
EMBFERRY = (sys.executable, "-c", "from embferry.cli.main import run; run()")


class Servers:
    """``embferry serve`` and an undivided server, in this folder.

    Args:
        instances: options of ``embferry serve`` that say which instances there are.
        vllm: more options of each ``vllm serve``.
        make: writes the model; None: the tiny Qwen2.5-VL.
        environ: more variables of all processes.
    """

    def __init__(
        self,
        folder: Path,
        instances: Sequence[str] = ("--encoders", str(ENCODERS)),
        vllm: Sequence[str] = (),
        make: Callable[[Path], object] | None = None,
        **environ: str,
    ) -> None:
        self._prepare(folder, environ, make)
        words = ("serve", "--engine", "vllm", "--model", str(folder / "model"), "--port", "0")
        more = (*instances, "--restart-delay", "0.1")
        self.split = self.start(self._log, *EMBFERRY, *words, *more, "--", *VLLM, *vllm)
        self.undivided = f"http://127.0.0.1:{free_port()}"
        serve = (str(Path(sys.executable).with_name("vllm")), "serve", str(folder / "model"), *VLLM, *vllm)
        # It accepts image_embeds and has no connector: it must not answer as if there were no picture.
        port = self.undivided.rpartition(":")[2]
        self.start(
            *(folder / "undivided.log", *serve, "--middleware", MIDDLEWARE),
            *("--enable-mm-embeds", "--host", "127.0.0.1", "--port", port),
        )

    def _prepare(self, folder: Path, environ: Mapping[str, str], make: Callable[[Path], object] | None = None) -> None:
        """Makes the model, and has what every method needs. Nothing is started."""
        from embferry.models import tiny_qwen

        self.orphans_before = orphans()
        self._log = folder / "log"
        self._folder, self._environ = folder, environ
        self._processes: list[subprocess.Popen[bytes]] = []
        (make or tiny_qwen.make)(folder / "model")

    def start(self, log: Path, *words: str) -> subprocess.Popen[bytes]:
        environ = {"EMBFERRY_CLUSTER_KEY": KEY.written(), "EMBFERRY_ROUTER_API_KEY": API_KEY, **self._environ}
        with log.open("w") as output:
            started = subprocess.Popen(
                words, stdout=output, stderr=output, env=os.environ | ENVIRONMENT | environ, start_new_session=True
            )
        self._processes.append(started)
        return started

    @property
    def log(self) -> str:
        return self._log.read_text()

    @property
    def url(self) -> str:
        return self.found(r"ready: \S+ at (http://\S+)/v1")

    def found(self, pattern: str) -> str:
        matches = re.findall(pattern, self.log)
        assert matches, self.log[-5000:]
        return str(matches[-1])

    def process(self, name: str) -> Any:
        """Returns the ``psutil.Process`` of this ``vllm serve``."""
        import psutil

        (vllm,) = psutil.Process(int(self.found(rf"{name} is starting \(pid (\d+)\)"))).children()
        return vllm

    def kill(self, name: str) -> None:
        """Kills the server and its engine, which delivers embeddings, at the same time.

        Python's resource tracker stays alive and removes the shared memory of both.
        """
        server = self.process(name)
        for process in (server, *server.children(recursive=True)):
            if "resource_tracker" not in " ".join(process.cmdline()):
                process.kill()

    @contextlib.contextmanager
    def held(self, name: str) -> Iterator[None]:
        """Suspends the server while the context lasts; it may be killed meanwhile."""
        import psutil

        process = self.process(name)
        process.suspend()
        try:
            yield
        finally:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()

    def up(self) -> list[str]:
        """Returns the names of the encoders that answer."""
        names = [f"encode-{number}" for number in range(ENCODERS)]
        return [name for name in names if answers(self.at(name) + "/health")]

    def counted(self, name: str) -> float:
        """Returns a metric of the router, summed over its labels."""
        return sum(_numbers(self.url, f"embferry_router_{name}"))

    def encoded_by(self, encoder: str) -> float:
        """Returns how many requests this encoder has answered."""
        return self.metric(encoder, "vllm:request_success_total")

    def computed_by(self, name: str) -> float:
        """Returns how many tokens of prompts this instance has taken."""
        return self.metric(name, "vllm:prompt_tokens_total")

    def metric(self, name: str, metric: str) -> float:
        """Returns a metric of this instance, summed over its labels."""
        return sum(_numbers(self.at(name), metric))

    def received_by(self, name: str) -> float:
        """Returns how many embeddings this instance has received."""
        return sum(_numbers(self.at(name), "embferry_connector_transfers_total"))

    def counted_by_connector(self, name: str, metric: str) -> float:
        """Returns a metric of this instance's connector from its own page, where Prometheus finds it by the router."""
        headers = {"Authorization": f"Bearer {API_KEY}"}
        groups = httpx.get(f"{self.url}/sd", headers=headers, trust_env=False, timeout=5).json()
        labels = {"part": "connector", "worker": self.at(name)}
        (found,) = (group for group in groups if labels.items() <= group["labels"].items())
        scheme, (target,) = found["labels"]["__scheme__"], found["targets"]
        return sum(_numbers(f"{scheme}://{target}", f"embferry_connector_{metric}"))

    def at(self, name: str) -> str:
        """Returns the URL of this ``vllm serve``."""
        return self.found(rf"{name} answers at (\S+)")

    def wait(self, what: str, url: str | None = None) -> None:
        """Waits until the log matches, or the URL answers 200."""
        deadline = time.monotonic() + START_S
        while not (re.search(what, self.log) if url is None else answers(url)):
            assert time.monotonic() < deadline, f"{what}:\n{self.log[-5000:]}"
            assert self.split.poll() is None, self.log[-5000:]
            time.sleep(0.1)

    def tokens(self, url: str, *content: Any, stream: bool = False) -> list[int]:
        """Returns the tokens of the answer, by OpenAI's client."""
        with self.client(url) as client:
            asked: dict[str, Any] = {
                "model": "tiny",
                "messages": [{"role": "user", "content": list(content)}],
                **GREEDY,
            }
            if not stream:
                (choice,) = client.chat.completions.create(**asked, extra_body=MORE).choices
                return list(choice.token_ids)
            chunks = client.chat.completions.create(**asked, extra_body=MORE, stream=True)
            return [token for chunk in chunks for token in getattr(chunk.choices[0], "token_ids", None) or ()]

    def client(self, url: str) -> Any:
        """Returns OpenAI's client for the router, or for the undivided model."""
        import openai

        http = httpx.Client(auth=Proved(url) if url == self.undivided else None, trust_env=False, timeout=CONDITION_S)
        return openai.OpenAI(
            base_url=f"{url}/v1", api_key=API_KEY, max_retries=0, timeout=CONDITION_S, http_client=http
        )

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


class TracedServers(Servers):
    """One encoder, one language instance and a router, which send their spans to a collector. No undivided model."""

    def __init__(self, folder: Path, collector: str) -> None:
        self._prepare(folder, {"OTEL_BSP_SCHEDULE_DELAY": "200"})
        self._traces = ("--traces-endpoint", collector)
        words = ("serve", "--engine", "vllm", "--model", str(folder / "model"), "--port", "0", "--restart-delay", "0.1")
        self.split = self.start(self._log, *EMBFERRY, *words, *self._traces, "--", *VLLM)

    def another_router(self, overlap: str) -> str:
        """Starts one more router before the same instances, with this ``vllm.overlap``. Returns its URL."""
        port = str(free_port())
        where = ("--encode-urls", self.at("encode-0"), "--language-urls", self.at("language-0"), "--port", port)
        words = ("router", "--engine", "vllm", *where, "--overlap", overlap, *self._traces)
        self.start(self._folder / f"router-{port}.log", *EMBFERRY, *words)
        url = f"http://127.0.0.1:{port}"
        self.wait("it is ready", f"{url}/ready")
        return url

    def ask(self, *content: Any, url: str = "", traceparent: str = "", stream: bool = True, **more: Any) -> None:
        """Asks a router, and reads the whole answer."""
        body = {"model": "tiny", "messages": [{"role": "user", "content": list(content)}], **GREEDY, **MORE, **more}
        headers = {"Authorization": f"Bearer {API_KEY}"} | ({"traceparent": traceparent} if traceparent else {})
        path = f"{url or self.url}/v1/chat/completions"
        with httpx.Client(trust_env=False, timeout=CONDITION_S, headers=headers) as client:
            response = client.post(path, json=body | {"stream": stream})
        assert response.status_code == 200, response.text


def picture(seed: int, width: int = 224, height: int = 168) -> dict[str, Any]:
    """Returns a picture of noise: no two have the same embedding."""
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{_noise(seed, width, height, 'PNG')}"}}


def video(seed: int, frames: int) -> dict[str, Any]:
    """Returns a list of frames in vLLM's format."""
    listed = ",".join(_noise(1000 * seed + number, 224, 168, "JPEG") for number in range(frames))
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{listed}"}}


def _noise(seed: int, width: int, height: int, kind: str) -> str:
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


class Proved(httpx.Auth):
    """The digests and proofs that the router adds to its requests to an instance."""

    requires_request_body = True

    def __init__(self, url: str, key: Key = KEY) -> None:
        self._proofs = ProvedRequests(ClusterKeys(key), INSTANCE, url)

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        yield from self._proofs.auth_flow(digested(request))


def answers(url: str) -> bool:
    try:
        return httpx.get(url, trust_env=False, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def until(condition: Callable[[], object], seen: object = None) -> None:
    deadline = time.monotonic() + CONDITION_S
    while not condition():
        assert time.monotonic() < deadline, seen
        time.sleep(0.02)


def orphans() -> set[str]:
    """Returns the shared memory of vLLM that no process maps."""
    found = {path.name for path in Path("/dev/shm").glob("psm_*")}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # it has ended
            text = maps.read_text()
            found = {name for name in found if name not in text}
    return found


def _numbers(url: str, name: str) -> list[float]:
    lines = httpx.get(f"{url}/metrics", trust_env=False, timeout=5).text.splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if re.match(rf"{name}[{{ ]", line)]
