"""What a deployment of the origin's wire is configured with. Hardly any of it is on the wire: both sides must agree."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.transports.leased.mooncake.engine import P2P, EngineSettings

MROPE = "mrope_positions"
_FIXED = (("input_embeddings", "bfloat16", None), ("fill_ids", "int32", 1), (MROPE, "int32", 3))
_DEEPSTACK = ("deepstack_embeddings", "bfloat16", None)


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """
    :param host: the address the control socket listens on; the engine listens on all.
    :param port: of the control socket; 0 for any free one.
    :param advertise: the address that peers are told, if it is another one than ``host``.
    :param protocol: handed to the engine: ``tcp``, ``rdma``, or what your build has.
    :param device: handed to the engine: names of RDMA devices, comma separated; empty: all.
    :param register_sources: register source memory with the engine; None: unless the protocol is ``tcp``.
    :param tp_size: ranks of this side's engine; ``dp_size`` data-parallel groups among them.
    :param engine_rank: which of them this is.
    :param sender_rank: None: status messages have two frames. Else they have a third, this. Public receivers of the
        origin unpack exactly three.
    :param mrope_planes: a row of ``mrope_positions`` holds its n tokens as [3, n], as in the origin's code; if False,
        as [n, 3].
    :param heartbeat_interval: seconds between two looks at ``/health``, and between two registrations of a rank.
    :param max_misses: looks in a row after which an encode side is given up.
    :param max_total_tokens: a longer embedding is refused: memory is set aside for what a peer says.
    """

    host: str = "127.0.0.1"
    port: int = 0
    advertise: str | None = None
    protocol: str = "tcp"
    device: str = ""
    register_sources: bool | None = None
    tp_size: int = 1
    dp_size: int = 1
    engine_rank: int = 0
    sender_rank: int | None = None
    mrope_planes: bool = True
    heartbeat_interval: float = 5.0
    max_misses: int = 2
    max_total_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        if not 0 <= self.engine_rank < self.tp_size or self.dp_size < 1 or self.tp_size % self.dp_size:
            raise LocalProtocolError(
                f"rank {self.engine_rank} of {self.tp_size} in {self.dp_size} groups cannot be; dp_size divides tp_size"
            )
        if not self.heartbeat_interval > 0 or self.max_total_tokens < 1:
            raise LocalProtocolError("heartbeat_interval and max_total_tokens must be greater than 0")

    @property
    def reached_at(self) -> str:
        """The address that peers are told."""
        return self.advertise or self.host

    @property
    def engine(self) -> EngineSettings:
        """Peer to peer always: a session id is the engine's ``host:port``."""
        return EngineSettings(self.reached_at, self.protocol, self.device, P2P)

    @property
    def sources_are_registered(self) -> bool:
        return self.protocol != "tcp" if self.register_sources is None else self.register_sources


def origin_layout(hidden: int, deepstack: int = 0) -> Layout:
    """The fields of the origin's tokens, in its order.

    :param hidden: elements of an embedding.
    :param deepstack: elements of a token's ``deepstack_embeddings``, all layers together; 0: the model has none.
    """
    fields = [Field(name, dtype, width or hidden) for name, dtype, width in _FIXED]
    if deepstack:
        fields.append(Field(*_DEEPSTACK[:2], deepstack))
    return Layout(tuple(fields))


def check_geometry(geometry: Geometry) -> None:
    """:raises LocalProtocolError: its fields are not the origin's, or not in its order.
    :raises LayoutMismatch: it cannot be served at all."""
    geometry.validate()
    known = (*_FIXED, _DEEPSTACK)
    fields = geometry.layout.fields
    fits = len(fields) in (3, 4) and all(
        field.name == name and field.dtype == dtype and width in (None, field.width)
        for field, (name, dtype, width) in zip(fields, known, strict=False)
    )
    if not fits:
        raise LocalProtocolError(
            f"the origin's wire carries {', '.join(name for name, _, _ in known)} in this order, the last where there "
            f"is any, not {', '.join(map(str, fields))}; see origin_layout"
        )
