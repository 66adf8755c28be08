"""SGLang's servers as processes of their own, on a CPU, with a small model."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.ports import free_port

START_S, ANSWER_S, END_S = 600.0, 300.0, 30.0
BLOCKS, BLOCK_SIZE = 4, 8
POOL_TOKENS = BLOCKS * BLOCK_SIZE
ENVIRONMENT = {
    "SGLANG_USE_CPU_ENGINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "SGLANG_ENCODER_BOOTSTRAP_HEALTH_CHECK_INTERVAL": "3600",  # what the tests stop stays on the list of encoders
}
PLUGIN = {
    "EMBFERRY_SGLANG": "1",
    "EMBFERRY_SGLANG_NUM_BLOCKS": str(BLOCKS),
    "EMBFERRY_SGLANG_BLOCK_SIZE": str(BLOCK_SIZE),
    "EMBFERRY_SGLANG_TRANSPORTS": "tcp",
    "EMBFERRY_SGLANG_ENCODER_TIMEOUT": "2",
    "EMBFERRY_SGLANG_FAILOVER_TIMEOUT": "30",
    "EMBFERRY_SGLANG_VIDEO_RATE": "undivided",
}
ARGUMENTS = [
    *("--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32", "--random-seed", "0"),
    *("--attention-backend", "torch_native", "--mm-attention-backend", "sdpa", "--grammar-backend", "none"),
    *("--mem-fraction-static", "0.5", "--max-total-tokens", "8192", "--context-length", "4096"),
    *("--chunked-prefill-size", "4096", "--max-running-requests", "4"),
    *("--disable-radix-cache", "--disable-overlap-schedule", "--skip-server-warmup"),
]
DIVIDED = ["--encoder-transfer-backend", "zmq_to_scheduler"]


class Server:
    """One ``sglang.launch_server``, with the processes that it starts. A context manager.

    Args:
        model: Folder of the model.
        log: File for its log.
        arguments: More arguments.
        environment: More variables of the environment.
        port: Where it listens; None: any free port.
    """

    def __init__(
        self,
        model: Path,
        log: Path,
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        *,
        port: int | None = None,
    ) -> None:
        self.log, self.port = log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), *ARGUMENTS]
        env = os.environ | ENVIRONMENT | dict(environment or {})
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # a start takes twice as long without bytecode
        with log.open("w") as output:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port), *arguments],
                env=env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def started(self) -> Server:
        """Waits until the server answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"{self.log}: {self.text()[-2000:]}"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=START_S, trust_env=False).status_code == 200:
                    return self
            time.sleep(0.2)
        raise TimeoutError(f"{self.log}: {self.text()[-2000:]}")

    def text(self) -> str:
        """Returns its log."""
        return self.log.read_text(errors="replace")

    def signal(self, number: int) -> None:
        """Sends a signal to each of its processes."""
        os.killpg(self.process.pid, number)

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Its processes stand still meanwhile."""
        self.signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.signal(signal.SIGCONT)

    def close(self) -> None:
        """Ends its processes, and waits. Python's resource tracker goes last: it removes their shared memory."""
        for process in self._processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                if "resource_tracker" not in " ".join(process.cmdline()):
                    process.kill()
        self.process.wait(END_S)
        psutil.wait_procs(self._processes(), END_S)
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGKILL)

    def _processes(self) -> list[psutil.Process]:
        """Returns the processes of its group."""
        found = []
        for pid in psutil.pids():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(pid) == self.process.pid:
                    found.append(psutil.Process(pid))
        return found

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def body(media: Sequence[str], *, tokens: int = 16, **more: Any) -> dict[str, Any]:
    """Returns a request for SGLang's ``/generate``, whose answer is the same each time.

    Args:
        media: The URLs of pictures and videos.
        tokens: Length of the answer.
        more: More fields.
    """
    videos = [url for url in media if url.startswith("data:video/")]
    pads = "".join(f"<|vision_start|><|{'video' if url in videos else 'image'}_pad|><|vision_end|>" for url in media)
    return {
        "text": f"<|im_start|>user\n{pads}What is this?<|im_end|>\n<|im_start|>assistant\n",
        "image_data": [url for url in media if url not in videos],
        **({"video_data": videos} if videos else {}),
        "sampling_params": {"temperature": 0, "max_new_tokens": tokens, "ignore_eos": True},
        **more,
    }


def ask(server: Server, media: Sequence[str], *, timeout: float = ANSWER_S, **more: Any) -> httpx.Response:
    """Asks a server about pictures and videos."""
    return httpx.post(f"{server.url}/generate", json=body(media, **more), timeout=timeout, trust_env=False)


def tokens_of(response: httpx.Response) -> list[int]:
    """Returns the tokens of an answer."""
    assert response.status_code == 200, response.text[:2000]
    return list(response.json()["output_ids"])


def reason_of(response: httpx.Response) -> str:
    """Returns why a request has failed."""
    assert response.status_code >= 400, response.text[:2000]
    told = response.json()
    return str(told.get("error", told)["message"])
