"""The plug-in inside SGLang's own modules: what is in place, and what ends the start."""

from __future__ import annotations

import asyncio
import contextlib
import os
import ssl
import subprocess
import sys
import threading
from array import array
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest

from embferry.connectors.sglang.parts import Destination
from embferry.protocol.errors import BY_CODE
from tests.ports import free_port

pytestmark = [
    pytest.mark.sglang,
    pytest.mark.timeout(600),
    pytest.mark.filterwarnings("ignore"),  # warnings of SGLang and torch, when SGLang is imported without a GPU
]

LOAD = """
import sys
from sglang.srt import plugins
{before}
plugins.load_plugins()
from sglang.srt.disaggregation.encoder import receiver
print("in place:", receiver.WaitingZmqRequest.__name__ == "EmbferryWaiting")
"""
STATUS = 2


def load(before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """Loads SGLang's plug-ins in a process of its own, after a program that changes something."""
    env = os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"} | environment
    program = LOAD.format(before=before)
    command = [sys.executable, "-c", program, "--language-only"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_the_plugin_is_off_unless_the_environment_asks_for_it() -> None:
    loaded = load()
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert "in place: False" in loaded.stdout


def test_the_plugin_is_in_place_if_the_environment_asks_for_it() -> None:
    loaded = load(SGLANG_PLUGINS="embferry")
    assert loaded.returncode == 0, loaded.stderr[-2000:]
    assert "in place: True" in loaded.stdout


def test_a_plugin_that_is_not_in_place_ends_the_process_with_one_sentence() -> None:
    before = (
        "from sglang.srt.plugins import hook_registry\n"
        "hook_registry.HookRegistry._apply_target = classmethod(lambda cls, target, hooks: None)"
    )
    assert "has not replaced sglang.srt.disaggregation.encoder.receiver." in last_words(
        load(before, EMBFERRY_SGLANG="1")
    )


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("NUM_BLOCKS", "0", "EMBFERRY_SGLANG_NUM_BLOCKS='0'"), ("HOST", "0.0.0.0", "cluster key")],
)
def test_a_wrong_setting_ends_the_process_with_one_sentence(name: str, value: str, why: str) -> None:
    assert why in last_words(load(EMBFERRY_SGLANG="1", **{f"EMBFERRY_SGLANG_{name}": value}))


def last_words(loaded: subprocess.CompletedProcess[str]) -> str:
    """Returns the sentence with which a process has ended."""
    assert loaded.returncode == STATUS, (loaded.stdout, loaded.stderr[-2000:])
    last = loaded.stderr.strip().splitlines()[-1]
    assert last.startswith("embferry: the embferry plug-in")
    return last


class Ended(BaseException):
    """In place of the end of the process."""


def ended(why: str) -> None:
    raise Ended(why)


class Fake:
    """A class in the place of one of SGLang's."""

    def method(self, value: int) -> int:
        return value


class Ours(Fake):
    """A class in the place of that one."""


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Returns the module with the hooks; SGLang has registered none, and has one more module."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    from embferry.connectors.sglang.inside import hooks

    monkeypatch.setitem(sys.modules, "sglang.srt.fake", SimpleNamespace(Fake=Fake, Gone=None))
    monkeypatch.setattr(HookRegistry, "_hooks", defaultdict(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(HookRegistry, "apply_hooks", HookRegistry.apply_hooks)
    monkeypatch.setattr(Fake, "method", Fake.method)
    monkeypatch.setattr(hooks, "end_process", ended)
    return hooks


def around(original: Callable[..., int], fake: Fake, value: int) -> int:
    return 10 * original(fake, value)


def test_hooks_are_put_in_place(hooks: Any) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    hooks.install([hooks.Hook("fake", "Fake.method", HookType.AROUND, around, "self, value")])
    HookRegistry.apply_hooks()
    assert Fake().method(2) == 20


@pytest.mark.parametrize(
    ("name", "parameters", "why"),
    [
        ("Fake.gone", "self", "sglang.srt.fake.Fake.gone is not there"),
        ("Fake.method", "self", r"has the parameters \(self, value\), not \(self\)"),
    ],
)
def test_a_hook_that_does_not_fit_ends_the_process(hooks: Any, name: str, parameters: str, why: str) -> None:
    from sglang.srt.plugins.hook_registry import HookType

    with pytest.raises(Ended, match=why):
        hooks.install([hooks.Hook("fake", name, HookType.AROUND, around, parameters)])


def test_another_version_ends_the_process(hooks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "SUPPORTED", ("0.0.1",))
    with pytest.raises(Ended, match=r"works with SGLang 0\.0\.1, not 0\.5\."):
        hooks.install([])


@pytest.mark.parametrize("name", ["Fake.method", "Fake"])
def test_a_hook_that_sglang_could_not_apply_ends_the_process(
    hooks: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    def fails(cls: type, target: str, found: Any) -> None:
        raise RuntimeError("this was planted")

    ours = (Ours, HookType.REPLACE, "") if name == "Fake" else (around, HookType.AROUND, "self, value")
    hooks.install([hooks.Hook("fake", name, ours[1], ours[0], ours[2])])
    monkeypatch.setattr(HookRegistry, "_apply_target", classmethod(fails))
    with pytest.raises(Ended, match=f"has not replaced sglang.srt.fake.{name}"):
        HookRegistry.apply_hooks()


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Any:
    from embferry.connectors.sglang.inside import language

    monkeypatch.setattr(language, "end_process", ended)
    return language


@pytest.mark.parametrize(
    ("backend", "over_http", "dp_attention", "tokenizers", "why"),
    [
        ("mooncake", True, False, 1, "does not work with mooncake"),
        ("zmq_to_tokenizer", True, False, 1, "does not work with zmq_to_tokenizer"),
        ("zmq_to_scheduler", False, False, 1, "over HTTP"),
        ("zmq_to_scheduler", True, True, 1, "--enable-dp-attention"),
        ("zmq_to_scheduler", True, False, 2, "--tokenizer-worker-num"),
    ],
)
def test_a_language_server_that_the_plugin_cannot_work_in_ends(
    language: Any,
    monkeypatch: pytest.MonkeyPatch,
    backend: str,
    over_http: bool,
    dp_attention: bool,
    tokenizers: int,
    why: str,
) -> None:
    from sglang.srt.disaggregation.encoder import receiver

    kind = receiver.MMReceiverHTTP if over_http else receiver.MMReceiverGrpc
    made = kind.__new__(kind)
    made.encoder_transfer_backend = backend
    monkeypatch.setattr(language, "get_parallel", lambda: SimpleNamespace(attn_dp_enabled=dp_attention))
    monkeypatch.setattr(language, "get_serving", lambda: SimpleNamespace(tokenizer_worker_num=tokenizers))
    with pytest.raises(Ended, match=why):
        language.constructed(lambda *args: None, made, None)


def test_a_failed_request_has_input_ids(language: Any) -> None:
    without, given = SimpleNamespace(input_ids=None), SimpleNamespace(input_ids=array("q", [1]))
    for request in (without, given):
        language.has_input_ids(None, request)
    assert (list(without.input_ids), list(given.input_ids)) == ([], [1])


def test_parts_are_the_items_as_sglang_has_assigned_them(language: Any) -> None:
    from sglang.srt.managers.schedule_batch import Modality

    items = [{"url": f"u{n}", "modality": Modality.IMAGE} for n in range(3)]
    items.append({"url": "v", "modality": Modality.VIDEO})
    assigned = {Modality.IMAGE: [1, 0, 2], Modality.VIDEO: [0, 1, 0]}
    parts = language.parts_of(SimpleNamespace(host="h"), items, assigned, None)
    assert [(part.kind, part.assigned, part.body["mm_items"]) for part in parts] == [
        ("IMAGE", 0, ["u0"]),
        ("IMAGE", 2, ["u1", "u2"]),
        ("VIDEO", 1, ["v"]),
    ]


class FakeDispatcher:
    """In the place of the dispatcher; ``cancelled`` are the requests that it was told to end."""

    def __init__(self, *_: object) -> None:
        self.cancelled: list[str] = []

    def cancel(self, rid: str) -> None:
        self.cancelled.append(rid)


def test_a_request_that_sglang_has_refused_is_not_encoded(language: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = FakeDispatcher()
    monkeypatch.setattr(language, "dispatcher", lambda: dispatcher)
    manager, forwarded = SimpleNamespace(rid_to_state={"known": None}), []
    for rid in ("known", "refused"):
        error = SimpleNamespace(rid=rid)
        language.forward_dispatch_error(lambda manager, error: forwarded.append(error.rid), manager, error)
    assert (forwarded, dispatcher.cancelled) == (["known"], ["refused"])


def test_first_requests_at_once_get_the_same_dispatcher(language: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    both = threading.Barrier(2)
    made: list[FakeDispatcher] = []

    def make(settings: Any) -> FakeDispatcher:
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(0.5)  # without a lock, the other thread is here as well
        made.append(FakeDispatcher())
        return made[-1]

    monkeypatch.setattr(language, "Dispatcher", make)
    monkeypatch.setattr(language, "_dispatchers", [])
    with ThreadPoolExecutor(2) as pool:
        assert len(set(pool.map(lambda _: id(language.dispatcher()), range(2)))) == 1
    assert len(made) == 1


def probe(alive: bool, answers: bool) -> bool:
    """Asks as SGLang's list of encoders does whether one is well."""
    from embferry.connectors.sglang.inside import language

    async def original(bootstrap: Any, session: Any, url: str) -> bool:
        return answers

    class Dispatcher:
        def is_alive(self, url: str) -> Any:
            from concurrent.futures import Future

            future: Future[bool] = Future()
            future.set_result(alive)
            return future

    dispatcher: Callable[[], Any] = language.dispatcher
    language.dispatcher = lambda: Dispatcher()  # type: ignore[assignment]
    try:
        return asyncio.run(language.probe(original, None, None, "http://e:1"))
    finally:
        language.dispatcher = dispatcher  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("alive", "answers", "well"), [(True, False, True), (False, False, False), (False, True, True)]
)
def test_a_busy_encoder_is_well(alive: bool, answers: bool, well: bool) -> None:
    assert probe(alive, answers) is well


def test_asking_for_parts_makes_one_tls_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 20 ms of the scheduler's process."""
    from embferry.connectors.sglang.inside import waiting

    made: list[ssl.SSLContext] = []
    original = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    waiting.tls_context.cache_clear()
    destination = Destination("part", "h:1", count=1, host=0, receives=True)
    refused = f"http://127.0.0.1:{free_port()}"
    for _ in range(3):
        turns = iter((True, False))
        asyncio.run(waiting.register(refused, destination, lambda turns=turns: next(turns)))  # type: ignore[misc]
    assert len(made) == 1


def test_every_failure_has_a_status_that_sglang_can_answer_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """With another one, SGLang's scheduler ends."""
    from sglang.srt.disaggregation.encoder import receiver

    from embferry.connectors.sglang.inside import waiting

    statuses: list[Any] = []
    monkeypatch.setattr(
        receiver.WaitingZmqRequest, "_fail_and_release", lambda self, message, code=None: statuses.append(code)
    )
    request = waiting.EmbferryWaiting.__new__(waiting.EmbferryWaiting)
    for error in BY_CODE.values():
        request._fail_and_release(*waiting.reason_and_status(error("reason")))
    for code in (None, 400, HTTPStatus.BAD_GATEWAY, 499, 1):
        request._fail_and_release("reason", code)
    assert all(status is None or HTTPStatus(status) for status in statuses)
    assert statuses[-5:] == [None, 400, 502, 503, 503]
