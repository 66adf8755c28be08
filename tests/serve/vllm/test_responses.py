"""Pictures at ``/v1/responses``: encoded elsewhere, checked as at any other path, and still in the request."""

from __future__ import annotations

import base64
from typing import Any

import httpx
import pytest

from tests.serve.vllm.stubs import Stub, routed

pytestmark = pytest.mark.asyncio

FILE = "http://169.254.169.254/latest"


def url(content: bytes = b"a picture") -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def asked(*parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    content = [*parts, {"type": "input_text", "text": "what is this?"}]
    return {"model": "tiny", "input": [{"role": "user", "content": content}], **more}


def image(at: str, **more: Any) -> dict[str, Any]:
    return {"type": "input_image", "image_url": at, **more}


def by_content(**changes: Any) -> Any:
    """Responds as a producer does that names an item by its content."""

    async def behave(stub: Stub, body: dict[str, Any]) -> httpx.Response:
        (part,) = body["messages"][0]["content"]
        coordinates = {"endpoint": f"tcp://{stub.host}:1", "room": 7, "tokens": 48, "width": 64, "dtype": "float32"}
        entry = {"item_indices": [0], "metadata": {}, "embferry": coordinates | {"digest": "00"}} | changes
        return httpx.Response(200, json={"ec_transfer_params": {f"hash of {part['image_url']['url'][-8:]}": entry}})

    return behave


def replied(status: int = 200, **body: Any) -> Any:
    async def behave(stub: Stub, asked: dict[str, Any]) -> httpx.Response:
        return httpx.Response(status, json=body or {"object": "response"})

    return behave


async def test_pictures_are_encoded_and_stay_in_the_request() -> None:
    encoder, language = (
        Stub("e", "encode", behaviours=[by_content()] * 2),
        Stub("l", "language", behaviours=[replied()]),
    )
    first, second = url(b"one"), url(b"two")
    async with routed(encoder, language) as router:
        request = asked(image(first, detail="low"), image(second), image(first), temperature=0)
        response = await router.post("/v1/responses", request)
        assert (response.status, response.json()) == (200, {"object": "response"})
        assert await router.counted("encodes_total") == 2
    assert sorted(one["messages"][0]["content"][0]["image_url"]["url"] for one in encoder.requests) == sorted(
        (first, second)
    )
    assert all("uuid" not in one["messages"][0]["content"][0] for one in encoder.requests)
    (got,) = language.requests
    params = got.pop("ec_transfer_params")
    assert got == request
    assert {name: entry["embferry"]["room"] for name, entry in params.items()} == {
        f"hash of {first[-8:]}": 7,
        f"hash of {second[-8:]}": 7,
    }


async def test_a_picture_that_cannot_be_encoded_elsewhere_is_encoded_by_the_instance_that_answers() -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language", behaviours=[replied()])
    async with routed(encoder, language) as router:
        encoder.up = False
        assert (await router.post("/v1/responses", asked(image(url())))).status == 200
        assert await router.counted("fallbacks_total") == 1
    assert "ec_transfer_params" not in language.requests[0]


async def test_a_picture_that_an_encoder_refuses() -> None:
    refusal = replied(400, error={"message": "cannot identify image file"})
    async with routed(Stub("e", "encode", behaviours=[refusal]), language := Stub("l", "language")) as router:
        response = await router.post("/v1/responses", asked(image(url())))
    assert (response.status, response.json()["error"]["message"]) == (400, "cannot identify image file")
    assert not language.requests


@pytest.mark.parametrize(
    ("part", "code", "status"),
    [
        (image(FILE), "host_not_allowed", 403),
        (image("file:///etc/passwd"), "file_not_allowed", 403),
        (image(url(b"%PDF-1.7 " + bytes(100))), "unsupported_media_type", 415),
        (image(""), "invalid_request", 400),
        ({"type": "input_image", "file_id": "file-1"}, "unsupported_value", 400),
        (image(url(), file_url=FILE), "unsupported_value", 400),
        (image(url(), image_embeds={"image_grid_thw": [1, 2, 2]}), "unsupported_value", 400),
        ({"type": "input_file", "file_url": FILE}, "unsupported_value", 400),
    ],
)
async def test_a_file_or_an_address_does_not_get_past_the_router(part: dict[str, Any], code: str, status: int) -> None:
    encoder, language = Stub("e", "encode"), Stub("l", "language")
    async with routed(encoder, language) as router:
        response = await router.post("/v1/responses", asked(part))
    assert (response.status, response.json()["error"]["code"]) == (status, code)
    assert response.json()["error"]["param"] in ("input", "input[0].content[0]")
    assert not encoder.requests + language.requests


async def test_a_client_s_name_for_a_picture_reaches_no_instance() -> None:
    """VLLM would look it up in a cache that all clients share, and answer for what another client has sent."""
    encoder, language = Stub("e", "encode", behaviours=[by_content()]), Stub("l", "language", behaviours=[replied()])
    unseen = {"type": "input_text", "text": "x", "image_url": None, "uuid": "abc"}
    async with routed(encoder, language) as router:
        response = await router.post("/v1/responses", asked(image(url(), uuid="abc", detail="high"), unseen))
        assert response.status == 200
    (got,) = language.requests
    first, second, _ = got["input"][0]["content"]
    assert first == {"type": "input_image", "image_url": url(), "detail": "high"}
    assert second == {"type": "input_text", "text": "x", "image_url": None}
    assert "uuid" not in str(encoder.requests)
