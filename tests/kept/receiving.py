"""A language worker as a process of its own: ``python -m tests.kept.receiving FOLDER``.

It receives one embedding for each line of its input, ``endpoint room digest tokens``, and writes lines of JSON: what it
has kept at first, then how much is recorded, at the end a digest of the rows. It uses them until the next line.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading

from embferry import EmbeddingReceiver, ReceiveManager
from embferry.kept.folder import KeptFolder
from embferry.kept.sink import KeptSink
from embferry.protocol.layout import Geometry
from embferry.transfer.handle import ENDED
from embferry.transports.tcp.transport import TcpTransport
from tests.transfer.conftest import LAYOUT

SIZE = 8
"""Tokens of a block. The pool has two."""


def tell(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def receive(manager: ReceiveManager, folder: KeptFolder, endpoint: str, room: int, digest: bytes, tokens: int) -> None:
    file = folder.take(digest, tokens)
    tell(kept=[] if file is None else list(file.ranges))
    sink = KeptSink(folder, file)
    receiver = manager.open(room, endpoint, sink)
    changed = threading.Event()
    receiver.wake_on_change(changed.set)
    receiver.init()
    told = -1
    while receiver.poll() not in ENDED:
        changed.wait()
        changed.clear()
        with sink.owner.lock:
            recorded = 0 if sink._file is None else sink._file.ranges.prefix
        if recorded != told:
            told = recorded
            tell(arrived=told)
    end(receiver)


def end(receiver: EmbeddingReceiver) -> None:
    error = receiver.error
    rows = {} if error is not None else receiver.arrays()
    rows_digest = hashlib.sha256(b"".join(rows[name].tobytes() for name in sorted(rows))).hexdigest()
    sent, kept, transfers = receiver.verified_tokens, receiver.kept_tokens, receiver.transfers
    tell(error=error and error.code, rows=rows_digest, sent=sent, kept_tokens=kept, transfers=transfers)
    sys.stdin.readline()
    receiver.clear()
    tell(cleared=True)


def main() -> None:
    folder = KeptFolder(sys.argv[1], 1 << 30, LAYOUT)
    manager = ReceiveManager(Geometry(LAYOUT, 2, SIZE), [TcpTransport()])
    tell(begun=True)
    while line := sys.stdin.readline():
        endpoint, room, digest, tokens = line.split()
        receive(manager, folder, endpoint, int(room), bytes.fromhex(digest), int(tokens))
    manager.close()
    folder.close()


if __name__ == "__main__":
    main()
