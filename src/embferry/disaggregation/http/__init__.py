"""The ``http`` transport."""

from .conn_multimodal import HttpTransport

__all__ = ["HttpTransport"]
