"""The processes of ``embferry serve``, as a user starts it, and what each of them holds."""

from __future__ import annotations

import contextlib
import json
import re
from dataclasses import dataclass, replace

import psutil

from embferry.serve.http.address import get
from embferry.serve.supervisor import ProcessView
from tests.serve.workers.test_processes import START, Serve, wait

FLAGS = ("--encode-workers", "2", "--language-workers", "2", "--restart-delay", "1e-9")
SMALL = ("--transfer-num-blocks", "4", "--transfer-block-size", "2", "--encode-cache-bytes", "0")
"""Every embedding is encoded anew, and needs many transfers: at any time some are under way."""
UNCLAIMED = ("--encode-unclaimed-timeout", "10")
"""Seconds for which a stopped worker holds a request that it reads when its router has given it up; 60 by default."""
SAID = re.compile(r"(\S+) (?:is starting \(pid (\d+)\)|answers at (\S+))")
ANSWER = 20.0
"""Seconds within which a process that is not stopped has to answer."""
SENDING = r'embferry_encode_rooms{state="(?:encoding|inflight)"}'
HOLDING = r"embferry_(?:process_held_bytes|encode_rooms|language_requests|router_chat_in_flight)\b"


@dataclass(frozen=True)
class Signs:
    """The vital signs of a process. ``rss``: its resident memory in bytes."""

    pid: int
    fds: int
    threads: int
    rss: int

    @property
    def mib(self) -> float:
        return self.rss / 2**20


class Stack:
    """A running stack. A context manager: at its end no process is left, also if the supervisor cannot end them."""

    def __init__(self, transport: str) -> None:
        self._flags = (*FLAGS, *SMALL, *UNCLAIMED, "--transfer-transports", transport)
        self._known: dict[tuple[int, str, int], psutil.Process] = {}
        self.url = ""

    def __enter__(self) -> Stack:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends all processes. Idempotent."""
        self.serve.process.terminate()
        try:
            self.wait_gone()
        finally:
            for process in filter(_alive, self._known.values()):
                process.kill()
            self.serve.close()

    def start(self) -> None:
        self.serve = Serve(*self._flags)
        try:
            wait(lambda: bool(self.serve.found(r"ready: shapes at (\S+)")) or self._ended, "ready", START)
            assert not self._ended, self.serve.lines
        except BaseException:
            self.close()
            raise
        (url,) = self.serve.found(r"ready: shapes at (\S+)/v1")
        self.url = url

    def restart(self) -> None:
        """Waits for the end of all processes after the supervisor's, and starts them anew."""
        self.wait_gone()
        self.serve.close()
        self.start()

    @property
    def _ended(self) -> bool:
        return self.serve.process.poll() is not None

    def wait_gone(self) -> None:
        """Waits until no process of the stack is left."""
        self.processes()
        wait(lambda: self._ended and not any(map(_alive, self._known.values())), "the end of all processes")

    def processes(self) -> dict[str, ProcessView]:
        """Returns every process by name, from what the supervisor has said."""
        found = {"supervisor": ProcessView("supervisor", "router", self.serve.process.pid, self.url, 1)}
        for line in list(self.serve.lines):
            if said := SAID.search(line):
                name, pid, url = said.groups()
                before = found.get(name, ProcessView(name, name.partition("-")[0]))  # type: ignore[arg-type]
                now = replace(before, pid=int(pid), url="", starts=before.starts + 1) if pid else before
                found[name] = now if pid else replace(before, url=url)
        for view in found.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                if (key := (view.pid, view.name, view.starts)) not in self._known:
                    self._known[key] = psutil.Process(view.pid)
        return found

    def under_way(self, name: str) -> bool:
        """Returns whether a transfer is under way, for a worker: one of its own."""
        views = self.processes()
        if name.startswith("encode") and not any(_values(views[name], SENDING)):
            return False
        languages = [view for view in views.values() if view.role == "language"]
        return any(_used(view) for view in ([views[name]] if views[name] in languages else languages))

    def recovered(self) -> bool:
        """Returns whether every process answers, and bootstrap server and router know the workers of now alone."""
        views = self.processes()
        _, workers = get(views["bootstrap"].url, "/workers", ANSWER)
        status, ready = get(self.url, "/ready", ANSWER)
        if not workers or status != 200:
            return False
        urls = sorted(worker["url"] for worker in json.loads(workers)["workers"])
        known = json.loads(ready)["workers"] == {"encode": 2, "language": 2}
        return known and urls == sorted(view.url for view in views.values() if view.role in ("encode", "language"))

    def acquainted(self) -> bool:
        """Returns whether both language workers are connected with both encode workers."""
        encode = [view for view in self.processes().values() if view.role == "encode"]
        return all(_values(view, "embferry_worker_control_connections ") == [2] for view in encode)

    def held(self) -> list[str]:
        """Returns what is not free, one entry each; empty in an idle stack."""
        found = []
        for view in self.processes().values():
            if view.name in ("supervisor", "bootstrap"):
                continue
            if any(_values(view, HOLDING)):
                found.append(f"{view.name} holds requests")
            if view.role == "language" and (
                any(_values(view, r'embferry_language_pool_blocks{state="(?:used|quarantined)"}'))
                or sum(_values(view, r'embferry_language_pool_blocks{state="free"}')) != 4
            ):
                found.append(f"{view.name} has blocks that are not free")
        return found

    def signs(self) -> dict[str, Signs]:
        """Returns what every process holds, by name."""
        found = {}
        for view in self.processes().values():
            process = psutil.Process(view.pid)
            found[view.name] = Signs(view.pid, process.num_fds(), process.num_threads(), process.memory_info().rss)
        return found


def _alive(process: psutil.Process) -> bool:
    """Returns whether this very process runs; its number may have gone to another one."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def _values(view: ProcessView, pattern: str) -> list[float]:
    """Returns the values of the metrics whose names with labels begin with the pattern."""
    lines = _page(view, "/metrics").decode().splitlines()
    return [float(line.rpartition(" ")[2]) for line in lines if re.match(pattern, line)]


def _used(view: ProcessView) -> int:
    return int(json.loads(_page(view, "/debug/pool"))["used"])


def _page(view: ProcessView, path: str) -> bytes:
    status, body = get(view.url, path, ANSWER)
    assert status == 200, f"{view.name} at {view.url} does not return {path} (status {status})"
    return body
