"""The ``mooncake`` transport."""

from .transport import MooncakeTransport

__all__ = ["MooncakeTransport"]
