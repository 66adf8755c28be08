"""The plug-in inside a language server: dispatching, and what SGLang does wrong with requests that have pictures."""

from __future__ import annotations

import asyncio
import logging
import threading
from array import array
from collections.abc import Callable, Coroutine
from typing import Any

from sglang.srt.disaggregation.encoder import receiver
from sglang.srt.managers.io_struct import EncoderDispatchErrorReq
from sglang.srt.runtime_context import get_parallel, get_serving

from embferry.protocol.errors import shown

from ..dispatcher import Dispatcher, Failure, Part
from ..language_side import LanguageSide
from ..process import BACKEND, end_process, settings
from . import tracing, waiting

log = logging.getLogger(__name__)

WAITING = (receiver.WaitingMMRequestStatus.PENDING, receiver.WaitingMMRequestStatus.SUCCESS)


_dispatchers: list[Dispatcher] = []
_making = threading.Lock()


def dispatcher() -> Dispatcher:
    """Returns the dispatcher of the tokenizer's process: one, although the first requests may come at once."""
    with _making:
        if not _dispatchers:
            _dispatchers.append(Dispatcher(settings()))
        return _dispatchers[0]


def constructed(original: Callable[..., None], mm_receiver: Any, *args: Any, **kwargs: Any) -> None:
    """After SGLang's ``MMReceiverBase.__init__``: makes this rank's part of the plug-in, if it can work here."""
    original(mm_receiver, *args, **kwargs)
    backend = mm_receiver.encoder_transfer_backend
    if backend != "zmq_to_scheduler":
        end_process(f"the embferry plug-in does not work with {backend}; {BACKEND}")
    if not isinstance(mm_receiver, receiver.MMReceiverHTTP):
        end_process("the embferry plug-in works with encoders over HTTP: set SGLANG_ENCODER_MM_RECEIVER_MODE=http")
    if get_parallel().attn_dp_enabled:
        end_process("the embferry plug-in does not work with --enable-dp-attention, nor does SGLang's division itself")
    if get_serving().tokenizer_worker_num > 1:  # their processes load no plug-ins
        end_process("the embferry plug-in does not work with --tokenizer-worker-num above 1: leave it out")
    if mm_receiver.scheduler is not None:
        try:
            side = LanguageSide(settings(), mm_receiver.tp_rank, mm_receiver.tp_size, mm_receiver.nnodes)
        except Exception as error:  # noqa: BLE001 - SGLang would log it, and go on without the plug-in
            end_process(f"the embferry plug-in cannot start: {shown(error)}")
        waiting.side[:] = [side]


def run_encode_in_thread(
    original: Callable[..., None],
    mm_receiver: Any,
    req_id: str,
    mm_data: Any,
    endpoint_encode: str,
    num_items_assigned: Any,
    encode_urls: Any = None,
    time_stats_json: Any = None,
    scheduler_dispatch_ready: Any = None,
    on_dispatch_error: Any = None,
) -> None:
    """In place of SGLang's ``_run_encode_in_thread``, on a thread that SGLang makes for each request."""
    urls = encode_urls if encode_urls is not None else list(mm_receiver.encode_urls)

    def tell(text: str, code: int) -> None:
        on_dispatch_error(EncoderDispatchErrorReq(rid=req_id, error_msg=text, error_code=code))

    try:
        parts = parts_of(mm_receiver, mm_data, num_items_assigned, time_stats_json)
        trace = tracing.of_state(time_stats_json)
        failure = dispatcher().dispatch(req_id, urls, parts, tell, scheduler_dispatch_ready, trace)
    except Exception as error:
        log.exception("the dispatch of request %s has failed", req_id)
        failure = Failure(f"the dispatch has failed: {shown(error)}", 500)
        scheduler_dispatch_ready.wait()
    if failure is not None:
        tell(failure.why, failure.status)


def parts_of(mm_receiver: Any, mm_data: Any, assigned: Any, time_stats_json: Any) -> list[Part]:
    """Returns the parts of a request: the items of each kind of media, divided as SGLang has assigned them."""
    parts = []
    for modality, counts in assigned.items():
        items = [item for item in mm_data if item.get("modality") == modality]
        for number, count in enumerate(counts):
            if count == 0:
                continue
            body = {
                "encoder_idx": number,
                "mm_items": [receiver._encoder_media_item(item) for item in items[:count]],
                "prefill_host": mm_receiver.host,
                "embedding_port": None,
                "time_stats_json": time_stats_json,
            }
            parts.append(Part(modality.name, number, body))
            items = items[count:]
    return parts


def has_input_ids(mm_receiver: Any, recv_req: Any) -> None:
    """Before SGLang's ``create_req``: a request that failed before it had input ids ends the server otherwise."""
    if recv_req.input_ids is None:
        recv_req.input_ids = array("q")


def abort_waiting_requests(original: Callable[..., None], mm_receiver: Any, recv_req: Any) -> None:
    """In place of SGLang's method, which aborts ``req-10`` with ``req-1``."""
    for each in mm_receiver.waiting_list:
        is_meant = recv_req.abort_all or each.rid == recv_req.rid
        if is_meant and each.status in WAITING:
            each._fail_and_release("aborted by the client", error_code=400)
            log.info("request %s was aborted while it waited for its embeddings", each.rid[:64])


def abort_request(original: Callable[..., None], manager: Any, rid: str = "", abort_all: bool = False) -> None:
    """Around SGLang's ``TokenizerManager.abort_request``: the encoders are told as well."""
    original(manager, rid, abort_all)
    for each in list(manager.rid_to_state) if abort_all else [rid]:
        dispatcher().cancel(each)


def forward_dispatch_error(original: Callable[..., None], manager: Any, error: Any) -> None:
    """Around SGLang's ``TokenizerManager._forward_encoder_dispatch_error``, which brings the dispatcher's messages.

    SGLang dispatches a request before it looks at the rest of it. If it then refuses the request, nothing will ask for
    the embeddings, which an encoder would keep for 180 s.
    """
    if error.rid in manager.rid_to_state:
        original(manager, error)
    else:
        dispatcher().cancel(error.rid)


async def probe(original: Callable[..., Coroutine[Any, Any, bool]], bootstrap: Any, session: Any, url: str) -> bool:
    """Around SGLang's ``EncoderBootstrapServer._probe``: an encoder that is busy for long is not evicted."""
    if await original(bootstrap, session, url):
        return True
    try:
        return await asyncio.wrap_future(dispatcher().is_alive(url))
    except Exception as error:  # noqa: BLE001 - SGLang asks again
        log.info("the encoder at %s cannot be asked whether it is alive: %s", url, shown(error))
        return False


def handle_encode_request(original: Callable[..., None], manager: Any, obj: Any) -> None:
    """Around SGLang's method that dispatches a request: each request of a batch is dispatched as one of its own."""
    if obj.is_single or not getattr(obj, "contains_mm_input", bool)():
        original(manager, obj)
        return
    if obj.parallel_sample_num > 1:
        raise ValueError("n above 1 is not supported for requests with pictures: send the request n times")
    for index in range(obj.batch_size):
        original(manager, obj[index])
