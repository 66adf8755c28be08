"""The ``shm`` transport."""

from .transport import ShmTransport

__all__ = ["ShmTransport"]
