"""URLs that are hard to read: hosts with letters outside ASCII, white space, half characters, and ``data:``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import addresses as under_test
from embferry.serve.media import fetch as fetch_module
from embferry.serve.media.fetch import Fetcher
from tests.serve.web_site import PNG, Site, fetch, refusal


@pytest.mark.parametrize(
    "url",
    ["http://\ud800/", "http://h/\ud800", "file:///\ud800", "http://h/" + "a" * 70_000, "http://xn--\u00e4.\u2026/",
     "http://" + "ä" * 70 + ".com/", "http://h\u00a0ä/", "http://ä..b/"],
)  # fmt: skip
def test_a_url_that_cannot_be_asked_is_refused(url: str, tmp_path: Path) -> None:
    limits = {"allowed_hosts": ("*", "h"), "allowed_folders": (tmp_path,)}
    assert refusal(url, **limits) in ("invalid_url", "fetch_failed")


@pytest.mark.parametrize("url", ["http://h/a b\tc", "http://h\n/a", " http://h/a\n"])
def test_a_url_with_white_space_in_it_is_an_answer_and_no_fault(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    async def send(self: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        raise httpx.ConnectError("no network in tests")

    monkeypatch.setattr(under_test, "_resolve", resolve)
    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    assert refusal(url, allowed_hosts=("h",)) in ("invalid_url", "fetch_failed")


@pytest.mark.parametrize("entry", ["bücher.example", "xn--bcher-kva.example", "*.bücher.example"])
@pytest.mark.parametrize("host", ["bücher.example", "BÜCHER.example", "bu\u0308cher.example", "xn--bcher-kva.example"])
def test_a_host_with_letters_outside_ascii(site: str, monkeypatch: pytest.MonkeyPatch, entry: str, host: str) -> None:
    """Its name in ASCII is the one that is looked up, sent as Host and as SNI."""
    lookups: list[str] = []
    names: list[object] = []
    send = httpx.AsyncClient.send

    async def resolve(host: str, port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1"]

    async def seen(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        names.append(request.extensions["sni_hostname"])
        return await send(self, request, **options)

    monkeypatch.setattr(under_test, "_resolve", resolve)
    monkeypatch.setattr(under_test, "is_public", lambda _: True)
    monkeypatch.setattr(httpx.AsyncClient, "send", seen)
    port = site.partition(":")[2]
    host = f"media.{host}" if entry.startswith("*") else host
    expected = "media.xn--bcher-kva.example" if entry.startswith("*") else "xn--bcher-kva.example"
    assert fetch(f"http://user@{host}:{port}/picture", allowed_hosts=(f"{entry}:{port}",)) == PNG
    assert (lookups, names) == ([expected], [expected])
    assert Site.seen == [("/picture", f"{expected}:{port}")]


def test_a_redirect_to_a_host_with_letters_outside_ascii(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    port = site.partition(":")[2]
    Site.redirects = {"/away": f"http://xn--bcher-kva.example:{port}/picture"}
    assert fetch(f"http://☃.net:{port}/away", allowed_hosts=(f"☃.net:{port}", f"bücher.example:{port}")) == PNG
    assert [host for _, host in Site.seen] == [f"xn--n3h.net:{port}", f"xn--bcher-kva.example:{port}"]


@pytest.mark.parametrize("target", ["xn--n3h.net", "☃.net", "xn--a", "xn--", "xn--zzzz-.example", "a_b.example"])
def test_a_redirect_to_a_host_that_idna_refuses_is_followed_like_its_url(
    site: str, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    port = site.partition(":")[2]
    Site.redirects = {"/away": f"http://{target}:{port}/picture"}
    allowed = (site, f"{target}:{port}")
    assert fetch(f"http://{site}/away", allowed_hosts=allowed) == PNG
    assert fetch(f"http://{target}:{port}/picture", allowed_hosts=allowed) == PNG
    assert Site.seen[-1] == Site.seen[-2]


@pytest.mark.parametrize("host", ["xn--a", "xn--", "xn--n3h.invalid", "xn--" + "a" * 80])
def test_a_redirect_to_a_host_that_is_not_there_is_a_failed_fetch(
    site: str, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    def lookup(host: str, *_: object, **__: object) -> list[object]:
        host.encode("idna")
        raise OSError("no network in tests")

    permitted = under_test._resolve

    async def resolve(host: str, port: int) -> list[str]:
        if host == "127.0.0.1":
            return [host]
        monkeypatch.setattr(under_test.socket, "getaddrinfo", lookup)
        return await permitted(host, port)

    monkeypatch.setattr(under_test, "_resolve", resolve)
    Site.redirects = {"/away": f"http://{host}/"}
    assert refusal(f"http://{site}/away", allowed_hosts=(site, "*")) == "fetch_failed"


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("data:," + "%41" * 1_000_000, "media_too_large"),
        ("data:image/png;base64," + "%41" * 20_000_000, "media_too_large"),
        ("data:image/png;base64," + "%2B" * 45_000_000, "media_too_large"),
        ("data:image/png;base64," + "%41" * 1_000_000, "invalid_url"),
        ("data:" + "x" * 1_000_000 + ";base64,AAAA", "invalid_url"),
    ],
    ids=range(5),
)
def test_a_data_url_is_bounded_before_it_is_unquoted(url: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("unquote", "unquote_to_bytes", "decode_base64"):
        real = getattr(fetch_module, name)
        bounded = lambda text, *rest, real=real: real(text, *rest) if len(text) <= 4 << 20 else pytest.fail("read")  # noqa: E731
        monkeypatch.setattr(fetch_module, name, bounded)
    assert refusal(url) == code


def test_a_list_of_frames_is_counted_before_it_is_split() -> None:
    fetcher = Fetcher(MediaSettings())
    with pytest.raises(ServeError) as caught:
        fetcher.inline_frames("data:video/jpeg;base64" + "," * 60_000_000)
    assert caught.value.code == "too_many_frames"
