"""Decoding in processes of its own: the same results, and any deed of a decoder is an error of one request."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.decoding import child as child_module
from embferry.serve.media.decoding import media
from embferry.serve.media.decoding.cancellation import Cancellation, CancelledWorkError
from embferry.serve.media.decoding.child import BrokenChildError, Child
from embferry.serve.media.decoding.pool import DecoderPool
from embferry.serve.media.image import decode_image
from embferry.serve.media.video import decode_frames, decode_video
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import DEADLINE, Deployment

pytestmark = pytest.mark.integration
LIMITS = MediaSettings()
BROKEN = partial(Child, "tests.serve.broken_decoder")


@pytest.fixture
def pool() -> Iterator[Callable[..., DecoderPool]]:
    """Makes pools, and closes them."""
    made: list[DecoderPool] = []

    def make(*arguments: object) -> DecoderPool:
        made.append(DecoderPool(*arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for one in made:
        one.close()


def refusal(call: Callable[[], object]) -> ServeError:
    with pytest.raises(ServeError) as caught:
        call()
    return caught.value


def test_the_results_are_those_of_the_decoders() -> None:
    noise = pictures.encoded(pictures.noise(1000, 700))  # more than one piece of pixels
    assert media.image(noise, LIMITS, Cancellation()).tobytes() == decode_image(noise, LIMITS).tobytes()
    film = pictures.video(20, 10)
    for ours, theirs in (
        (media.video(film, LIMITS, 5, Cancellation()), decode_video(film, LIMITS, 5)),
        (media.frames([noise] * 3, 1.5, LIMITS, Cancellation()), decode_frames([noise] * 3, 1.5, LIMITS)),
    ):
        assert ours.fps == theirs.fps
        assert [frame.tobytes() for frame in ours.frames] == [frame.tobytes() for frame in theirs.frames]


def test_refusals_keep_their_codes() -> None:
    assert refusal(lambda: media.image(b"junk", LIMITS, Cancellation())).code == "unsupported_media_type"
    assert (
        refusal(lambda: media.image(pictures.encoded(pictures.noise())[:900], LIMITS, Cancellation())).code
        == "image_truncated"
    )
    assert refusal(lambda: media.video(pictures.video(9)[:-200], LIMITS, None, Cancellation())).http_status == 400
    with pytest.raises(ServeError) as caught:
        media.frames([pictures.png(), pictures.png(8, 8)], 1, LIMITS, Cancellation())
    assert caught.value.code == "video_frame_sizes"


DEEDS = {
    "segfault": "SIGSEGV",
    "abort": "SIGABRT",
    "exit": "status 0",
    "memory": "media.decode_memory",
    "much memory": "media.decode_memory",
    "write": "decoder",
    "recursion": "RecursionError",
    "SystemExit": "SystemExit",
    "KeyboardInterrupt": "KeyboardInterrupt",
    "RuntimeError": "RuntimeError",
    "AssertionError": "AssertionError",
    "nonsense": "nonsense",
    "long message": "nonsense",
    "large picture": "nonsense",
    "no picture": "nonsense",
    "often": "nonsense",
    "many": "too many frames",
    "spin": "processor time",
}


@pytest.mark.parametrize("deed", DEEDS)
def test_whatever_a_decoder_does_is_one_error_of_its_request(
    pool: Callable[..., DecoderPool], deed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_module, "CLOCK_FACTOR", 100)  # on a busy machine, half a second takes long
    decoders = pool(1, BROKEN)
    limits = MediaSettings(decode_memory=256 << 20, image_decode_timeout=0.5 if deed == "spin" else 60)
    error = refusal(lambda: decoders.run("decode_image", [deed.encode()], limits))
    assert error.code == "media_decoder_failed"
    assert DEEDS[deed] in error.detail
    assert len(error.detail) < 2100
    assert decoders.run("decode_image", [b"fine"], LIMITS).frames[0].size == (2, 3)


def test_a_process_ends_with_its_parent_in_the_middle_of_a_job() -> None:
    child = BROKEN()
    threading.Thread(target=lambda: list(_suppressed(child))).start()
    while not child.jobs:
        os.sched_yield()
    child._sock.shutdown(socket.SHUT_RDWR)  # as the end of the parent does
    assert child._process.wait(DEADLINE) == 0
    child.close()


def _suppressed(child: Child) -> Iterator[object]:
    with contextlib.suppress(BrokenChildError):
        yield from child.run("decode_image", [b"hang"], LIMITS, None)


@pytest.mark.parametrize("deed", ["hang", "unfinished"])
def test_a_decoder_that_hangs_is_ended(pool: Callable[..., DecoderPool], deed: str) -> None:
    decoders = pool(1, BROKEN)
    limits = MediaSettings(image_decode_timeout=0.05)
    assert refusal(lambda: decoders.run("decode_image", [deed.encode()], limits)).code == "media_decoder_failed"
    assert decoders.run("decode_image", [b"fine"], LIMITS).frames


def test_cancelled_work_ends_while_it_runs_and_while_it_waits(pool: Callable[..., DecoderPool]) -> None:
    started: list[Child] = []

    def start() -> Child:
        started.append(BROKEN())
        return started[-1]

    decoders = pool(1, start)
    ended: list[str] = []

    def work(name: str, cancellation: Cancellation) -> None:
        with pytest.raises(CancelledWorkError):
            decoders.run("decode_image", [b"hang"], LIMITS, None, cancellation)
        ended.append(name)

    running, waiting = Cancellation(), Cancellation()
    first = threading.Thread(target=work, args=("first", running))
    first.start()
    while not (started and started[0].jobs):
        first.join(0.01)
    second = threading.Thread(target=work, args=("second", waiting))
    second.start()
    waiting.cancel()
    second.join(DEADLINE)
    assert ended == ["second"]
    running.cancel()
    first.join(DEADLINE)
    assert ended == ["second", "first"]
    assert not started[0].is_usable
    assert decoders.run("decode_image", [b"fine"], LIMITS).frames
    with pytest.raises(CancelledWorkError):
        decoders.run("decode_image", [b"fine"], LIMITS, None, running)


def test_work_that_is_cancelled_while_its_process_starts_is_no_error(
    pool: Callable[..., DecoderPool], caplog: pytest.LogCaptureFixture
) -> None:
    started: list[Child] = []

    def start() -> Child:
        started.append(Child())
        os.kill(started[-1].pid, signal.SIGSTOP)
        return started[-1]

    cancellation = Cancellation()
    outcomes: list[type[Exception]] = []

    def work() -> None:
        try:
            pool(1, start).run("check_image", [pictures.png()], LIMITS, None, cancellation)
        except (CancelledWorkError, ServeError) as error:
            outcomes.append(type(error))

    thread = threading.Thread(target=work)
    thread.start()
    while not (started and started[0]._sock.gettimeout() == child_module.START_SECONDS):
        thread.join(0.01)
    cancellation.cancel()
    thread.join(DEADLINE)
    assert outcomes == [CancelledWorkError]
    assert [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_a_process_that_has_died_while_idle_is_replaced(pool: Callable[..., DecoderPool]) -> None:
    decoders = pool(1)
    decoders.run("check_image", [pictures.png()], LIMITS)
    (child,) = decoders._idle
    child.kill()
    child._process.wait()
    decoders.run("check_image", [pictures.png()], LIMITS)


def test_a_process_that_does_not_start_is_a_retryable_error(pool: Callable[..., DecoderPool]) -> None:
    decoders = pool(1, partial(Child, "tests.serve.no_such_module"))
    for _ in range(2):
        error = refusal(lambda: decoders.run("check_image", [b"x"], LIMITS))
        assert (error.code, error.http_status, error.retryable) == ("capacity_exhausted", 503, True)


def test_a_process_knows_no_secrets_and_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", "secret")
    child = Child()
    try:
        list(child.run("check_image", [pictures.png()], LIMITS, None))
        assert b"secret" not in Path(f"/proc/{child.pid}/environ").read_bytes()
        links = [os.readlink(link) for link in Path(f"/proc/{child.pid}/fd").iterdir()]
        assert sum(link.startswith("socket:") for link in links) == 1
        child._sock.close()
        assert child._process.wait(DEADLINE) == 0
    finally:
        child.close()


def test_checks_in_the_router_end_when_the_client_leaves(
    deployment: Deployment, pool: Callable[..., DecoderPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Child] = []

    def start() -> Child:
        started.append(BROKEN())
        return started[-1]

    monkeypatch.setattr(media, "POOL", pool(1, start))
    part = {"type": "image_url", "image_url": {"url": pictures.data_url(b"hang")}}
    body = json.dumps({"model": "shapes", "messages": user(part, "?")}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: router\r\nContent-Length: {len(body)}\r\n\r\n"
    url = urlsplit(deployment.url)
    with socket.create_connection((url.hostname, url.port)) as client:
        client.sendall(head.encode() + body)
        deployment.wait(lambda: bool(started and started[0].jobs))
    assert started[0]._process.wait(DEADLINE) == -signal.SIGKILL
    assert deployment.fakes["encode0"].requests == []
