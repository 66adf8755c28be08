"""Where SGLang's users look for these names. The code lives in :mod:`blocks` and :mod:`buffers`."""

from __future__ import annotations

from .blocks import MetadataAllocation, ReqToMetadataBlockAllocator
from .buffers import MultimodalDataBuffers

__all__ = ["MetadataAllocation", "MultimodalDataBuffers", "ReqToMetadataBlockAllocator"]
