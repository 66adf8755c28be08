"""Asks questions about pictures and videos of two workers, and compares the answers with one undivided process.

The embeddings are transferred into a receive pool far smaller than they are, once over shared memory and once over TCP.
Then an embedding is transferred while its connection is cut. The exit status is 0 if every answer is true and has the
same tokens as that of the undivided model, 130 after Ctrl-C.
"""

# ruff: noqa: E402 - Ctrl-C is quiet before the imports, which take seconds.

from __future__ import annotations

import signal

IS_IN_BACKGROUND = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
if __name__ == "__main__" and not IS_IN_BACKGROUND:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import base64
import contextlib
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cut
import httpx
from transformers.utils.logging import disable_progress_bar

from embferry.cli.streams import open_missing, told
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


def row(question: str, answer: str, tokens: str, resumes: str, same: str) -> str:
    """Returns one row of the table: 79 columns, if question and answer have their usual lengths."""
    return f"{question:<41} {answer:<13} {tokens:>6} {resumes:>7}  {same}"


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
    say(f"\n{number}. Two workers, embeddings over {transport}, a pool of {POOL} tokens: ", end="")
    began = time.monotonic()
    with handled_interrupts(), LocalCluster(cluster_settings(transport)) as cluster:
        cluster.wait_ready(120)
        say(f"ready in {time.monotonic() - began:.0f} s\n")
        say(row("question", "answer", "tokens", "resumes", "same"))
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
    say(row(question.text, answer, f"{transfer['total_tokens']:,}", str(transfer["resumed"]), "yes" if same else "NO"))
    say("  " + ", ".join(path.name for path in question.media))
    if not same:
        say(f"  the undivided model says {expected.text!r}, tokens {expected.tokens}")
    if not true:
        say(f"  the right answer is {question.truth!r}")
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
    say(f"\n{len(TRANSPORTS) + 2}. An embedding of 4 MB over tcp, while its connection is cut:\n")
    fine.append(cut.show(lambda text, end: say(text, end=end)))
    say()
    if not all(fine):
        say("Some answers or bytes are wrong or differ; see above.")
        return 1
    say("Every answer is true and has the same tokens as the undivided model's.")
    say(f"The longest embedding has {longest:,} tokens, {longest / POOL:.0f} times the receive pool.")
    say("All processes have ended.")
    serve, then_ask = commands(asked[0])
    say(f"\nNow try it yourself:\n\n{serve}\n\nand in another terminal:\n\n{then_ask}")
    return 0


def commands(question: Question) -> tuple[str, str]:
    """Returns two lines to paste: one serves, the other asks."""
    command = shown(Path(sys.executable).with_name("embferry"))
    return f"{command} serve", f'{command} ask -v {shown(question.media[0])} "{question.text}"'


def shown(path: Path) -> str:
    """Returns a path as it can be typed here: relative if it lies in the working directory."""
    path = Path(os.path.abspath(path))  # a link such as .venv/bin/python is not followed
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))


@contextlib.contextmanager
def handled_interrupts() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt within the context, so that the cluster ends in order."""
    if IS_IN_BACKGROUND:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    open_missing()
    try:
        with told("demo"):
            sys.exit(main())
    except KeyboardInterrupt:
        say("\nInterrupted. All processes have ended.")
        sys.exit(130)
