"""The Mooncake connection under the names that users of SGLang's branch know.

:mod:`embferry.disaggregation.wire` has the format and the rules, the other files of this folder execute them.
"""

from __future__ import annotations

from embferry.discovery.bootstrap_server import BootstrapServer as MooncakeEmbeddingBootstrapServer

from ..wire.messages import EmbeddingArgsRegisterInfo, TransferEmbeddingChunk, TransferEmbeddingInfo
from .encode_manager import EncodeManager, MooncakeEmbeddingSender
from .language_manager import LanguageManager, MooncakeEmbeddingReceiver
from .manager import MooncakeEmbeddingManager
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
