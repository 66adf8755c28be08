"""The encode side of one transfer, in a process of its own: ``python -m tests.transports.encode_side ROOM ROAD...``.

Prints its endpoint; once the embedding has been sent, as JSON: what was sent, and which roads were given up.
"""

from __future__ import annotations

import hashlib
import json
import sys

from embferry.disaggregation.common.conn_multimodal import EmbeddingSendManager, Rows, wait
from embferry.disaggregation.protocol.layout import Field, Layout
from embferry.disaggregation.protocol.settings import TransferSettings
from embferry.serve.config_roads import ROADS
from embferry.testing.pair import embedding

LAYOUT = Layout(
    (Field("input_embeddings", "bfloat16", 2048), Field("fill_ids", "int32", 1), Field("mrope_positions", "int32", 3))
)
TOKENS = (64 << 20) // LAYOUT.token_bytes
CHUNK_TOKENS = 256
SETTINGS = TransferSettings(chunk_bytes=CHUNK_TOKENS * LAYOUT.token_bytes)
SECONDS = 30.0


def content() -> Rows:
    return embedding(LAYOUT, TOKENS)


def digest(rows: Rows) -> bytes:
    return hashlib.sha256(b"".join(rows[field.name].tobytes() for field in LAYOUT.fields)).digest()


def main(room: int, names: list[str]) -> None:
    transports = [ROADS[name].load()() for name in names]
    sending = EmbeddingSendManager(LAYOUT, transports, settings=SETTINGS)
    rows = content()
    sender = sending.open(room)
    sender.init(TOKENS, digest(rows))
    sender.send_embedding(rows)
    print(sending.endpoint, flush=True)
    wait(sender, SECONDS)
    (destination,) = sender.machine.destinations.values()
    given_up = [road.transport for road in destination.roads.given_up]
    print(json.dumps({"sent_bytes": sender.sent_bytes, "given_up": given_up}), flush=True)
    sending.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
