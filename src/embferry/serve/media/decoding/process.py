"""The process that decodes: one job after the other, within limits of memory and processor time.

Its parent starts it with one end of a socket. It has no other connection, no secrets in its environment, and cannot
write files; :mod:`.confinement` takes what else the system can take. It ends when the parent closes the socket.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gc
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from PIL import Image

from embferry.protocol.text import shown
from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding import messages
from embferry.serve.media.decoding.confinement import confine
from embferry.serve.media.decoding.messages import Done, Job, Picture, Refused
from embferry.serve.media.decoding.system_calls import forbid_processes
from embferry.serve.media.image import check_image, decode_image
from embferry.serve.media.video import check_frames, check_video, frames_of, sampled_frames

OPEN_FILES = 32


def main(descriptor: int) -> None:
    """Works on the socket until its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    for kind, limit in ((resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, OPEN_FILES)):
        resource.setrlimit(kind, (limit, limit))
    with open("/proc/self/statm") as memory:  # opened now: it cannot be afterwards
        confine(_folders())
        threading.Thread(target=_end_with_parent, args=(descriptor,), daemon=True).start()
        if not forbid_processes():
            resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # no threads either, so HEIC cannot be decoded
        reserved = int(memory.read().split()[0]) * resource.getpagesize()  # the address space of this process
    with socket.socket(fileno=descriptor) as sock, contextlib.suppress(EOFError, ConnectionError):
        sock.sendall(messages.READY)
        while True:
            job = messages.receive_job(sock)
            with _limits(reserved, job):
                _work(sock, job)
            gc.collect()  # frames that nothing but their own side data refers to


def _end_with_parent(descriptor: int) -> None:
    """Ends the process when the parent has closed its end of the socket, also in the middle of a job."""
    poll = select.poll()
    poll.register(descriptor, select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def _work(sock: socket.socket, job: Job) -> None:
    try:
        files = [bytes(messages.receive_bytes(sock, size)) for size in job.sizes]
        answer: Done | Refused = _done(sock, job, files)
    except (EOFError, ConnectionError):
        raise
    except ServeError as error:
        answer = Refused(error.code, error.detail)
    except BaseException as error:  # noqa: BLE001 - decoders raise anything
        answer = Refused("media_decoder_failed", f"the decoder failed: {shown(error)}")
        if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM:
            answer = Refused("capacity_exhausted", "")
    messages.send(sock, answer)


def _done(sock: socket.socket, job: Job, files: list[bytes]) -> Done:
    """Does a job. Sends the pictures as they are decoded, so that one is in memory at a time."""
    limits = _settings(job.limits)
    fps = 0.0
    if job.task == "check_image":
        check_image(files[0], limits)
    elif job.task == "check_video":
        check_video(files[0], limits)
    elif job.task == "check_frames":
        check_frames(files, limits)
    elif job.task == "decode_image":
        _send(sock, decode_image(files[0], limits), 1)
    else:
        if job.task == "decode_video":
            fps, pictures = sampled_frames(files[0], limits, job.fps)
        else:
            fps, pictures = frames_of(files, job.fps or 0.0, limits)
        for picture, times in pictures:
            _send(sock, picture, times)
    return Done(fps)


def _send(sock: socket.socket, picture: Image.Image, times: int) -> None:
    width, height = picture.size
    messages.send(sock, Picture(width, height, times))
    for top, rows in messages.bands(width, height):
        sock.sendall(picture.crop((0, top, width, top + rows)).tobytes())


@functools.lru_cache(1)
def _settings(text: str) -> MediaSettings:
    return MediaSettings.model_validate_json(text)


@contextlib.contextmanager
def _limits(reserved: int, job: Job) -> Iterator[None]:
    """Bounds memory and processor time for a job. A process that exceeds the time is ended by the system."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = math.ceil(used.ru_utime + used.ru_stime + job.cpu_seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_AS, (reserved + job.memory + sum(job.sizes), resource.RLIM_INFINITY))
    try:
        yield
    finally:
        for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS):
            resource.setrlimit(kind, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _folders() -> list[str]:
    """Returns the folders of the packages that are loaded, wherever they are: they load more of themselves."""
    packages = [module for name, module in sys.modules.items() if "." not in name]
    return [path for package in packages for path in getattr(package, "__path__", ())]


if __name__ == "__main__":
    main(int(sys.argv[1]))
