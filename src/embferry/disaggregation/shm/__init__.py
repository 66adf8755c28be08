"""The ``shm`` transport."""

from .conn_multimodal import ShmTransport

__all__ = ["ShmTransport"]
