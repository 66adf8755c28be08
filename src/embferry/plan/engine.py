"""A language model that batches, as vLLM, SGLang and the engine of this project do.

Each step gives every running request one token and prefills, with the rest of its budget, requests that wait: in whole
or in chunks (Yu et al., Orca, 2022; Agrawal et al., Sarathi-Serve, 2024).
"""

from __future__ import annotations

from collections import deque

from .clock import Clock, Then
from .speeds import Speeds


class Prompt:
    """A request at a language model. ``encode``: seconds of the encoder, if the same instance encodes."""

    def __init__(self, tokens: int, output_tokens: int, encode: float, first: Then, ended: Then) -> None:
        self.tokens, self.left, self.encode = tokens, output_tokens, encode
        self.first: Then | None = first
        self.ended = ended
        self.done = 0


class Engine:
    """One instance.

    Attributes:
        busy: Seconds of its steps so far, longer ones where cores were full included.
        requests: Requests that have not ended.
    """

    def __init__(self, clock: Clock, speeds: Speeds) -> None:
        self._clock, self._speeds = clock, speeds
        self._waiting: deque[Prompt] = deque()
        self._running: list[Prompt] = []
        self._steps = False
        self.busy = 0.0
        self.requests = 0

    def add(self, prompt: Prompt) -> None:
        self.requests += 1
        self._waiting.append(prompt)
        if not self._steps:
            self._steps = True
            self._step()

    def _step(self) -> None:
        speeds, decoding = self._speeds, list(self._running)
        budget = speeds.batch_tokens - len(decoding)
        seconds = speeds.step.at(len(decoding))
        prefilled: list[Prompt] = []
        while self._waiting and budget > 0 and len(self._running) < speeds.batch_requests:
            prompt = self._waiting[0]
            if not prompt.done:
                if prefilled and prompt.tokens > budget:
                    break  # it waits for the next step, as in vLLM, whose pictures are not cut
                seconds += prompt.encode + speeds.prefill.base
            before, prompt.done = prompt.done, min(prompt.tokens, prompt.done + budget)
            budget -= prompt.done - before
            seconds += speeds.prefill.at(prompt.done) - speeds.prefill.at(before)
            if prompt.done < prompt.tokens:
                break
            self._waiting.popleft()
            self._running.append(prompt)
            prefilled.append(prompt)
        began = self._clock.now
        self._clock.work(seconds, lambda: self._stepped(began, [*decoding, *prefilled]))

    def _stepped(self, began: float, served: list[Prompt]) -> None:
        self.busy += self._clock.now - began
        for prompt in served:
            prompt.left -= 1
            if prompt.first is not None:
                first, prompt.first = prompt.first, None
                first()
            if prompt.left <= 0:
                self._running.remove(prompt)
                self.requests -= 1
                prompt.ended()
        if self._running or self._waiting:
            self._step()
        else:
            self._steps = False
