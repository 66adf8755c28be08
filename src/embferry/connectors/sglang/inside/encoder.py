"""The plug-in inside an encoder: what it sends goes over this library."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import torch
from fastapi import Request, Response
from sglang.srt.disaggregation.encoder import http_server, server

from embferry.protocol.errors import shown
from embferry.transfer.failures import attempt

from ...shared.shape import Shape, digest_of
from ..encoder_side import EncoderSide
from ..encoders import PATH
from ..outgoing import Rows
from ..parts import Destination, parse
from ..process import BACKEND, end_process, settings

log = logging.getLogger(__name__)

CANCELLED = 499
_submitted: dict[str, asyncio.Task[Any]] = {}
_side: list[EncoderSide] = []


class EmbferryDelivery(server.ZmqDelivery):  # type: ignore[misc]
    """In the place of SGLang's delivery: its message goes without the embedding, which this library moves."""

    def __init__(self, encoder: Any, *, cleanup_receive_state: bool) -> None:
        if not cleanup_receive_state:
            end_process(f"the embferry plug-in does not work with zmq_to_tokenizer; {BACKEND}")
        super().__init__(encoder, cleanup_receive_state=cleanup_receive_state)
        kinds = {kind.name: width for kind, width in encoder._embedding_dims.items() if encoder.supports_modality(kind)}
        try:
            _side[:] = [EncoderSide(settings(), kinds, name_of(encoder._embedding_dtype))]
        except Exception as error:  # noqa: BLE001 - SGLang would log it, and go on without the plug-in
            end_process(f"the embferry plug-in cannot start: {shown(error)}")

    async def send(self, state: Any, destination: Any) -> None:
        """Sends the embedding of a part to one rank. SGLang keeps it until this returns."""
        data = await self.encoder._wait_for_embedding(state)
        part = _side[0].parts.find(state.req_id)
        if part is None or data.error_msg is not None:
            await super().send(state, destination)
            return
        if not part.is_encoded:
            part.encoded(*await asyncio.to_thread(rows_of, data))
        message = data.copy_without_embedding()
        message.embferry = msgspec.to_builtins(part.content)
        message.embedding = torch.zeros(1, dtype=torch.uint8)  # in place of the payload; the plug-in there ignores it
        await self.encoder._send(None, message, url=destination.endpoint)
        await part.send(destination.endpoint)

    async def release(self, state: Any) -> None:
        """Ends what is still under way for a part that SGLang drops."""
        _side[0].parts.drop(state.req_id)
        await super().release(state)


async def publish(
    original: Callable[..., Coroutine[Any, Any, None]], encoder: Any, ctx: Any, requests: list[dict[str, Any]]
) -> None:
    """After SGLang's ``_publish_preprocess_metadata``: announces the lengths, before the encoder runs.

    A part that cannot be announced fails when it is sent, and not the batch that it is encoded in.
    """
    await original(encoder, ctx, requests)
    if encoder.rank != 0:
        return
    for request in requests:
        part = parse(request["req_id"])
        if part is not None:
            tokens, width = encoder.req_states[request["req_id"]].embedding_data.shape
            shape = Shape(tokens, width, name_of(encoder._embedding_dtype))
            if (error := attempt(_side[0].parts.get(part).announce, shape)) is not None:
                log.warning("part %s cannot be announced: %s", part.text, shown(error))


async def submit(original: Callable[..., Coroutine[Any, Any, Any]], scheduler: Any, request: dict[str, Any]) -> Any:
    """Around SGLang's ``EncoderScheduler.submit``: a part that is abandoned while it waits is not encoded."""
    task = asyncio.create_task(original(scheduler, request))
    _submitted[request["req_id"]] = task
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():  # by abandon(): an error of this request, and not of the connection's task
            raise server.MMError("the language server does not want this part any more", code=CANCELLED) from None
        task.cancel()
        raise
    finally:
        _submitted.pop(request["req_id"], None)


def constructed(original: Callable[..., None], encoder: Any, *args: Any, **kwargs: Any) -> None:
    """After SGLang's ``MMEncoder.__init__``: with another back-end the plug-in would have no effect."""
    original(encoder, *args, **kwargs)
    if encoder.rank == 0 and not isinstance(encoder.delivery, EmbferryDelivery):
        end_process(f"the embferry plug-in does not work with {encoder.transfer_backend}; {BACKEND}")


def refuse_data_parallelism(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of SGLang's ``launch_dp_runtime``, whose workers load no plug-ins."""
    end_process("the embferry plug-in does not work with --dp-size above 1 in an encoder: start that many encoders")


@http_server.app.get(PATH)  # type: ignore[untyped-decorator]
async def describe() -> Response:
    """Describes this encoder to the dispatcher of a language server."""
    if not _side:
        return Response(status_code=503, headers={"Retry-After": "1"})
    return Response(await asyncio.to_thread(_side[0].describe), media_type="application/json")


@http_server.app.post(f"{PATH}/destinations")  # type: ignore[untyped-decorator]
async def add_destination(request: Request) -> Response:
    """A rank of a language server asks for a part."""
    try:
        destination = msgspec.json.decode(await request.body(), type=Destination)
    except msgspec.MsgspecError as error:
        return Response(str(error), status_code=400)
    part = parse(destination.part)
    if part is None or not _side or http_server.encoder is None:
        return Response("not a part of the embferry plug-in", status_code=400)
    _side[0].parts.get(part).add(destination)
    try:
        await http_server.encoder.register_embedding_destinations(part.text, destination.count, [destination.url])
    except server.MMError as error:
        return Response(str(error), status_code=int(error.code))
    return Response(status_code=200)


@http_server.app.post(f"{PATH}/abandon")  # type: ignore[untyped-decorator]
async def abandon(request: Request) -> Response:
    """A language server does not want a part any more."""
    try:
        text = str(msgspec.json.decode(await request.body(), type=dict[str, str]).get("part"))
    except msgspec.MsgspecError as error:
        return Response(str(error), status_code=400)
    if (task := _submitted.get(text)) is not None:
        task.cancel()
    if _side:
        _side[0].parts.drop(text)
    if http_server.encoder is not None:
        await http_server.encoder.release_request(text)
    return Response(status_code=200)


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a type, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def rows_of(data: Any) -> tuple[Shape, Rows, str]:
    """Returns shape, bytes and digest of an embedding; the bytes are copied if they are on a device."""
    tensor = data.embedding.detach().cpu().contiguous()
    tokens, width = tensor.shape
    shape = Shape(tokens, width, name_of(tensor.dtype))
    rows: Rows = tensor.view(torch.uint8).reshape(tokens, -1).numpy()
    return shape, rows, digest_of(rows, shape).hex()
