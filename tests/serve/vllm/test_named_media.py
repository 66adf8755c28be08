"""Pictures and videos by their ``uuid`` alone: whose they are, what a name stands for, and when it is forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from embferry.serve.errors import ServeError
from embferry.serve.http.api_keys import ApiKey, digest_of, new_key
from embferry.serve.vllm import named_media as module
from embferry.serve.vllm.endpoint import owner_of
from embferry.serve.vllm.items import Item
from embferry.serve.vllm.media_parts import MediaPart
from embferry.serve.vllm.metrics import VllmRouterMetrics
from embferry.serve.vllm.named_media import NamedMedia
from tests.serve.vllm.stubs import (
    Answer,
    Stub,
    completion,
    encoder_stubs,
    language_stubs,
    picture,
    request,
    routed,
    text,
    video,
)

IGNORED = "embferry-ignored-fields"


def named(uuid: Any = "x", kind: str = "image_url") -> dict[str, Any]:
    return {"type": kind, kind: None, "uuid": uuid}


def unknown(answer: Answer) -> bool:
    return (answer.status, answer.json()["error"]["code"]) == (400, "unknown_media_uuid")


def shown_to(language: Stub) -> list[str]:
    """Returns the names of the items of the latest request to an instance."""
    return [part["uuid"] for part in language.requests[-1]["messages"][0]["content"] if part["type"] != "text"]


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "form",
    [
        named(),
        {"type": "image_url", "uuid": "x"},
        {"image_url": None, "uuid": "x"},
        {"type": "image_url", "image_url": {"url": None}, "uuid": "x"},
        {"type": "input_image", "image_url": None, "uuid": "x"},
        {"type": "image", "image": None, "uuid": "x"},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_picture_is_named_in_a_later_request(form: dict[str, Any], stream: bool) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        first = await router.ask(request(picture(uuid="x"), text()))
        assert IGNORED not in first.headers
        answer = await router.ask(request(form, text(), stream=stream))
        assert answer.status == 200
        assert IGNORED not in answer.headers
        if not stream:
            assert answer.json() == completion("a red circle")
        assert await router.counted("named_media_total", '{outcome="found"}') == 1
        assert await router.counted("held_bytes", part="process") == 0
    assert language.requests[0]["messages"] == language.requests[1]["messages"]
    assert len(encoder.requests) == 1  # the instance has it
    assert shown_to(language) != ["x"]  # instances never see the name


@pytest.mark.asyncio
async def test_a_video_has_names_of_its_own() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(uuid="x"), {**video(), "uuid": "x"}))
        sent = language.requests[-1]["messages"]
        assert (await router.ask(request(named(), named(kind="video_url")))).status == 200
        assert language.requests[-1]["messages"] == sent
        await router.ask(request(picture(uuid="y")))
        assert unknown(await router.ask(request(named("y", "video_url"))))


@pytest.mark.asyncio
async def test_an_unknown_name_is_refused_with_its_place() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        answer = await router.ask(request(text(), named("a stranger's")))
        assert unknown(answer)
        assert answer.error["param"] == "messages[0].content[1]"
        assert answer.error["type"] == "invalid_request_error"
        assert "a stranger's" in answer.error["message"]
        assert "retry-after" not in answer.headers
        assert await router.counted("named_media_total", '{outcome="unknown"}') == 1
    assert encoder.requests == language.requests == []


@pytest.mark.asyncio
@pytest.mark.parametrize("uuid", ["", "x" * 257, 5, True, ["x"], {"a": 1}])
@pytest.mark.parametrize("part", [picture(), named()])
async def test_what_is_no_name_is_refused(uuid: Any, part: dict[str, Any]) -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        answer = await router.ask(request({**part, "uuid": uuid}))
    assert (answer.status, answer.error["code"], answer.error["param"]) == (
        400,
        "invalid_request",
        "messages[0].content[0]",
    )


@pytest.mark.asyncio
async def test_what_was_sent_last_under_a_name_counts() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        names = []
        for part in (picture(b"a", uuid="x"), named(), picture(b"b", uuid="x"), named(), picture(b"a", uuid="x")):
            assert (await router.ask(request(part))).status == 200
            names += shown_to(language)
    a, b = dict.fromkeys(names)
    assert names == [a, a, b, b, a]


@pytest.mark.asyncio
async def test_a_name_may_stand_for_a_picture_of_the_same_request() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(b"old", uuid="x")))
        assert (await router.ask(request(named(), picture(b"new", uuid="x"), named()))).status == 200
        first, second, third = shown_to(language)
        assert first == second == third
        await router.ask(request(named()))
        assert shown_to(language) == [first]


@pytest.mark.asyncio
async def test_other_options_make_another_item_of_a_named_picture() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(uuid="x")))
        await router.ask(request(named(), mm_processor_kwargs={"max_pixels": 9}))
    assert len(encoder.requests) == 2
    assert encoder.requests[1]["messages"][0]["content"][0]["image_url"] == picture()["image_url"]


@pytest.mark.asyncio
async def test_after_a_restart_of_the_language_instance_a_named_picture_is_encoded_again() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(uuid="x")))
        for up in (False, True):
            language.up = up
            await router.until_up(language=int(up))
        assert (await router.ask(request(named()))).status == 200
    assert len(encoder.requests) == 2


@pytest.mark.asyncio
async def test_a_router_that_was_started_again_knows_no_names() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(uuid="x")))
    async with routed(encoder, language) as router:
        assert unknown(await router.ask(request(named())))


@pytest.mark.asyncio
async def test_the_limits_hold_for_named_pictures() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, media={"max_images": 2}, router={"max_held_bytes": 10_000}) as router:
        await router.ask(request(picture(b"x" * 3000, uuid="x")))
        answer = await router.ask(request(*[named()] * 3))
        assert (answer.status, answer.error["code"]) == (400, "too_many_images")
        assert await router.counted("held_bytes", part="process") == 0
        assert await router.counted("named_media_bytes") == len(picture(b"x" * 3000)["image_url"]["url"])


@pytest.mark.asyncio
async def test_without_memory_for_names_they_are_ignored_by_name() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, uuid_bytes=0) as router:
        answer = await router.ask(request(picture(uuid="x")))
        assert (answer.status, answer.headers[IGNORED]) == (200, "messages[0].content[0].uuid")
        assert unknown(await router.ask(request(named())))
        assert await router.counted("named_media_bytes") == 0


# Whose a name is


@pytest.mark.asyncio
async def test_a_client_cannot_name_the_picture_of_another_client(tmp_path: Path) -> None:
    keys = {name: new_key() for name in ("alice", "bob")}
    file = tmp_path / "keys"
    file.write_text("".join(ApiKey(name, digest_of(key)).line() + "\n" for name, key in keys.items()))
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language, router={"api_keys_file": file}) as router:

        async def ask(client: str, part: dict[str, Any]) -> Answer:
            return await router.ask(request(part), authorization=f"Bearer {keys[client]}")

        assert (await ask("alice", picture(b"alice's", uuid="x"))).status == 200
        (alices,) = shown_to(language)
        assert unknown(await ask("bob", named()))
        assert (await ask("bob", picture(b"bob's", uuid="x"))).status == 200
        (bobs,) = shown_to(language)
        assert bobs != alices
        for client, mine in (("alice", alices), ("bob", bobs), ("alice", alices)):
            assert (await ask(client, named())).status == 200
            assert shown_to(language) == [mine]


@pytest.mark.asyncio
async def test_without_keys_of_the_router_the_key_for_the_instances_tells_clients_apart() -> None:
    (encoder,), (language,) = encoder_stubs(1), language_stubs(1)
    async with routed(encoder, language) as router:
        await router.ask(request(picture(uuid="x")), authorization="Bearer a")
        assert unknown(await router.ask(request(named()), authorization="Bearer b"))
        assert unknown(await router.ask(request(named())))
        assert (await router.ask(request(named()), authorization="Bearer a")).status == 200


@pytest.mark.asyncio
async def test_the_owner_must_be_part_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant."""
    monkeypatch.setattr("embferry.serve.vllm.chat.owner_of", lambda scope, settings: "")
    with pytest.raises((AssertionError, KeyError)):
        await test_a_client_cannot_name_the_picture_of_another_client(tmp_path)


@pytest.mark.asyncio
async def test_the_key_for_the_instances_must_be_part_of_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mutant."""
    monkeypatch.setattr("embferry.serve.vllm.chat.owner_of", lambda scope, settings: scope["state"]["client"])
    with pytest.raises((AssertionError, KeyError)):
        await test_without_keys_of_the_router_the_key_for_the_instances_tells_clients_apart()


# The bounds


class Memory:
    """The names, with a clock of the test."""

    def __init__(self, max_bytes: int = 1000, seconds: float = 10.0) -> None:
        self.now = 0.0
        self.media = NamedMedia(max_bytes, seconds, VllmRouterMetrics(), lambda: self.now)

    def keep(self, owner: str, uuid: str, url: str = "data:") -> None:
        part = MediaPart(0, 0, "image", url, {}, uuid=uuid)
        self.media.keep(owner, [part], [Item("image", "sha", url)])

    def find(self, owner: str, uuid: str) -> str | None:
        asked = MediaPart(0, 0, "image", "", {}, uuid=uuid)
        grown: list[int] = []
        try:
            (found,) = self.media.resolved(owner, [asked], grown.append)
        except ServeError as error:
            return None if error.code == "unknown_media_uuid" and not grown else error.code
        assert grown == [len(found.url)]
        self.media.keep(owner, [found], [Item("image", "sha", found.url)])
        return found.url

    def check(self) -> None:
        owned = self.media._owned
        total = sum(len(one.url) for each in owned.values() for one in each.named.values())
        assert self.media.nbytes == total == sum(each.nbytes for each in owned.values()) <= 1000
        assert {(owner, name) for owner, each in owned.items() for name in each.named} == set(self.media._order)
        assert all(each.named for each in owned.values())


def test_the_least_recently_used_name_of_the_client_with_most_bytes_is_forgotten() -> None:
    memory = Memory()
    memory.keep("small", "s", "s" * 300)
    for name in "abc":
        memory.keep("large", name, name * 200)
    assert memory.find("large", "a")
    memory.keep("small", "t", "t" * 200)
    memory.check()
    assert [memory.find("large", name) is not None for name in "abc"] == [True, False, True]
    assert memory.find("small", "s") == "s" * 300


def test_many_small_names_displace_those_of_their_own_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_NAMES", 10)
    memory = Memory()
    memory.keep("one", "large", "x" * 500)
    for number in range(100):
        memory.keep("many", str(number))
        memory.check()
    assert memory.find("one", "large") == "x" * 500
    assert len(memory.media._order) == 10


def test_a_file_larger_than_the_memory_is_not_kept_and_its_name_stands_for_nothing() -> None:
    memory = Memory()
    memory.keep("a", "x", "old")
    memory.keep("a", "y", "other")
    memory.keep("a", "x", "x" * 1001)
    memory.check()
    assert memory.find("a", "x") is None
    assert memory.find("a", "y") == "other"


def test_a_name_is_forgotten_some_time_after_its_last_use() -> None:
    memory = Memory(seconds=10)
    memory.keep("a", "x", "x")
    memory.keep("a", "y", "y")
    memory.now = 9
    assert memory.find("a", "x") == "x"
    memory.now = 10
    assert memory.find("a", "y") is None
    assert memory.media.nbytes == 1
    memory.now = 18.9
    assert memory.find("a", "x") == "x"
    memory.now = 100
    memory.keep("b", "z", "z")
    memory.check()
    assert memory.media.nbytes == 1


def test_the_owner_is_the_key_where_there_are_keys() -> None:
    from embferry.serve.config import RouterSettings, Settings

    scope = {"headers": [(b"authorization", b"Bearer k")], "state": {"client": "key alice"}}
    other = {"headers": [(b"authorization", b"bearer  k")], "state": {"client": "key alice"}}
    for settings in (Settings(router=RouterSettings(api_key="k")), Settings(router=RouterSettings(api_keys_file="f"))):
        assert owner_of(scope, settings) == owner_of(other, settings) == "key alice"
    assert owner_of(scope, Settings()) != owner_of(other, Settings())
