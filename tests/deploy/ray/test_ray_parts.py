"""Parts of the deployment on Ray that need no cluster: what is work, and how many workers it asks for."""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from embferry.engine.cache import EmbeddingCache
from embferry.serve.config import Settings
from embferry.serve.config_load import ConfigError
from embferry.serve.encode.metrics import EncodeMetrics
from embferry.serve.supervisor.process import Program
from tests.deploy.ray.conftest import RAY

pytestmark = RAY

STATES = {"decoding": 1, "bootstrapping": 10, "encoding": 2, "inflight": 100}


def test_an_encoder_is_busy_with_what_it_decodes_and_encodes_and_not_with_what_it_sends() -> None:
    from embferry.deploy.ray.measures import total, waits_for_encoder

    page = EncodeMetrics(EmbeddingCache(0), lambda: STATES).exposition().decode()
    assert total(page, waits_for_encoder) == 3


def test_an_instance_of_vllm_is_busy_with_what_runs_and_waits() -> None:
    from embferry.deploy.ray.measures import total, waits_in_vllm

    names = {"running": 2, "waiting": 5, "swapped": 9}
    page = "".join(f'vllm:num_requests_{name}{{engine="0"}} {count}\n' for name, count in names.items())
    assert total(page, waits_in_vllm) == 7


def test_a_page_that_counts_no_requests_is_an_error_and_not_zero() -> None:
    from embferry.deploy.ray.measures import total, waits_for_answer

    with pytest.raises(ValueError, match="does not say"):
        total("up 1\n", waits_for_answer)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"work": {"a": 4.0, "b": 6.0}}, 2.5),  # Ray rounds it up
        ({"work": {"a": 0.0}}, 0),  # and keeps to the least number
        ({"work": {}}, 3),
        ({}, 3),
        (None, 3),
    ],
)
def test_the_number_of_workers_goes_by_the_sum_of_the_work(
    told: dict[str, dict[str, float]] | None, wanted: float
) -> None:
    """A controller that has heard of no work, such as one that was started again, changes nothing."""
    from embferry.deploy.ray.scaling import by_work

    config = SimpleNamespace(target_ongoing_requests=4)
    context = SimpleNamespace(aggregated_metrics=told, config=config, target_num_replicas=3)
    assert by_work(context)[0] == wanted


READY = 'import os, sys; os.write(1, b\'{"url": "http://h:1"}\\n\'); sys.stdin.read()'


def child(code: str, ended: threading.Event) -> Any:
    from embferry.deploy.ray.child import Child

    return Child("a child", "encode", Program(("-c", code), b"\n"), ended.set)


@pytest.mark.timeout(60)
def test_a_process_that_is_not_ready_in_time_is_ended_with_a_reason() -> None:
    from embferry.deploy.ray.child import ChildError

    started = child("import sys; sys.stdin.read()", threading.Event())
    with pytest.raises(ChildError, match=r"a child is not ready within 0\.5 s \(its setting\)"):
        started.start(0.5, "its setting")
    assert started._process.view.pid == 0


@pytest.mark.timeout(60)
def test_a_process_that_cannot_start_gives_its_own_reason() -> None:
    from embferry.deploy.ray.child import ChildError

    failing = """import os; os.write(1, b'{"failure": "no such model"}\\n'); raise SystemExit(1)"""
    with pytest.raises(ChildError, match="a child cannot start: no such model"):
        child(failing, threading.Event()).start(30, "its setting")


@pytest.mark.timeout(60)
def test_the_end_of_a_process_is_told_once_unless_it_was_asked_for() -> None:
    ended = threading.Event()
    started = child(READY, ended)
    assert started.start(30, "its setting") == "http://h:1"
    started.stop(30)
    assert not ended.is_set()
    dying = child(READY, ended)
    dying.start(30, "its setting")
    dying._process._process.kill()
    assert ended.wait(30)
    dying._process.join(0)
    assert dying._process.view.starts == 1


FAILING = """import os; os.write(1, b'{"failure": "no such model"}\\n'); raise SystemExit(1)"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("host", "why"), [("192.0.2.1", "without a cluster key"), ("127.0.0.1", "cannot start: no such model")]
)
def test_a_replica_that_has_not_started_has_nothing_to_end(
    monkeypatch: pytest.MonkeyPatch, host: str, why: str
) -> None:
    """It fails before it has a process, or with it. Serve ends it in any case, which is no error of its own."""
    from embferry.deploy.ray import replica, worker
    from embferry.deploy.ray.child import ChildError

    identity = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a1"))
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: identity)
    monkeypatch.setattr(replica, "configure", lambda *_: None)
    monkeypatch.setattr(worker.ray.util, "get_node_ip_address", lambda: host)
    monkeypatch.setattr(worker, "child_program", lambda *_: Program(("-c", FAILING), b"\n"))
    made = worker.WorkerReplica.__new__(worker.WorkerReplica)
    with pytest.raises((ConfigError, ChildError), match=why):
        made.__init__("encode", Settings())  # type: ignore[misc]  # as Serve does
    assert made.__del__() is None  # type: ignore[func-returns-value]
    if host == "127.0.0.1":
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((host, made._bootstrap.port)).close()


@pytest.mark.timeout(60)
@pytest.mark.asyncio
async def test_a_new_worker_is_healthy_before_it_has_registered_and_an_old_one_without_a_lease_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With TLS, Serve's first check comes before the registration, and a replica that fails it has failed to start."""
    from embferry.deploy.ray import worker

    tables: list[list[dict[str, str]]] = [[], [], [{"id": "a"}]]

    async def answers(path: str) -> tuple[int, bytes]:
        return 200, b""

    made = worker.WorkerReplica.__new__(worker.WorkerReplica)
    monkeypatch.setattr(made, "_get", answers)
    made.name, made._has_registered = "encode-a1", False
    made._bootstrap = SimpleNamespace(workers=lambda: tables.pop(0))  # type: ignore[assignment]
    await made.check_health()
    assert not tables
    tables.append([])
    with pytest.raises(RuntimeError, match="does not renew its lease"):  # at once
        await made.check_health()
    monkeypatch.setattr(worker, "REGISTER_SECONDS", 0.0)
    tables.append([])
    made._has_registered = False
    with pytest.raises(RuntimeError, match="does not renew its lease"):
        await made.check_health()


@pytest.mark.timeout(60)
@pytest.mark.asyncio
@pytest.mark.parametrize("starts", [True, False])
async def test_a_replica_of_vllm_keeps_its_ports_and_folder_until_it_has_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, starts: bool
) -> None:
    from embferry.deploy.ray import replica, vllm_instance
    from embferry.deploy.ray.child import ChildError

    root = tmp_path / "root"
    program = Program(("-c", READY if starts else FAILING), b"\n")
    identity = SimpleNamespace(replica_id=SimpleNamespace(unique_id="a1"))
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: identity)
    monkeypatch.setattr(replica, "configure", lambda *_: None)
    monkeypatch.setattr(vllm_instance.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(vllm_instance.proxies, "address", lambda: ("127.0.0.1", 1))
    monkeypatch.setattr(vllm_instance.temporary, "new_root", lambda: root)
    monkeypatch.setattr(vllm_instance, "instance_program", lambda *_: program)
    made = vllm_instance.VllmReplica.__new__(vllm_instance.VllmReplica)
    if starts:
        made.__init__("encode", Settings())  # type: ignore[misc]  # as Serve does
        gc.collect()
        assert root.is_dir()
        for port in made._ports.numbers:
            with pytest.raises(OSError, match="in use"), socket.socket() as taken:
                taken.bind(("127.0.0.1", port))
        ending = made.__del__()
        assert ending is not None
        await ending
    else:
        with pytest.raises(ChildError, match="no such model"):
            made.__init__("encode", Settings())  # type: ignore[misc]
    assert made.__del__() is None
    assert not root.exists()
    assert not made._ports.release.alive  # type: ignore[attr-defined]  # a finalizer


SERVE_SAYS = """A replica failed to start with exception. Retrying 2 more time(s). Error:
\x1b[36mray::ServeReplica:embferry:encode.initialize_and_get_metadata()\x1b[39m (pid=1, ip=192.0.2.2)
  File "/x/ray/serve/_private/replica.py", line 1928, in initialize
    raise RuntimeError(traceback.format_exc()) from None
RuntimeError: Traceback (most recent call last):
  File "/x/embferry/serve/security.py", line 68, in check_part
    raise ConfigError([error.detail]) from error
{error}
"""


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("embferry.serve.config_load.ConfigError: --host: no\n--port: no", "--host: no --port: no"),
        ("embferry.deploy.ray.child.ChildError: encode-a1b2 cannot start: no such model", "no such model"),
        ("embferry.deploy.ray.child.ChildError: encode-a1b2 ended with status 1", "encode-a1b2 ended with status 1"),
        ("OSError: [Errno 28] No space left", "OSError: [Errno 28] No space left"),
    ],
)
def test_the_cause_of_a_failed_start_is_what_the_replica_said_last(error: str, expected: str) -> None:
    from embferry.deploy.ray.causes import cause, has_failed

    message = SERVE_SAYS.format(error=error)
    assert has_failed(message)
    assert cause(message) == expected


def test_a_message_without_an_error_is_its_own_cause() -> None:
    from embferry.deploy.ray.causes import cause, has_failed

    message = "Deployment 'encode' has 1 replicas that have\n taken more than 30s to be scheduled."
    assert not has_failed(message)
    assert cause(message) == "Deployment 'encode' has 1 replicas that have taken more than 30s to be scheduled."


@pytest.mark.asyncio
async def test_a_router_hears_of_each_change_of_the_replicas_at_once() -> None:
    from embferry.deploy.ray.replica_list import ReplicaList

    replicas = ReplicaList()
    worker = {"id": "encode-1", "role": "encode", "url": "http://h:1", "load": 2.0}
    assert (await replicas.read()).workers == ()
    waiting = asyncio.create_task(replicas.wait())
    await asyncio.sleep(0)
    await asyncio.to_thread(replicas.put, "encode", [worker, {}])  # the second one has not told anything yet
    await waiting
    (found,), dropped = (await replicas.read()).read()
    assert (found.id, found.url, found.load, dropped) == ("encode-1", "http://h:1", 2.0, {})
    assert replicas.urls("encode") == ["http://h:1"]
    replicas.put("encode", [])
    await replicas.wait()
    assert (await replicas.read()).workers == ()
