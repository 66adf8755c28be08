"""The Mooncake connection under the origin's names: where users of SGLang's branch look for them.

The wire format is in :mod:`embferry.disaggregation.wire`; this folder drives it. ``docs/origin-wire.md`` has the
tables.
"""

from __future__ import annotations

from embferry.discovery.bootstrap_server import BootstrapServer as MooncakeEmbeddingBootstrapServer

from ..wire.frames import EmbeddingArgsRegisterInfo, TransferEmbeddingChunk, TransferEmbeddingInfo
from .manager import MooncakeEmbeddingManager
from .receiver import MooncakeEmbeddingReceiver
from .receiving import LanguageManager
from .sending import EncodeManager, MooncakeEmbeddingSender
from .settings import OriginSettings, origin_layout

__all__ = [
    "EmbeddingArgsRegisterInfo",
    "EncodeManager",
    "LanguageManager",
    "MooncakeEmbeddingBootstrapServer",
    "MooncakeEmbeddingManager",
    "MooncakeEmbeddingReceiver",
    "MooncakeEmbeddingSender",
    "OriginSettings",
    "TransferEmbeddingChunk",
    "TransferEmbeddingInfo",
    "origin_layout",
]
