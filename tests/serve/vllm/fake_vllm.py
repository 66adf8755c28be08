"""A fake ``vllm`` command for the tests: it serves, has shared memory and an engine process, and no model.

With ``--deaf-engine``, the engine ignores SIGTERM, and must be killed. With ``--deaf-at MOMENT``, all processes do: the
server, its engine, the engine's worker and an orphan, each of these in a session of its own. It stands still at that
moment of its start: before it has started any of them (``first``), after each of them (``engine``, ``orphan``), before
it answers (``bound``), or not at all (``ready``).

Each start appends a JSON object with its arguments to ``$FAKE_VLLM_NOTES``. It leaves a socket in its temporary folder.
At SIGTERM it writes the alarming lines of vLLM. With ``$FAKE_VLLM_HOLD``, a folder, a question makes the file ``asked``
in there and is answered when there is a file ``answer``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


def served_names() -> list[str]:
    """Returns the names of the model, by vLLM's rules: the last option counts, and before it that of ``--config``."""
    names: list[str] = []
    words = [word.replace("_", "-") for word in sys.argv[3:]]
    if "--config" in words and "--served-model-name" not in words:
        return ["mine", "other"]
    for at, word in enumerate(words):
        if word.startswith("--served-model-name="):
            names = [word.partition("=")[2]]
        elif word == "--served-model-name":
            rest = words[at + 1 :]
            names = rest[: next((n for n, other in enumerate(rest) if other.startswith("--")), len(rest))]
    return names or [sys.argv[2]]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer({"data": [{"id": name} for name in served_names()]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if json.loads(option("--ec-transfer-config"))["ec_role"] == "ec_producer":
            uuid = body["messages"][0]["content"][0]["uuid"]
            entry = {
                "metadata": {"image_grid_thw": [1, 2, 2]},
                "embferry": {
                    "endpoint": "tcp://127.0.0.1:1",
                    "room": 1,
                    "tokens": 1,
                    "width": 64,
                    "dtype": "float32",
                },
            }
            self._answer({"ec_transfer_params": {uuid: entry}})
        else:
            if hold := os.getenv("FAKE_VLLM_HOLD"):
                Path(hold, "asked").touch()
                while not Path(hold, "answer").exists():
                    time.sleep(0.02)
            choice = {"message": {"content": str(os.getpid())}, "finish_reason": "stop"}
            blocks = (
                {"do_remote_prefill": True} if (body.get("kv_transfer_params") or {}).get("do_remote_decode") else None
            )
            self._answer({"choices": [choice], "asked": body, "kv_transfer_params": blocks})

    def _answer(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Logs nothing."""


class Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores clients that leave."""


DEAF = "import os, signal; os.setsid(); signal.signal(signal.SIGTERM, signal.SIG_IGN); "
ENGINE = (
    DEAF
    + """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, pass_fds=[int(sys.argv[2])])
worker.stdout.readline()
print(worker.pid, flush=True)
signal.pause()
"""
)
WORKER = DEAF + "print('here', flush=True); signal.pause()"
ORPHAN = DEAF + "print(os.getpid(), flush=True) if not os.fork() else os._exit(0); signal.pause()"


def leave_socket() -> str:
    """Makes a socket in the folder for temporary files. Returns the folder."""
    folder = tempfile.gettempdir()
    socket.socket(socket.AF_UNIX).bind(os.path.join(folder, str(uuid.uuid4())))
    return folder


def deaf(moment: str) -> None:
    """Starts processes that ignore SIGTERM, and stands still at a moment of that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    shared = SharedMemory(create=True, size=1 << 20)
    tracker = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
    note: dict[str, Any] = {"pid": os.getpid(), "engine": os.getpid(), "shared": shared.name, "more": []}
    note["folder"] = leave_socket()

    def reached(name: str) -> None:
        if name == moment:
            with open(os.environ["FAKE_VLLM_NOTES"], "a") as notes:
                notes.write(json.dumps(note) + "\n")
            while name != "ready":
                signal.pause()

    def started(*program: str) -> int:
        process = subprocess.Popen([sys.executable, "-c", *program], stdout=subprocess.PIPE, pass_fds=[tracker])
        assert process.stdout is not None
        note["more"].append(int(process.stdout.readline()))
        return process.pid

    reached("first")
    note["engine"] = started(ENGINE, WORKER, str(tracker))
    reached("engine")
    started(ORPHAN)
    reached("orphan")
    with Server((option("--host"), int(option("--port"))), Handler) as server:
        reached("bound")
        reached("ready")
        server.serve_forever()


def end_loudly(number: int, frame: Any) -> None:
    """Ends as at SIGTERM without a handler."""
    line = "ERROR 11-29 AsyncLLM output_handler failed: EngineDeadError"
    os.write(2, f"{line}\nWARNING force killing\n1 leaked shared_memory objects\n".encode())
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def main() -> None:
    if "--deaf-at" in sys.argv:
        deaf(option("--deaf-at"))
    if "--end-at-once" in sys.argv:
        print("(EngineCore pid=1) RuntimeError: no device", file=sys.stderr)
        sys.exit(1)
    signal.signal(signal.SIGTERM, end_loudly)
    folder = leave_socket()
    print("\x1b[31mERROR 11-29 a line of vLLM\x1b[0m", file=sys.stderr, flush=True)
    with Server((option("--host"), int(option("--port"))), Handler) as server:
        shared = SharedMemory(create=True, size=1 << 20)
        ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN); " if "--deaf-engine" in sys.argv else ""
        tracker = resource_tracker._resource_tracker._fd  # type: ignore[attr-defined]
        program = f"import signal; {ignores}signal.pause()"
        engine = subprocess.Popen([sys.executable, "-c", program], pass_fds=[tracker])
        note = {"pid": os.getpid(), "engine": engine.pid, "arguments": sys.argv[1:], "key": os.getenv("VLLM_API_KEY")}
        note["offline"] = os.getenv("HF_HUB_OFFLINE")
        note |= {"shared": shared.name, "folder": folder, "kv_port": os.getenv("VLLM_NIXL_SIDE_CHANNEL_PORT")}
        with open(os.environ["FAKE_VLLM_NOTES"], "a") as notes:
            notes.write(json.dumps(note) + "\n")
        server.serve_forever()


if __name__ == "__main__":
    main()
