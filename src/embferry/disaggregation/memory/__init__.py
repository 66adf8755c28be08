"""The ``memory`` transport."""

from .conn_multimodal import MemoryTransport

__all__ = ["MemoryTransport"]
