"""Prompts are built beside the engine's thread: tokenizing a long text takes seconds."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch

from embferry.engine.errors import ParameterError, PromptTooLong
from embferry.engine.prompt import Prompt, PromptBuilder
from embferry.serve.config import LanguageSettings
from embferry.serve.language.messages import GenerateRequest
from embferry.serve.shared_threads import SharedThreads
from embferry.serve.text_limit import check_characters

LONG_CHARACTERS = 16_384
"""Longer texts have a thread of their own, so that no short one waits for them."""
LONG_COUNT = 512
"""Requests with more messages and parts have it, too: each takes as long as a short text."""
TOKENS_OF_MESSAGE = 3
"""Each message has at least its beginning, its role and its end."""


class PromptThreads:
    """Two threads that build prompts: one for short texts, one for long ones. The router's clients take turns on each.

    Args:
        prompts: the model's.
        limits: the settings.
        threads: CPU threads that torch may use.
    """

    def __init__(self, prompts: PromptBuilder, limits: LanguageSettings, threads: int) -> None:
        self._prompts, self._limits = prompts, limits
        self._short, self._long = (
            SharedThreads(1, name, initializer=torch.set_num_threads, initargs=(threads,))
            for name in ("prompt", "long-prompt")
        )

    def submit(self, request: GenerateRequest, done: Callable[[Future[Prompt]], object]) -> Future[Prompt]:
        """Has the prompt of a request built. To cancel the future takes it out of its queue.

        Args:
            request: the decoded request.
            done: called with the future when it is done, on the thread that built it, or on this one.
        """
        is_long = request.characters > LONG_CHARACTERS or request.count > LONG_COUNT
        threads = self._long if is_long else self._short
        future = threads.submit(request.client, partial(self.build, request))
        future.add_done_callback(done)
        return future

    def build(self, request: GenerateRequest) -> Prompt:
        """Builds the prompt of a request.

        Raises:
            ParameterError: the request asks for more tokens than an answer may have.
            PromptError: no prompt can be built, or it is too long.
            ServeError: context_length_exceeded: the texts are too long to be tokenized.
        """
        params, limits = request.sampling.params, self._limits
        if params.max_tokens > limits.max_new_tokens:
            limit = f"{limits.max_new_tokens} (language.max_new_tokens)"
            raise ParameterError(f"max_tokens is {params.max_tokens}; an answer may have at most {limit}")
        check_characters(request.characters, limits, self._prompts.limit)
        least, most = TOKENS_OF_MESSAGE * len(request.messages), min(limits.max_prompt_tokens, self._prompts.limit)
        if least > most:
            raise PromptTooLong(f"the messages have at least {least} tokens; the limit is {most}")
        prompt = self._prompts.build(request.chat, request.shapes, params.max_tokens)
        if prompt.length > limits.max_prompt_tokens:
            limit = f"{limits.max_prompt_tokens} (language.max_prompt_tokens)"
            raise PromptTooLong(f"the prompt has {prompt.length} tokens; the limit is {limit}")
        return prompt

    def close(self) -> None:
        """Ends the threads, each after the prompt that it is building."""
        for threads in (self._short, self._long):
            threads.close()
