"""The ``http`` transport."""

from .transport import HttpTransport

__all__ = ["HttpTransport"]
