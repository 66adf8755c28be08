"""The plug-in inside a scheduler: a request whose embeddings come over this library."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from functools import cache
from http import HTTPStatus
from typing import Any

import httpx
import msgspec
import torch
from sglang.srt.disaggregation.encoder import receiver
from sglang.srt.utils.network import NetworkAddress

from embferry import EmbeddingTransferError, RemoteProtocolError
from embferry.protocol.errors import shown
from embferry.trust.bounded_answers import bounded_client

from ...shared.shared_rows import SharedRows
from ..encoders import MAX_ANSWER, PATH
from ..incoming import IncomingPart
from ..language_side import LanguageSide
from ..mapped import Announced, MappedPart, map_announced
from ..parts import SOURCE_CODE, Content, Destination, Source, decode_source, parse
from . import tracing

log = logging.getLogger(__name__)

REGISTER_TIMEOUT_S = 200.0
"""An encoder answers a rank when it begins to encode, at the latest after 180 s."""
AGAIN_S = 0.2
PENDING = receiver.WaitingMMRequestStatus.PENDING
side: list[LanguageSide] = []
"""This rank's part of the plug-in, once its receiver has been made."""


class EmbferryWaiting(receiver.WaitingZmqRequest):  # type: ignore[misc]
    """In the place of SGLang's waiting request. The scheduler's thread calls the methods; none of them blocks.

    SGLang's own message about a part still arrives, without the embedding. The dispatcher in the tokenizer's process
    says which encoder a part comes from, in SGLang's message of a failed dispatch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._side = side[0]
        self._parts: dict[int, IncomingPart | MappedPart] = {}
        self._messages: dict[int, Any] = {}
        self._added: set[int] = set()
        self._registrations: list[Future[None]] = []
        self.recv_embedding_data: Any = None
        super().__init__(*args, **kwargs)

    def send_encode_request(self) -> None:
        """Does nothing: the ranks ask an encoder for a part when the dispatcher has named it."""

    def consume_parts(self, parts: Any) -> None:
        """Takes SGLang's message about a part. One of an encoder that was given up is of no use."""
        if self.status != PENDING:
            return
        try:
            data = receiver.safe_pickle_loads(parts[0])
            name = parse(data.req_id) if isinstance(data, receiver.EmbeddingData) else None
            part = None if name is None else self._parts.get(name.index)
            if name is None or part is None or part.part != name:
                log.info("dropping a message about a part that request %s does not wait for", self.rid[:64])
                return
            if data.error_msg is not None or name.index in self._added:
                return  # the dispatcher is told as well, and decides whether another encoder can do it
            part.made(msgspec.convert(getattr(data, "embferry", None), Content))
            data.req_id = self.rid
            del data.embferry
            self._messages[name.index] = data
        except Exception as error:
            log.exception("a message about request %s cannot be used", self.rid[:64])
            self._fail_and_release(f"a message of the encoder cannot be used: {shown(error)}")

    def take(self, announced: Announced) -> None:
        """Maps what another rank of this host has received."""
        part = self._parts.get(announced.index)
        if self.status == PENDING and isinstance(part, MappedPart):
            try:
                part.shared = map_announced(announced)
            except (EmbeddingTransferError, OSError) as error:
                self._fail_and_release(f"an embedding cannot be mapped: {shown(error)}")

    def complete(self) -> Iterable[tuple[int, SharedRows]]:
        """Returns the parts that have arrived at this rank for the others of its host."""
        for index, part in self._parts.items():
            if isinstance(part, IncomingPart) and part.is_complete and part.shared is not None:
                yield index, part.shared

    def release_resources(self) -> None:
        """Ends the transfers that are under way. SGLang calls it for a failure, an abort and a time-out."""
        for part in self._parts.values():
            part.close()
        for registration in self._registrations:
            registration.cancel()
        super().release_resources()

    def _fail_and_release(self, error_msg: Any, error_code: Any = None) -> None:
        if error_code != SOURCE_CODE:
            super()._fail_and_release(error_msg, status_of(error_code))
            return
        try:
            self._comes_from(decode_source(error_msg))
        except Exception as error:
            log.exception("the dispatcher's message about request %s cannot be used", self.rid[:64])
            self._fail_and_release(*reason_and_status(error))

    def _comes_from(self, source: Source) -> None:
        """Starts or continues the transfer of a part, and asks the encoder for it."""
        if self.status != PENDING:
            return
        if source.index not in self._parts:
            self._parts[source.index] = self._new_part()
        self._collect()
        part = self._parts[source.index]
        is_needed = part.comes_from(source)
        if is_needed:
            self._messages.pop(source.index, None)
        name = source.part_of(self.rid)
        destination = Destination(
            part=name.text,
            url=NetworkAddress(self.host_name, self.embedding_port).to_host_port_str(),
            count=self.receive_count,
            host=self._side.host,
            receives=self._side.receives and is_needed,
            before=part.before,
        )

        def is_current() -> bool:
            return bool(self.status == PENDING and part.part == name)

        self._registrations.append(self.registration_runner.submit(register(source.url, destination, is_current)))

    def _new_part(self) -> IncomingPart | MappedPart:
        if not self._side.receives:
            return MappedPart(self.rid)
        return self._side.incoming(self.rid, tracing.of_request(self.recv_req))

    def _try_recv_mm_data(self) -> None:
        if self.status != PENDING:
            return
        try:
            self._collect()
        except Exception as error:
            if not isinstance(error, EmbeddingTransferError):
                log.exception("the embeddings of request %s cannot be used", self.rid[:64])
            self._fail_and_release(*reason_and_status(error))
            return
        super()._try_recv_mm_data()

    def _collect(self) -> None:
        """Takes the parts that are complete."""
        for part in self._parts.values():
            if isinstance(part, IncomingPart):
                part.ask_again()
        for index, data in list(self._messages.items()):
            if self._parts[index].poll():
                del self._messages[index]
                self._added.add(index)
                self._add(data, self._parts[index])

    def _add(self, data: Any, part: IncomingPart | MappedPart) -> None:
        shared = part.shared
        assert shared is not None
        tokens, width = data.shape
        if (tokens, width, str(data.dtype).removeprefix("torch.")) != tuple(shared.shape):
            raise RemoteProtocolError(f"the encoder announced {tuple(data.shape)} {data.dtype} and sent {shared.shape}")
        data.embedding = torch.from_numpy(shared.rows).view(data.dtype).reshape(tokens, width)
        self.recv_embedding_data = receiver._aggregate_embedding_part(self.recv_embedding_data, data, self.model_type)
        if self._side.ranks == 1:
            part.close()  # the mapping stays


def status_of(code: Any) -> Any:
    """Returns a status that SGLang can answer with: it ends the scheduler if Python does not know the number."""
    return code if code is None or code in set(HTTPStatus) else HTTPStatus.SERVICE_UNAVAILABLE.value


def reason_and_status(error: Exception) -> tuple[str, int]:
    """Returns what the client is told of an error, and the HTTP status."""
    if isinstance(error, EmbeddingTransferError):
        return f"{error.code}: {error.detail}", error.http_status
    return f"the embedding cannot be used: {shown(error)}", 500


@cache
def tls_context() -> ssl.SSLContext:
    """Returns the TLS context of all clients. Making one occupies the scheduler's process for 20 ms, TLS or not."""
    return httpx.create_ssl_context(trust_env=False)


async def register(url: str, destination: Destination, is_current: Callable[[], bool]) -> None:
    """Asks an encoder for a part, again and again while it is the one that the part comes from.

    Runs on SGLang's thread for such requests. If the encoder is lost, the dispatcher names another one, or the request
    fails.
    """
    body = msgspec.json.encode(destination)
    limits = httpx.Limits(max_connections=1)
    options: dict[str, Any] = {"timeout": REGISTER_TIMEOUT_S, "verify": tls_context(), "max_bytes": MAX_ANSWER}
    async with bounded_client(limits=limits, **options) as client:
        while is_current():
            try:
                response = await client.post(f"{url}{PATH}/destinations", content=body)
                if response.status_code == 200:
                    return
                log.info(
                    "the encoder at %s does not take a rank: %d %s", url, response.status_code, response.text[:200]
                )
            except httpx.HTTPError as error:
                log.info("the encoder at %s cannot be reached: %s", url, shown(error))
            await asyncio.sleep(AGAIN_S)


def share(original: Callable[[Any], None], mm_receiver: Any) -> None:
    """After SGLang's ``_drain_scheduler_embeddings``: the ranks of a host map what one of them has received.

    Every rank calls it in the same loops, if a request waits: SGLang's own agreement on their states needs that too.
    """
    original(mm_receiver)
    if mm_receiver.tp_size == 1 or not side:
        return
    mine, closing = [], []
    for waiting in mm_receiver.waiting_list:
        for index, shared in waiting.complete():
            if shared.is_open:
                mine.append(Announced.of(waiting.rid, index, side[0].host, shared))
                closing.append(shared)
    gathered = mm_receiver.tp_group.all_gather_object([msgspec.to_builtins(each) for each in mine])
    if not any(gathered):
        return
    for each in (msgspec.convert(raw, Announced) for raws in gathered for raw in raws):
        waiting = mm_receiver.waiting_by_rid.get(each.rid)
        if waiting is not None and each.host == side[0].host and not side[0].receives:
            waiting.take(each)
    mm_receiver.tp_group.all_gather_object(None)  # every rank has mapped it
    for shared in closing:
        shared.close()
