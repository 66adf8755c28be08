"""Fetching files: data URLs, allowed hosts, allowed folders, and attempts to bypass the lists."""

from __future__ import annotations

import asyncio
import gzip
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import addresses as under_test
from embferry.serve.media import fetch as fetch_module
from embferry.serve.media.fetch import Fetcher
from embferry.serve.shared_threads import UnwantedError, acting_for
from tests.serve import pictures

PNG = pictures.png()


def fetch(url: str, seen: list[int] | None = None, **limits: Any) -> bytes:
    """Fetches a URL; ``seen`` gets the numbers of bytes that it takes in memory."""

    async def run() -> bytes:
        fetcher = Fetcher(MediaSettings(**limits))
        try:
            return await fetcher.fetch(url, seen.append if seen is not None else lambda nbytes: None)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(url: str, seen: list[int] | None = None, **limits: Any) -> str:
    with pytest.raises(ServeError) as caught:
        fetch(url, seen, **limits)
    assert 400 <= caught.value.http_status < 500
    return caught.value.code


class Site(http.server.BaseHTTPRequestHandler):
    """A small web site. ``seen`` holds the requests it received: (path, Host header)."""

    seen: ClassVar[list[tuple[str, str | None]]] = []
    release: ClassVar[threading.Event]
    redirects: ClassVar[dict[str, str]] = {}
    encoded: ClassVar[tuple[str, bytes]] = ("", b"")
    cookies: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if target := self.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif self.path == "/picture":
            self._send(PNG, {"Content-Type": "text/nonsense"})
        elif self.path == "/chunks":
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            self.wfile.write(head + b"1\r\na\r\n" * 100_000)
        elif self.path == "/cookie":
            self.cookies.append(self.headers["Cookie"])
            self._send(PNG, {"Set-Cookie": "a=b; Path=/", "Content-Length": str(len(PNG))})
        elif self.path == "/encoded":
            encoding, body = self.encoded
            self._send(body, {"Content-Encoding": encoding, "Content-Length": str(len(body))})
        elif self.path == "/huge":
            self._send(b"", {"Content-Length": "999999999"})
        elif self.path == "/endless":
            self._send(bytes(300_000), {})
        elif self.path == "/short":
            self._send(PNG[:20], {"Content-Length": "500"})
        elif self.path == "/silent":
            self.release.wait(100)
        elif self.path == "/drip":
            self._send(b"", {"Content-Length": "500"})
            while not self.release.wait(0.02):
                self.wfile.write(b"x")
                self.wfile.flush()
        else:
            self.send_error(404)

    def _send(self, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Ignores the clients that disconnect on purpose."""


@pytest.fixture
def site() -> Iterator[str]:
    """Runs the web site and returns its ``host:port``."""
    Site.seen, Site.redirects, Site.release, Site.cookies = [], {}, threading.Event(), []
    with _Server(("127.0.0.1", 0), Site) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_address[1]}"
        Site.release.set()
        server.shutdown()
        thread.join(10)


@pytest.mark.parametrize(
    "url",
    [
        pictures.data_url(PNG),
        pictures.data_url(PNG, "text/html"),
        pictures.data_url(PNG).replace("data:image/png;base64", "DATA:;charset=x;BASE64"),
        pictures.data_url(PNG).replace("+", "%2B").replace("=", "%3D"),
        pictures.data_url(PNG)[:60] + "\n  " + pictures.data_url(PNG)[60:],
        "data:," + "".join(f"%{byte:02x}" for byte in PNG),
        " \n" + pictures.data_url(PNG) + "\n",
        pictures.data_url(PNG).rstrip("="),
        pictures.data_url(PNG).replace("+", "-").replace("=", ""),
        pictures.data_url(PNG)[:22] + pictures.data_url(PNG)[22:].replace("+", "-").replace("/", "_"),
    ],
)
def test_a_data_url_holds_its_bytes(url: str) -> None:
    assert fetch(url) == PNG


@pytest.mark.parametrize(
    "url",
    [
        "data:",
        "data:image/png;base64",
        "data:;base64,a",
        "data:;base64,ä===",
        "data:;base64,AA=A",
        "data:,\ud800",
        "data:;base64,\ud800AAA",
        "data:;base64,=",
        "data:;base64,AAAA=AAA",
    ],
)
def test_a_malformed_data_url_is_refused(url: str) -> None:
    assert refusal(url) == "invalid_url"


@pytest.mark.parametrize(
    "url", ["ftp://h/x", "gopher://h/", "javascript:1", "picture.png", "/etc/passwd", "", "blob:x"]
)
def test_other_schemes_are_refused(url: str) -> None:
    assert refusal(url, allowed_hosts=("*",)) == "unsupported_url_scheme"


def test_a_data_url_above_the_limit_is_refused() -> None:
    assert refusal(pictures.data_url(PNG), max_bytes=len(PNG) - 1) == "media_too_large"
    assert fetch(pictures.data_url(PNG), max_bytes=len(PNG)) == PNG


def test_an_allowed_host_is_asked(site: str) -> None:
    assert fetch(f"http://{site}/picture", allowed_hosts=(site,)) == PNG
    assert Site.seen == [("/picture", site)]


@pytest.mark.parametrize("allowed", [(), ("example.com",), ("127.0.0.1",), ("127.0.0.1:1",), ("*.0.0.1",)])
def test_hosts_and_ports_outside_the_list_are_not_asked(site: str, allowed: tuple[str, ...]) -> None:
    assert refusal(f"http://{site}/picture", allowed_hosts=allowed) == "host_not_allowed"
    assert Site.seen == []


def test_a_pattern_never_admits_a_private_address(site: str) -> None:
    port = site.partition(":")[2]
    for host in (site, f"localhost:{port}", f"[::ffff:127.0.0.1]:{port}"):
        assert refusal(f"http://{host}/picture", allowed_hosts=(f"*:{port}",)) == "host_not_allowed"
    assert Site.seen == []


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1/x", "http://a:b/", "http://a:99999/", "http:///x", "https://a b/"]
)
def test_a_malformed_url_is_refused(url: str) -> None:
    assert refusal(url, allowed_hosts=("*",)) in ("invalid_url", "host_not_allowed", "fetch_failed")


@pytest.mark.parametrize(
    "host", ["a\0.h", "a b.h", "a%00b.h", "a\\\\.h", ".h", "a..h", "\ud800.h", "a\x7f.h", "a'.h", "h:", "é:8x"]
)
def test_a_host_that_two_programs_read_differently_is_not_looked_up(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """The system's lookup reads no further than to a zero byte."""

    async def resolve(host: str, port: int) -> list[str]:
        raise AssertionError("it was looked up")

    monkeypatch.setattr(under_test, "_resolve", resolve)
    assert refusal(f"http://{host}/", allowed_hosts=("*.h",)) in ("invalid_url", "host_not_allowed")


@pytest.mark.parametrize("name", ["bücher.example", "BÜCHER.example.", "xn--bcher-kva.example"])
@pytest.mark.parametrize("listed", ["bücher.example", "xn--bcher-kva.example"])
def test_an_international_name_is_asked_in_the_letters_of_dns(
    site: str, monkeypatch: pytest.MonkeyPatch, name: str, listed: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.1" if host == "xn--bcher-kva.example" else "192.0.2.1"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    port = site.partition(":")[2]
    assert fetch(f"http://u:é@{name}:{port}/picture", allowed_hosts=(f"{listed}:{port}",)) == PNG
    assert Site.seen[0][1].removesuffix(f":{port}").rstrip(".").lower() == "xn--bcher-kva.example"  # type: ignore[union-attr]


def test_a_site_gets_no_cookie_back_and_fills_no_memory_with_them(site: str) -> None:
    """The addresses of sites are their domains here, so a site would get those of others at the same address."""

    async def run() -> None:
        fetcher = Fetcher(MediaSettings(allowed_hosts=(site,)))
        for _ in range(2):
            assert await fetcher.fetch(f"http://{site}/cookie") == PNG
        assert len(fetcher._client.cookies.jar) == 0
        await fetcher.close()

    asyncio.run(run())
    assert Site.cookies == [None, None]


def test_a_client_whose_hosts_are_slow_leaves_slots_to_others(site: str) -> None:
    async def run() -> None:
        fetcher = Fetcher(MediaSettings(allowed_hosts=(site,), fetch_timeout=100), max_connections=4)
        with acting_for("first"):
            slow = [asyncio.create_task(fetcher.fetch(f"http://{site}/silent")) for _ in range(20)]
        while len(Site.seen) < 2:
            await asyncio.sleep(0.001)
        for other in ("second", "third"):
            with acting_for(other):
                assert await fetcher.fetch(f"http://{site}/picture") == PNG
        assert [path for path, _ in Site.seen] == ["/silent", "/silent", "/picture", "/picture"]
        for task in slow:
            task.cancel()
        await asyncio.wait(slow)
        await fetcher.close()

    asyncio.run(run())


def test_the_wait_for_a_slot_is_no_part_of_a_fetch(site: str) -> None:
    async def run() -> None:
        fetcher = Fetcher(MediaSettings(allowed_hosts=(site,), fetch_timeout=0.2), max_connections=1)
        fetches = [fetcher.fetch(f"http://{site}/{path}") for path in ("silent", "silent", "picture")]
        first, second, last = await asyncio.gather(*fetches, return_exceptions=True)
        assert [first.code, second.code] == ["fetch_timeout"] * 2  # type: ignore[union-attr]
        assert last == PNG
        await fetcher.close()

    asyncio.run(run())


def test_a_user_name_in_a_url_does_not_bypass_the_list(site: str) -> None:
    assert refusal(f"http://{site}@example.invalid/x", allowed_hosts=(site,)) == "host_not_allowed"
    assert fetch(f"http://user:word@{site}/picture", allowed_hosts=(site,)) == PNG


def test_redirects_within_the_list_are_followed(site: str) -> None:
    Site.redirects = {"/a": "/b", "/b": f"http://{site}/picture"}
    assert fetch(f"http://{site}/a", allowed_hosts=(site,)) == PNG


@pytest.mark.parametrize(
    ("target", "code"),
    [
        ("http://127.0.0.2:1/x", "host_not_allowed"),
        ("file:///etc/passwd", "unsupported_url_scheme"),
        ("data:,x", "fetch_failed"),
        ("/again", "fetch_failed"),
        ("http://[", "invalid_url"),
    ],
)
def test_the_target_of_a_redirect_is_checked(site: str, target: str, code: str) -> None:
    Site.redirects = {"/again": target}
    assert refusal(f"http://{site}/again", allowed_hosts=(site,)) == code


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("nowhere", "fetch_failed"),
        ("short", "fetch_failed"),
        ("huge", "media_too_large"),
        ("endless", "media_too_large"),
    ],
)
def test_bad_responses_of_a_site_are_refused(site: str, path: str, code: str) -> None:
    assert refusal(f"http://{site}/{path}", allowed_hosts=(site,), max_bytes=100_000) == code


def test_a_site_that_sends_a_picture_in_tiny_chunks_is_refused(site: str) -> None:
    """Each chunk costs the event loop as much as hundreds of bytes."""
    seen: list[int] = []
    assert refusal(f"http://{site}/chunks", seen, allowed_hosts=(site,)) == "fetch_failed"
    assert sum(seen) < 10_000


@pytest.mark.parametrize("path", ["silent", "drip"])
def test_a_slow_site_ends_in_a_timeout(site: str, path: str) -> None:
    """The site sends nothing, or one byte at a time, until the fixture ends."""
    assert refusal(f"http://{site}/{path}", allowed_hosts=(site,), fetch_timeout=0.2) == "fetch_timeout"


def test_a_host_that_does_not_answer_is_a_failed_fetch() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{holder.getsockname()[1]}"
        assert refusal(f"http://{host}/", allowed_hosts=(host,)) == "fetch_failed"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with ``open/``, which the tests allow, and ``secret/``, which they do not."""
    for name in ("open", "secret", "open/inner"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(PNG)
    return tmp_path


def test_files_in_an_allowed_folder_are_read(folder: Path) -> None:
    allowed = {"allowed_folders": (folder / "open",)}
    (folder / "open" / "link.png").symlink_to("inner/a.png")
    for url in ("a.png", "inner/a.png", "link.png", "inner/../a.png", "%61.png"):
        assert fetch(f"file://{folder}/open/{url}", **allowed) == PNG
    assert fetch(f"file://localhost{folder}/open/a.png", **allowed) == PNG
    assert refusal(f"file://{folder}/open/a.png", max_bytes=10, **allowed) == "media_too_large"


def test_links_and_paths_out_of_the_folder_are_refused(folder: Path) -> None:
    (folder / "open" / "out.png").symlink_to(folder / "secret" / "a.png")
    (folder / "open" / "outside").symlink_to(folder / "secret")
    (folder / "openly").mkdir()
    (folder / "openly" / "a.png").write_bytes(PNG)
    outside = ("secret/a.png", "open/../secret/a.png", "open/%2e%2e/secret/a.png")
    for url in (*outside, "open/out.png", "open/outside/a.png", "openly/a.png"):
        assert refusal(f"file://{folder}/{url}", allowed_folders=(folder / "open",)) == "file_not_allowed"
    assert refusal(f"file://{folder}/open/a.png") == "file_not_allowed"


def test_missing_and_special_files_are_refused(folder: Path) -> None:
    allowed = {"allowed_folders": (folder / "open",)}
    os.mkfifo(folder / "open" / "pipe")
    for url in ("none.png", "inner", "pipe"):
        assert refusal(f"file://{folder}/open/{url}", **allowed) == "file_not_found"
    assert refusal(f"file://elsewhere{folder}/open/a.png", **allowed) == "invalid_url"
    assert refusal(f"file://{folder}/open/a.png%00.txt", **allowed) == "invalid_url"


def gzipped(times: int, nbytes: int) -> bytes:
    data = bytes(nbytes)
    for _ in range(times):
        data = gzip.compress(data, mtime=0)
    return data


@pytest.mark.parametrize(
    ("encoding", "body", "code"),
    [
        ("gzip", gzip.compress(PNG, mtime=0), None),
        ("GZIP", gzip.compress(PNG, mtime=0), None),
        ("identity", PNG, None),
        ("gzip", gzipped(1, 100 << 20), "media_too_large"),
        ("gzip", b"no gzip", "fetch_failed"),
        ("gzip, gzip", gzipped(2, 1000), "fetch_failed"),
        ("gzip,identity", gzip.compress(PNG, mtime=0), "fetch_failed"),
        ("gzip, deflate, br", b"x", "fetch_failed"),
        ("br", b"x", "fetch_failed"),
        ("zstd", b"x", "fetch_failed"),
        ("deflate", b"x", "fetch_failed"),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else str(value),
)
def test_one_encoding_is_unpacked_within_the_limit(site: str, encoding: str, body: bytes, code: str | None) -> None:
    Site.encoded = (encoding, body)
    seen: list[int] = []
    if code is None:
        assert fetch(f"http://{site}/encoded", allowed_hosts=(site,)) == PNG
    else:
        assert refusal(f"http://{site}/encoded", seen, allowed_hosts=(site,), max_bytes=1 << 20) == code
        assert sum(seen) <= (1 << 20) + (1 << 16)


@pytest.mark.parametrize(
    "host", ["0x7f.1", "2130706433", "0177.0.0.1", "127.1", "[::ffff:7f00:1]", "[::1]", "0", "①②⑦.0.0.1"]
)
@pytest.mark.parametrize("by", ["url", "redirect"])
def test_no_way_to_write_a_private_address_passes_a_pattern(site: str, host: str, by: str) -> None:
    port = site.partition(":")[2]
    url = f"http://{host}:{port}/picture"
    Site.redirects = {"/away": url}
    allowed = (f"*:{port}", site) if by == "redirect" else (f"*:{port}",)
    code = refusal(f"http://{site}/away" if by == "redirect" else url, allowed_hosts=allowed)
    assert code in ("host_not_allowed", "fetch_failed", "invalid_url")
    assert [path for path, _ in Site.seen if path == "/picture"] == []


def test_the_address_that_was_checked_is_the_one_that_is_asked(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that has another address at each lookup gains nothing: it is looked up once."""
    lookups = []

    async def rebinding(host: str, port: int) -> list[str]:
        lookups.append(host)
        return ["127.0.0.1" if len(lookups) == 1 else "192.0.2.1"]

    monkeypatch.setattr(under_test, "_resolve", rebinding)
    port = site.partition(":")[2]
    assert fetch(f"http://media.example:{port}/picture", allowed_hosts=(f"media.example:{port}",)) == PNG
    assert lookups == ["media.example"]


def test_the_next_address_of_a_name_is_tried_if_one_cannot_be_reached(
    site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a host with an IPv6 address behind a network without IPv6: refused at once, or silent for its share."""

    async def resolve(host: str, port: int) -> list[str]:
        return ["127.0.0.2", "192.0.2.1", "127.0.0.1"]  # the site listens at the last one only

    shares: dict[str, float] = {}
    send = httpx.AsyncClient.send

    async def silent(self: httpx.AsyncClient, request: httpx.Request, **options: Any) -> httpx.Response:
        shares[request.url.host] = request.extensions["timeout"]["connect"]
        if request.url.host == "192.0.2.1":
            raise httpx.ConnectTimeout("the share of this address is over", request=request)
        return await send(self, request, **options)

    monkeypatch.setattr(under_test, "_resolve", resolve)
    monkeypatch.setattr(httpx.AsyncClient, "send", silent)
    port = site.partition(":")[2]
    limits = {"allowed_hosts": (f"media.example:{port}",), "fetch_timeout": 60}
    assert fetch(f"http://media.example:{port}/picture", **limits) == PNG
    assert list(shares) == ["127.0.0.2", "192.0.2.1", "127.0.0.1"]
    assert shares["127.0.0.2"] <= 20
    assert shares["192.0.2.1"] <= 30
    assert [host for path, host in Site.seen if path == "/picture"][-1] == f"media.example:{port}"


@pytest.mark.parametrize(
    "url", ["http://h:80\\@127.0.0.1/", "http://h\t@127.0.0.1/", "http://127.0.0.1\\.h/", "http://h#@127.0.0.1/"]
)
def test_a_url_that_two_parsers_read_differently_reaches_the_checked_host(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["0.0.0.0" if "127" in host else "192.0.2.1"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    asked: list[httpx.URL] = []

    async def send(self: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        asked.append(request.url)
        raise httpx.ConnectError("no network in tests")

    monkeypatch.setattr(httpx.AsyncClient, "send", send)
    assert refusal(url, allowed_hosts=("h",)) in ("host_not_allowed", "fetch_failed", "invalid_url")
    assert {(target.host, target.port) for target in asked} <= {("192.0.2.1", None), ("192.0.2.1", 80)}


def test_frames_that_are_not_base64_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one piece of work, and unquoting a megabyte takes a tenth of a second."""
    monkeypatch.setattr(fetch_module, "unquote_to_bytes", lambda text: pytest.fail("read"))
    fetcher = Fetcher(MediaSettings())
    with pytest.raises(ServeError) as caught:
        fetcher.inline_frames("data:video/jpeg;," + ",".join(["%41" * 300_000] * 2))
    assert caught.value.code == "media_too_large"


def test_frames_are_not_decoded_to_their_end_when_their_client_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted() -> None:
        raise UnwantedError

    monkeypatch.setattr(fetch_module, "stop_if_unwanted", unwanted)
    with pytest.raises(UnwantedError):
        Fetcher(MediaSettings()).inline_frames("data:video/jpeg;base64,AAAA,AAAA")
