"""The ``tcp`` transport."""

from .conn_multimodal import TcpTransport

__all__ = ["TcpTransport"]
