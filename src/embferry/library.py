"""The public names of the library, in one place. Users import them from ``embferry``."""

from __future__ import annotations

from .memory.blocks import (
    MetadataAllocation,
)
from .protocol.errors import (
    Aborted,
    CapacityError,
    EmbeddingTransferError,
    IntegrityError,
    LayoutMismatch,
    LeaseExpired,
    LocalProtocolError,
    PeerGone,
    RemoteProtocolError,
    TransportError,
    VersionMismatch,
    WrongKey,
)
from .protocol.layout import (
    Field,
    Geometry,
    Layout,
)
from .protocol.settings import (
    TransferSettings,
)
from .protocol.states import (
    KVPoll,
)
from .transfer.checksums import (
    Checksums,
)
from .transfer.device_sink import (
    DeviceSink,
    DeviceTarget,
)
from .transfer.fields import (
    Fields,
    as_fields,
)
from .transfer.receive_handle import (
    EmbeddingReceiver,
)
from .transfer.receive_manager import (
    ReceiveManager,
)
from .transfer.send_handle import EmbeddingSender
from .transfer.send_manager import SendManager
from .transfer.sinks import (
    ArrivedChunk,
    ChunkSink,
    GatherSink,
    Sink,
)
from .transfer.staging import (
    DeviceRows,
)
from .transfer.waiting import (
    transferred,
    wait,
)
from .transports.contract import (
    Transport,
)
from .transports.http import (
    HttpTransport,
)
from .transports.in_memory import (
    InMemoryTransport,
)
from .transports.registry import (
    TRANSPORTS,
)
from .transports.shm import (
    ShmTransport,
)
from .transports.tcp import (
    TcpTransport,
)
from .trust import (
    ClusterKeys,
    Trust,
)

__all__ = [
    "TRANSPORTS",
    "Aborted",
    "ArrivedChunk",
    "CapacityError",
    "Checksums",
    "ChunkSink",
    "ClusterKeys",
    "DeviceRows",
    "DeviceSink",
    "DeviceTarget",
    "EmbeddingReceiver",
    "EmbeddingSender",
    "EmbeddingTransferError",
    "Field",
    "Fields",
    "GatherSink",
    "Geometry",
    "HttpTransport",
    "InMemoryTransport",
    "IntegrityError",
    "KVPoll",
    "Layout",
    "LayoutMismatch",
    "LeaseExpired",
    "LocalProtocolError",
    "MetadataAllocation",
    "PeerGone",
    "ReceiveManager",
    "RemoteProtocolError",
    "SendManager",
    "ShmTransport",
    "Sink",
    "TcpTransport",
    "TransferSettings",
    "Transport",
    "TransportError",
    "Trust",
    "VersionMismatch",
    "WrongKey",
    "as_fields",
    "transferred",
    "wait",
]
