"""One combination: a question is asked while a fault strikes; the answer is the undivided one, or a named error."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from typing import Any

import httpx

from embferry.serve.config import Settings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.undivided import Undivided, UndividedAnswer
from tests.serve.pictures import encoded, noise
from tests.serve.relay.stack import RelayedStack
from tests.serve.relay.table import NAMED, TRIES, Combination
from tests.serve.workers.test_processes import START, wait

HANG_SECONDS = 90.0
"""Far longer than any time-out of the stack (30 s): a request that takes it hangs."""
TEXT, TOKENS = "How many circles are there?", 6


@dataclass(frozen=True)
class Asked:
    """The question, and its answer by one undivided process."""

    body: dict[str, Any]
    expected: UndividedAnswer

    @classmethod
    def make(cls) -> Asked:
        picture = encoded(noise(96, 64))
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": TEXT}]
        body = {"model": "shapes", "messages": [{"role": "user", "content": content}], "max_tokens": TOKENS}
        return cls(body, Undivided(Settings()).answer([EncodeItem("image", picture)], TEXT, TOKENS))

    def ask(self, url: str) -> str:
        """Asks. Returns the error's code and sentence, "wrong: …", or nothing: the answer is right, token by token."""
        try:
            path = f"{url}/v1/chat/completions"
            response = httpx.post(path, json=self.body, timeout=HANG_SECONDS, trust_env=False)
        except httpx.TimeoutException:
            return "hangs: no answer"
        answer = response.json()
        if "error" in answer:
            return f"{answer['error']['code']}: {answer['error']['message']}"
        told = tuple(answer["embferry"]["tokens"]), answer["choices"][0]["message"]["content"]
        right = told == (self.expected.tokens, self.expected.text)
        return "" if right else f"wrong: {told} instead of {self.expected}"


class Trials:
    """The combinations at one stack."""

    def __init__(self, stack: RelayedStack, asked: Asked) -> None:
        self._stack, self._asked = stack, asked
        self._carried: dict[tuple[str, str], int] = {}

    def prepare(self) -> None:
        """Counts the bytes that each direction of each hop carries for a question."""
        self._recover()
        before = {hop: self._counts(hop) for hop in self._stack.relays}
        assert self._asked.ask(self._stack.url) == ""
        for hop, counts in before.items():
            for toward, old, new in zip(("upstream", "clients"), counts, self._counts(hop), strict=True):
                old += [0] * (len(new) - len(old))
                self._carried[hop, toward] = max((b - a for a, b in zip(old, new, strict=True)), default=0)

    def run(self, combination: Combination) -> tuple[str, str]:
        """Tries a combination.

        Returns:
            What became of the question, and what is wrong with that; empty if nothing is.
        """
        relay = self._stack.relays[combination.hop]
        relay.arm(combination.at(self._carried[combination.hop, combination.toward]))
        outcome = ""
        for _ in range(TRIES):
            outcome = self._asked.ask(self._stack.url)
            if relay.struck.is_set() or outcome:
                break
        struck = relay.struck.is_set()
        relay.disarm()
        problem = self._judge(outcome, struck)
        self._recover()
        if restarts := self._stack.restarts():
            problem = f"{problem} processes have ended: {restarts}"
        return outcome, problem

    @staticmethod
    def _judge(outcome: str, struck: bool) -> str:
        code = outcome.partition(":")[0]
        if not struck:
            return f"the fault did not strike; {outcome or 'right answers'}"
        return outcome if code and code not in NAMED else ""

    def _recover(self) -> None:
        """Waits until the stack is whole and answers; connections that were struck are given up meanwhile."""
        wait(self._stack.whole, "a whole stack", START)
        wait(lambda: not self._asked.ask(self._stack.url), "a right answer", START)

    def _counts(self, hop: str) -> tuple[list[int], list[int]]:
        relay = self._stack.relays[hop]
        return list(relay.to_upstream), list(relay.to_clients)
