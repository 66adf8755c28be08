"""The ``mooncake`` transport."""

from .conn_multimodal import MooncakeTransport

__all__ = ["MooncakeTransport"]
