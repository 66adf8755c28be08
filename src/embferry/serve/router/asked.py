"""A client's request in the form in which workers get it, whichever path it came by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from embferry.protocol.text import shown
from embferry.serve.config import Settings
from embferry.serve.errors import ServeError
from embferry.serve.openai.completions import CompletionForm, parse_completion
from embferry.serve.openai.constraints import RESPONSE_FORMAT, constraint_of
from embferry.serve.openai.ignored import Ignored
from embferry.serve.openai.messages import Media, characters_of, parse_messages
from embferry.serve.openai.reply import ChatForm, Form
from embferry.serve.openai.request import parse
from embferry.serve.openai.responses import FORMAT, ResponsesForm, parse_responses
from embferry.serve.openai.sampling import SamplingFields
from embferry.serve.text_limit import check_characters


class _Names(NamedTuple):
    """The names that a path has for what all have.

    Attributes:
        prompt: the field with the question.
        most_tokens: those with the most tokens of an answer, the first that is given counts.
        form: the place of the form of an answer.
    """

    prompt: str
    most_tokens: tuple[str, ...]
    form: str = RESPONSE_FORMAT


_CHAT = _Names("messages", ("max_completion_tokens", "max_tokens"))
_COMPLETION = _Names("prompt", ("max_tokens",))
_RESPONSES = _Names("input", ("max_output_tokens",), FORMAT)


@dataclass(slots=True)
class Asked:
    """A request.

    Attributes:
        prompt: the fields of the prompt for the language worker, as ``messages``.
        sampling: for the language worker.
        form: the form of the reply.
        streams: the reply is a stream of events.
        media: its pictures and videos, until they are loaded.
        items: the same, for the encode worker.
        nbytes: bytes of the texts and of the ids of tokens, about.
        places: the name of a field for workers → where the client has written its value.
    """

    prompt: dict[str, Any]
    sampling: dict[str, Any]
    form: Form
    streams: bool
    media: list[Media] = field(default_factory=list)
    items: list[dict[str, Any]] = field(default_factory=list)
    nbytes: int = 0
    places: dict[str, str] = field(default_factory=dict)

    def place(self, error: ServeError) -> None:
        """Sets ``param`` of a worker's error to the place in the client's request."""
        name = error.param or ("prompt" if error.code == "context_length_exceeded" else None)
        error.param = None if name is None else self.places.get(name, name)


Read = Callable[[dict[str, Any], Settings, Ignored], Asked]
"""Reads the body of a request. Raises ServeError; notes the fields that have no effect."""


def read_chat(body: dict[str, Any], settings: Settings, ignored: Ignored) -> Asked:
    """Reads a request for ``/v1/chat/completions``."""
    request = parse(body, ignored)
    check_model(request.model, settings)
    messages, media = parse_messages(request.messages, ignored)
    form = ChatForm(settings.public_model_name, request.n or 1, request.includes_usage)
    prompt = {"messages": messages, **request.template}
    return _asked(_CHAT, prompt, request, body, form, settings, ignored, media)


def read_completion(body: dict[str, Any], settings: Settings, ignored: Ignored) -> Asked:
    """Reads a request for ``/v1/completions``."""
    request = parse_completion(body, ignored)
    check_model(request.model, settings)
    form = CompletionForm(settings.public_model_name, request.includes_usage)
    return _asked(_COMPLETION, {"prompt": request.one_prompt}, request, body, form, settings, ignored)


def read_responses(body: dict[str, Any], settings: Settings, ignored: Ignored) -> Asked:
    """Reads a request for ``/v1/responses``."""
    request, given, fields = parse_responses(body, ignored)
    check_model(request.model, settings)
    messages, media = parse_messages(given.messages, ignored, given.places)
    form = ResponsesForm(settings.public_model_name, request)
    return _asked(_RESPONSES, {"messages": messages}, request, fields, form, settings, ignored, media)


def check_model(name: str | None, settings: Settings) -> None:
    """Refuses the name of another model. Without a name, the model is the one that is served.

    Raises:
        ServeError: model_not_found.
    """
    served = settings.public_model_name
    if name and name != served:
        why = f"the model {shown(name, 80)} is not served here; {served!r} is"
        raise ServeError("model_not_found", why, param="model")


def _asked(
    names: _Names,
    prompt: dict[str, Any],
    request: SamplingFields,
    body: dict[str, Any],
    form: Form,
    settings: Settings,
    ignored: Ignored,
    media: list[Media] | None = None,
) -> Asked:
    constraint = constraint_of(body, ignored, names.form)
    sampling = request.sampling(settings.router.default_max_tokens, constraint and constraint.value)
    most = next((name for name in names.most_tokens if body.get(name) is not None), names.most_tokens[-1])
    places = {"max_tokens": most, "prompt": names.prompt}
    places |= {} if constraint is None else {"constraint": constraint.param}
    text = prompt.get("prompt")
    characters = characters_of(prompt.get("messages", [])) + (len(text) if isinstance(text, str) else 0)
    check_characters(characters, settings.language)
    nbytes = characters + (8 * len(text) if isinstance(text, list) else 0)
    return Asked(prompt, sampling, form, bool(request.stream), media or [], nbytes=nbytes, places=places)
