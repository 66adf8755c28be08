"""Two encoders and a language server, divided by the plug-in, and what an undivided server answers."""

from __future__ import annotations

import base64
import io
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from tests.connectors.faulty_link import ADVERTISES, LISTENS, FaultyLink, ports_at
from tests.ports import free_port

from .servers import DIVIDED, PLUGIN, START_S, Server, ask, tokens_of

WAIT_S = 120.0


def picture(seed: int, width: int = 224, height: int = 168) -> str:
    """Returns the URL of a picture of noise: no two have the same embedding. 224 × 168 is 48 tokens."""
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(file, "PNG")
    return data_url(file.getvalue())


def data_url(content: bytes) -> str:
    """Returns a picture of PNG as a URL."""
    return "data:image/png;base64," + base64.b64encode(content).decode()


def damaged(seed: int, width: int = 224, height: int = 168) -> str:
    """Returns the URL of a picture that ends too early."""
    content = base64.b64decode(picture(seed, width, height).partition(",")[2])
    return data_url(content[: len(content) // 2])


VIDEO = "data:video/mp4;base64," + base64.b64encode(Path(__file__).with_name("two_seconds.mp4").read_bytes()).decode()
QUESTIONS: dict[str, list[str]] = {
    "one": [picture(1)],
    "another": [picture(2)],
    "two": [picture(1), picture(2)],
    "three": [picture(3), picture(4), picture(5)],
    "large": [picture(8, 560, 560)],
    "video": [VIDEO],
    "video and picture": [VIDEO, picture(1)],
    "text": [],
}


def plain(width: int, height: int) -> str:
    """Returns the URL of a picture of one colour, which takes few bytes in any size."""
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 40, 40)).save(file, "PNG")
    return data_url(file.getvalue())


AT_LIMITS: dict[str, list[str]] = {
    "one pixel": [plain(1, 1)],
    "a line": [plain(2000, 20)],
    "a line, upright": [plain(20, 2000)],
    "thinner than the model reads": [plain(3000, 3)],
    "larger than the model reads": [plain(6000, 6000)],
    "more tokens than the context": [plain(1120, 1120)] * 4,
}
Outcome = tuple[int, list[int]]
"""The status of an answer, and its tokens if there are any."""


def outcome_of(response: httpx.Response) -> Outcome:
    """Returns the outcome of a request that may be refused."""
    return response.status_code, tokens_of(response) if response.status_code == 200 else []


def wait_until(is_so: Callable[[], bool]) -> None:
    """Waits, and fails if it takes too long."""
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Stage:
    """The servers.

    Attributes:
        expected: The tokens of the undivided server, by the name of the question.
        at_limits: The outcomes of the undivided server, likewise.
        link: Carries the data connections of the language server.
    """

    model: Path
    encoders: list[Server]
    language: Server
    metrics_port: int
    expected: dict[str, list[int]]
    at_limits: dict[str, Outcome]
    link: FaultyLink | None = None
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(16))

    def ask(self, name: str, **more: Any) -> httpx.Response:
        """Asks one of the questions."""
        return ask(self.language, QUESTIONS[name], **more)

    def is_right(self, name: str, **more: Any) -> bool:
        """Whether the answer is the undivided server's."""
        return tokens_of(self.ask(name, **more)) == self.expected[name]

    def later(self, pictures: Sequence[str], **more: Any) -> Future[httpx.Response]:
        """Asks, without waiting for the answer."""
        return self.pool.submit(ask, self.language, pictures, **more)

    def abort(self, rid: str) -> None:
        """Aborts a request."""
        url = f"{self.language.url}/abort_request"
        assert httpx.post(url, json={"rid": rid}, timeout=WAIT_S, trust_env=False).status_code == 200

    def metrics(self) -> dict[str, float]:
        """Returns the metrics of the language server by name and labels."""
        text = httpx.get(f"http://{LISTENS}:{self.metrics_port}/metrics", timeout=WAIT_S, trust_env=False).text
        return {
            name: float(value) for name, value in re.findall(r"^embferry_connector_(\S+) (\S+)$", text, re.MULTILINE)
        }

    def wait_for_dispatch(self, count: int) -> None:
        """Waits until the language server has asked encoders for so many requests more than at the last call."""
        self._dispatched += count
        wait_until(lambda: self.language.text().count("Dispatching") >= self._dispatched)

    _dispatched: int = 0

    def mark(self) -> None:
        """Counts dispatches from here on."""
        self._dispatched = self.language.text().count("Dispatching")


def started(servers: Sequence[Server]) -> None:
    """Waits until the servers answer."""
    for server in servers:
        server.started()


def answers_of_one(model: Path, log: Path) -> tuple[dict[str, list[int]], dict[str, Outcome]]:
    """Returns the answers of an undivided server, which ends again."""
    with Server(model, log) as server:
        server.started()
        expected = {name: tokens_of(ask(server, pictures)) for name, pictures in QUESTIONS.items()}
        return expected, {name: outcome_of(ask(server, pictures)) for name, pictures in AT_LIMITS.items()}


@contextmanager
def running(folder: Path, make_model: Callable[[Path], object]) -> Iterator[Stage]:
    """Starts everything: first the undivided server, then the others at once."""
    model = folder / "model"
    make_model(model)
    expected, at_limits = answers_of_one(model, folder / "undivided.log")
    metrics_port = free_port()
    with ExitStack() as stack:
        encoders = [
            stack.enter_context(Server(model, folder / f"encoder-{n}.log", ["--encoder-only", *DIVIDED], PLUGIN))
            for n in range(2)
        ]
        takes = PLUGIN | {
            "EMBFERRY_SGLANG_HOST": LISTENS,
            "EMBFERRY_SGLANG_ADVERTISE": ADVERTISES,
            "EMBFERRY_SGLANG_METRICS_PORT": str(metrics_port),
        }
        urls = [encoder.url for encoder in encoders]
        arguments = ["--language-only", "--encoder-urls", *urls, "--encoder-bootstrap-port", str(free_port()), *DIVIDED]
        language = stack.enter_context(Server(model, folder / "language.log", arguments, takes))
        started([*encoders, language])
        stage = Stage(model, encoders, language, metrics_port, expected, at_limits)
        try:
            insert_link(stage)
            yield stage
        finally:
            if stage.link is not None:
                stage.link.close()
            stage.pool.shutdown(cancel_futures=True)


def insert_link(stage: Stage) -> None:
    """Puts a link before the port where the language server takes data, once it has one: during the first request.

    Nothing listens at the advertised address before the link does, so that request may come too early, and fail.
    """
    before = ports_at(LISTENS)
    first = stage.later(QUESTIONS["one"])
    wait_until(lambda: bool(ports_at(LISTENS) - before))
    (port,) = ports_at(LISTENS) - before
    stage.link = FaultyLink(port)
    assert first.result(START_S).status_code in (httpx.codes.OK, httpx.codes.BAD_GATEWAY)
    assert tokens_of(ask(stage.language, QUESTIONS["one"])) == stage.expected["one"]
