"""The ``nixl`` transport."""

from .agent import installed
from .transport import NixlTransport

__all__ = ["NixlTransport", "installed"]
