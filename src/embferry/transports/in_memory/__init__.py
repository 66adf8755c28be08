"""The ``memory`` transport."""

from .transport import InMemoryTransport

__all__ = ["InMemoryTransport"]
