"""The plug-in inside SGLang's own modules: what is in place, and what ends the start."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from array import array
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]

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


HOOKS = "from sglang.srt.plugins import hook_registry\n"
RECEIVER = "from sglang.srt.disaggregation.encoder import receiver\n"


@pytest.mark.parametrize(
    ("before", "environment", "why"),
    [
        ("", {"EMBFERRY_SGLANG_NUM_BLOCKS": "0"}, "the variables EMBFERRY_SGLANG_*"),
        ("", {"EMBFERRY_SGLANG_HOST": "0.0.0.0"}, "cluster key"),
        (
            "from embferry.connectors.sglang.inside import hooks; hooks.SUPPORTED = ('0.0.1',)",
            {},
            "works with SGLang 0.0.1, not 0.5.",
        ),
        (RECEIVER + "del receiver.MMReceiverBase.create_req", {}, "MMReceiverBase.create_req is not there"),
        (
            RECEIVER + "receiver.MMReceiverBase.create_req = lambda self, request, more: None",
            {},
            "has the parameters (self, request, more), not (self, recv_req)",
        ),
        (
            HOOKS + "hook_registry.HookRegistry._apply_target = classmethod(lambda cls, target, hooks: None)",
            {},
            "has not replaced sglang.srt.disaggregation.encoder.receiver.WaitingZmqRequest",
        ),
        (
            HOOKS + "apply = hook_registry.HookRegistry._apply_target.__func__\n"
            "def fails(cls, target, hooks):\n"
            "    if 'probe' in target: raise RuntimeError('this was planted')\n"
            "    apply(cls, target, hooks)\n"
            "hook_registry.HookRegistry._apply_target = classmethod(fails)",
            {},
            "has not replaced sglang.srt.disaggregation.encoder.receiver.EncoderBootstrapServer._probe",
        ),
    ],
)
def test_a_plugin_that_cannot_work_ends_the_process_with_one_sentence(
    before: str, environment: dict[str, str], why: str
) -> None:
    loaded = load(before, EMBFERRY_SGLANG="1", **environment)
    assert loaded.returncode == STATUS, (loaded.stdout, loaded.stderr[-2000:])
    last = loaded.stderr.strip().splitlines()[-1]
    assert last.startswith("embferry: the embferry plug-in")
    assert why in last


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def language(monkeypatch: pytest.MonkeyPatch) -> Any:
    from embferry.connectors.sglang.inside import language

    def end(why: str) -> None:
        raise Ended(why)

    monkeypatch.setattr(language, "end_process", end)
    return language


@pytest.mark.parametrize(
    ("backend", "over_http", "dp_attention", "why"),
    [
        ("mooncake", True, False, "does not work with mooncake"),
        ("zmq_to_tokenizer", True, False, "does not work with zmq_to_tokenizer"),
        ("zmq_to_scheduler", False, False, "over HTTP"),
        ("zmq_to_scheduler", True, True, "--enable-dp-attention"),
    ],
)
def test_a_language_server_that_the_plugin_cannot_work_in_ends(
    language: Any, monkeypatch: pytest.MonkeyPatch, backend: str, over_http: bool, dp_attention: bool, why: str
) -> None:
    from sglang.srt.disaggregation.encoder import receiver

    kind = receiver.MMReceiverHTTP if over_http else receiver.MMReceiverGrpc
    made = kind.__new__(kind)
    made.encoder_transfer_backend = backend
    monkeypatch.setattr(language, "get_parallel", lambda: SimpleNamespace(attn_dp_enabled=dp_attention))
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


def submitted(abandon: bool) -> tuple[Any, list[str]]:
    """Returns the outcome of a part that waits to be encoded, and the parts that were encoded."""
    from sglang.srt.disaggregation.encoder import server

    from embferry.connectors.sglang.inside import encoder

    encoded: list[str] = []

    async def original(scheduler: Any, request: dict[str, Any]) -> str:
        await scheduler.wait()
        encoded.append(request["req_id"])
        return "done"

    async def run() -> Any:
        turn = asyncio.Event()
        task = asyncio.create_task(encoder.submit(original, turn, {"req_id": "a"}))
        await asyncio.sleep(0)
        if abandon:
            encoder._submitted["a"].cancel()
        turn.set()
        try:
            return await task
        except server.MMError as error:
            return error

    return asyncio.run(run()), encoded


def test_a_part_that_is_abandoned_while_it_waits_is_not_encoded() -> None:
    from sglang.srt.disaggregation.encoder import server

    outcome, encoded = submitted(abandon=True)
    assert isinstance(outcome, server.MMError)
    assert outcome.code == 499
    assert encoded == []
    assert submitted(abandon=False) == ("done", ["a"])


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
