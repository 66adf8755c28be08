"""The commands as processes, on the real Mooncake engine."""

from __future__ import annotations

import base64
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from tests.serve.origin.joined import MAX_TOKENS, Models
from tests.serve.pictures import png

pytestmark = [pytest.mark.integration, pytest.mark.engines]

SECONDS = 300.0
PICTURE = png(640, 480, "green")


class Process:
    """A worker, and what it logs."""

    def __init__(self, verb: str, *options: str) -> None:
        words = [
            verb,
            "--wire",
            "origin",
            "--dtype",
            "bf16",
            "--transfer-num-blocks",
            "4",
            "--transfer-block-size",
            "16",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "embferry", *words, *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")

    def end(self) -> None:
        self.process.kill()
        self.process.wait(SECONDS)
        self._reader.join()

    def wait_for(self, pattern: str) -> re.Match[str]:
        seen = []
        while line := self._lines.get(timeout=SECONDS):
            seen.append(line)
            if found := re.search(pattern, line):
                return found
        raise AssertionError("".join(seen))


@contextmanager
def running(verb: str, *options: str) -> Iterator[Process]:
    worker = Process(verb, *options)
    try:
        yield worker
        worker.process.send_signal(signal.SIGTERM)
        assert worker.process.wait(SECONDS) == 0
    finally:
        worker.end()


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"{url}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return dict(json.load(response))


def test_two_processes_answer_as_the_undivided_model(models: Models) -> None:
    text = {"type": "text", "text": "what colour is it?"}
    url = "data:image/png;base64," + base64.b64encode(PICTURE).decode()
    whole = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, text]}]
    texts = [{"role": "user", "content": [text]}]
    with ExitStack() as stack:
        encode = stack.enter_context(running("encode", "--bootstrap-port", "0"))
        language = stack.enter_context(running("language"))
        bootstrap = encode.wait_for(r"bootstrap server listens on http://127.0.0.1:(\d+)")[1]
        urls = [each.wait_for(r"load balancer at (http://\S+)")[1] for each in (encode, language)]
        place = {"bootstrap_host": "127.0.0.1", "bootstrap_port": int(bootstrap), "bootstrap_room": 5}
        bodies = [{"messages": messages, "max_tokens": MAX_TOKENS} | place for messages in (whole, texts)]
        with ThreadPoolExecutor(2) as callers:
            encoded, answered = callers.map(post, urls, bodies)
    assert encoded["usage"]["completion_tokens"] == 0
    assert answered["choices"][0]["message"]["content"] == models.answer(whole, PICTURE)
    transfer = answered["embferry"]["transfer"]
    assert (transfer["initial"], transfer["transport"]) == (1, "mooncake")
    assert transfer["resumed"] >= transfer["total_tokens"] // 64
