"""Where SGLang's users look for these names. The code lives in :mod:`blocks` and :mod:`buffers`."""

from __future__ import annotations

from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.states import KVPoll

__all__ = ["KVPoll", "MetadataAllocation", "MultimodalDataBuffers", "ReqToMetadataBlockAllocator"]
