"""The live page as files: what they hold and load, and how they are served."""

from __future__ import annotations

import base64
import re
from importlib import resources
from pathlib import Path

import pytest

import embferry.models
from embferry.serve import page
from tests.serve.inside import Inside

PARTS = {
    "/": "text/html",
    "/page/style.css": "text/css",
    "/page/page.js": "text/javascript",
    "/page/icon.svg": "image/svg+xml",
}
TEXTS = {name: resources.files(page).joinpath(name).read_text() for name in page._TYPES}


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PARTS)
async def test_a_part_has_its_type_and_may_load_nothing_from_elsewhere(inside: Inside, path: str) -> None:
    async with inside.asking() as client:
        response = await client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].partition(";")[0] == PARTS[path]
        policy = dict(rule.strip().split(" ", 1) for rule in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'"
        assert policy["frame-ancestors"] == "'none'"
        assert response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.asyncio
@pytest.mark.parametrize("path", PARTS)
async def test_a_browser_that_has_a_part_gets_it_only_when_it_has_changed(inside: Inside, path: str) -> None:
    async with inside.asking() as client:
        first = await client.get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = await client.get(path, headers={"if-none-match": first.headers["etag"]})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
        assert (await client.get(path, headers={"if-none-match": '"other"'})).content == first.content


def test_no_part_names_another_place() -> None:
    known = {"http://www.w3.org/2000/svg"}
    for name, text in TEXTS.items():
        assert set(re.findall(r"https?://[^\s\"'`<)\\/]+[^\s\"'`<)]*", text)) <= known, name
        assert "@import" not in text
        assert "url(" not in text


def test_no_script_or_style_stands_in_the_page_itself() -> None:
    text = TEXTS["index.html"]
    assert re.findall(r"<script[^>]*>([^<]*)", text) == [""]
    assert "<style" not in text
    assert not re.search(r"\s(style|on\w+)=", text)
    assert "innerHTML" not in TEXTS["page.js"]


def test_all_that_the_page_loads_is_served() -> None:
    loaded = set(re.findall(r'(?:href|src)="([^"]+)"', TEXTS["index.html"]))
    served = {route.path.lstrip("/") for route in page.page_routes()} | {"metrics", "activity"}
    assert loaded <= served


def test_the_first_question_shows_the_picture_of_the_package() -> None:
    picture = Path(embferry.models.__file__).with_name("example.png").read_bytes()
    assert base64.b64encode(picture).decode() in TEXTS["page.js"]


@pytest.mark.asyncio
async def test_an_error_about_another_path_names_the_page_and_not_its_parts(inside: Inside) -> None:
    async with inside.asking() as client:
        message = (await client.get("/nothing")).json()["error"]["message"]
    assert "GET /," in message
    assert "GET /activity" in message
    assert "/page/" not in message
