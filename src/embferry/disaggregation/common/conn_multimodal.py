"""Manager, sender and receiver: what joins the protocol to a transport. The one import for users of the library."""

from .checksums import Checksums
from .landing import DeviceSink, DeviceTarget
from .receiver import EmbeddingReceiver
from .receiving import EmbeddingReceiveManager
from .rows import Rows, rows_of
from .sending import EmbeddingSender, EmbeddingSendManager
from .sinks import ArrivedChunk, ChunkSink, GatherSink, Sink
from .staging import DeviceRows
from .waiting import transferred, wait

__all__ = [
    "ArrivedChunk",
    "Checksums",
    "ChunkSink",
    "DeviceRows",
    "DeviceSink",
    "DeviceTarget",
    "EmbeddingReceiveManager",
    "EmbeddingReceiver",
    "EmbeddingSendManager",
    "EmbeddingSender",
    "GatherSink",
    "Rows",
    "Sink",
    "rows_of",
    "transferred",
    "wait",
]
