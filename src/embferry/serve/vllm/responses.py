"""``/v1/responses`` before vLLM: encode instances encode the pictures of its input, which stay in the request.

vLLM takes no grid of an embedding in place of a picture at this path. So the language instance prepares the picture and
finds the embedding under the name that both instances derive from the content. If it does not arrive, it encodes the
picture itself.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from embferry.serve.errors import ServeError
from embferry.serve.http.journal import current_record
from embferry.serve.text_limit import count_characters
from embferry.serve.vllm.client_request import ClientRequest
from embferry.serve.vllm.connectors import Encoded
from embferry.serve.vllm.fields import ignored_fields
from embferry.serve.vllm.item_encoder import ItemEncoder, gather_or_cancel
from embferry.serve.vllm.items import Item, load_items
from embferry.serve.vllm.losses import ItemError
from embferry.serve.vllm.media_parts import MediaPart, parse_request
from embferry.serve.vllm.passed_on import Asked, PassedOn, check_files, strip_names

log = logging.getLogger(__name__)

RESPONSES = "/v1/responses"
_FIELD = "input"


class Responses(PassedOn):
    """The endpoint.

    Args:
        encoder: encodes the pictures.
    """

    def __init__(self, encoder: ItemEncoder) -> None:
        super().__init__(encoder.fleet, RESPONSES)
        self._encoder = encoder

    def _read(self, body: bytes) -> Asked:
        request = parse_request(body)
        ignored = ignored_fields(request, RESPONSES)
        is_changed = strip_names(request)
        pictures = input_pictures(request)
        rest = with_pictures(request, [(one, None) for one in pictures])
        check_files(rest)  # a part could name a second file
        return Asked(request, count_characters(rest), ignored, is_changed, pictures)

    async def _prepared(self, request: ClientRequest, asked: Asked, body: bytes) -> bytes:
        if not asked.pictures:
            return await super()._prepared(request, asked, body)
        fetcher, limits = self.fleet.fetcher, self._settings.media
        items = await load_items(asked.pictures, request.content, fetcher, limits, request.grow, are_named=False)
        pairs = list(zip(asked.pictures, items, strict=True))
        for item in items:
            self.fleet.metrics.media.labels(item.kind).inc()
        changed = with_pictures(request.content, [(one, item.url) for one, item in pairs])
        if encoded := await self._encoded(request, pairs):
            changed["ec_transfer_params"] = self._encoder.connector.answer_params(encoded)
        return await request.as_json(changed, items)

    async def _encoded(self, request: ClientRequest, pairs: Sequence[tuple[MediaPart, Item]]) -> list[Encoded]:
        """Returns the encoded pictures; none if encode instances are not to be had: then the language instance encodes.

        Raises:
            VerbatimError, ServeError: a picture is to blame.
        """
        if self._encoder.connector.pushes:  # to an instance that is not chosen yet
            return []
        items = dict.fromkeys(item for _, item in pairs)
        try:
            current_record().phase("encode")
            return await gather_or_cancel(*(self._encoder.encode(request, item) for item in items))
        except ServeError as error:
            if isinstance(error, ItemError):
                error.at(next(part.param for part, item in pairs if item == error.item))
            if error.http_status < 500:
                raise
            log.warning("sent undivided: %s", error.detail)
            self.fleet.metrics.fallbacks.inc()
            self.fleet.journal.event("fallback")
            return []


def input_pictures(request: dict[str, Any]) -> list[MediaPart]:
    """Returns the pictures of the messages in a request's input.

    Raises:
        ServeError: invalid_request, unsupported_value, with the part in ``param``.
    """
    found = []
    given = request.get(_FIELD)
    for number, message in enumerate(given if isinstance(given, list) else ()):
        content = message.get("content") if isinstance(message, dict) else None
        for position, part in enumerate(content if isinstance(content, list) else ()):
            if isinstance(part, dict) and part.get("type") == "input_image":
                found.append(MediaPart(number, position, "image", _url(part, number, position), {}, _FIELD))
    return found


def _url(part: dict[str, Any], number: int, position: int) -> str:
    at = f"{_FIELD}[{number}].content[{position}]"
    if part.get("file_id") is not None:
        raise ServeError("unsupported_value", f"{at}: there are no uploaded files here; use image_url", param=at)
    url = part.get("image_url")
    if not isinstance(url, str) or not url:
        raise ServeError("invalid_request", f"{at} must have a URL, in image_url", param=at)
    return url


def with_pictures(request: dict[str, Any], pictures: Sequence[tuple[MediaPart, str | None]]) -> dict[str, Any]:
    """Returns a copy of the request with another URL for each of these pictures; None takes it out of the part.

    A part with a URL keeps the fields of the API alone: vLLM would take a ``uuid`` for its name in a cache that all
    clients share.
    """
    if not pictures:
        return request
    messages = list(request[_FIELD])
    for one, url in pictures:
        content = list(messages[one.message]["content"])
        part = content[one.part]
        if url is None:
            content[one.part] = {**part, "image_url": None}
        else:
            content[one.part] = {name: part[name] for name in ("type", "detail") if name in part} | {"image_url": url}
        messages[one.message] = {**messages[one.message], "content": content}
    return {**request, _FIELD: messages}
