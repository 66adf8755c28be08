"""Heads of HTTP messages of the ``http`` transport, and what is read from them: length, target, conditions, range."""

from __future__ import annotations

from random import Random

from embferry.transports.http import heads, resource
from embferry.transports.http.heads import HttpError
from embferry.transports.http.messages import parse_target

from ..engine import Target
from ..measure import Bounds
from ..raw import Pieces
from ..tree import Tree, packed

ETAG = '"e-1"'
CONTENT = resource.Representation(1000, ETAG, 500, bytes(32))
FIELDS = (
    ("Host", "192.0.2.1:80"),
    ("Content-Length", "17"),
    ("Connection", "keep-alive, close"),
    ("Range", "bytes=5-99"),
    ("Range", "bytes=-7"),
    ("If-Range", ETAG),
    ("If-Match", f'W/"a", {ETAG}'),
    ("If-None-Match", '"b",,\t"c,d"'),
    ("Want-Repr-Digest", "sha-512=3, sha-256=10"),
    ("Prefer", "wait=25"),
    ("Authorization", "Bearer 00"),
)


class HttpHeads(Target):
    documented = (HttpError,)
    inputs = 8000
    bounds = Bounds(calls=6000, calls_per_byte=16, memory_per_byte=400)  # h11's patterns note a step for each character

    def tree(self, chance: Random) -> Tree:
        fields = [[name, ":", " ", value, "\r\n"] for name, value in chance.sample(FIELDS[1:], chance.randrange(6))]
        names = {name for name, *_ in fields}
        fields = [next(field for field in fields if field[0] == name) for name in sorted(names)]
        if chance.random() < 0.3:
            return [
                ["HTTP/1.1", " ", str(chance.choice((200, 204, 206, 404, 100))), " ", "OK", "\r\n"],
                *fields,
                "\r\n",
            ]
        target = ["/embferry/1/", "0a" * 16, chance.choice(("", "/7", "/7?outcome=written", "?after=3&landed=9"))]
        host = ["Host", ":", " ", "192.0.2.1", "\r\n"]
        return [[chance.choice(("GET", "DELETE", "HEAD")), " ", target, " ", "HTTP/1.1", "\r\n"], host, *fields, "\r\n"]

    def encode(self, tree: Tree, chance: Random) -> Pieces:
        return [packed(tree)]

    def run(self, pieces: Pieces) -> None:
        received = b"".join(pieces)
        length = heads.head_length(received)
        if length < 0:
            raise HttpError("incomplete")
        head = received[:length]
        if head.startswith(b"HTTP/"):
            _check_response(head)
        else:
            _check_request(head)


def _check_response(head: bytes) -> None:
    response = heads.parse_response(head)
    assert 100 <= response.status <= 599, f"status {response.status}"
    _check_length(response.headers)


def _check_request(head: bytes) -> None:
    request = heads.parse_request(head)
    _check_length(request.headers)
    if (target := parse_target(request.target)) is not None:
        assert len(target.token) == 32, "a token of another length"
        assert max(target.after, target.landed) < 10**18, "a number beyond 18 digits"
    answer = resource.answer(request.method, request.headers, CONTENT)
    assert 0 <= answer.start <= answer.stop <= CONTENT.length, "a range outside of the content"
    resource.wants_digest(request.headers)
    is_plain = all(value == value.strip() for value in request.headers.values())  # two empty fields make ", "
    if "host" in request.headers and head.isascii() and is_plain:
        again = heads.write_request(request.method, request.target, request.headers)
        back = heads.parse_request(again[: heads.head_length(again)])
        same = (back.method, back.target, back.headers) == (request.method, request.target, request.headers)
        assert same, "a head changes when it is written"


def _check_length(headers: dict[str, str]) -> None:
    length = heads.content_length(headers)
    assert length is None or 0 <= length < 10**18, f"a body of {length} bytes"
