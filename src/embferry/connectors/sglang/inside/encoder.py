"""The plug-in inside an encoder: what it sends goes over this library."""

from __future__ import annotations

import asyncio
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from contextvars import ContextVar
from typing import Any

import msgspec
import torch
from sglang.srt.disaggregation.encoder import http_server, server
from sglang.srt.managers.schedule_batch import Modality

from embferry.protocol.errors import shown
from embferry.transfer.failures import attempt

from ...shared.shape import Shape, digest_of
from ..encoder_side import EncoderSide
from ..outgoing import Rows
from ..parts import parse
from ..process import BACKEND, end_process, settings
from ..request_trace import RequestTrace

log = logging.getLogger(__name__)

CANCELLED = 499
TURNS = 16
"""Turns of the event loop in which it reads messages between two batches: a hang-up takes about six."""
MAX_UNWANTED = 4096
"""Parts that were given up and are remembered, at most."""
LONG_WORD = re.compile(r"(\S{60})\S{140,}")
"""A picture in a text, and where it is cut."""
side: list[EncoderSide] = []
"""The plug-in's part of this encoder, once it has been made."""
hung_up: ContextVar[asyncio.Event | None] = ContextVar("hung_up", default=None)
"""In the task of an encode request: set when its dispatcher has hung up."""
called_for: ContextVar[RequestTrace | None] = ContextVar("called_for", default=None)
"""In the same task: the trace of the request, if it has spans."""
_submitted: dict[str, asyncio.Task[Any]] = {}
_unwanted: OrderedDict[str, None] = OrderedDict()


class EmbferryDelivery(server.ZmqDelivery):  # type: ignore[misc]
    """In the place of SGLang's delivery: its message goes without the embedding, which this library moves."""

    def __init__(self, encoder: Any, *, cleanup_receive_state: bool) -> None:
        if not cleanup_receive_state:
            end_process(f"the embferry plug-in does not work with zmq_to_tokenizer; {BACKEND}")
        super().__init__(encoder, cleanup_receive_state=cleanup_receive_state)
        kinds = {kind.name: width for kind, width in encoder._embedding_dims.items() if encoder.supports_modality(kind)}
        try:
            side[:] = [EncoderSide(settings(), kinds, name_of(encoder._embedding_dtype))]
        except Exception as error:  # noqa: BLE001 - SGLang would log it, and go on without the plug-in
            end_process(f"the embferry plug-in cannot start: {shown(error)}")

    async def send(self, state: Any, destination: Any) -> None:
        """Sends the embedding of a part to one rank. SGLang keeps it until this returns."""
        data = await self.encoder._wait_for_embedding(state)
        part = side[0].parts.find(state.req_id)
        if part is None or data.error_msg is not None:
            await super().send(state, destination)
            return
        if not part.is_encoded:
            part.encoded(*await asyncio.to_thread(rows_of, data))
        message = data.copy_without_embedding()
        message.embferry = msgspec.to_builtins(part.content)
        message.embedding = torch.zeros(1, dtype=torch.uint8)  # in place of the payload; the plug-in there ignores it
        sending = self.encoder._send(None, message, url=destination.endpoint)
        await asyncio.wait_for(sending, settings().lease_timeout)  # to a dead one SGLang sends for 180 s, one by one
        await part.send(destination.endpoint)

    async def release(self, state: Any) -> None:
        """Ends what is still under way for a part that SGLang drops."""
        side[0].parts.drop(state.req_id)
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
            if (error := attempt(side[0].parts.get(part).announce, shape)) is not None:
                log.warning("part %s cannot be announced: %s", part.text, shown(error))


async def pipeline(original: Callable[..., Coroutine[Any, Any, Any]], *args: Any, **kwargs: Any) -> Any:
    """Around SGLang's ``execute_encode_pipeline``: a part that was given up is not encoded, and not kept.

    SGLang goes on when its client hangs up, and then keeps the embedding for 180 s. It answers with a picture that it
    cannot read, whole, before the reason.
    """
    request = kwargs["request"] if "request" in kwargs else args[2]
    text, gone = request["req_id"], hung_up.get()
    if text in _unwanted:
        raise not_wanted()
    part, trace = parse(text), called_for.get()
    spans = None if part is None or trace is None else side[0].parts.get(part).traced(trace)
    watching = None if gone is None else asyncio.create_task(_give_up_after(gone, text))
    try:
        return await original(*args, **kwargs)
    except server.MMError as error:
        raise server.MMError(LONG_WORD.sub(r"\1…", str(error)), code=error.code) from None
    finally:
        if watching is not None:
            watching.cancel()
        if spans is not None:
            spans.end("aborted" if text in _unwanted else "failed")


async def _give_up_after(gone: asyncio.Event, text: str) -> None:
    await gone.wait()
    log.info("the language server that part %s is for has hung up", text)
    await give_up(text)


async def submit(original: Callable[..., Coroutine[Any, Any, Any]], scheduler: Any, request: dict[str, Any]) -> Any:
    """Around SGLang's ``EncoderScheduler.submit``: a part that is given up while it waits is not encoded."""
    task = asyncio.create_task(original(scheduler, request))
    _submitted[request["req_id"]] = task
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():  # by give_up(): an error of this request, and not of the connection's task
            raise not_wanted() from None
        task.cancel()
        raise
    finally:
        _submitted.pop(request["req_id"], None)


async def collect_batch(original: Callable[..., Coroutine[Any, Any, list[Any]]], scheduler: Any) -> list[Any]:
    """Around SGLang's ``EncoderScheduler._collect_batch``: what was given up during the last encode is not encoded.

    SGLang encodes in its event loop, and collects the next batch before it reads a message that has come meanwhile.
    """
    batch = await original(scheduler)
    try:
        for _ in range(TURNS):
            await asyncio.sleep(0)
    except asyncio.CancelledError:  # the server ends; SGLang knows nothing of this batch yet
        for pending in batch:
            pending.future.cancel()
        raise
    return [pending for pending in batch if not pending.future.done()]


async def give_up(text: str) -> None:
    """Ends the encode of a part if it waits for its turn, and drops everything that is held for the part.

    The part is remembered, because the request to encode it may come later: messages on two connections overtake each
    other, above all in a process that stood still.
    """
    _unwanted[text] = None
    forgotten = _unwanted.popitem(last=False)[0] if len(_unwanted) > MAX_UNWANTED else None
    if (task := _submitted.get(text)) is not None:
        task.cancel()
    if side:
        side[0].parts.drop(text)
    if (encoder := http_server.encoder) is not None:
        if forgotten is not None:
            encoder.clear_abandoned_request(forgotten)
        await encoder.abandon_request(text)


def is_unwanted(text: str) -> bool:
    """Returns whether a part was given up."""
    return text in _unwanted


def not_wanted() -> Exception:
    """Returns the error of a part that was given up."""
    error: Exception = server.MMError("the language server does not want this part any more", code=CANCELLED)
    return error


def constructed(original: Callable[..., None], encoder: Any, *args: Any, **kwargs: Any) -> None:
    """After SGLang's ``MMEncoder.__init__``: with another back-end the plug-in would have no effect."""
    original(encoder, *args, **kwargs)
    if encoder.rank == 0 and not isinstance(encoder.delivery, EmbferryDelivery):
        end_process(f"the embferry plug-in does not work with {encoder.transfer_backend}; {BACKEND}")


def embedding_dims(original: Callable[..., dict[Any, int]], encoder: Any) -> dict[Any, int]:
    """After SGLang's ``MMEncoder._infer_embedding_dims``, which takes the audio tower's width for Qwen2-Audio's.

    The model's projector makes embeddings as wide as its language model. SGLang's encoder refuses what it has made, if
    the two differ, and counts as ill.
    """
    dims = original(encoder)
    if encoder.model_type == "qwen2_audio":
        dims[Modality.AUDIO] = encoder.model_config.hidden_size
    return dims


def refuse_data_parallelism(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """In place of SGLang's ``launch_dp_runtime``, whose workers load no plug-ins."""
    end_process("the embferry plug-in does not work with --dp-size above 1 in an encoder: start that many encoders")


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
