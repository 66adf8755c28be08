"""vLLM engines in processes of their own, and requests to them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

START_S, ANSWER_S, END_S = 600.0, 300.0, 120.0
"""Guards against an engine that hangs, not expectations."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}
Content = dict[str, Any]
"""One part of a chat message."""


class Engine:
    """One engine process.

    Attributes:
        status: ``Observation.status`` after the last answer, with ``preemptions`` and ``prefix_hits``.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        transfer: dict[str, Any] | None = None,
        *,
        prefix: Sequence[str] = (),
        **options: Any,
    ) -> None:
        """Starts the process.

        Args:
            model: Folder of the model.
            log: File for its log.
            transfer: Its ``ec_transfer_config``; None for an undivided engine.
            prefix: Words before the command, to start it in another name space.
            options: Arguments of ``vllm.LLM``.
        """
        self.log, self.transfer = log, transfer
        self.status: dict[str, Any] = {}
        arguments = json.dumps({"transfer": transfer or {}, "options": options})
        command = [*prefix, sys.executable, "-m", "tests.connectors.engine_process", str(model), arguments]
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                command, env=os.environ | ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr
            )

    def started(self) -> None:
        """Waits until the engine accepts requests."""
        self.pid: int = self._answer(START_S)["ready"]

    def ask(self, *content: Content, params: dict[str, Any] | None = None, max_tokens: int = 16) -> dict[str, Any]:
        """Runs one request."""
        return self.ask_all([(content, params)], max_tokens=max_tokens)[0]

    def ask_all(
        self, requests: Sequence[tuple[Sequence[Content], dict[str, Any] | None]], *, max_tokens: int = 16
    ) -> list[dict[str, Any]]:
        """Runs requests at the same time."""
        return self._order(requests, max_tokens)

    def ask_and_abort(self, *content: Content, params: dict[str, Any]) -> list[dict[str, Any]]:
        """Aborts a request once its data may arrive. Returns the answers that ended before."""
        return self._order([(content, params)], 16, abort=True)

    def refresh(self) -> dict[str, Any]:
        """Returns its status now."""
        self._order([], 0)
        return self.status

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Asks the process to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """Waits until the process has ended, with status 0 unless it was killed."""
        assert self._process.stdout is not None
        self.end()
        try:
            status = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            self._process.stdout.close()
        assert status in (0, -signal.SIGKILL), f"ended with {status}; its log:\n{self.log.read_text()[-3000:]}"

    def _order(self, requests: Sequence[Any], max_tokens: int, *, abort: bool = False) -> list[dict[str, Any]]:
        assert self._process.stdin is not None
        asked = [{"content": content, "params": params, "max_tokens": max_tokens} for content, params in requests]
        self._process.stdin.write(json.dumps({"requests": asked, "abort": abort}).encode() + b"\n")
        self._process.stdin.flush()
        answer = self._answer(ANSWER_S)
        self.status = answer["status"]
        answers: list[dict[str, Any]] = answer["answers"]
        return answers

    def _answer(self, timeout: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            line = out.readline() if selector.select(timeout) else b""
        assert line, f"no answer within {timeout:g} s; the log ends with:\n{self.log.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


def picture(seed: int, width: int = 224, height: int = 168) -> Content:
    """Returns an image of noise: no two have the same embedding. 224 × 168 is 48 tokens."""
    return _item("image", "png", _noise(seed, width, height, "PNG"))


def video(seed: int, frames: int = 8, width: int = 224, height: int = 168) -> Content:
    """Returns a video of noise, with different frames. Two frames of 224 × 168 are 48 tokens."""
    pictures = [_noise(seed * frames + number, width, height, "JPEG") for number in range(frames)]
    return _item("video", "jpeg", ",".join(pictures))


def reference(item: Content, entry: dict[str, Any]) -> Content:
    """Returns the same item for a consumer: its grid and its uuid."""
    kind = item["type"].removesuffix("_url") + "_embeds"
    grid = {key: np.ravel(value).tolist() for key, value in entry["metadata"].items()}
    return {"type": kind, kind: grid, "uuid": item["uuid"]}


def _noise(seed: int, width: int, height: int, form: str) -> str:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, form)
    return base64.b64encode(data.getvalue()).decode()


def _item(kind: str, form: str, data: str) -> Content:
    url = f"data:{kind}/{form};base64,{data}"
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}, "uuid": hashlib.sha256(url.encode()).hexdigest()}
