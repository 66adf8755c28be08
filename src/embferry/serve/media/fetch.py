"""Fetches the files of a request: ``data:``, ``http(s):`` from allowed hosts, ``file:`` from allowed folders.

The list of allowed hosts guards against requests to addresses that only this machine can reach.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import ssl
import stat
from collections.abc import Callable
from pathlib import Path
from urllib.parse import SplitResult, unquote, unquote_to_bytes, urljoin, urlsplit

import httpx

from embferry.serve.config import MediaSettings
from embferry.serve.errors import ServeError
from embferry.serve.off_loop import decode_base64, off_loop

Grow = Callable[[int], object]
"""Called with the bytes that a file takes in memory, before or as it is read. What it raises ends the fetch."""

MAX_REDIRECTS = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SHOWN = 120
"""Characters of a URL that an error repeats."""


class Fetcher:
    """The fetcher of one router. Checks each file against the limits of a single file."""

    def __init__(self, limits: MediaSettings, certificates: ssl.SSLContext | None = None) -> None:
        self._limits = limits
        # trust_env: proxies and credentials of the environment would bypass the list of hosts.
        self._client = httpx.AsyncClient(
            trust_env=False, follow_redirects=False, timeout=limits.fetch_timeout, verify=certificates or True
        )

    async def close(self) -> None:
        await self._client.aclose()

    async def fetch(self, url: str, grow: Grow = lambda nbytes: None) -> bytes:
        """Returns the bytes of a URL.

        Raises:
            ServeError: invalid_url, unsupported_url_scheme, host_not_allowed, file_not_allowed, file_not_found,
                fetch_failed, fetch_timeout, media_too_large.
        """
        if url[:5].lower() == "data:":
            grow(len(url) // 4 * 3)
            return await off_loop(len(url), self._inline, url)
        parts = _split(url)
        if parts.scheme in ("http", "https"):
            try:
                async with asyncio.timeout(self._limits.fetch_timeout):
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
        head, _, rest = url.partition(",")
        return [self._inline(f"{head},{frame}") for frame in rest.split(",")]

    def _inline(self, url: str) -> bytes:
        """Decodes a ``data:`` URL (RFC 2397). The media type is ignored; the format is detected in the bytes."""
        start = url.find(",") + 1
        if not start:
            raise ServeError("invalid_url", "a data: URL needs a comma before its data")
        if not url[:start].lower().removesuffix(",").rstrip().endswith(";base64"):
            return self._fits(unquote_to_bytes(url[start:]))
        if (len(url) - start) // 4 * 3 > self._limits.max_bytes + 3:
            raise self._too_large()
        try:
            if "%" in url:
                url, start = unquote(url[start:]), 0
            return self._fits(decode_base64(url, start))
        except ValueError as error:
            raise ServeError("invalid_url", f"the data: URL is not base64: {error}") from error

    async def _remote(self, url: str, parts: SplitResult, grow: Grow) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            address = await permitted_address(parts, self._limits.allowed_hosts)
            target = httpx.URL(url).copy_with(host=address, username=None, password=None, fragment=None)
            host = parts.netloc.rpartition("@")[2]
            request = self._client.build_request("GET", target, headers={"Host": host, "Accept": "image/*, video/*"})
            request.extensions["sni_hostname"] = parts.hostname
            try:
                response = await self._client.send(request, stream=True)
                try:
                    if response.status_code in _REDIRECTS and (location := response.headers.get("location")):
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

    async def _body(self, response: httpx.Response, grow: Grow) -> bytes:
        """Reads a body within the limit, which applies to the decompressed bytes."""
        announced = response.headers.get("content-length", "")
        if announced.isdigit() and int(announced) > self._limits.max_bytes:
            raise self._too_large()
        body = bytearray()
        async for piece in response.aiter_bytes(1 << 16):
            grow(len(piece))
            body += piece
            if len(body) > self._limits.max_bytes:
                raise self._too_large()
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


async def permitted_address(url: SplitResult, allowed: tuple[str, ...]) -> str:
    """Returns the IP address to connect to for ``url``. It is resolved once, so the checked address is the one used.

    A host that the list names in full may have any address, because the operator has listed it. A host that matches
    only a pattern (``*``, ``*.domain``) must have public addresses only.

    Raises:
        ServeError: host_not_allowed; fetch_failed if the name has no address.
    """
    default_port = _DEFAULT_PORTS[url.scheme]
    host, port = (url.hostname or "").rstrip("."), url.port or default_port
    names = [name for name, entry_port in map(_name_and_port, allowed) if port == (entry_port or default_port)]
    by_name = host in names
    if not by_name and not any(name == "*" or (name[:2] == "*." and host.endswith(name[1:])) for name in names):
        why = f"files may not be fetched from {host}:{port}; the operator can allow it with media.allowed_hosts"
        raise ServeError("host_not_allowed", why)
    addresses = await _resolve(host, port)
    if not by_name and (private := [a for a in addresses if not ipaddress.ip_address(a).is_global]):
        raise ServeError("host_not_allowed", f"{host} resolves to {private[0]}, which is not a public address")
    return addresses[0]


def _name_and_port(entry: str) -> tuple[str, int | None]:
    """Splits an entry of the list. Without a port, the entry means the scheme's default port."""
    entry = entry.strip().lower()
    if entry.startswith("["):  # [2001:db8::1]:8080
        name, _, rest = entry[1:].partition("]")
        return name, int(rest[1:]) if rest[1:].isdigit() else None
    name, colon, port = entry.rpartition(":")
    if colon and ":" not in name and port.isdigit():
        return name, int(port)
    return entry, None


async def _resolve(host: str, port: int) -> list[str]:
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServeError("fetch_failed", f"{host} has no address: {error}") from error
    addresses = [str(entry[4][0]) for entry in found]
    return sorted(addresses, key=lambda a: ":" in a)  # IPv4 first: it works in more places


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _, host = parts.port, parts.hostname  # both properties may raise
    except ValueError as error:
        raise ServeError("invalid_url", f"{_short(url)!r} is not a URL: {error}") from error
    if parts.scheme in ("http", "https") and not host:
        raise ServeError("invalid_url", f"{_short(url)!r} names no host")
    return parts


def _joined(url: str, location: str) -> tuple[str, SplitResult]:
    """Returns the target of a redirect."""
    try:
        target = urljoin(url, location)
    except ValueError as error:
        why = f"{_short(url)} redirects to {_short(location)!r}, which is not a URL"
        raise ServeError("invalid_url", why) from error
    return target, _split(target)


def _short(url: str) -> str:
    return url if len(url) <= _SHOWN else f"{url[:_SHOWN]}…"
