"""The ``tcp`` transport."""

from .transport import TcpTransport

__all__ = ["TcpTransport"]
