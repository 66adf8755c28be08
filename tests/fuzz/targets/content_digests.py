"""``Content-Digest`` of a client's request, as RFC 9530 allows it."""

from __future__ import annotations

import base64
import hashlib
import re
from random import Random

from embferry.trust.digests import DamagedError, check_foreign_content

from ..engine import Target
from ..raw import Pieces
from ..tree import Tree, packed

BODY = b'{"model": "m"}'


class ContentDigests(Target):
    documented = (DamagedError,)
    inputs = 2000

    def tree(self, chance: Random) -> Tree:
        members = [[name, "=", ":", _digest(name), ":"] for name in chance.sample(("sha-256", "sha-512", "md5"), 2)]
        return [members[0], chance.choice((",", ", ", " ,\t")), members[1]]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(tree)]

    def run(self, pieces: Pieces) -> None:
        value = b"".join(pieces).decode("latin-1")
        check_foreign_content(value, BODY)
        for name in ("sha-256", "sha-512"):
            claimed = re.findall(rf"(?:^|,)[ \t]*{name}=:([^:]*):", value)
            assert not claimed or claimed[-1] == _digest(name), "a wrong digest is accepted"


def _digest(name: str) -> str:
    return base64.b64encode(hashlib.new(name.replace("-", ""), BODY).digest()).decode()
