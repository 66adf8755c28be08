"""Fetching files: data URLs, allowed hosts, allowed folders, and attempts to bypass the lists."""

from __future__ import annotations

import gzip
import os
import socket
from pathlib import Path

import pytest

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media import fetch as fetch_module
from embferry.serve.media.fetch import Fetcher
from embferry.serve.media.gzip_answers import Unpacker
from embferry.serve.shared_threads import UnwantedError
from tests.serve import pictures
from tests.serve.web_site import PNG, Site, fetch, refusal

BLANKS = (" ", "\t", "\n", "\f", "\r", "%20", "%09", "%0A", "%0a", "%0C", "%0D", "%09%0d%0a%20")
"""White space that may stand in base64 (the Fetch standard, "data: URL processor"), and its escapes."""


@pytest.mark.parametrize(
    "url",
    [
        pictures.data_url(PNG),
        pictures.data_url(PNG, "text/html"),
        pictures.data_url(PNG).replace("data:image/png;base64", "DATA:;charset=x;BASE64"),
        pictures.data_url(PNG).replace(";base64", "; base64"),
        pictures.data_url(PNG).replace(";base64", " ;  Base64 "),
        *(pictures.data_url(PNG)[:40] + blank + pictures.data_url(PNG)[40:] for blank in BLANKS),
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


@pytest.mark.parametrize("allowed", [(), ("example.com",), ("127.0.0.1",), ("127.0.0.1:1",)])
def test_hosts_and_ports_outside_the_list_are_not_asked(site: str, allowed: tuple[str, ...]) -> None:
    assert refusal(f"http://{site}/picture", allowed_hosts=allowed) == "host_not_allowed"
    assert Site.seen == []


def test_a_pattern_never_admits_a_private_address(site: str) -> None:
    port = site.partition(":")[2]
    for host in (site, f"localhost:{port}", f"[::ffff:127.0.0.1]:{port}"):
        assert refusal(f"http://{host}/picture", allowed_hosts=(f"*:{port}",)) == "host_not_allowed"
    assert Site.seen == []


@pytest.mark.parametrize(
    "url", ["http://", "http://[::1/x", "http://a:b/", "http://a:99999/", "http://a:0/", "http:///x", "https://a b/"]
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
        ("data:,x", "unsupported_url_scheme"),
        ("/again", "fetch_failed"),
        ("http://[", "invalid_url"),
        ("http://a:b/", "invalid_url"),
        ("http://a:99999/", "invalid_url"),
        ("http://xn--a/", "host_not_allowed"),
        ("http://xn--/", "host_not_allowed"),
        ("//xn--a/x", "host_not_allowed"),
        ("http://xn--n3h.net/", "host_not_allowed"),
        ("http://xn--\u00e4.\u2026/", "invalid_url"),
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
        ("gzip", gzip.compress(PNG[:9], mtime=0) + gzip.compress(PNG[9:], mtime=0), None),
        ("gzip", b"".join(gzip.compress(PNG[at : at + 1], mtime=0) for at in range(len(PNG))), None),
        ("gzip", gzip.compress(PNG, mtime=0) + gzip.compress(b"", mtime=0) + bytes(512), None),
        ("gzip", gzip.compress(PNG, mtime=0) + b"anything", None),
        ("gzip", gzip.compress(PNG, mtime=0) + b"\x1f", None),
        ("gzip", gzip.compress(PNG, mtime=0)[:-1], "fetch_failed"),
        ("gzip", gzip.compress(PNG, mtime=0)[:-8], "fetch_failed"),
        ("gzip", gzip.compress(PNG, mtime=0)[:20], "fetch_failed"),
        ("gzip", gzip.compress(PNG, mtime=0)[:5], "fetch_failed"),
        ("gzip", gzip.compress(PNG, mtime=0) + gzip.compress(PNG, mtime=0)[:20], "fetch_failed"),
        ("gzip", gzip.compress(PNG, mtime=0) + b"\x1f\x8bxxxxxxxxxx", "fetch_failed"),
        ("gzip", gzip.compress(PNG, mtime=0)[:-8] + bytes(8), "fetch_failed"),
        ("gzip", gzip.compress(b"", mtime=0) * 10_001, "fetch_failed"),
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


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize("tail", [b"", bytes(9), b"\x1f", b"x"])
def test_members_of_gzip_are_unpacked_wherever_pieces_end(step: int, tail: bytes) -> None:
    packed = gzip.compress(PNG[:30], mtime=0) + bytes(3) + gzip.compress(PNG[30:], mtime=0) + tail
    unpacker = Unpacker()
    pieces = [packed[at : at + step] for at in range(0, len(packed), step)]
    assert b"".join(part for piece in pieces for part in unpacker.unpack(piece)) == PNG
    unpacker.finish()


def test_an_answer_of_gzip_without_a_byte_is_empty(site: str) -> None:
    Site.encoded = ("gzip", b"")
    assert fetch(f"http://{site}/encoded", allowed_hosts=(site,)) == b""


@pytest.mark.parametrize(
    "host", ["0x7f.1", "2130706433", "0177.0.0.1", "127.1", "[::ffff:7f00:1]", "[::1]", "0", "①②⑦.0.0.1"]
)
@pytest.mark.parametrize("by", ["url", "redirect"])
def test_no_way_to_write_a_private_address_passes_a_pattern(site: str, host: str, by: str) -> None:
    port = site.partition(":")[2]
    url = f"http://{host}:{port}/picture"
    Site.redirects = {"/away": url}
    first = f"localhost:{port}"  # listed in full; its address is not
    allowed = (f"*:{port}", first) if by == "redirect" else (f"*:{port}",)
    code = refusal(f"http://{first}/away" if by == "redirect" else url, allowed_hosts=allowed)
    assert code in ("host_not_allowed", "fetch_failed", "invalid_url")
    assert [path for path, _ in Site.seen if path == "/picture"] == []


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
