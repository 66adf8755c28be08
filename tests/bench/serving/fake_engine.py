"""Stands for a Python interpreter that has vLLM. Answers chat requests; fails to start as a divided engine.

python fake_engine.py -m vllm.entrypoints.cli.main serve MODEL --port PORT …
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import zlib

from tests.bench.serving import stub_endpoint as stub


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c":  # asked for versions
        print(json.dumps(dict.fromkeys(json.loads(arguments[2]), "9.9")))
        return
    if "--ec-transfer-config" in arguments:
        sys.exit("Traceback …\nImportError: the engine is not installed")
    port = int(arguments[arguments.index("--port") + 1])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    with stub.serving(_answer, {"/health": ""}, port):
        ended.wait(60)


def _answer(request: stub.Request) -> None:
    urls = "".join(part["image_url"]["url"] for part in request.body["messages"][0]["content"][:-1])
    request.answer([zlib.crc32(urls.encode()) % 100 + i for i in range(request.body["max_tokens"])])


if __name__ == "__main__":
    main(sys.argv[1:])
