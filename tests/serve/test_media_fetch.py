"""Fetching files: data URLs, allowed hosts, allowed folders, and attempts to bypass the lists."""

from __future__ import annotations

import asyncio
import http.server
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import fetch as under_test
from embferry.serve.media.fetch import Fetcher, permitted_address
from tests.serve import pictures

PNG = pictures.png()


def fetch(url: str, **limits: Any) -> bytes:
    async def run() -> bytes:
        fetcher = Fetcher(MediaSettings(**limits))
        try:
            return await fetcher.fetch(url)
        finally:
            await fetcher.close()

    return asyncio.run(run())


def refusal(url: str, **limits: Any) -> str:
    with pytest.raises(ServeError) as caught:
        fetch(url, **limits)
    assert 400 <= caught.value.http_status < 500
    return caught.value.code


class Site(http.server.BaseHTTPRequestHandler):
    """A small web site. ``seen`` holds the requests it received: (path, Host header)."""

    seen: ClassVar[list[tuple[str, str | None]]] = []
    release: ClassVar[threading.Event]
    redirects: ClassVar[dict[str, str]] = {}

    def do_GET(self) -> None:
        self.seen.append((self.path, self.headers["Host"]))
        if target := self.redirects.get(self.path):
            self.send_response(302)
            self.send_header("Location", target)
            self.end_headers()
        elif self.path == "/picture":
            self._send(PNG, {"Content-Type": "text/nonsense"})
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
    Site.seen, Site.redirects, Site.release = [], {}, threading.Event()
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
    ],
)
def test_a_data_url_holds_its_bytes(url: str) -> None:
    assert fetch(url) == PNG


@pytest.mark.parametrize(
    "url", ["data:", "data:image/png;base64", "data:;base64,a", "data:;base64,ä===", "data:;base64,AA=A"]
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


@pytest.mark.parametrize("path", ["silent", "drip"])
def test_a_slow_site_ends_in_a_timeout(site: str, path: str) -> None:
    """The site sends nothing, or one byte at a time, until the fixture ends."""
    assert refusal(f"http://{site}/{path}", allowed_hosts=(site,), fetch_timeout=0.2) == "fetch_timeout"


def test_a_host_that_does_not_answer_is_a_failed_fetch() -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{holder.getsockname()[1]}"
        assert refusal(f"http://{host}/", allowed_hosts=(host,)) == "fetch_failed"


@pytest.mark.parametrize(
    ("entry", "url", "allowed"),
    [
        ("example.com", "https://example.com/", True),
        ("example.com", "http://EXAMPLE.com:80/", True),
        ("Example.com", "https://example.com/", True),
        ("example.com", "https://example.com:8443/", False),
        ("example.com:8443", "https://example.com:8443/", True),
        ("example.com", "https://www.example.com/", False),
        ("*.example.com", "https://www.example.com/", True),
        ("*.example.com", "https://a.b.example.com/", True),
        ("*.example.com", "https://example.com/", False),
        ("*.example.com", "https://evilexample.com/", False),
        ("*", "https://anything.org/", True),
        ("*", "https://anything.org:22/", False),
        ("[2001:db8::1]:8080", "http://[2001:db8::1]:8080/", True),
        ("2001:db8::1", "http://[2001:db8::1]/", True),
    ],
)
def test_an_entry_of_the_list_admits_its_hosts_only(
    monkeypatch: pytest.MonkeyPatch, entry: str, url: str, allowed: bool
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34"]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    if allowed:
        assert asyncio.run(permitted_address(urlsplit(url), (entry,))) == "93.184.216.34"
    else:
        with pytest.raises(ServeError) as caught:
            asyncio.run(permitted_address(urlsplit(url), (entry,)))
        assert caught.value.code == "host_not_allowed"


@pytest.mark.parametrize(
    "address", ["10.0.0.5", "192.168.1.1", "169.254.169.254", "::1", "fd00::1", "0.0.0.0", "100.64.0.1"]
)
def test_a_name_with_a_private_address_needs_to_be_listed_in_full(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    async def resolve(host: str, port: int) -> list[str]:
        return ["93.184.216.34", address]

    monkeypatch.setattr(under_test, "_resolve", resolve)
    url = urlsplit("https://inside.example.com/")
    with pytest.raises(ServeError) as caught:
        asyncio.run(permitted_address(url, ("*.example.com",)))
    assert caught.value.code == "host_not_allowed"
    assert address in caught.value.detail
    assert asyncio.run(permitted_address(url, ("inside.example.com",)))


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
