"""A proxy before vLLM's servers with embferry's connector: pictures go to the producers in turns.

    python examples/vllm_proxy.py PORT CONSUMER PRODUCER...
    python examples/vllm_proxy.py 8000 http://127.0.0.1:8003 http://127.0.0.1:8001 http://127.0.0.1:8002

It passes on what producers answer without looking at it. The consumer gets the pictures too: it encodes one itself if a
producer has failed, or fails before the embedding is there.
"""

import asyncio
import itertools
import json
import sys
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

PORT, CONSUMER, *PRODUCERS = sys.argv[1:]
PATH = "/v1/chat/completions"
SAME = ("model", "mm_processor_kwargs", "media_io_kwargs")  # they change an embedding, and its hash
client, turns = httpx.AsyncClient(timeout=600, trust_env=False), itertools.cycle(PRODUCERS)


async def encode(body: dict[str, Any], picture: dict[str, Any]) -> dict[str, Any]:
    asked = {name: body[name] for name in SAME if name in body}
    asked |= {"messages": [{"role": "user", "content": [picture]}], "max_tokens": 1}
    try:
        answer = (await client.post(next(turns) + PATH, json=asked)).raise_for_status()
    except httpx.HTTPError:
        return {}  # the consumer encodes it
    return answer.json().get("ec_transfer_params") or {}


async def chat(request: Request) -> StreamingResponse:
    body = await request.json()
    parts = [part for message in body["messages"] for part in message["content"] if isinstance(part, dict)]
    pictures = {json.dumps(part): part for part in parts if part["type"] in ("image_url", "video_url")}  # each once
    answers = await asyncio.gather(*(encode(body, picture) for picture in pictures.values()))
    body["ec_transfer_params"] = {name: entry for answer in answers for name, entry in answer.items()}
    answer = await client.send(client.build_request("POST", CONSUMER + PATH, json=body), stream=True)
    headers, close = {"content-type": answer.headers["content-type"]}, BackgroundTask(answer.aclose)
    return StreamingResponse(answer.aiter_bytes(), answer.status_code, headers, background=close)


uvicorn.run(Starlette(routes=[Route(PATH, chat, methods=["POST"])]), port=int(PORT), log_level="warning")
