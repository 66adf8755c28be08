"""Acts that are forbidden to a decoder, even if a file has taken it over, as far as this kernel can forbid them."""

from __future__ import annotations

import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pillow_heif
import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding.child import Child
from embferry.serve.media.decoding.confinement import landlock_version
from embferry.serve.media.decoding.pool import DecoderPool
from tests.serve import pictures

pytestmark = pytest.mark.integration
LIMITS = MediaSettings()
LEAVE = "import sys; from embferry.serve.media.decoding.confinement import leave_network; sys.exit(not leave_network())"
FILTER = """
import ctypes, errno, os, sys, threading
from embferry.serve.media.decoding.system_calls import forbid_processes
NO_NEW_PRIVS, CLONE3 = 38, 435
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0)  # and nothing else that confines
if not forbid_processes():
    sys.exit(1)
thread = threading.Thread(target=print)
thread.start()
thread.join()
program = sys.executable, [sys.executable, "-c", "raise SystemExit(3)"]
for start in (os.fork, lambda: os.execv(*program), lambda: os.posix_spawn(*program, {})):
    try:
        start()
    except PermissionError:
        continue
    os._exit(2)
if libc.syscall(CLONE3, 0, 0) != -1 or ctypes.get_errno() != errno.ENOSYS:  # else EINVAL
    os._exit(2)
"""
LANDLOCK = {"read": 1, "list": 1, "create": 1, "remove": 1, "execute": 1, "truncate": 3, "listen": 4, "signal": 6}
"""The version of Landlock from which on each act is forbidden."""


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(1, partial(Child, "tests.serve.broken_decoder"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def kernel() -> dict[str, bool]:
    """Returns of each act whether this kernel can forbid it to this user."""
    can_leave = subprocess.run([sys.executable, "-c", LEAVE], check=False).returncode == 0
    version = landlock_version()
    forbids = {act: version >= needed for act, needed in LANDLOCK.items()}
    forbids |= {"udp": can_leave, "connect": can_leave or forbids["listen"]}
    can_filter = subprocess.run([sys.executable, "-c", FILTER], check=False).returncode == 0
    return forbids | {"execute": forbids["execute"] or can_filter or os.geteuid() != 0}  # RLIMIT_NPROC is not for root


@pytest.mark.parametrize("act", [*LANDLOCK, "udp", "connect"])
def test_a_decoder_that_was_taken_over_cannot(
    pool: DecoderPool, act: str, kernel: dict[str, bool], tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"content")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        argument = {"udp": port, "connect": port, "listen": 0, "signal": os.getpid()}.get(act, file)
        is_forbidden = is_refused(pool, f"{act} {argument}")
    assert is_forbidden == kernel[act]
    if is_forbidden:
        assert list(tmp_path.iterdir()) == [file]
        assert file.read_bytes() == b"content"


def test_processes_and_programs_are_forbidden_and_threads_are_not() -> None:
    has_filters = Path("/proc/sys/kernel/seccomp/actions_avail").exists()
    can = has_filters and platform.machine() in ("x86_64", "aarch64")
    assert subprocess.run([sys.executable, "-c", FILTER], check=False).returncode == (0 if can else 1)


DECODERS = ["embferry.serve.media.decoding.process"]
if not os.geteuid():
    DECODERS.append("tests.serve.unprivileged_decoder")  # becomes another user


@pytest.mark.parametrize("module", DECODERS)
@pytest.mark.parametrize("form", ["AVIF", "HEIF", "JPEG2000", "WEBP", "TIFF"])
def test_every_decoder_works_in_its_confinement(module: str, form: str) -> None:
    """Some start threads of their own, which a limit on processes would forbid to other users than root."""
    pillow_heif.register_heif_opener()
    child = Child(module)
    try:
        data = pictures.encoded(pictures.noise(64, 48), form)
        (picture, _), _ = child.run("decode_image", [data], LIMITS, None)
        assert picture.size == (64, 48)
    finally:
        child.close()


def is_refused(pool: DecoderPool, act: str) -> bool:
    try:
        pool.run("decode_image", [act.encode()], LIMITS)
    except ServeError as error:
        return "Error" in error.detail
    return False


def test_a_decoder_gets_no_privileges_processes_or_files() -> None:
    child = Child()
    try:
        list(child.run("check_image", [pictures.png()], LIMITS, None))
        assert "NoNewPrivs:\t1" in Path(f"/proc/{child.pid}/status").read_text()
        is_filtered = "Seccomp:\t2" in Path(f"/proc/{child.pid}/status").read_text()
        assert is_filtered or resource.prlimit(child.pid, resource.RLIMIT_NPROC) == (0, 0)
        assert resource.prlimit(child.pid, resource.RLIMIT_FSIZE) == (0, 0)
    finally:
        child.close()
