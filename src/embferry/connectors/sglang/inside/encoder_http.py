"""The plug-in's HTTP paths in an encoder, and what it notices of the requests to encode."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
from fastapi import Request, Response
from sglang.srt.disaggregation.encoder import http_server, server

from ..encoders import ENCODE_PATH, PATH
from ..parts import Destination, parse
from . import tracing
from .encoder import called_for, give_up, hung_up, is_unwanted, not_wanted, side


class EncodeCalls:
    """ASGI middleware: an encode request knows its trace, and when its dispatcher hangs up; SGLang asks for neither."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Handles one request."""
        if scope["type"] != "http" or scope["path"] != ENCODE_PATH:
            await self._app(scope, receive, send)
            return
        gone = asyncio.Event()
        watching: list[asyncio.Task[None]] = []

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def receive_and_watch() -> Any:
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body") and not watching:
                watching.append(asyncio.create_task(watch()))
            return message

        tokens = hung_up.set(gone), called_for.set(tracing.of_headers(scope["headers"]))
        try:
            await self._app(scope, receive_and_watch, send)
        finally:
            hung_up.reset(tokens[0])
            called_for.reset(tokens[1])
            for task in watching:
                task.cancel()


http_server.app.add_middleware(EncodeCalls)


@http_server.app.get(PATH)  # type: ignore[untyped-decorator]
async def describe() -> Response:
    """Describes this encoder to the dispatcher of a language server."""
    if not side:
        return Response(status_code=503, headers={"Retry-After": "1"})
    return Response(await asyncio.to_thread(side[0].describe), media_type="application/json")


@http_server.app.post(f"{PATH}/destinations")  # type: ignore[untyped-decorator]
async def add_destination(request: Request) -> Response:
    """A rank of a language server asks for a part."""
    try:
        destination = msgspec.json.decode(await request.body(), type=Destination)
    except msgspec.MsgspecError as error:
        return Response(str(error), status_code=400)
    part = parse(destination.part)
    if part is None or not side or http_server.encoder is None:
        return Response("not a part of the embferry plug-in", status_code=400)
    if is_unwanted(part.text):
        return Response(str(not_wanted()), status_code=400)
    side[0].parts.get(part).add(destination)
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
    if parse(text) is None:
        return Response("not a part of the embferry plug-in", status_code=400)
    await give_up(text)
    return Response(status_code=200)
