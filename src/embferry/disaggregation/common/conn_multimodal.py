"""Manager, sender and receiver: what joins the protocol to a transport. The one import for users of the library."""

from .receiving import EmbeddingReceiveManager, EmbeddingReceiver
from .sending import EmbeddingSender, EmbeddingSendManager, Rows, rows_of
from .sinks import ArrivedChunk, ChunkSink, GatherSink, Sink
from .waiting import transferred, wait

__all__ = [
    "ArrivedChunk",
    "ChunkSink",
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
