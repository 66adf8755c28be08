"""The YAML file with the settings."""

from __future__ import annotations

import os
from random import Random

from embferry.serve.config_load import ConfigError, load

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, as_json

HOSTS = ("127.0.0.1", "localhost")


class ConfigText(Target):
    documented = (ConfigError,)
    nesting = (b"[", b"]")
    texts = (
        b"2001-99-99",
        b"!!bool x",
        b"!!timestamp x",
        b"&a [*a]",
        b"0x_",
        b"1:99",
        b"? x",
        b"- x",
        b"!!int ''",
        b"<<: ",
    )
    inputs = 100
    bounds = Bounds(calls=60_000, calls_per_byte=1000, memory=2 << 20, memory_per_byte=2000)

    def tree(self, chance: Random) -> Tree:
        router = {"port": 8000, "request_timeout": 30.0}
        transfer = {"num_blocks": chance.randrange(1, 99), "block_size": 16}
        media = {"allowed_hosts": ["example.org"], "max_images": 3}
        return {"host": chance.choice(HOSTS), "router": router, "transfer": transfer, "media": media}

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        text = as_json(tree)
        if chance.random() < 0.7:
            text = text.replace(b",", b",\n ").replace(b":", b": ").replace(b'"', b"")  # as people write it
        return [text]

    def run(self, pieces: Pieces) -> None:
        fd = os.memfd_create("settings")  # nothing is left on the disk
        try:
            os.write(fd, b"".join(pieces))
            load({}, {}, f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)
