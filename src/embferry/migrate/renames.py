"""The table: which names and phrases become which, and what tells that a file has to do with the system."""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ROOT_WORD = "continuation"
"""What the earlier family was named after; ``resume`` now."""
NEW_ROOT = "resume"

NAMES = {
    "needs_continuation": "needs_resume",
    "init_continuation": "resume_transfer",
    "partial_data": "buffered_chunks",
    "received_tokens": "transferred_tokens",
}
PLAIN = frozenset({"partial_data", "received_tokens"})
"""Names that other libraries use, too: these are left alone where they are seen to be another library's."""

METHOD = "resume_transfer"
METHOD_KEYWORDS = {"received_tokens": "sent_tokens", "continuation_offset": "sent_tokens"}
"""Keyword arguments of the method in earlier forms of it."""

PHRASES = (
    ("sent continuation transfer request", "sent resume transfer request"),
    ("sent continuation request", "sent resume transfer request"),
    ("needs continuation", "needs resume"),
    ("need continuation", "need resume"),
    ("completed with continuation transfer", "completed with resumed transfer"),
    ("completed with continuation", "completed with resumed transfer"),
    ("completed continuation", "completed resumed transfer"),
    ("continuation transfer request", "resume transfer request"),
    ("continuation transfers", "resumed transfers"),
    ("continuation transfer", "resumed transfer"),
    ("continuation requests", "resume transfer requests"),
    ("continuation request", "resume transfer request"),
    ("init continuation", "resume transfer"),
    ("start continuation", "start resumed transfer"),
    ("starting continuation", "starting resumed transfer"),
    ("waiting for continuation", "waiting for resume"),
    ("continuation for room", "resume for room"),
    ("continuation buffer", "resume buffer"),
    ("continuation blocks", "resume blocks"),
    ("continuation allocation", "resume allocation"),
    ("continuation failed", "resumed transfer failed"),
    ("continuation completed", "resumed transfer completed"),
    ("continuation complete", "resumed transfer complete"),
)
"""What logs and comments of the system said, the longer before the shorter that it contains."""

FOREIGN_WORDS = _words("line lines byte bytes http https 100 header headers frame frames utf backslash string")
"""A phrase that one of these stands right before is about something else: "HTTP continuation request"."""

VOCABULARY = _words("""
    needs need init is has pending request requests transfer transfers allocation allocations alloc buffer buffers
    sent tokens token send do start started queue state waiting wait count num msg message messages remaining data
    embedding embeddings blocks block room rooms receiver req reqs for process retry ready done total max new old offset
    language handle trigger check total info chunk chunks failed completed resume
    """)
"""Words that make a name of the family together with the root word: ``_pending_continuation_requests``."""

# What tells that a Python file has to do with the system.

PACKAGES = frozenset({"sglang", "embferry"})
MODULES = frozenset({"multimodal_language", "multimodal_embedding", "conn_multimodal"})
CLASSES = _words("""
    MultimodalLanguageRequest MultimodalLanguagePreallocQueue MultimodalLanguageTransferQueue
    MultimodalEmbeddingBootstrapQueue MultimodalDataBuffers ReqToMetadataBlockAllocator MetadataAllocation
    TransferEmbeddingInfo TransferEmbeddingChunk EmbeddingArgsRegisterInfo EmbeddingTransferError
    MooncakeEmbeddingManager MooncakeEmbeddingSender MooncakeEmbeddingReceiver MooncakeEmbeddingBootstrapServer
    """)
NEUTRAL = PACKAGES | {"torch", "numpy"}
"""What comes out of a call to these may well be the system's."""

# Where a string is a name.

ATTRIBUTE_CALLS = frozenset({"getattr", "setattr", "hasattr", "delattr", "attrgetter", "methodcaller", "object"})
NAME_LISTS = frozenset({"__slots__", "__match_args__", "__all__"})
MAPPING_VIEWS = frozenset({"vars", "asdict"})
PLACEHOLDER_CALLS = frozenset({"format", "format_map", "substitute", "safe_substitute"})
OWN_KEYS = frozenset({"dict", *PLACEHOLDER_CALLS})
"""Keyword arguments of these become keys or fill placeholders; they are names of the user's own."""

# Where a string is a message, or searches for one.

MESSAGE_CALLS = _words("debug info warning warn error exception critical log print fail echo write")
SEARCH_CALLS = _words("search match fullmatch findall finditer compile sub split count find startswith endswith")
