"""Stands for a Python that has vLLM: starts as one, answers chat requests, and fails as a divided engine.

python fake_engine.py -m vllm.entrypoints.cli.main serve MODEL --port PORT …
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import zlib

from tests.bench_serving import stub


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c":  # is asked for versions
        print(json.dumps(["9.9"] * len(arguments[1:])))
        return
    if "--ec-transfer-config" in arguments:
        sys.exit("Traceback …\nImportError: the engine for this transport is not installed")
    port = int(arguments[arguments.index("--port") + 1])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    with stub.serving(_answer, {"/health": ""}, port):
        ended.wait(60)


def _answer(exchange: stub.Exchange) -> None:
    urls = "".join(part["image_url"]["url"] for part in exchange.body["messages"][0]["content"][:-1])
    exchange.answer([zlib.crc32(urls.encode()) % 100 + i for i in range(exchange.body["max_tokens"])])


if __name__ == "__main__":
    main(sys.argv[1:])
