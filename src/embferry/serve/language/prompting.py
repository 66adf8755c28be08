"""Prompts are built beside the engine's thread: tokenizing a long text takes seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from embferry.engine.errors import ParameterError, PromptTooLong
from embferry.engine.grammar import Grammars, Matcher
from embferry.engine.prompt import Prompt, PromptBuilder
from embferry.engine.sampling import SamplingParams
from embferry.serve.config import LanguageSettings
from embferry.serve.language.messages import DetokenizeRequest, GenerateRequest, TokenizeRequest
from embferry.serve.shared_threads import SharedThreads
from embferry.serve.text_limit import check_characters

T = TypeVar("T")
LONG_CHARACTERS = 16_384
"""Longer texts have a thread of their own, so that no short one waits for them."""
LONG_COUNT = 512
"""Requests with more messages and parts have it, too: each takes as long as a short text."""
TOKENS_OF_MESSAGE = 3
"""Each message has at least its beginning, its role and its end."""


@dataclass(frozen=True, slots=True)
class Built:
    """A request before its embedding arrives: its prompt, its parameters, the grammar of its answer."""

    prompt: Prompt
    params: SamplingParams
    matcher: Matcher | None


class PromptThreads:
    """Two threads that build prompts: one for short texts, one for long ones. The router's clients take turns on each.

    Args:
        prompts: the model's.
        grammars: the model's.
        limits: the settings.
        threads: CPU threads that torch may use.
    """

    def __init__(self, prompts: PromptBuilder, grammars: Grammars, limits: LanguageSettings, threads: int) -> None:
        self._prompts, self._grammars, self._limits = prompts, grammars, limits
        self._short, self._long = (
            SharedThreads(1, name, initializer=torch.set_num_threads, initargs=(threads,))
            for name in ("prompt", "long-prompt")
        )

    def submit(self, request: GenerateRequest, done: Callable[[Future[Built]], object]) -> Future[Built]:
        """Has the prompt of a request built. To cancel the future takes it out of its queue.

        Args:
            request: the decoded request.
            done: called with the future when it is done, on the thread that built it, or on this one.
        """
        is_long = (
            max(request.characters / LONG_CHARACTERS, request.count / LONG_COUNT) > 1
            or request.sampling.constraint is not None
        )
        threads = self._long if is_long else self._short
        future = threads.submit(request.client, partial(self.build, request))
        future.add_done_callback(done)
        return future

    def build(self, request: GenerateRequest) -> Built:
        """Builds the prompt of a request, and compiles the grammar of its answer.

        Raises:
            ParameterError: the request asks for more tokens or choices than it may, or for tokens or a grammar that
                there cannot be.
            PromptError: no prompt can be built, or it is too long.
            ServeError: context_length_exceeded: the texts are too long to be tokenized.
        """
        sampling, limits = request.sampling, self._limits
        params = sampling.params(max(limits.max_new_tokens, sampling.min_tokens))
        if params.max_tokens > limits.max_new_tokens:
            limit = f"{limits.max_new_tokens} (language.max_new_tokens)"
            name = "min_tokens" if sampling.max_tokens is None else "max_tokens"
            raise ParameterError(f"{name} is {params.max_tokens}; an answer may have at most {limit}", param=name)
        if params.n > limits.max_concurrent:
            limit = f"{limits.max_concurrent} (language.max_concurrent)"
            raise ParameterError(f"n is {params.n}; a request may have at most {limit} choices", param="n")
        params.check_tokens(self._grammars.vocabulary)
        check_characters(request.characters, limits, self._prompts.limit)
        self._check_messages(len(request.messages))
        prompt = self._prompt(request, 1 if sampling.max_tokens is None else params.max_tokens)
        if prompt.length > limits.max_prompt_tokens:
            limit = f"{limits.max_prompt_tokens} (language.max_prompt_tokens)"
            raise PromptTooLong(f"the prompt has {prompt.length} tokens; the limit is {limit}")
        return Built(prompt, params, self._matcher(request))

    def tokens(self, request: TokenizeRequest) -> dict[str, Any]:
        """Returns the tokens of a text or a conversation, in the form of the answer to ``/tokenize``.

        Raises:
            PromptError: no prompt can be built.
            ServeError: context_length_exceeded: the texts are too long to be tokenized.
        """
        check_characters(request.characters, self._limits, self._prompts.limit)
        self._check_messages(len(request.messages))
        if request.prompt is not None:
            ids = self._prompts.token_ids(request.prompt)
        else:
            chat = [message.chat for message in request.messages]
            ids = self._prompts.build(chat, opens=request.opens, continues=request.continues).input_ids[0].tolist()
        strings = self._prompts.tokenizer.convert_ids_to_tokens(ids) if request.strings else None
        return {"count": len(ids), "max_model_len": self._most, "tokens": ids, "token_strs": strings}

    def text(self, request: DetokenizeRequest) -> dict[str, Any]:
        """Returns the text of tokens, in the form of the answer to ``/detokenize``.

        Raises:
            ParameterError: there is no such token.
        """
        size = self._grammars.vocabulary
        if (wrong := next((token for token in request.tokens if token >= size), None)) is not None:
            raise ParameterError(f"there is no token {wrong}; the model has those from 0 to {size - 1}", param="tokens")
        return {"prompt": self._prompts.text_of(request.tokens)}

    async def run(self, client: str, is_long: bool, call: Callable[[], T]) -> T:
        """Returns the result of a call on one of the threads, which is work of ``client``."""
        threads = self._long if is_long else self._short
        return await asyncio.wrap_future(threads.submit(client, call))

    @property
    def _most(self) -> int:
        """The most tokens of a prompt and its answer."""
        return min(self._prompts.limit, self._limits.max_prompt_tokens + self._limits.max_new_tokens)

    def _check_messages(self, count: int) -> None:
        least, most = TOKENS_OF_MESSAGE * count, min(self._limits.max_prompt_tokens, self._prompts.limit)
        if least > most:
            raise PromptTooLong(f"the messages have at least {least} tokens; the limit is {most}")

    def _prompt(self, request: GenerateRequest, max_new_tokens: int) -> Prompt:
        if request.prompt is not None:
            return self._prompts.build_plain(request.prompt, max_new_tokens)
        ending = {"opens": request.opens, "continues": request.continues}
        return self._prompts.build(request.chat, request.shapes, max_new_tokens, **ending)

    def _matcher(self, request: GenerateRequest) -> Matcher | None:
        form = request.sampling.constraint
        if form is None:
            return None
        return self._grammars.compile(json_schema=form.json, regex=form.regex, choice=form.choice, compact=form.compact)

    def close(self) -> None:
        """Ends the threads, each after the prompt that it is building."""
        for threads in (self._short, self._long):
            threads.close()
