"""``embferry serve --on ray``, as a user starts it."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from embferry.serve.supervisor.first_question import ANSWER
from embferry.trust.keys import Key
from embferry.trust.trust import KEY_ENV
from tests.deploy.ray.command import READY, Serve, served
from tests.deploy.ray.conftest import DEADLINE, START, wait
from tests.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

API_KEY = "a key of the test"
PAGE = Path(__file__).parents[3] / "docs" / "ray.md"


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """The command with keys in its environment, ready."""
    keys = {"EMBFERRY_ROUTER_API_KEY": API_KEY, KEY_ENV: Key.new().written()}
    with served(tmp_path, READY, **keys) as running:
        yield running


def test_the_first_command_of_the_page_needs_no_key_and_its_question_is_answered(tmp_path: Path) -> None:
    """Workers listen where others can reach them. They share a key of their own, which nothing shows."""
    command = next(line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("embferry serve --on ray"))
    words = shlex.split(command, comments=True)
    assert words[:4] == ["embferry", "serve", "--on", "ray"]
    with served(tmp_path, READY, *words[4:]) as running:
        (url,) = running.found(READY)
        (ask,) = wait(lambda: running.found(r": try: (.* ask .*)"), "a question")
        done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.stdout.strip() == ANSWER, done.stderr
        processes = psutil.Process(running.process.pid).children(recursive=True)
        (key,) = {key for process in processes if (key := process.environ().get(KEY_ENV))}
        for worker in httpx.get(f"{url}/workers", trust_env=False, timeout=DEADLINE).json()["workers"]:
            answer = httpx.post(f"{worker['url']}/encode", trust_env=False, timeout=DEADLINE)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "proof_required")
        assert not [process for process in processes if key in " ".join(process.cmdline())]
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0, running.lines
        assert key not in "".join(running.lines)


def test_ctrl_c_ends_also_a_worker_that_has_no_place(tmp_path: Path) -> None:
    with served(tmp_path, "(encode: 1 starting)", "--encoder-gpus", "1000") as running:
        wait(lambda: running.found("(router: 1 running)"), "a router", START)
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0, running.lines
        assert running.found(r"(everything has ended)")
        assert not running.found("(Traceback|has not ended in time)")
        assert not running.found("(Connecting to existing Ray cluster)"), "that of other tests runs beside this one"


def test_a_failed_start_ends_with_its_cause_in_plain_words(tmp_path: Path) -> None:
    """Only the encode worker finds that the port it is to have is taken."""
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        running = Serve("--encode-port", str(port), "--port", str(free_port()), HOME=str(tmp_path))
        assert running.wait(START) == 1, running.lines
    assert re.match(rf"embferry: encode cannot start on Ray: \S.*\b{port}\b", running.lines[-1]), running.lines
    assert not [line for line in running.lines[:-1] if line.startswith("embferry: ")]
    assert not running.found("(AttributeError)")


def test_a_port_that_is_taken_is_refused_with_what_helps_on_ray() -> None:
    """Ray's proxies do not take a free port, so that is not advised."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        running = Serve("--port", str(taken.getsockname()[1]))
        assert running.wait() == 1
    assert "is taken; end the process that has it, or choose another with --port\n" in running.lines[-1]


def test_the_shown_command_works_and_ctrl_c_ends_everything(serve: Serve) -> None:
    """The keys of the environment count: the router asks for one, and workers for proofs of the other."""
    (url,) = serve.found(READY)
    (curl,) = serve.found(r": or: (curl .*)")
    assert httpx.get(f"{url}/v1/models", trust_env=False, timeout=DEADLINE).status_code == 401
    environment = {**os.environ, "EMBFERRY_ROUTER_API_KEY": API_KEY, "no_proxy": "*"}
    done = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, env=environment, check=False)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"] == "red", shlex.join([curl, done.stderr])
    authorized = {"Authorization": f"Bearer {API_KEY}"}
    pages = httpx.get(f"{url}/workers", headers=authorized, trust_env=False, timeout=DEADLINE).json()
    for worker in pages["workers"]:
        answer = httpx.post(f"{worker['url']}/encode", trust_env=False, timeout=DEADLINE)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "proof_required")
    for name in ("encode", "language", "router"):
        assert serve.found(rf"({name}: 1 running)")
    assert not [line for line in serve.lines if API_KEY in line]
    serve.process.send_signal(signal.SIGINT)
    assert serve.wait() == 0, serve.lines
    assert serve.found(r"(everything has ended)")


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    running = Serve("--address", f"127.0.0.1:{free_port()}", "--port", str(free_port()))
    assert running.wait() == 1
    assert [line for line in running.lines if line.startswith("embferry: the Ray cluster at 127.0.0.1:")]
