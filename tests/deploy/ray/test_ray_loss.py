"""``embferry serve --on ray`` where Ray itself fails, or has no memory."""

from __future__ import annotations

import contextlib
import signal
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.deploy.ray.command import READY, Serve, served
from tests.deploy.ray.conftest import DEADLINE
from tests.serve.pictures import data_url, encoded, noise

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]

MEMORY = Path("/dev/shm")
SMALL = 160 << 20
"""Bytes of a file system in memory with room for Ray's object store and little else."""


def process(running: Serve, name: str) -> psutil.Process:
    """Returns the process of Ray with a name."""
    found = psutil.Process(running.process.pid).children(recursive=True)
    return next(one for one in found if one.name() == name)


def asked(url: str) -> tuple[int, Any]:
    """Asks about a picture of megabytes, which Ray passes on in its object store. Returns the status and the tokens."""
    part = {"type": "image_url", "image_url": {"url": data_url(encoded(noise(1200, 900)))}}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what is there?"}]}]
    body = {"model": "shapes", "messages": messages, "max_tokens": 8}
    response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=DEADLINE, trust_env=False)
    return response.status_code, response.json().get("embferry", {}).get("tokens")


def test_the_command_ends_with_a_process_that_ray_needs(tmp_path: Path) -> None:
    with served(tmp_path, READY) as running:
        process(running, "raylet").kill()
        assert running.wait() == 1, running.lines
    (told,) = running.found(r"^embferry: (.*)")
    assert told.startswith("Ray's process raylet has ended by SIGKILL, and Ray cannot go on"), told


def test_the_memory_of_the_object_store_is_there_from_the_start(tmp_path: Path) -> None:
    with served(tmp_path, READY) as running:
        pid = process(running, "raylet").pid
        links = [link for link in Path(f"/proc/{pid}/fd").iterdir() if link.readlink().name.startswith("plasma")]
        files = [found for link in links if stat.S_ISREG((found := link.stat()).st_mode)]
        assert files
        assert all(file.st_blocks * 512 >= file.st_size for file in files), files
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0, running.lines


def in_small_memory() -> Sequence[str]:
    """Returns the words that run a program with a small file system of its own at :data:`MEMORY`. Needs root."""
    script = f'mount -t tmpfs -o size={SMALL} tmpfs {MEMORY} && exec "$@"'
    return ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]


def test_requests_are_answered_while_the_file_system_in_memory_is_full(tmp_path: Path) -> None:
    with served(tmp_path, READY, before=in_small_memory()) as running:
        (url,) = running.found(READY)
        expected = asked(url)
        assert expected[0] == 200, expected
        filler = Path(f"/proc/{running.process.pid}/root{MEMORY}/filler")
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        assert filler.stat().st_size > 0
        assert [asked(url) for _ in range(3)] == [expected] * 3
        filler.unlink()
        assert asked(url) == expected
        running.process.send_signal(signal.SIGINT)
        assert running.wait() == 0, running.lines
