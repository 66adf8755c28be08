"""Prefill at one instance and decode at another, which gets the keys and values of the prompt from the first.

The protocol is that of vLLM's NIXL connector. A prefill instance computes the prompt and one token, which is dropped.
Its answer has ``kv_transfer_params``: where the blocks of the prompt are. With them, a decode instance gets the
client's request, fetches the blocks, and computes the whole answer.

Blocks can be fetched once. Then the prefill instance gives their memory to other requests, and a second fetch would get
the contents of those, without an error. A decode instance that has received the request may have fetched them, so when
it fails, the prompt is computed again. Only one that could not be reached is replaced by another at once.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from embferry.serve.errors import ServeError
from embferry.serve.http.answers import read_json
from embferry.serve.http.body import parse_object
from embferry.serve.off_loop import JSON_WEIGHT, off_loop
from embferry.serve.vllm.client_request import ClientRequest
from embferry.serve.vllm.failures import EncodeAgainError, VerbatimError, is_busy
from embferry.serve.vllm.fleet import Fleet
from embferry.serve.vllm.instance import Instance
from embferry.serve.vllm.language_call import Answer, ask, unavailable

log = logging.getLogger(__name__)

KEY = "kv_transfer_params"
_OF_ANSWER = (
    "echo", "logprob_token_ids", "logprobs", "max_completion_tokens", "min_tokens", "n", "return_prompt_text",
    "return_token_ids", "return_token_offsets", "stream_interval", "stream_options", "top_logprobs",
)  # fmt: skip
"""Fields that concern the answer alone. With some of them, a request for one token would be refused."""
_PREFILL: dict[str, Any] = {
    "max_tokens": 1, "stream": False, KEY: {"do_remote_decode": True, "do_remote_prefill": False},
}  # fmt: skip
_WHOLE: dict[str, Any] = {
    "n": 1,
    "prompt_logprobs": None,
    "routed_experts_prompt_start": None,
    "use_beam_search": False,
}
"""Fields, and the value with which a request can be divided. Several answers would fetch the same blocks, and what is
told about the prompt is known only where it is computed."""


class PrefillAgainError(ServeError):
    """A failure before the first byte to the client: another prefill may help, another encode would not."""


@dataclass(frozen=True, slots=True)
class _Question:
    """A request that is answered in stages.

    Attributes:
        body: the client's request, with embeddings in place of its media.
        prefill: the body for prefill instances.
        has_media: embeddings have to arrive at the prefill instance first.
        asked: the URLs of the instances that were asked, which are asked last.
    """

    fleet: Fleet
    request: ClientRequest
    body: dict[str, Any]
    prefill: bytes
    has_media: bool
    asked: set[str] = field(default_factory=set)

    async def answer(self, held: AsyncExitStack, first: Instance | None = None, only_first: bool = False) -> Answer:
        """Makes one attempt. ``held`` keeps the connection to the decode instance."""
        await check_decoders(self.fleet, self.request.model)
        prefilled_by, params = await self._prefill(first, only_first)
        body = {**self.body, KEY: params}
        content = await off_loop(len(self.prefill), msgspec.json.encode, body)
        try:
            answer = await ask(self.fleet, self.request, content, held, asked=self.asked, decodes=True)
        except EncodeAgainError as error:
            raise _prefill_again(error) from error
        except VerbatimError as error:
            if not is_busy(error.status):
                raise
            raise PrefillAgainError("no_worker", f"no decode instance has capacity: {error}") from error
        return replace(answer, prefilled_by=prefilled_by)

    async def _prefill(self, first: Instance | None, only_first: bool) -> tuple[Instance | None, dict[str, Any]]:
        """Returns a prefill instance that has computed the prompt, and where the blocks are."""
        async with AsyncExitStack() as call:
            try:
                with self.fleet.metrics.prefill_seconds.time():
                    answer = await ask(
                        *(self.fleet, self.request, self.prefill, call),
                        has_media=self.has_media,
                        first=first,
                        only_first=only_first,
                        asked=self.asked,
                    )
            except EncodeAgainError as error:
                if self.has_media:
                    raise
                raise _prefill_again(error) from error
            return answer.instance, await off_loop(len(answer.body), _params_in, answer)


async def ask_in_stages(
    fleet: Fleet,
    request: ClientRequest,
    content: bytes,
    held: AsyncExitStack,
    *,
    has_media: bool = False,
    first: Instance | None = None,
    only_first: bool = False,
) -> Answer:
    """Asks a prefill instance, then a decode instance; once more, elsewhere if possible, if that fails.

    A request that cannot be divided is answered by a prefill instance alone. For the arguments, see :func:`ask`; the
    prefill instance is ``first``.

    Raises:
        VerbatimError: the request is wrong, or all prefill instances are busy.
        EncodeAgainError: the prefill of a request with media failed, or messages arrived damaged twice.
        ServeError: no_worker if no instance of a role can be reached, before the prefill if that is known;
            worker_failed if the prefill or the decode failed twice, or a prefill instance does not say where its blocks
            are.
    """
    body = await off_loop(JSON_WEIGHT * len(content), parse_object, content)
    if not is_divided(body):
        return await ask(fleet, request, content, held, has_media=has_media, first=first, only_first=only_first)
    prefill = {name: value for name, value in body.items() if name not in _OF_ANSWER} | _PREFILL
    question = _Question(fleet, request, body, await off_loop(len(content), msgspec.json.encode, prefill), has_media)
    try:
        return await question.answer(held, first, only_first)
    except PrefillAgainError as error:
        earlier, code = error.detail, error.code
    log.warning("prefilling again: %s", earlier)
    fleet.metrics.second_attempts.inc()
    fleet.journal.event("second_attempt", code=code)
    try:
        return await question.answer(held)
    except ServeError as error:
        error.detail = f"{error.detail} (before that: {earlier})"
        raise


def is_divided(body: Mapping[str, Any]) -> bool:
    """Returns whether a decode instance answers the request; otherwise a prefill instance answers it alone."""
    return all(body.get(name) in (None, value) for name, value in _WHOLE.items())


async def check_decoders(fleet: Fleet, model: str | None) -> None:
    """Refuses a request that no decode instance can answer now.

    Its prefill would keep blocks that nothing fetches, until their lease ends: some requests fill a prefill instance,
    and it answers nothing for two minutes after a decode instance has come back.

    Raises:
        ServeError: no_worker.
    """
    if await fleet.language(model, (), decodes=True) is None:
        raise unavailable(fleet, decodes=True)


def _prefill_again(error: ServeError) -> PrefillAgainError:
    return PrefillAgainError(error.code, error.detail, status=error.http_status, retryable=error.retryable)


def _params_in(answer: Answer) -> dict[str, Any]:
    """Returns the ``kv_transfer_params`` of a prefill. Raises ServeError worker_failed if there are none."""
    params = read_json(answer.body).get(KEY) if answer.rest is None else None
    if not isinstance(params, dict) or not params.get("do_remote_prefill"):
        why = "does not say where the keys and values are; is it started with NixlConnector, as kv_producer?"
        raise ServeError("worker_failed", f"{answer.instance!r} {why}", retryable=False)
    return params
