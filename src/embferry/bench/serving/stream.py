"""One streamed answer, chunk by chunk, with the times that ``vllm bench serve`` takes. The caller passes the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

DONE = "[DONE]"


class Events:
    """Splits bytes into server-sent events.

    Only a line feed ends a line: JSON may contain other characters at which ``str.splitlines`` splits, such as U+2028.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[str]:
        """Yields the text after ``data:`` of each event that is complete."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode(errors="replace")


class Stream:
    """The state of one answer. Times are seconds since the request was sent.

    As in vLLM's bench, the first chunk with a choice ends the time to first token, each later one ends an inter-token
    latency, and the last one ends the request. The chunk with the usage does not count.
    """

    def __init__(self) -> None:
        self.ttft: float | None = None
        self.itls: list[float] = []
        self.latency = 0.0
        self.tokens: list[int] = []
        self.text = ""
        self.prompt_tokens: int | None = None
        self.done = False
        self._error = ""
        self._counted: int | None = None
        self._chunks = 0

    def take(self, now: float, data: str) -> None:
        """Takes the text after ``data:`` of the next event."""
        if data == DONE:
            self.done = True
            return
        try:
            event: Any = msgspec.json.decode(data)
        except (msgspec.DecodeError, RecursionError):
            self._error = f"a chunk is not JSON: {data[:80]!r}"
            return
        if not isinstance(event, dict):
            self._error = f"a chunk is not an object: {data[:80]!r}"
            return
        try:
            self._take(now, event)
        except (AttributeError, LookupError, TypeError):
            self._error = f"a chunk has another form than OpenAI's: {data[:80]!r}"

    def _take(self, now: float, event: dict[str, Any]) -> None:
        if event.get("error"):
            self._error = error_text(event)
        elif event.get("choices"):
            self._choice(now, event["choices"][0])
        elif output := (event.get("sglext") or {}).get("output_ids"):
            self.tokens = list(output[0])  # SGLang has them in one event near the end
        elif usage := event.get("usage"):
            self._counted = _count(usage.get("completion_tokens"))
            self.prompt_tokens = _count(usage.get("prompt_tokens"))

    @property
    def error(self) -> str:
        """Why the answer is not one; empty if it is."""
        if self._error:
            return self._error
        if self.ttft is None:
            return "the answer ended before its first token"
        return "" if self.done else "the answer ended in the middle"

    @property
    def output_tokens(self) -> int:
        """The server's count, or else the number of token ids, or else the number of chunks with text."""
        return self._counted if self._counted is not None else len(self.tokens) or self._chunks

    def _choice(self, now: float, choice: dict[str, Any]) -> None:
        if self.ttft is None:
            self.ttft = now
        else:
            self.itls.append(now - self.latency)
        self.latency = now
        content = (choice.get("delta") or {}).get("content") or ""
        self.text += content
        self._chunks += bool(content)
        self.tokens += choice.get("token_ids") or ()
        if (reason := choice.get("finish_reason")) in ("error", "abort"):
            self._error = f"the server ended the answer with finish_reason {reason}"


def _count(value: object) -> int | None:
    """Returns a number of tokens; None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def error_text(body: dict[str, Any]) -> str:
    """Returns code and message of an error of OpenAI's API."""
    error = body.get("error")
    if isinstance(error, dict):
        code = error.get("code")
        return " ".join(str(part) for part in (f"[{code}]" if code else "", error.get("message")) if part)
    return str(error or body.get("message") or body)  # SGLang has no field around it
