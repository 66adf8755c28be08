"""Fetches the files of a request: ``data:``, ``http(s):`` from allowed hosts, ``file:`` from allowed folders.

What a URL can cost is bounded before it is spent: the length of a ``data:`` URL, the bytes of an answer while
they are unpacked, the time. :mod:`.addresses` says which hosts may be asked.
"""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlsplit

import httpx

from embferry.protocol.text import printable
from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.media.addresses import DEFAULT_PORTS, ascii_host, permitted_addresses
from embferry.serve.media.gzip_answers import Unpacker
from embferry.serve.off_loop import decode_base64, off_loop
from embferry.serve.shared_slots import SharedSlots
from embferry.serve.shared_threads import stop_if_unwanted
from embferry.trust.bounded_answers import no_cookies
from embferry.trust.chunks import too_many

Grow = Callable[[int], object]
"""Called with the bytes that a file takes in memory, before or as it is read. What it raises ends the fetch."""

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_LOCATION = "embferry.location"
"""The extension of a response in which the target of a redirect is kept."""
MAX_UNQUOTED = 1 << 20
"""Characters of a ``data:`` URL that is not base64: three of them may be one byte, and reading them is slow."""
MAX_URL = 65_536
"""Characters of a URL that is none of data."""
_ESCAPED = {"%2B": "+", "%2F": "/", "%3D": "=", "%09": "", "%0A": "", "%0C": "", "%0D": "", "%20": ""}
"""Escapes of the characters of base64, and of white space."""
_MAX_HEAD = 1 << 16
"""Characters of a ``data:`` URL before its comma."""
_SHOWN = 120
"""Characters of a URL that an error repeats."""
_NETLOC = re.compile(r"(?:\[[0-9A-Za-z:.%_-]+\]|[0-9A-Za-z_-]+(?:\.[0-9A-Za-z_-]+)*\.?)(?::\d*)?", re.ASCII)


class Fetcher:
    """The fetcher of one router. Checks each file against the limits of a single file.

    Args:
        limits: of a file, and of the time that a fetch may take.
        certificates: verify servers; None: the system's.
        max_connections: fetches at once; further ones wait. Clients share them.
    """

    def __init__(
        self, limits: MediaSettings, certificates: ssl.SSLContext | None = None, max_connections: int = 100
    ) -> None:
        self._limits = limits
        self._slots = SharedSlots(max_connections)
        # trust_env: proxies and credentials of the environment would bypass the list of hosts.
        self._client = httpx.AsyncClient(
            trust_env=False,
            follow_redirects=False,
            timeout=limits.fetch_timeout,
            verify=certificates or True,
            cookies=no_cookies(),
            event_hooks={"response": [_take_location]},
            limits=httpx.Limits(max_connections=max_connections),
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, url: str, grow: Grow = lambda nbytes: None) -> bytes:
        """Returns the bytes of a URL.

        Raises:
            ServeError: invalid_url, unsupported_url_scheme, host_not_allowed, file_not_allowed, file_not_found,
                fetch_failed, fetch_timeout, media_too_large.
        """
        url = url.strip()
        if url[:5].lower() == "data:":
            grow(len(url) // 4 * 3)
            return await off_loop(len(url), self._inline, url)
        url, parts = _split(url)
        if parts.scheme in ("http", "https"):
            try:
                async with self._slots.taken(), asyncio.timeout(self._limits.fetch_timeout):
                    return await self._remote(url, parts, grow)
            except (TimeoutError, httpx.TimeoutException) as error:
                seconds = f"{self._limits.fetch_timeout:g} seconds (media.fetch_timeout)"
                raise ServeError("fetch_timeout", f"{_short(url)} took longer than {seconds}") from error
        if parts.scheme == "file":
            return await asyncio.to_thread(self._local, parts, grow)
        scheme = f"{parts.scheme}: URLs are" if parts.scheme else "a URL without a scheme is"
        raise ServeError("unsupported_url_scheme", f"{scheme} not supported; use data:, http:, https: or file:")

    def inline_frames(self, url: str) -> list[bytes]:
        """Returns the frames of a ``data:video/jpeg;base64,<frame>,<frame>,…`` URL, the form that vLLM's users send.

        Raises:
            ServeError: as :meth:`fetch` for ``data:`` URLs.
        """
        if (count := url.count(",")) > self._limits.max_video_frames:
            why = f"the video has {count} frames; the limit is {self._limits.max_video_frames} (media.max_video_frames)"
            raise ServeError("too_many_frames", why)
        head, _, rest = url.partition(",")
        if not _is_base64(head):
            self._check_unquoted(len(rest))  # of all frames: they are one piece of work
        frames = []
        for frame in rest.split(","):
            stop_if_unwanted()
            frames.append(self._inline(f"{head},{frame}"))
        return frames

    def _inline(self, url: str) -> bytes:
        """Decodes a ``data:`` URL (RFC 2397). The media type is ignored; the format is detected in the bytes."""
        start = url.find(",") + 1
        if not start:
            raise ServeError("invalid_url", "a data: URL needs a comma before its data")
        if start > _MAX_HEAD:
            raise ServeError("invalid_url", "the head of the data: URL is too long")
        if not _is_base64(url[: start - 1]):
            self._check_unquoted(len(url) - start)
            return self._fits(_unquoted(url[start:]))
        if (len(url) - start) // 4 * 3 > self._limits.max_bytes * (3 if "%" in url else 1) + 3:
            raise self._too_large()
        try:
            if "%" in url:
                url, start = _unescaped(url[start:]), 0
                if len(url) // 4 * 3 > self._limits.max_bytes + 3:
                    raise self._too_large()
            return self._fits(decode_base64(url, start))
        except ValueError as error:
            raise ServeError("invalid_url", f"the data: URL is not base64: {error}") from error

    def _check_unquoted(self, characters: int) -> None:
        if characters > MAX_UNQUOTED:
            why = f"a data: URL of more than {MAX_UNQUOTED:,} characters must be base64: data:image/png;base64,…"
            raise ServeError("media_too_large", why)

    async def _remote(self, url: str, parts: SplitResult, grow: Grow) -> bytes:
        until = asyncio.get_running_loop().time() + self._limits.fetch_timeout
        for _ in range(MAX_REDIRECTS + 1):
            try:
                response = await self._first_response(parts, until)
                try:
                    if response.status_code in _REDIRECTS and (location := response.extensions.get(_LOCATION)):
                        url, parts = _joined(url, location)
                        if parts.scheme not in ("http", "https"):
                            raise ServeError("unsupported_url_scheme", f"redirected to a {parts.scheme}: URL")
                        continue
                    if response.status_code != 200:
                        raise ServeError("fetch_failed", f"{_short(url)} answered with status {response.status_code}")
                    return await self._body(response, grow)
                finally:
                    await response.aclose()
            except httpx.TimeoutException:
                raise
            except (httpx.HTTPError, httpx.InvalidURL) as error:
                reason = str(error) or type(error).__name__
                raise ServeError("fetch_failed", f"{_short(url)} could not be fetched: {reason}") from error
        raise ServeError("fetch_failed", f"{_short(url)}: more than {MAX_REDIRECTS} redirects")

    async def _first_response(self, parts: SplitResult, until: float) -> httpx.Response:
        """Returns the response of the first address of the host that can be connected to.

        Each address has an equal share of the time that is left until ``until``, on the event loop's clock.
        """
        addresses = await permitted_addresses(parts, self._limits.allowed_hosts)
        headers = {"Host": parts.netloc, "Accept": "image/*, video/*, audio/*", "Accept-Encoding": "gzip"}
        while True:
            address = addresses.pop(0)
            # Host and port are those that were checked, however httpx reads the URL.
            checked = {"scheme": parts.scheme, "host": address, "port": parts.port or DEFAULT_PORTS[parts.scheme]}
            target = httpx.URL(parts.geturl()).copy_with(**checked, username=None, password=None, fragment=None)
            share = max(0.0, until - asyncio.get_running_loop().time()) / (len(addresses) + 1)
            timeout = httpx.Timeout(self._limits.fetch_timeout, connect=share)
            request = self._client.build_request("GET", target, headers=headers, timeout=timeout)
            request.extensions["sni_hostname"] = parts.hostname
            try:
                return await self._client.send(request, stream=True)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if not addresses:
                    raise

    async def _body(self, response: httpx.Response, grow: Grow) -> bytes:
        """Reads a body within the limit, which applies to the bytes as sent and as unpacked."""
        unpacker = _unpacker(response)
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limits.max_bytes:
            raise self._too_large()
        body = bytearray()
        received = chunks = 0
        async for packed in response.aiter_raw():
            received, chunks = received + len(packed), chunks + 1
            if too_many(chunks, received):
                raise ServeError(
                    "fetch_failed", f"the host sent {received:,} bytes in {chunks:,} pieces, which is slow"
                )
            for piece in unpacker.unpack(packed) if unpacker else (packed,):
                grow(len(piece))
                body += piece
                if max(received, len(body)) > self._limits.max_bytes:
                    raise self._too_large()
                await asyncio.sleep(0)  # a piece may unpack to a thousand times its size
        if unpacker:
            unpacker.finish()
        return bytes(body)

    def _local(self, parts: SplitResult, grow: Grow) -> bytes:
        """Reads a regular file whose real path, with links resolved, is in an allowed folder."""
        if parts.netloc not in ("", "localhost") or "\0" in unquote(parts.path):
            raise ServeError("invalid_url", "a file: URL has no host: file:///folder/picture.png")
        path = Path(os.path.realpath(unquote(parts.path)))
        if not self._inside(path):
            raise ServeError("file_not_allowed", "the file is in none of the allowed folders (media.allowed_folders)")
        try:
            # The flags avoid waiting on a pipe, and following a link that replaced the file since.
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
        except OSError as error:
            raise ServeError("file_not_found", f"{path.name}: {error.strerror}") from error
        try:
            if not self._inside(Path(os.path.realpath(f"/proc/self/fd/{handle}"))):
                raise ServeError("file_not_allowed", "the file has moved out of the allowed folders")
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ServeError("file_not_found", f"{path.name} is not a file")
            grow(min(os.fstat(handle).st_size, self._limits.max_bytes))
            with os.fdopen(handle, "rb", closefd=False) as file:
                return self._fits(file.read(self._limits.max_bytes + 1))
        finally:
            os.close(handle)

    def _inside(self, path: Path) -> bool:
        return any(path.is_relative_to(os.path.realpath(folder)) for folder in self._limits.allowed_folders)

    def _fits(self, data: bytes) -> bytes:
        if len(data) > self._limits.max_bytes:
            raise self._too_large()
        return data

    def _too_large(self) -> ServeError:
        why = f"the file is larger than {self._limits.max_bytes:,} bytes (media.max_bytes)"
        return ServeError("media_too_large", why)


def is_frame_list(url: str) -> bool:
    """Returns whether a ``data:`` URL is a list of frames; see :meth:`Fetcher.inline_frames`."""
    return url[:64].lstrip().lower().startswith(("data:video/jpeg;", "data:video/jpg;"))


def _split(url: str) -> tuple[str, SplitResult]:
    """Returns a URL with the host in ASCII, and its parts.

    Raises:
        ServeError: invalid_url.
    """
    if len(url) > MAX_URL:
        raise ServeError("invalid_url", f"the URL has more than {MAX_URL:,} characters; only data: URLs may")
    try:
        url.encode()  # not possible with half a character (a lone surrogate)
        parts = urlsplit(url)
        if parts.scheme in ("http", "https"):
            parts = parts._replace(netloc=_plain_netloc(parts))
    except ValueError as error:
        raise ServeError("invalid_url", f"{_short(url)!r} is not a URL: {printable(str(error), _SHOWN)}") from error
    return parts.geturl(), parts


def _plain_netloc(parts: SplitResult) -> str:
    """Returns host and port in the letters of DNS, so that all that read them read the same. Drops name and password.

    Raises:
        ValueError: the host is no name, no address and no international name (IDNA).
    """
    netloc, port = parts.netloc.rpartition("@")[2], parts.port  # the latter raises, if it is no number
    if not parts.hostname:
        raise ValueError("it names no host")
    if port == 0:
        raise ValueError("there is no port 0")
    if not netloc.isascii():
        netloc = ascii_host(parts.hostname) + (f":{port}" if port is not None else "")
    if not _NETLOC.fullmatch(netloc):
        raise ValueError("its host is no name and no address")
    return netloc


def _is_base64(head: str) -> bool:
    """Returns whether the data after this head of a ``data:`` URL, without its comma, are base64."""
    parameters, _, last = head[-_SHOWN:].rpartition(";")
    return bool(parameters) and last.strip().lower() == "base64"


def _joined(url: str, location: str) -> tuple[str, SplitResult]:
    """Returns the target of a redirect."""
    try:
        target = urljoin(url, location)
    except ValueError as error:
        why = f"{_short(url)} redirects to {_short(location)!r}, which is not a URL"
        raise ServeError("invalid_url", why) from error
    return _split(target)


def _unquoted(text: str) -> bytes:
    try:
        return unquote_to_bytes(text)
    except UnicodeEncodeError as error:
        raise ServeError("invalid_url", "the data: URL has half a character in it (a lone surrogate)") from error


def _short(url: str) -> str:
    return printable(url, _SHOWN)


def _unescaped(text: str) -> str:
    """Returns base64 without URL escapes. Others than those of base64's own characters remain, and are no base64."""
    for escape, character in _ESCAPED.items():
        text = text.replace(escape, character).replace(escape.lower(), character)
    return text


async def _take_location(response: httpx.Response) -> None:
    """Takes the target of a redirect from httpx, which reads it without following it, and fails at names of IDNA."""
    if (location := response.headers.pop("location", None)) is not None:
        response.extensions[_LOCATION] = location


def _unpacker(response: httpx.Response) -> Unpacker | None:
    """Returns what unpacks the body; None: it is not packed.

    Raises:
        ServeError: fetch_failed: the encoding is none that was asked for.
    """
    encodings = [name.strip().lower() for name in response.headers.get("content-encoding", "").split(",")]
    if encodings in ([""], ["identity"]):
        return None
    if encodings not in (["gzip"], ["x-gzip"]):
        shown = printable(", ".join(encodings), _SHOWN)
        raise ServeError("fetch_failed", f"the host answered with the encoding {shown}; one gzip is accepted")
    return Unpacker()
