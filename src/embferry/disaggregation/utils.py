"""Blocks and buffers under the names that users of SGLang's branch know; :mod:`embferry.memory` defines them."""

from __future__ import annotations

from embferry.memory.blocks import MetadataAllocation, ReqToMetadataBlockAllocator
from embferry.memory.buffers import MultimodalDataBuffers
from embferry.protocol.states import KVPoll

__all__ = ["KVPoll", "MetadataAllocation", "MultimodalDataBuffers", "ReqToMetadataBlockAllocator"]
