"""Where a router learns which workers there are: from the bootstrap server, unless something else counts them."""

from __future__ import annotations

import asyncio
from typing import Protocol

import httpx
import msgspec

from embferry.discovery.leases import Role, WorkerList
from embferry.serve.config import Settings
from embferry.serve.http.backends import reason_of
from embferry.serve.http.proofs import ProvedRequests
from embferry.trust.digests import CONTENT_DIGEST, DamagedError, check_content
from embferry.trust.requests import BOOTSTRAP
from embferry.trust.trust import Trust

_DECODER = msgspec.json.Decoder(WorkerList)


class NoListError(Exception):
    """There is no list of workers now. The message says why, and names the source."""


class WorkerSource(Protocol):
    """The source of the list of workers. All methods run on the router's event loop.

    Attributes:
        address: names the source in log lines.
        stale_seconds: age at which a list no longer tells who is there; inf if a list is replaced as soon as it is
            wrong.
    """

    address: str
    stale_seconds: float

    async def read(self) -> WorkerList:
        """Returns the workers that there are.

        Raises:
            NoListError: the source does not tell.
        """
        ...

    async def wait(self) -> None:
        """Waits until the next read is due."""
        ...

    def absence(self, role: Role) -> str:
        """Returns a sentence for a role without a worker."""
        ...


class BootstrapSource:
    """The bootstrap server, asked every ``router.poll_interval`` seconds.

    Args:
        settings: all of them.
        client: for the requests.
        trust: the cluster key and certificates of this process.

    Raises:
        LocalProtocolError: the server's URL does not fit to what ``trust`` says about TLS.
    """

    def __init__(self, settings: Settings, client: httpx.AsyncClient, trust: Trust) -> None:
        url = settings.bootstrap_url.rstrip("/")
        trust.check_url(url, "the bootstrap server's URL")
        self.address, self.stale_seconds = f"{url}/workers", settings.bootstrap.lease
        self._settings, self._client = settings, client
        self._proof = ProvedRequests(trust.keys, BOOTSTRAP, url)

    async def read(self) -> WorkerList:
        """Asks once, for ``router.connect_timeout`` at most."""
        try:
            async with asyncio.timeout(self._settings.router.connect_timeout):  # httpx limits each read, not the whole
                response = await self._client.get(self.address, auth=self._proof)
            response.raise_for_status()
            digest = response.headers.get(CONTENT_DIGEST)
            if digest is not None:  # a proof covers whether there is one
                check_content(digest, response.content)
            return _DECODER.decode(response.content)
        except (httpx.HTTPError, httpx.InvalidURL, DamagedError, ValueError, TimeoutError) as error:
            why = f"the bootstrap server at {self._settings.bootstrap_url} returns no list: {reason_of(error)}"
            raise NoListError(why) from error

    async def wait(self) -> None:
        await asyncio.sleep(self._settings.router.poll_interval)

    def absence(self, role: Role) -> str:
        return f"no {role} worker has a live lease"
