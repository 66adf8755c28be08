"""Settings of the origin's wire. Few of them travel on the wire, so both sides must be configured alike."""

from __future__ import annotations

from dataclasses import dataclass

from embferry.protocol.errors import LocalProtocolError
from embferry.protocol.layout import Field, Geometry, Layout
from embferry.transports.leased.mooncake.engine import P2P, Engine, EngineSettings

MROPE = "mrope_positions"


@dataclass(frozen=True, slots=True)
class OriginSettings:
    """Settings of one rank.

    Attributes:
        host: Address that the control socket listens on. One that is not loopback needs ``EMBFERRY_INSECURE=1``: peers
            prove nothing on this wire. The engine listens on all addresses.
        port: Port of the control socket; 0 chooses a free one.
        advertise: Address that peers are given, if it differs from ``host``.
        protocol: Protocol of the engine: ``tcp``, ``rdma``, or another one that your build of the engine has.
        device: Names of the RDMA devices that the engine uses, separated by commas; empty for all.
        register_sources: Whether source memory is registered with the engine; None registers it unless the protocol
            is ``tcp``.
        tp_size: Number of ranks of this side.
        dp_size: Number of data-parallel groups among the ranks of this side.
        engine_rank: Index of this rank.
        mrope_planes: Whether a row of ``mrope_positions`` holds its n tokens as [3, n], as in the origin's code. If
            False, it holds them as [n, 3].
        heartbeat_interval: Seconds between two requests of ``/health``, and between two registrations of a rank.
        max_misses: Number of unanswered requests of ``/health`` in a row after which an encode side counts as lost.
        max_total_tokens: Longest embedding, in tokens. A longer one is refused, because the receiver allocates memory
            for the length that its peer states.
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
    mrope_planes: bool = True
    heartbeat_interval: float = 5.0
    max_misses: int = 2
    max_total_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        if not 0 <= self.engine_rank < self.tp_size or self.dp_size < 1 or self.tp_size % self.dp_size:
            raise LocalProtocolError(
                f"engine_rank {self.engine_rank}, tp_size {self.tp_size} and dp_size {self.dp_size} do not fit: "
                "engine_rank must be below tp_size, and dp_size must divide tp_size"
            )
        if not self.heartbeat_interval > 0 or min(self.max_misses, self.max_total_tokens) < 1:
            raise LocalProtocolError("heartbeat_interval, max_misses and max_total_tokens must be greater than 0")

    @property
    def reached_at(self) -> str:
        """Address that peers are given."""
        return self.advertise or self.host

    def make_engine(self) -> Engine:
        """Makes an engine. Engines meet peer to peer, so that a session id is the engine's ``host:port``."""
        return Engine(EngineSettings(self.reached_at, self.protocol, self.device, P2P))


def origin_layout(hidden: int, deepstack: int = 0) -> Layout:
    """Returns the fields of the origin's tokens: ``hidden`` elements an embedding, and ``deepstack`` in all layers."""
    fields = (Field("input_embeddings", "bfloat16", hidden), Field("fill_ids", "int32", 1), Field(MROPE, "int32", 3))
    return Layout((*fields, Field("deepstack_embeddings", "bfloat16", deepstack)) if deepstack else fields)


def check_geometry(geometry: Geometry) -> None:
    """Checks that the pool is valid and has the origin's fields in the origin's order."""
    geometry.validate()
    fields = geometry.layout.fields
    if geometry.layout != origin_layout(fields[0].width, fields[3].width if len(fields) > 3 else 0):
        raise LocalProtocolError(
            f"the origin's wire carries input_embeddings, fill_ids, mrope_positions and, if the model has it, "
            f"deepstack_embeddings, not {', '.join(map(str, fields))}; make the layout with origin_layout"
        )
