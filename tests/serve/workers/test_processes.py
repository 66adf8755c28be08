"""The real processes: they start, serve, restart after a crash, and end with their parent."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from embferry.serve.config import BootstrapSettings, RouterSettings, ServeSettings, Settings, TransferSettings
from embferry.serve.supervisor import ClusterError, LocalCluster, ProcessView
from tests.serve.pictures import data_url, encoded, noise, png
from tests.serve.workers.joined import DEADLINE

pytestmark = [pytest.mark.integration, pytest.mark.timeout(900)]

START = 300.0
"""Seconds until the start of a cluster counts as hanging: every worker imports torch and loads a model."""
PREFIX = r"\d\d:\d\d:\d\d\.\d{3} (info|warning) +(serve|bootstrap|router|encode-0|language-0)\[\d+\] embferry\."
STARTED = r"is starting \(pid (\d+)\)"
SETTINGS = Settings(
    router=RouterSettings(port=0, poll_interval=0.1),
    bootstrap=BootstrapSettings(port=0),
    transfer=TransferSettings(num_blocks=1, block_size=1),
    serve=ServeSettings(restart_delay=0.1, start_timeout=START),
)


def wait(condition: Callable[[], bool], goal: str, seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{goal}: not within {seconds:g} s"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def listening(url: str) -> bool:
    host, _, port = url.removeprefix("http://").rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def ask(cluster: LocalCluster, *media: dict[str, Any]) -> httpx.Response:
    content = [*media, {"type": "text", "text": "what is there?"}]
    body = {"model": "shapes", "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=START, trust_env=False)


def image() -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(encoded(noise(96, 64)))}}


def long_video(frames: int = 160) -> dict[str, Any]:
    pictures = [png(64, 64, f"rgb({n % 256},{n * 7 % 256},{n * 31 % 256})") for n in range(frames)]
    joined = ",".join(base64.b64encode(picture).decode() for picture in pictures)
    return {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{joined}"}}


@pytest.fixture(scope="module", params=["shm", pytest.param("tcp", marks=pytest.mark.sweeps)])
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    transfer = SETTINGS.transfer.model_copy(update={"transports": (request.param,)})
    settings = SETTINGS.model_copy(update={"transfer": transfer})
    with LocalCluster(settings, logs=tmp_path_factory.mktemp("cluster") / "log") as running:
        running.wait_ready(START)
        yield running
        known = running.processes
    assert not any(alive(view.pid) for view in known)
    assert not any(listening(view.url) for view in known)


def worker(cluster: LocalCluster, role: str) -> ProcessView:
    return next(view for view in cluster.workers if view.role == role)


def pool(cluster: LocalCluster) -> dict[str, int]:
    return dict(httpx.get(f"{worker(cluster, 'language').url}/debug/pool", timeout=DEADLINE, trust_env=False).json())


def test_a_question_about_a_picture_is_answered(cluster: LocalCluster) -> None:
    response = ask(cluster, image())
    assert response.status_code == 200, response.text
    transfer = response.json()["embferry"]["transfer"]
    assert transfer["initial"] == 1
    assert transfer["resumed"] == transfer["total_tokens"] - 1  # each transfer moves one token
    assert (transfer["transport"],) == cluster.settings.transfer.transports
    wait(lambda: pool(cluster) == {"num_blocks": 1, "available": 1, "used": 0, "quarantined": 0}, "no block in use")
    (through_router,) = httpx.get(f"{cluster.url}/debug/pool", timeout=DEADLINE, trust_env=False).json()["pools"]
    assert through_router.pop("worker").startswith("language-")
    assert through_router.pop("url") == worker(cluster, "language").url
    assert through_router == pool(cluster)


@pytest.mark.parametrize("role", ["encode", "language"])
def test_a_worker_killed_during_a_transfer_is_restarted(cluster: LocalCluster, role: str) -> None:
    """The worker is restarted, and the next request succeeds.

    The request is answered if the new worker is there by the time the old one is known to be lost; otherwise it ends
    with the error of a lost peer.
    """
    killed = worker(cluster, role)
    answers: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: answers.append(ask(cluster, long_video())), daemon=True)
    asking.start()
    wait(lambda: pool(cluster)["used"] > 0, "a transfer in progress")
    os.kill(killed.pid, signal.SIGKILL)
    asking.join(DEADLINE)
    assert answers, "the request hangs"
    if answers[0].status_code != 200:
        assert answers[0].status_code in (502, 503), answers[0].text
        assert answers[0].json()["error"]["code"] in ("peer_gone", "worker_failed", "transport_error")
    wait(lambda: worker(cluster, role).starts == killed.starts + 1 and worker(cluster, role).ready, "a restart", START)
    # Until its lease expires, the router may know the killed worker alone.
    wait(lambda: ask(cluster, image()).status_code == 200, "an answer", START)
    wait(lambda: pool(cluster)["available"] == 1, "no block in use")


def test_a_process_that_cannot_start_ends_the_cluster_with_the_reason(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = SETTINGS.model_copy(update={"bootstrap": BootstrapSettings(port=port)})
        why = rf"bootstrap cannot start: .*127\.0\.0\.1:{port} .*--bootstrap-port"
        with LocalCluster(settings, logs=tmp_path / "log") as cluster, pytest.raises(ClusterError, match=why):
            cluster.wait_ready(START)
    assert "Traceback" not in (tmp_path / "log").read_text()


class Serve:
    """The process ``embferry serve``, started as by a user."""

    def __init__(self, *more: object) -> None:
        command = "from embferry.cli.main import run; run()"
        flags = ["--port", "0", "--bootstrap-port", "0", "--start-timeout", str(START), *map(str, more)]
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("EMBFERRY_", "SGLANG_"))}
        self.process = subprocess.Popen(
            [sys.executable, "-c", command, "serve", *flags], stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def found(self, pattern: str) -> list[str]:
        return [found[1] for line in list(self.lines) if (found := re.search(pattern, line))]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self._reader.join(DEADLINE)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def serve(request: pytest.FixtureRequest) -> Iterator[Serve]:
    """The command, ready. More flags: ``@pytest.mark.parametrize("serve", [(…)], indirect=True)``."""
    running = Serve(*getattr(request, "param", ()))
    try:
        wait(
            lambda: bool(running.found(r"ready: shapes at (\S+)")) or running.process.poll() is not None, "ready", START
        )
        assert running.process.poll() is None, running.lines
        yield running
    finally:
        running.close()


@pytest.mark.parametrize(
    "options",
    [("--bootstrap-port",), ("--port",), ("--encode-port",), ("--language-port",)],
    ids=lambda options: options[0],
)
def test_a_port_in_use_ends_serve_with_one_line_that_names_it_and_the_flag(options: tuple[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        running = Serve(*options, port)
        try:
            assert running.process.wait(START) == 1
        finally:
            running.close()
    (line,) = running.lines
    assert re.match(rf"embferry: port {port} of .* is taken; .*with {options[0]}\b", line)


def test_the_log_has_one_format_and_one_line_for_each_event(serve: Serve) -> None:
    (url,) = serve.found(r"ready: shapes at (\S+)/v1")
    body = {"model": "shapes", "messages": [{"role": "user", "content": [image()]}], "max_tokens": 4}
    headers = {"X-Request-Id": "mine"}
    refused = httpx.post(
        f"{url}/v1/chat/completions", json={}, headers=headers | {"X-Request-Id": "bad"}, timeout=DEADLINE
    )
    assert refused.status_code == 400
    response = httpx.post(f"{url}/v1/chat/completions", json=body, headers=headers, timeout=DEADLINE)
    assert response.status_code == 200, response.text
    wait(lambda: bool(serve.found("( request=mine )")), "the request's line")
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(DEADLINE) == 0
    serve.close()
    (line,) = [line for line in serve.lines if "request=mine" in line]
    for fact in ("status=200", "outcome=answered", "seconds=", "tokens=4", "transfer_initial=1", "room="):
        assert fact in line
    (line,) = [line for line in serve.lines if "request=bad" in line]
    assert "outcome=invalid_request error=" in line
    assert [line for line in serve.lines if not re.match(PREFIX, line)] == []
    assert serve.found(r": try: (.* ask --url .*)")
    assert serve.found(r": or: (curl .*)")
    for name in ("encode-0", "language-0"):
        assert serve.found(rf"({name}\[\d+\] .*: loading torch and transformers)")
        assert serve.found(rf"({name}\[\d+\] .*: loading the (?:vision encoder|language model) from )")
    for name in ("bootstrap", "router", "encode-0", "language-0"):
        assert len([line for line in serve.lines if re.search(rf"\b{name} (is starting|answers)", line)]) == 2
    assert [line for line in serve.lines if re.search("listens on|worker answers|registered|joined", line)] == []


TINY_POOL = ("--transfer-num-blocks", "1", "--transfer-block-size", "4")


@pytest.mark.sweeps
@pytest.mark.parametrize("serve", [(*TINY_POOL, "--log-format", "json")], indirect=True)
def test_json_is_every_line_and_the_shown_commands_work_when_pasted(serve: Serve) -> None:
    (shown,) = [json.loads(line) for line in serve.lines if '"curl"' in line]
    environment = {**os.environ, "no_proxy": "*"}
    for command in (shown["ask"], shown["curl"]):
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command
        if command is shown["ask"]:
            assert done.stdout == shown["answer"] + "\n"
        else:
            answer = json.loads(done.stdout)
            assert answer["choices"][0]["message"]["content"] == shown["answer"]
    phrases = ("needs resume for remaining data", "Sent resume transfer request", "completed with resumed transfer")
    for phrase in phrases:
        wait(lambda phrase=phrase: len(serve.found(f"({phrase})")) == 2, phrase)  # once for each question
    serve.process.send_signal(signal.SIGINT)
    assert serve.process.wait(DEADLINE) == 0
    serve.close()
    lines = [json.loads(line) for line in serve.lines]
    assert {line["process"] for line in lines} == {"serve", "router", "encode-0", "language-0"}
    transfers = [line for line in lines if any(phrase in line["message"] for phrase in phrases)]
    requests = {line["request_id"]: line["room"] for line in lines if line["message"] == "request" and "room" in line}
    assert {line["request_id"]: line["room"] for line in transfers} == requests
    assert {line["worker"].partition("-")[0] for line in transfers} == {"language"}


@pytest.mark.sweeps
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_no_process_outlives_the_supervisor(serve: Serve, how: signal.Signals) -> None:
    pids = [int(pid) for pid in serve.found(STARTED)]
    urls = serve.found(r"answers at (http://\S+)")
    assert len(pids) == 4
    assert all(alive(pid) for pid in pids)
    serve.process.send_signal(how)
    wait(lambda: not any(alive(pid) for pid in pids), "the end of all processes")
    status = serve.process.wait(DEADLINE)
    assert status == (-signal.SIGKILL if how is signal.SIGKILL else 0)
    assert not any(listening(url) for url in urls)
