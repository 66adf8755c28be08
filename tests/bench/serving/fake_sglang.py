"""Stands for a Python interpreter that has SGLang: encoders that can be stopped, and language servers that need them.

python fake_sglang.py -m sglang.launch_server --model-path MODEL --port PORT …

Without the plug-in, a language server has faults of SGLang: it ends at a damaged picture, does not ask a second
encoder, and takes other pictures for those of a request to which the client has given an id.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import threading
import urllib.request
import zlib
from contextlib import ExitStack
from itertools import cycle

from tests.bench.serving import stub_endpoint as stub

END_OF_PNG = b"IEND"
ENCODE_S, LOST_S = 20.0, 0.2


def main(arguments: list[str]) -> None:
    if arguments[0] == "-c":  # asked for versions
        print(json.dumps(dict.fromkeys(json.loads(arguments[2]), "9.9")))
        return
    if os.environ.get("EMBFERRY_SGLANG_TRANSPORTS") == "nixl":
        sys.exit("Traceback …\nImportError: the engine is not installed")
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: ended.set())
    with ExitStack() as servers:
        port = int(arguments[arguments.index("--port") + 1])
        first = arguments.index("--encoder-urls") + 1 if "--encoder-urls" in arguments else 0
        encoders = arguments[first : first + 2] if first else []
        if encoders:
            listed = {"/list_encoder_urls": json.dumps({"encoder_urls": encoders})}
            listens = int(arguments[arguments.index("--encoder-bootstrap-port") + 1])
            servers.enter_context(stub.serving(lambda request: None, listed, listens))
        servers.enter_context(stub.serving(Language(encoders).answer, {"/health": ""}, port))
        ended.wait(60)


class Language:
    """A language server; with no encoders, an undivided one."""

    def __init__(self, encoders: list[str]) -> None:
        self._encoders, self._turns = encoders, cycle(encoders)
        self._plugged = "EMBFERRY_SGLANG" in os.environ

    def answer(self, request: stub.Request) -> None:
        if "messages" not in request.body:  # an abort
            request.refuse(200, "{}")
            return
        urls = "".join(part["image_url"]["url"] for part in request.body["messages"][0]["content"][:-1])
        if not base64.b64decode(urls.rpartition(",")[2])[-8:].startswith(END_OF_PNG):
            if self._encoders and not self._plugged:
                os._exit(3)
            request.refuse(400, json.dumps({"object": "error", "message": "the picture is truncated"}))
            return
        if "rid" in request.body and self._encoders and not self._plugged:
            urls = "pictures of an earlier request"
        if not self._encoded():
            request.refuse(502, json.dumps({"message": "the encoder is gone"}))
            return
        request.answer_of_sglang([zlib.crc32(urls.encode()) % 100 + i for i in range(request.body["max_tokens"])])

    def _encoded(self) -> bool:
        """Asks an encoder; with the plug-in, another one if that does not answer."""
        for url in (next(self._turns) for _ in range(100 if self._plugged else 1)) if self._encoders else ():
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=LOST_S if self._plugged else ENCODE_S):
                    return True
            except OSError:
                continue
        return not self._encoders


if __name__ == "__main__":
    main(sys.argv[1:])
