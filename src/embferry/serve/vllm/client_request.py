"""A client's request, as everything before vLLM hands it on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from embferry.serve.http.request_trace import Call
from embferry.serve.off_loop import off_loop
from embferry.serve.vllm.instance import Incarnation
from embferry.serve.vllm.items import Item

CHAT = "/v1/chat/completions"


@dataclass(frozen=True, slots=True)
class ClientRequest:
    """A client's request.

    Attributes:
        headers: to be sent to instances.
        nbytes: its length as JSON.
        grow: called with the bytes of an answer that the router holds for it; may raise ServeError capacity_exhausted.
        lost: gets the instances that end during the encode of its items.
        prefixes: by the name of each item, a digest of what is before its end in the prompt.
        on_encode: called when an item is about to go to an encoder.
    """

    content: dict[str, Any]
    headers: dict[str, str]
    nbytes: int = 0
    grow: Callable[[int], object] = lambda nbytes: None
    lost: set[Incarnation] = field(default_factory=set)
    prefixes: Mapping[str, bytes] = field(default_factory=dict)
    on_encode: Callable[[], object] = lambda: None

    @property
    def model(self) -> str | None:
        """The model's name, if it is a text."""
        model = self.content.get("model")
        return model if isinstance(model, str) else None

    def under(self, call: Call) -> ClientRequest:
        """Returns the request as an instance gets it in this call, of which its headers tell."""
        return replace(self, headers={**self.headers, **call.headers}) if call.headers else self

    async def as_json(self, body: dict[str, Any], items: Iterable[Item]) -> bytes:
        """Returns a body that was made from this request, with ``items`` in it."""
        nbytes = self.nbytes + sum(len(item.url) for item in items)
        return await off_loop(nbytes, msgspec.json.encode, body)
