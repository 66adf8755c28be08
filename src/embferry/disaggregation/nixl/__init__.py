"""The ``nixl`` transport."""

from .agent import installed
from .conn_multimodal import NixlTransport

__all__ = ["NixlTransport", "installed"]
