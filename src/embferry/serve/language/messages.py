"""``POST /generate``: the router's request (JSON) and the worker's events (JSON, one a line)."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from embferry.engine.sampling import SamplingParams
from embferry.engine.shape import MediaShape
from embferry.serve.errors import ServeError
from embferry.serve.text_limit import count_characters
from embferry.serve.worker.errors import error_body

Count = Annotated[int, Meta(ge=1, le=1 << 31)]


class Part(Struct, frozen=True):
    """Text, or the picture or video with the index ``item`` in the request's ``items``."""

    type: Literal["text", "image", "video"]
    text: str | None = None
    item: int | None = None

    def __post_init__(self) -> None:
        if (self.type == "text") != (self.text is not None):
            raise ValueError("a part of type text has a text, others have none")

    @property
    def content(self) -> dict[str, str]:
        """The part as the engine's prompt builder takes it."""
        return {"type": self.type} if self.text is None else {"type": "text", "text": self.text}


class Message(Struct, frozen=True, omit_defaults=True):
    """A message. Beside its parts it may have what chat templates know: tool calls, a name, a reasoning."""

    role: str
    parts: list[Part]
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[dict[str, Any]] = []
    reasoning: str | None = None

    @property
    def chat(self) -> dict[str, Any]:
        """The message as the engine's prompt builder takes it."""
        around = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning": self.reasoning}
        around["reasoning_content"] = self.reasoning  # as other templates call it
        kept: dict[str, Any] = {name: text for name, text in around.items() if text is not None}
        kept |= {"tool_calls": self.tool_calls} if self.tool_calls else {}
        return {"role": self.role, "content": [part.content for part in self.parts], **kept}

    @property
    def characters(self) -> int:
        """The number of characters of all of its texts."""
        texts = sum(len(part.text or "") for part in self.parts)
        return (
            len(self.role) + texts + count_characters([self.name, self.tool_call_id, self.tool_calls, self.reasoning])
        )


class Item(Struct, frozen=True):
    """A picture or video as the encode worker described it; ``digest`` is hexadecimal."""

    kind: Literal["image", "video"]
    grid_thw: tuple[Count, Count, Count]
    num_tokens: Count
    digest: Annotated[str, Meta(pattern="^([0-9a-f]{2}){0,64}$")] = ""
    timestamps: list[float] = []

    @property
    def shape(self) -> MediaShape:
        return MediaShape(self.kind, self.grid_thw, tuple(self.timestamps), bytes.fromhex(self.digest))


class Constraint(Struct, frozen=True, omit_defaults=True):
    """The form of an answer: one of a JSON schema, a regular expression, and a list of texts.

    ``compact``: JSON has no white space between its values.
    """

    json: dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    compact: bool = False

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.json, self.regex, self.choice)) != 1:
            raise ValueError("a constraint has one of json, regex and choice")


class Sampling(Struct, frozen=True, omit_defaults=True):
    """How an answer is generated; see :class:`SamplingParams`. ``max_tokens``: null for as many as fit."""

    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[str] = []
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: list[tuple[int, float]] = []
    allowed_token_ids: list[int] | None = None
    min_tokens: int = 0
    stop_token_ids: list[int] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    n: int = 1
    constraint: Constraint | None = None

    def params(self, most_tokens: int) -> SamplingParams:
        """Returns the parameters as the engine takes them.

        Args:
            most_tokens: the most tokens of an answer if the request does not say.

        Raises:
            ParameterError: a value is out of range.
        """
        allowed = self.allowed_token_ids
        return SamplingParams(
            max_tokens=most_tokens if self.max_tokens is None else self.max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
            stop=tuple(self.stop),
            ignore_eos=self.ignore_eos,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias),
            allowed_token_ids=None if allowed is None else tuple(allowed),
            min_tokens=self.min_tokens,
            stop_token_ids=frozenset(self.stop_token_ids),
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=self.logprobs,
            n=self.n,
        )


class GenerateRequest(Struct, frozen=True):
    """A prompt.

    Attributes:
        messages: a conversation; empty if there is a ``prompt``.
        prompt: a text, or the ids of its tokens, without a chat template.
        opens: the prompt ends with the beginning of the assistant's answer.
        continues: the answer continues the last message.
        room: from the encode worker's response, as ``endpoint``; null if there are no items.
        client: the router's name for the client, whose prompts take turns with those of others.
        progress: how much of the embedding has arrived is told in events of its own, which older routers do not know.
    """

    request_id: Annotated[str, Meta(max_length=512)]
    messages: list[Message] = []
    prompt: str | list[Annotated[int, Meta(ge=0, lt=1 << 31)]] | None = None
    opens: bool = True
    continues: bool = False
    room: Annotated[int, Meta(ge=0, le=(1 << 63) - 1)] | None = None
    endpoint: Annotated[str, Meta(pattern=r"^(tcp|tls)://.+:\d{1,5}$", max_length=512)] | None = None
    items: list[Item] = []
    sampling: Sampling = Sampling()
    client: Annotated[str, Meta(max_length=512)] = ""
    progress: bool = False

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("a request has messages or a prompt")
        if self.items and (self.room is None or self.endpoint is None):
            raise ValueError("a request with items needs the room and endpoint of their embedding")
        parts = [(p.item, p.type) for m in self.messages for p in m.parts if p.type != "text"]
        if parts != [(index, item.kind) for index, item in enumerate(self.items)]:
            raise ValueError("the messages must name each item once, in order, with its kind")

    @property
    def shapes(self) -> list[MediaShape]:
        return [item.shape for item in self.items]

    @property
    def characters(self) -> int:
        """The number of characters of all texts and roles."""
        return sum(m.characters for m in self.messages) + len(self.prompt or "")

    @property
    def count(self) -> int:
        """The number of messages and of their parts."""
        return len(self.messages) + sum(len(m.parts) for m in self.messages)

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages as the engine's prompt builder takes them."""
        return [message.chat for message in self.messages]


DECODER = msgspec.json.Decoder(GenerateRequest)


class TokenizeRequest(Struct, frozen=True):
    """``POST /tokenize``: a text, or a conversation without media. ``strings``: the texts of the tokens too."""

    request_id: Annotated[str, Meta(max_length=512)]
    messages: list[Message] = []
    prompt: str | None = None
    opens: bool = True
    continues: bool = False
    strings: bool = False
    client: Annotated[str, Meta(max_length=512)] = ""

    def __post_init__(self) -> None:
        if bool(self.messages) == (self.prompt is not None):
            raise ValueError("a request has messages or a prompt")

    @property
    def characters(self) -> int:
        """The number of characters of all texts and roles."""
        return sum(m.characters for m in self.messages) + len(self.prompt or "")


class DetokenizeRequest(Struct, frozen=True):
    """``POST /detokenize``: ids of tokens."""

    request_id: Annotated[str, Meta(max_length=512)]
    tokens: list[Annotated[int, Meta(ge=0, lt=1 << 31)]]
    client: Annotated[str, Meta(max_length=512)] = ""


TOKENIZE_DECODER = msgspec.json.Decoder(TokenizeRequest)
DETOKENIZE_DECODER = msgspec.json.Decoder(DetokenizeRequest)


PING: dict[str, Any] = {"type": "ping"}


def encoded(event: dict[str, Any] | ServeError) -> bytes:
    """Returns one event as JSON without line breaks."""
    fields = {"type": "error", **error_body(event)} if isinstance(event, ServeError) else event
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")).encode()
