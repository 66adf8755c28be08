"""Many slow and hostile clients at the ports of real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import psutil
import pytest

from tests.ports import free_port
from tests.serve.fakes import Deployment
from tests.serve.test_clients import CHAT
from tests.serve.workers.joined import DEADLINE
from tests.serve.workers.test_processes import START, wait

pytestmark = [pytest.mark.integration, pytest.mark.sweeps, pytest.mark.timeout(900)]

FILES = 256
PROGRAM = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))
from embferry.cli.main import run
run()
"""
MIB = 1 << 20
BODY = 190 * MIB


class Process:
    """A command of embferry with few descriptors, in a process of its own."""

    def __init__(self, *words: str, log: int, **environ: str) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("EMBFERRY_")}
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *words, "--port", str(self.port)], stderr=log, env=kept | environ
        )

    def __enter__(self) -> Process:
        wait(self.answers, "an answer of the process", START)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def answers(self) -> bool:
        assert self.process.poll() is None, "it has ended"
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.url}/health", timeout=DEADLINE, trust_env=False).status_code == 200
        return False

    @property
    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def memory(self) -> int:
        return int(psutil.Process(self.process.pid).memory_info().rss)

    def connect(self, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), DEADLINE, source_address=(source, 0))


@pytest.fixture
def router(tmp_path: Path) -> Iterator[Process]:
    """A router with few descriptors, before fake workers."""
    with ExitStack() as held:
        fakes, log = held.enter_context(Deployment()), held.enter_context((tmp_path / "log").open("wb"))
        process = held.enter_context(Process("router", "--bootstrap-url", fakes.fake_url, log=log.fileno()))
        wait(lambda: get(process, "/ready").status_code == 200, "a ready router")
        yield process


def get(process: Process, path: str) -> httpx.Response:
    return httpx.get(process.url + path, timeout=DEADLINE, trust_env=False)


def asked(process: Process) -> int:
    """Asks a question from another address than theirs. Returns the status."""
    with httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=DEADLINE) as client:
        return client.post(f"{process.url}/v1/chat/completions", json=CHAT).status_code


class Trickle:
    """Connections that each send a byte again and again, on a thread. A context manager."""

    def __init__(self, process: Process, count: int, head: bytes, source: str = "127.0.0.1") -> None:
        self._sockets = [process.connect(source) for _ in range(count)]
        for sock in self._sockets:
            with contextlib.suppress(ConnectionError):
                sock.sendall(head)
        self.rounds = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Trickle:
        self._thread.start()
        wait(lambda: self.rounds > 1, "bytes of all connections")
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        for sock in self._sockets:
            sock.close()

    def _run(self) -> None:
        while not self._over.is_set():
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.send(b"a")
            self.rounds += 1
            self._over.wait(0.1)  # often enough for none to be silent


HEADS = {
    "head": b"GET / HTTP/1.1\r\nX: ",
    "body": b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
    "unread body": b"POST /v1/models HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n",
}


@pytest.mark.parametrize("sent", HEADS)
def test_connections_that_trickle_keep_nobody_out(router: Process, sent: str) -> None:
    """400 of them stand against 256 descriptors; the router goes on to call bootstrap server and workers."""
    with Trickle(router, 400, HEADS[sent]):
        for _ in range(20):
            assert asked(router) == 200
            assert get(router, "/ready").status_code == 200
        assert router.descriptors < FILES


def test_bodies_that_never_end_take_bounded_memory(router: Process) -> None:
    """Eight clients of one address announce 190 MB and send nearly all of it; they get no end."""
    before, refused = router.memory, []

    def send(sock: socket.socket) -> None:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {BODY}\r\n\r\n"
        sock.sendall(head.encode())
        sock.settimeout(1)
        with contextlib.suppress(TimeoutError):
            refused.append(sock.recv(4096))
            return
        sock.settimeout(DEADLINE)
        for _ in range(BODY // MIB - 1):
            sock.sendall(bytes(MIB))

    with ExitStack() as held:
        sockets = [held.enter_context(router.connect()) for _ in range(8)]
        sending = [threading.Thread(target=send, args=(sock,), daemon=True) for sock in sockets]
        for thread in sending:
            thread.start()
        for thread in sending:
            thread.join()
        assert len(refused) == 6
        for answer in refused:
            assert answer.startswith(b"HTTP/1.1 503 ")
            assert b"retry-after: 1\r\n" in answer.lower()
        assert asked(router) == 200
        assert router.memory - before < 600 * MIB


def test_a_process_whose_log_nobody_reads_goes_on_and_ends() -> None:
    reader, writer = os.pipe()
    try:
        with Process("router", "--log-level", "debug", "--bootstrap-url", "http://127.0.0.1:9", log=writer) as process:
            with httpx.Client(base_url=process.url, timeout=DEADLINE, trust_env=False) as client:
                for _ in range(1000):  # each with a line of 150 bytes; a pipe takes 64 KiB
                    assert client.get("/v1/models").status_code == 200
            assert process.answers()
            process.process.send_signal(signal.SIGTERM)
            assert process.process.wait(DEADLINE) == 0
    finally:
        os.close(reader)
        os.close(writer)


class Dripping:
    """A bootstrap server whose answers never end."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked = 0
        self._over = threading.Event()

    def __enter__(self) -> Dripping:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                self.asked += 1
                threading.Thread(target=self._drip, args=(sock,), daemon=True).start()

    def _drip(self, sock: socket.socket) -> None:
        with contextlib.suppress(OSError), sock:
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
            while not self._over.wait(0.05):
                sock.sendall(b" ")


@pytest.mark.parametrize("verb", ["router", "encode", "language"])
def test_a_process_ends_although_the_bootstrap_server_drips(verb: str, tmp_path: Path) -> None:
    with ExitStack() as held:
        bootstrap, log = held.enter_context(Dripping()), held.enter_context((tmp_path / "log").open("wb"))
        process = held.enter_context(Process(verb, "--bootstrap-url", bootstrap.url, log=log.fileno()))
        wait(lambda: bootstrap.asked > 0, "a call of the bootstrap server")
        process.process.send_signal(signal.SIGTERM)
        assert process.process.wait(DEADLINE) == 0
