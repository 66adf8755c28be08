"""Each kind of process is killed, or told to end, during a transfer: what goes on, and what is made again."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from embferry.serve.config import RouterSettings, ServeSettings, Settings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.supervisor import LocalCluster, ProcessView
from embferry.serve.undivided import Undivided, UndividedAnswer
from tests.serve.pictures import data_url, png
from tests.serve.workers.joined import DEADLINE
from tests.serve.workers.test_processes import SETTINGS, START, wait

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

FRAMES = 160
TEXT = "what is there?"
MAX_TOKENS = 8
STREAM = [False, True]


def settings_of(workers: int) -> Settings:
    return SETTINGS.model_copy(
        update={
            "serve": ServeSettings(
                restart_delay=0.1, start_timeout=START, encode_workers=workers, language_workers=workers
            ),
            "router": RouterSettings(port=0, poll_interval=0.1, request_timeout=START),
            # A test suspends encode workers for longer than a language worker waits for its requests at its end.
            "transfer": SETTINGS.transfer.model_copy(update={"heartbeat_max_failures": 100}),
        }
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Two encode and two language workers, with pools of one token."""
    with LocalCluster(settings_of(2), logs=tmp_path_factory.mktemp("pair") / "log") as running:
        running.wait_ready(START)
        yield running


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """One encode and one language worker, with a pool of one token."""
    with LocalCluster(settings_of(1), logs=tmp_path_factory.mktemp("single") / "log") as running:
        running.wait_ready(START)
        yield running


def frames(seed: int) -> list[bytes]:
    """Returns the pictures of a video that no other seed gives."""
    return [png(64, 64, f"rgb({n % 256},{n * 7 % 256},{(n * 31 + seed) % 256})") for n in range(FRAMES)]


def undivided(seed: int) -> UndividedAnswer:
    return Undivided(SETTINGS).answer([EncodeItem("video", frames=frames(seed))], TEXT, MAX_TOKENS)


def body_of(seed: int, **more: Any) -> dict[str, Any]:
    """Returns a request about a video."""
    joined = ",".join(data_url(frame).partition(",")[2] for frame in frames(seed))
    video = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{joined}"}}
    content = [video, {"type": "text", "text": TEXT}]
    return {"model": "shapes", "messages": [{"role": "user", "content": content}], "max_tokens": MAX_TOKENS, **more}


class Asking:
    """A request on a thread of its own. A context manager, which waits for the answer.

    Attributes:
        lines: of the body so far.
        status: that of the answer, when its head is here; 0 if the connection has ended before.
    """

    def __init__(self, cluster: LocalCluster, body: dict[str, Any]) -> None:
        self._url, self._body = f"{cluster.url}/v1/chat/completions", body
        self.status, self.headers, self.lines = 0, httpx.Headers(), list[str]()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def _ask(self) -> None:
        with (
            contextlib.suppress(httpx.TransportError),
            httpx.Client(timeout=START, trust_env=False) as client,
            client.stream("POST", self._url, json=self._body) as answer,
        ):
            self.headers, self.status = answer.headers, answer.status_code
            for line in answer.iter_lines():
                self.lines.append(line)

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._thread.join(START)
        assert not self._thread.is_alive(), "the request hangs"

    def json(self) -> dict[str, Any]:
        return dict(json.loads("".join(self.lines)))

    def events(self) -> list[dict[str, Any]]:
        """Returns the events of a stream so far, but for ``[DONE]``."""
        data = [line.removeprefix("data: ") for line in list(self.lines) if line.startswith("data: {")]
        return [json.loads(one) for one in data]

    def check_says_when(self, *codes: str) -> None:
        """Checks that the answer is an error with one of these codes that says when to ask again."""
        assert self.status in (502, 503), self.lines
        assert self.json()["error"]["code"] in codes
        assert self.headers["x-should-retry"] == "true"
        assert int(self.headers["retry-after"]) >= 1


def answered(cluster: LocalCluster, seed: int, **more: Any) -> Asking:
    with Asking(cluster, body_of(seed, **more)) as asking:
        pass
    return asking


def of_role(cluster: LocalCluster, role: str) -> list[ProcessView]:
    return [view for view in cluster.workers if view.role == role]


def named(cluster: LocalCluster, name: str) -> ProcessView:
    return next(view for view in cluster.processes if view.name == name)


def metric(url: str, name: str) -> float:
    """Returns a metric, summed over the labels that ``name`` leaves open; 0 if the process is gone."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=DEADLINE, trust_env=False).text
    except httpx.TransportError:
        return 0
    lines = [line for line in text.splitlines() if re.match(rf"embferry_{re.escape(name)}[{{, ]", line)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def encodes(cluster: LocalCluster) -> float:
    return sum(metric(view.url, "encode_items_encoded_total") for view in of_role(cluster, "encode"))


def ended(cluster: LocalCluster, outcome: str) -> float:
    name = f'encode_rooms_ended_total{{outcome="{outcome}"}}'
    return sum(metric(view.url, name) for view in of_role(cluster, "encode"))


def receiving(cluster: LocalCluster) -> ProcessView | None:
    """Returns the language worker that has granted blocks."""
    name = 'language_pool_blocks{state="used"}'
    return next((view for view in of_role(cluster, "language") if view.url and metric(view.url, name)), None)


def under_way(cluster: LocalCluster, encodes_before: float) -> ProcessView:
    """Waits for the transfer of a video that has been encoded. Returns its language worker."""
    found: list[ProcessView] = []

    def is_under_way() -> bool:
        view = receiving(cluster) if encodes(cluster) > encodes_before else None
        found.extend([] if view is None else [view])  # asked again, it may have no block at that moment
        return bool(found)

    wait(is_under_way, "a transfer under way")
    return found[0]


def wait_whole(cluster: LocalCluster) -> None:
    """Waits until the router knows the workers that there are, and no other."""
    number = cluster.settings.serve.language_workers

    def is_whole() -> bool:
        ids = httpx.get(f"{cluster.url}/workers", timeout=DEADLINE, trust_env=False).json()["workers"]
        urls = {view.url for view in cluster.workers}
        return len(ids) == 2 * number and {one["url"] for one in ids} == urls and "" not in urls

    wait(is_whole, "all workers registered, and no other", START)


@contextlib.contextmanager
def restarted(cluster: LocalCluster, view: ProcessView) -> Iterator[None]:
    """Waits at the end until the worker runs again."""
    yield
    wait(lambda: named(cluster, view.name).starts > view.starts, "a restart", START)
    wait(lambda: named(cluster, view.name).ready, "its first answer", START)
    wait_whole(cluster)


@pytest.mark.parametrize("stream", STREAM)
def test_what_was_encoded_for_a_killed_worker_is_not_encoded_again(pair: LocalCluster, stream: bool) -> None:
    seed = 1 + stream
    expected = undivided(seed)
    wait_whole(pair)
    encoded, delivered = encodes(pair), ended(pair, "delivered")
    attempts = metric(pair.url, "router_chat_second_attempts_total")
    with Asking(pair, body_of(seed, stream=stream)) as asking:
        killed = under_way(pair, encoded)
        with restarted(pair, killed):
            os.kill(killed.pid, signal.SIGKILL)
            asking.__exit__()
    assert asking.status == 200, asking.lines
    extension = asking.events()[-1]["embferry"] if stream else asking.json()["embferry"]
    assert tuple(extension["tokens"]) == expected.tokens
    assert extension["transfer"]["total_tokens"] == expected.visual_tokens
    assert metric(pair.url, "router_chat_second_attempts_total") == attempts + 1
    wait(lambda: ended(pair, "delivered") == delivered + 1, "one transfer delivered, and the first one not")
    assert encodes(pair) == encoded + 1


@pytest.mark.parametrize("stream", STREAM)
def test_the_only_worker_that_is_killed_during_a_transfer_is_an_error_at_once(
    single: LocalCluster, stream: bool
) -> None:
    """The error says when to ask again. Once the worker has been restarted, the same question needs no encode."""
    seed = 10 + stream
    expected = undivided(seed)
    wait_whole(single)
    encoded = encodes(single)
    with Asking(single, body_of(seed, stream=stream)) as asking:
        killed = under_way(single, encoded)
        with restarted(single, killed):
            os.kill(killed.pid, signal.SIGKILL)
            asking.__exit__()
            now = named(single, killed.name)  # loading the model takes seconds; that is no time for an error to wait
            assert now.starts == killed.starts or not now.ready, "the error has waited for the restart"
    asking.check_says_when("worker_failed", "no_worker")
    again = answered(single, seed)
    assert again.status == 200, again.lines
    assert tuple(again.json()["embferry"]["tokens"]) == expected.tokens
    assert encodes(single) == encoded + 1


def test_requests_during_a_restart_are_refused_at_once_or_answered(single: LocalCluster) -> None:
    """Each has a video of its own, so the videos that were encoded are those of the answers."""
    wait_whole(single)
    encoded, seed = encodes(single), 20
    (killed,) = of_role(single, "language")
    outcomes: list[int] = []
    with restarted(single, killed):
        os.kill(killed.pid, signal.SIGKILL)
        while 200 not in outcomes:
            asking = answered(single, seed + len(outcomes))
            outcomes.append(asking.status)
            if asking.status != 200:
                asking.check_says_when("no_worker", "worker_failed")
    assert len(outcomes) > 1
    assert encodes(single) == encoded + 1


def test_a_stream_whose_only_worker_is_killed_ends_with_an_error(single: LocalCluster) -> None:
    wait_whole(single)
    (killed,) = of_role(single, "language")
    with Asking(single, body_of(50, stream=True, max_tokens=1000, ignore_eos=True)) as asking:
        wait(lambda: len(asking.events()) > 2, "the first tokens")
        with restarted(single, killed):
            os.kill(killed.pid, signal.SIGKILL)
            asking.__exit__()
    assert asking.status == 200
    assert asking.events()[-1]["error"]["code"] == "worker_failed"
    assert "data: [DONE]" not in asking.lines


@pytest.mark.parametrize("stream", STREAM)
def test_a_worker_that_is_told_to_end_hands_its_requests_over(pair: LocalCluster, stream: bool) -> None:
    """It cannot finish them in time. The encode worker is not blamed: it is asked again, and encodes nothing."""
    seed = 60 + stream
    expected = undivided(seed)
    wait_whole(pair)
    encoded = encodes(pair)
    with Asking(pair, body_of(seed, stream=stream)) as asking:
        told = under_way(pair, encoded)
        with restarted(pair, told):
            for view in of_role(pair, "encode"):
                os.kill(view.pid, signal.SIGSTOP)  # the transfer stands still, so that the worker has to give it up
            os.kill(told.pid, signal.SIGTERM)
            try:
                wait(lambda: named(pair, told.name).pid != told.pid, "its end")
            finally:
                for view in of_role(pair, "encode"):
                    os.kill(view.pid, signal.SIGCONT)
            asking.__exit__()
    assert asking.status == 200, asking.lines
    extension = asking.events()[-1]["embferry"] if stream else asking.json()["embferry"]
    assert tuple(extension["tokens"]) == expected.tokens
    assert encodes(pair) == encoded + 1


def test_what_a_killed_encode_worker_had_made_is_made_again(pair: LocalCluster) -> None:
    """By the other one, or by the one that has taken its place."""
    seed = 70
    expected = undivided(seed)
    wait_whole(pair)
    encoded = encodes(pair)
    with Asking(pair, body_of(seed)) as asking:
        under_way(pair, encoded)
        sending = [view for view in of_role(pair, "encode") if metric(view.url, 'encode_rooms{state="inflight"}')]
        (killed,) = sending
        (other,) = (view for view in of_role(pair, "encode") if view.name != killed.name)
        before = metric(other.url, "encode_items_encoded_total")
        with restarted(pair, killed):
            os.kill(killed.pid, signal.SIGKILL)
            asking.__exit__()
    assert asking.status == 200, asking.lines
    assert tuple(asking.json()["embferry"]["tokens"]) == expected.tokens
    assert encodes(pair) == before + 1  # the killed one's count began again


def test_a_killed_router_ends_its_connections_and_no_embedding(single: LocalCluster) -> None:
    """The workers drop the request. It is asked again, and the encode worker still has the embedding."""
    seed = 80
    expected = undivided(seed)
    wait_whole(single)
    encoded, router = encodes(single), named(single, "router")
    with Asking(single, body_of(seed)) as asking:
        under_way(single, encoded)
        with restarted(single, router):
            os.kill(router.pid, signal.SIGKILL)
            asking.__exit__()
    assert (asking.status, asking.lines) == (0, [])
    wait(lambda: receiving(single) is None, "no block in use")
    again = answered(single, seed)
    assert tuple(again.json()["embferry"]["tokens"]) == expected.tokens
    assert encodes(single) == encoded + 1


def test_a_killed_bootstrap_server_costs_no_request(single: LocalCluster) -> None:
    seed = 90
    expected = undivided(seed)
    wait_whole(single)
    encoded, killed = encodes(single), named(single, "bootstrap")
    attempts = metric(single.url, "router_chat_second_attempts_total")
    with Asking(single, body_of(seed)) as asking:
        under_way(single, encoded)
        os.kill(killed.pid, signal.SIGKILL)
    assert tuple(asking.json()["embferry"]["tokens"]) == expected.tokens
    assert metric(single.url, "router_chat_second_attempts_total") == attempts
    wait(lambda: named(single, "bootstrap").starts > killed.starts, "a restart", START)
    wait_whole(single)
