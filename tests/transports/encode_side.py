"""The encode side of one transfer, as a program: ``python -m tests.transports.encode_side ROOM TRANSPORT...``.

Prints its endpoint, and after the transfer, as JSON, the bytes sent and the transports given up.
"""

from __future__ import annotations

import hashlib
import json
import sys

from embferry import Fields, SendManager, wait
from embferry.protocol.layout import Field, Layout
from embferry.protocol.settings import TransferSettings
from embferry.testing.pair import embedding
from embferry.transports.registry import TRANSPORTS

LAYOUT = Layout(
    (Field("input_embeddings", "bfloat16", 2048), Field("fill_ids", "int32", 1), Field("mrope_positions", "int32", 3))
)
TOKENS = (64 << 20) // LAYOUT.token_bytes
CHUNK_TOKENS = 256
SETTINGS = TransferSettings(chunk_bytes=CHUNK_TOKENS * LAYOUT.token_bytes)
SECONDS = 100.0


def content() -> Fields:
    return embedding(LAYOUT, TOKENS)


def digest(rows: Fields) -> bytes:
    return hashlib.sha256(b"".join(rows[field.name].tobytes() for field in LAYOUT.fields)).digest()


def main(room: int, names: list[str]) -> None:
    transports = [TRANSPORTS[name].load()() for name in names]
    sending = SendManager(LAYOUT, transports, settings=SETTINGS)
    rows = content()
    sender = sending.open(room)
    sender.init(TOKENS, digest(rows))
    sender.send_embedding(rows)
    print(sending.endpoint, flush=True)
    wait(sender, SECONDS)
    (destination,) = sender.machine.destinations.values()
    given_up = [transport.name for transport in destination.transports.given_up]
    print(json.dumps({"sent_bytes": sender.sent_bytes, "given_up": given_up}), flush=True)
    sending.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
