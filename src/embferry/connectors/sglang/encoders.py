"""The encoders, as a language server's dispatcher sees them: what each says of itself, and whether it is alive."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

import httpx
import msgspec

from embferry import (
    EmbeddingReceiver,
    EmbeddingTransferError,
    Geometry,
    InMemoryTransport,
    KVPoll,
    ReceiveManager,
    TransferSettings,
)
from embferry.transfer.failures import attempt

from .parts import EncoderInfo

log = logging.getLogger(__name__)

PATH = "/embferry"
"""Where an encoder with the plug-in says what it is, and takes the requests of ranks."""
ENCODE_PATH = "/encode"
"""Where SGLang's encoders take requests to encode."""
VERSION = 1
WRONG = 502
"""The status of an encoder that is not what it has to be: to ask it again does not help."""
FOR_EVER = 10.0 * 365 * 86_400
MAX_ANSWER = 1 << 20
"""Longest answer of an encoder that is read, in bytes."""
DESCRIBE_S = 10.0
"""Seconds after which an encoder that has not described itself is asked again."""
RECENTLY_S = 10.0
"""An encoder that was lost within this time, in seconds, is asked after the others."""


class EncoderError(Exception):
    """An encoder could not do its work; another one may.

    Attributes:
        status: The HTTP status of its answer, or None if there was none: it is gone, or lost.
    """

    def __init__(self, why: str, status: int | None = None) -> None:
        super().__init__(why)
        self.status = status


class RequestRefusedError(Exception):
    """The request is wrong: no encoder can do it.

    Attributes:
        status: The HTTP status.
    """

    def __init__(self, why: str, status: int) -> None:
        super().__init__(why)
        self.status = status


class Description(msgspec.Struct, frozen=True):
    """Description of an encoder by itself, at :data:`PATH`: endpoint and layout for each kind of media."""

    version: int
    kinds: dict[str, EncoderInfo]


class Lifeline:
    """Whether the process behind an endpoint answers: a room that it will never open is asked for.

    Threads of the library answer, however busy the encoder is. Only a process that has ended or stands still does not.
    """

    def __init__(self, info: EncoderInfo, timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[EmbeddingTransferError] = self._loop.create_future()
        settings = TransferSettings(
            bootstrap_timeout=FOR_EVER, answer_timeout=timeout, peer_timeout=timeout, retry_limit=min(1.0, timeout / 3)
        )
        geometry = Geometry(info.layout, num_blocks=1, block_size=1)
        self._manager = ReceiveManager(geometry, [InMemoryTransport()], settings=settings)
        self._receiver = self._manager.open(secrets.randbits(63), info.endpoint)
        self._receiver.on_change(lambda: self._changed(self._receiver))
        self._receiver.init()

    def close(self) -> None:
        """Ends it. May block for a moment."""
        self._receiver.abort()
        self._manager.close()

    def _changed(self, receiver: EmbeddingReceiver) -> None:
        """Runs on the manager's callback thread."""
        try:
            error = receiver.failure_exception() if receiver.poll() is KVPoll.Failed else None
        except EmbeddingTransferError as stopped:
            error = stopped
        if error is not None:
            self._loop.call_soon_threadsafe(self._set_lost, error)

    def _set_lost(self, error: EmbeddingTransferError) -> None:
        if not self.lost.done():
            self.lost.set_result(error)


class Encoder:
    """One encoder. The dispatcher's event loop calls the methods.

    Attributes:
        url: Its base URL.
        lost_at: When it was lost last; None if it has worked since.
    """

    def __init__(self, url: str, client: httpx.AsyncClient, timeout: float, encode_timeout: float) -> None:
        self.url = url
        self.lost_at: float | None = None
        self._client, self._timeout, self._encode_timeout = client, timeout, encode_timeout
        self._description: Description | None = None
        self._describing: asyncio.Task[Description] | None = None
        self._lifelines: dict[str, Lifeline] = {}
        self._abandoning: set[asyncio.Task[None]] = set()

    @property
    def is_last_choice(self) -> bool:
        """Whether it was lost lately, or was asked what it is and does not answer."""
        if self._describing is not None:
            return self.lost_at is not None
        return self.lost_at is not None and time.monotonic() - self.lost_at < RECENTLY_S

    async def info(self, kind: str) -> EncoderInfo:
        """Returns what the encoder says of a kind of media.

        Raises:
            EncoderError: It cannot be reached, does not answer, or runs without the plug-in.
            RequestRefusedError: It does not encode this kind.
        """
        if self._description is None:
            self._description = await self._described()
        if kind not in self._description.kinds:
            raise RequestRefusedError(f"the encoder at {self.url} does not encode {kind.lower()}s", 400)
        return self._description.kinds[kind]

    async def encode(self, body: Mapping[str, Any], info: EncoderInfo, headers: Mapping[str, str]) -> None:
        """Has a part encoded and sent, and returns when it has arrived.

        Args:
            body: SGLang's encode request.
            info: What the encoder says of the kind of media.
            headers: More headers of the request.

        Raises:
            EncoderError: It could not, or is lost.
            RequestRefusedError: The request is wrong.
        """
        lifeline = self._lifeline(info)
        post = asyncio.create_task(self._post(body, headers))

        def cancel(lost: object) -> None:
            post.cancel()

        lifeline.lost.add_done_callback(cancel)
        try:
            response = await post
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if lifeline.lost.done() and task is not None and not task.cancelling():
                raise self._is_lost(str(lifeline.lost.result())) from None
            raise  # the request itself is cancelled, whether or not the encoder is lost as well
        finally:
            lifeline.lost.remove_done_callback(cancel)
            post.cancel()
        self.lost_at = None
        if response.status_code == 200:
            return
        why = f"the encoder at {self.url} answered {response.status_code}: {_reason(response)}"
        if 400 <= response.status_code < 500 and response.status_code not in (408, 429):
            raise RequestRefusedError(why, response.status_code)
        raise EncoderError(why, response.status_code)

    def abandon(self, part: str) -> None:
        """Tells the encoder that a part is not wanted any more, in a task of its own; an error is only logged."""
        task = asyncio.create_task(self._abandon(part))
        self._abandoning.add(task)
        task.add_done_callback(self._abandoning.discard)

    async def _abandon(self, part: str) -> None:
        try:
            await self._client.post(f"{self.url}{PATH}/abandon", json={"part": part}, timeout=self._timeout)
        except httpx.HTTPError as error:
            log.debug("the encoder at %s could not be told that a part is not wanted: %r", self.url, error)

    async def is_alive(self) -> bool:
        """Returns whether the encoder's process answers, however busy it is."""
        if self._description is None:
            return False
        lifeline = self._lifeline(next(iter(self._description.kinds.values())))
        await asyncio.wait({lifeline.lost}, timeout=2 * self._timeout)
        return not lifeline.lost.done()

    async def close(self) -> None:
        """Ends the lifelines, once the encoder has been told what is not wanted. Blocks for a moment."""
        if self._describing is not None:
            self._describing.cancel()
        await asyncio.gather(*self._abandoning)
        lifelines, self._lifelines = self._lifelines, {}
        for lifeline in lifelines.values():
            attempt(lifeline.close)

    async def _described(self) -> Description:
        """Waits until the encoder says what it is, but no longer than an encoder may be silent.

        All requests wait for one answer. It stays asked for when they have given up: one that is only busy will answer.
        """
        describing = self._describing
        if describing is None:
            describing = self._describing = asyncio.create_task(self._describe())
            describing.add_done_callback(self._has_described)
        done, _ = await asyncio.wait({describing}, timeout=self._timeout)
        if not done:
            raise self._is_lost(f"it has not said what it is within {self._timeout:g} s")
        return describing.result()

    def _has_described(self, describing: asyncio.Task[Description]) -> None:
        self._describing = None
        if not describing.cancelled() and describing.exception() is None:
            self._description = describing.result()

    async def _describe(self) -> Description:
        try:
            response = await self._client.get(f"{self.url}{PATH}", timeout=DESCRIBE_S)
        except httpx.HTTPError as error:
            raise self._is_lost(_shown(error)) from error
        if response.status_code == 404:
            why = f"the encoder at {self.url} runs without the plug-in: start it with EMBFERRY_SGLANG=1"
            raise EncoderError(why, WRONG)
        if response.status_code != 200:
            raise EncoderError(f"the encoder at {self.url} is not ready: {response.status_code}", response.status_code)
        try:
            description = msgspec.json.decode(response.content, type=Description)
        except msgspec.MsgspecError as error:
            why = f"the encoder at {self.url} has another version of the plug-in: {error}"
            raise EncoderError(why, WRONG) from None
        if description.version != VERSION or not description.kinds:
            why = f"the encoder at {self.url} has version {description.version} of the plug-in, not {VERSION}"
            raise EncoderError(why, WRONG)
        return description

    async def _post(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> httpx.Response:
        url, timeout = f"{self.url}{ENCODE_PATH}", self._encode_timeout
        try:
            return await self._client.post(url, json=body, headers=headers, timeout=timeout)
        except httpx.TimeoutException as error:
            why = f"the encoder at {self.url} has not answered within {self._encode_timeout:g} s"
            raise EncoderError(why, 504) from error
        except httpx.HTTPError as error:
            raise self._is_lost(_shown(error)) from error

    def _is_lost(self, why: str) -> EncoderError:
        """Forgets what the encoder said: another process may take its place."""
        self.lost_at, self._description = time.monotonic(), None
        return EncoderError(f"the encoder at {self.url} is lost: {why}")

    def _lifeline(self, info: EncoderInfo) -> Lifeline:
        """Returns the lifeline of the process that ``info`` is of. It stays until the process is lost."""
        lifeline = self._lifelines.get(info.endpoint)
        if lifeline is None:
            try:
                lifeline = self._lifelines[info.endpoint] = Lifeline(info, self._timeout)
            except EmbeddingTransferError as error:
                raise EncoderError(f"the encoder at {self.url} cannot be watched: {error}") from error
            lifeline.lost.add_done_callback(lambda lost: self._drop(info.endpoint, lost.result()))
        return lifeline

    def _drop(self, endpoint: str, why: EmbeddingTransferError) -> None:
        lifeline = self._lifelines.pop(endpoint, None)
        if lifeline is None:
            return  # the dispatcher is closing
        log.warning("the encoder at %s is lost: %s", self.url, why)
        self.lost_at, self._description = time.monotonic(), None
        threading.Thread(target=attempt, args=(lifeline.close,), name="embferry-lifeline", daemon=True).start()


def _reason(response: httpx.Response) -> str:
    try:
        return str(msgspec.json.decode(response.content)["message"])[:1000]
    except (msgspec.MsgspecError, KeyError, TypeError):
        return response.text[:1000]


def _shown(error: Exception) -> str:
    return str(error) or type(error).__name__
