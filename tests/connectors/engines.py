"""Engines as the tests use them."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import selectors
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

START_S, ANSWER_S = 150.0, 30.0
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


class Engine:
    """One engine process. ``log``: the file its log goes to."""

    def __init__(self, model: Path, log: Path, transfer: dict[str, Any] | None = None) -> None:
        self.log, self.transfer = log, transfer
        with log.open("w") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.connectors.engine_process", str(model), json.dumps(transfer or {})],
                env=os.environ | ENVIRONMENT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )

    def started(self) -> None:
        self.pid: int = self._answer(START_S)["ready"]

    def ask(self, *content: dict[str, Any], params: dict[str, Any] | None = None) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"content": content, "params": params}).encode() + b"\n")
        self._process.stdin.flush()
        began = time.monotonic()
        return self._answer(ANSWER_S) | {"seconds": time.monotonic() - began}

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def end(self) -> None:
        """Asks it to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def close(self) -> None:
        """Waits until it has ended."""
        assert self._process.stdout is not None
        self.end()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()

    def _answer(self, timeout: float) -> dict[str, Any]:
        out = self._process.stdout
        assert out is not None
        with selectors.DefaultSelector() as selector:
            selector.register(out, selectors.EVENT_READ)
            line = out.readline() if selector.select(timeout) else b""
        assert line, f"no answer within {timeout:g} s; the log ends with:\n{self.log.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer


def picture(seed: int, width: int = 224, height: int = 168) -> dict[str, Any]:
    """Noise: no two have the same embedding. 224 × 168 is 48 tokens."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    uuid = hashlib.sha256(url.encode()).hexdigest()
    return {"type": "image_url", "image_url": {"url": url}, "uuid": uuid}


def reference(item: dict[str, Any], entry: dict[str, Any]) -> dict[str, Any]:
    """The same picture for a consumer: its grid and its name."""
    grid = {key: np.ravel(value).tolist() for key, value in entry["metadata"].items()}
    return {"type": "image_embeds", "image_embeds": grid, "uuid": item["uuid"]}
