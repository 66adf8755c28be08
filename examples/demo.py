"""Asks questions about pictures and videos of two workers, and compares the answers with one undivided process.

The embeddings are transferred into a receive pool far smaller than they are, once over shared memory and once over TCP.
The exit status is 0 if every answer is true and has the same tokens as that of the undivided model.
"""

from __future__ import annotations

import base64
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers.utils.logging import disable_progress_bar

from embferry.serve.config import ServeSettings, Settings, TransferSettings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.supervisor import LocalCluster
from embferry.serve.undivided import Undivided, UndividedAnswer

MEDIA = Path(__file__).parent / "media"
TRANSPORTS = ("shm", "tcp")
BLOCKS, BLOCK_SIZE = 2, 8
POOL = BLOCKS * BLOCK_SIZE


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its pictures or video, and the true answer."""

    media: tuple[Path, ...]
    text: str
    truth: str

    @property
    def items(self) -> list[EncodeItem]:
        return [EncodeItem(_kind(path), path.read_bytes()) for path in self.media]

    @property
    def message(self) -> dict[str, Any]:
        parts: list[dict[str, Any]] = []
        for path in self.media:
            kind = f"{_kind(path)}_url"
            data = base64.b64encode(path.read_bytes()).decode()
            parts.append({"type": kind, kind: {"url": f"data:application/octet-stream;base64,{data}"}})
        return {"role": "user", "content": [*parts, {"type": "text", "text": self.text}]}


def _kind(path: Path) -> Any:
    return "video" if path.suffix == ".mp4" else "image"


def questions() -> list[Question]:
    """Returns the first question about each picture, set of pictures or video in ``examples/media/questions.json``."""
    found: dict[tuple[Path, ...], Question] = {}
    for entry in json.loads((MEDIA / "questions.json").read_text()):
        media = tuple(MEDIA / name for name in entry["media"])
        found.setdefault(media, Question(media, entry["question"], entry["answer"]))
    return list(found.values())


def say(text: str = "", *, end: str = "\n") -> None:
    print(text, end=end, flush=True)


def line(media: str, question: str, answer: str, tokens: str, transfers: str, verdict: str) -> str:
    """Returns one line of the table."""
    return f"   {media:<34}{question:<41}{answer:<15}{tokens:>6}  {transfers:<25}{verdict}"


def undivided(asked: Sequence[Question], settings: Settings) -> list[UndividedAnswer]:
    """Loads the whole model into this process and answers all questions."""
    say("1. One process, the undivided model: ", end="")
    disable_progress_bar()
    began = time.monotonic()
    model = Undivided(settings)
    answers = []
    for question in asked:
        answers.append(model.answer(question.items, question.text))
        say(".", end="")
    say(f" {len(answers)} answers in {time.monotonic() - began:.0f} s")
    return answers


def across(transport: str, number: int, asked: Sequence[Question], expected: Sequence[UndividedAnswer]) -> bool:
    """Asks all questions of a cluster; returns whether all answers are true and equal to the expected ones."""
    say(f"\n{number}. Two workers, embeddings over {transport}, receive pool of {POOL} tokens: ", end="")
    began = time.monotonic()
    with LocalCluster(cluster_settings(transport)) as cluster:
        cluster.wait_ready(120)
        say(f"ready in {time.monotonic() - began:.0f} s\n")
        say(line("picture or video", "question", "answer", "tokens", "transfers", "same as undivided"))
        with httpx.Client(base_url=cluster.url, timeout=60, trust_env=False) as client:
            fine = [ask(client, question, one) for question, one in zip(asked, expected, strict=True)]
    return all(fine)


def ask(client: httpx.Client, question: Question, expected: UndividedAnswer) -> bool:
    """Asks the router one question and prints its line; returns whether the answer is true and the expected one."""
    response = client.post("/v1/chat/completions", json={"model": "shapes", "messages": [question.message]})
    body = response.json()
    if response.status_code != 200:
        say(f"   {question.text}: {response.status_code} {body['error']['message']}")
        return False
    answer = body["choices"][0]["message"]["content"]
    transfer, tokens = body["embferry"]["transfer"], tuple(body["embferry"]["tokens"])
    same, true = tokens == expected.tokens and answer == expected.text, answer == question.truth
    names = ", ".join(path.name for path in question.media)
    how = f"{transfer['initial']} initial + {transfer['resumed']} resumed"
    verdict = ("yes" if same else f"NO: {expected.text!r}") + ("" if true else f"; WRONG, it is {question.truth}")
    say(line(names, question.text, answer, f"{transfer['total_tokens']:,}", how, verdict))
    return same and true


def cluster_settings(transport: str) -> Settings:
    """Returns settings for one encode and one language worker, free ports, and a tiny pool."""
    base = Settings()
    transfer = TransferSettings.model_validate(
        {"transports": [transport], "num_blocks": BLOCKS, "block_size": BLOCK_SIZE}
    )
    return base.model_copy(
        update={
            "log_level": "error",
            "transfer": transfer,
            "serve": ServeSettings(),
            "router": base.router.model_copy(update={"port": 0}),
            "bootstrap": base.bootstrap.model_copy(update={"port": 0}),
        }
    )


def main() -> int:
    logging.basicConfig(level=logging.ERROR)
    asked = questions()
    say("embferry: embeddings go from the encode worker to the language worker.\n")
    expected = undivided(asked, cluster_settings(TRANSPORTS[0]))
    fine = [across(transport, number, asked, expected) for number, transport in enumerate(TRANSPORTS, start=2)]
    longest = max(answer.visual_tokens for answer in expected)
    say()
    if not all(fine):
        say("Some answers are wrong or differ; see above.")
        return 1
    say("Every answer is true and has the same tokens as the undivided model's. The longest embedding has")
    say(f"{longest:,} tokens, {longest / POOL:.0f} times the receive pool. All processes have ended.")
    say("\nNow try it yourself:")
    say("   .venv/bin/embferry serve")
    say(f'   .venv/bin/embferry ask -v {asked[0].media[0].relative_to(Path.cwd())} "{asked[0].text}"')
    return 0


if __name__ == "__main__":
    sys.exit(main())
