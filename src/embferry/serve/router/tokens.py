"""``/tokenize`` and ``/detokenize`` before workers of this project: a language worker has the tokenizer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Scope

from embferry.serve.errors import ServeError
from embferry.serve.http.body import parse_object
from embferry.serve.http.chat import ChatEndpoint, ClientResponse, Incoming
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.openai.completions import as_tokens
from embferry.serve.openai.fields import note_ignored, refuse_unsupported
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.messages import characters_of, parse_messages
from embferry.serve.openai.request import parse
from embferry.serve.router.asked import check_model
from embferry.serve.router.fleet import Fleet
from embferry.serve.router.worker_call import WorkerCall
from embferry.serve.text_limit import check_characters

_TOKENIZE_FIELDS = (
    "model", "prompt", "messages", "add_generation_prompt", "continue_final_message", "return_token_strs",
)  # fmt: skip


class _TokensEndpoint(ChatEndpoint[Fleet]):
    """One of the two paths. A request is passed to one language worker, which answers at once."""

    path: str

    async def answer(self, incoming: Incoming, scope: Scope, response: ClientResponse) -> None:
        ignored = Ignored()
        asked, nbytes = await off_loop(JSON_WEIGHT * incoming.nbytes, self._parsed, incoming.take(), ignored)
        response.note_ignored(ignored)
        call = WorkerCall(self.fleet, scope["state"]["request_id"], None, set())
        try:
            answer = await call.ask_language(self.path, asked, nbytes)
        finally:
            await call.close()
        await response.send_whole(JSONResponse(answer))

    def _parsed(self, body: bytes, ignored: Ignored) -> tuple[dict[str, Any], int]:
        request = parse_object(body)
        model = request.get("model")
        if model is not None and not isinstance(model, str):
            raise ServeError("invalid_request", "model must be a text", param="model")
        check_model(model, self._settings)
        return self._read(request, ignored)

    @abstractmethod
    def _read(self, body: dict[str, Any], ignored: Ignored) -> tuple[dict[str, Any], int]:
        """Returns the request for the worker, and its bytes, about."""


class Tokenize(_TokensEndpoint):
    """``POST /tokenize``: the tokens of a text or of a conversation without pictures and videos."""

    path = "/tokenize"

    def _read(self, body: dict[str, Any], ignored: Ignored) -> tuple[dict[str, Any], int]:
        refuse_unsupported({name: value for name, value in body.items() if name != "add_special_tokens"})
        note_ignored(body, _TOKENIZE_FIELDS, ignored)
        prompt: dict[str, Any]
        if body.get("messages") is not None:
            if body.get("prompt") is not None:
                raise ServeError("invalid_request", "prompt and messages exclude each other", param="prompt")
            fields = {name: body[name] for name in _TOKENIZE_FIELDS[2:5] if name in body}
            request = parse(fields)
            messages, media = parse_messages(request.messages, ignored)
            if media:
                why = "the tokens of pictures and videos are counted when they are encoded; leave them out"
                raise ServeError("unsupported_value", why, param=media[0].param)
            prompt = {"messages": messages, **request.template}
        elif isinstance(body.get("prompt"), str):
            note_ignored({name: body.get(name) for name in _TOKENIZE_FIELDS[3:5]}, (), ignored)
            prompt = {"prompt": body["prompt"]}
        else:
            raise ServeError("invalid_request", "prompt must be a text, or messages a list", param="prompt")
        characters = characters_of(prompt.get("messages", [])) + len(prompt.get("prompt", ""))
        check_characters(characters, self._settings.language)
        return prompt | {"strings": bool(body.get("return_token_strs"))}, characters


class Detokenize(_TokensEndpoint):
    """``POST /detokenize``: the text of tokens."""

    path = "/detokenize"

    def _read(self, body: dict[str, Any], ignored: Ignored) -> tuple[dict[str, Any], int]:
        note_ignored(body, ("model", "tokens"), ignored)
        tokens = as_tokens(body.get("tokens"), "tokens")
        return {"tokens": tokens}, 8 * len(tokens)
