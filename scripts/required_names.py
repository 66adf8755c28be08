"""The names that users of the origin know, and where each has to be: the data of ``check_names.py``.

The origin is SGLang's resumable embedding transfer ("Resume-based Terminology", v3.0).
"""

from __future__ import annotations

STATES = "protocol/states.py"
LIBRARY = "library.py"
LANGUAGE = "disaggregation/multimodal_language.py"
EMBEDDING = "disaggregation/multimodal_embedding.py"
UTILS = "disaggregation/utils.py"
MESSAGES = "protocol/messages.py"
ERRORS = "protocol/errors.py"
BOOTSTRAP = "discovery/bootstrap_server.py"
MOONCAKE = "disaggregation/mooncake/conn_multimodal.py"
ORIGIN_WIRE = "disaggregation/mooncake"

# file -> what can be imported from it
IMPORTABLE: dict[str, tuple[str, ...]] = {
    UTILS: ("MetadataAllocation", "ReqToMetadataBlockAllocator", "MultimodalDataBuffers", "KVPoll"),
    STATES: ("KVPoll",),
    LIBRARY: ("EmbeddingReceiver", "EmbeddingSender"),
    LANGUAGE: ("MultimodalLanguageRequest", "MultimodalLanguagePreallocQueue", "MultimodalLanguageTransferQueue"),
    EMBEDDING: ("MultimodalEmbeddingBootstrapQueue",),
    ERRORS: ("EmbeddingTransferError",),
    BOOTSTRAP: ("BootstrapServer",),
    MOONCAKE: (
        "MooncakeEmbeddingManager",
        "MooncakeEmbeddingSender",
        "MooncakeEmbeddingReceiver",
        "MooncakeEmbeddingBootstrapServer",
        "TransferEmbeddingInfo",
        "TransferEmbeddingChunk",
        "EmbeddingArgsRegisterInfo",
    ),
}

# (file, class) -> its annotated fields in order, each with its default as source text; "" for none
FIELDS: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    (LANGUAGE, "MultimodalLanguageRequest"): (
        ("req", ""),
        ("embedding_receiver", ""),
        ("waiting_for_input", "False"),
        ("current_allocation", "None"),
        ("total_embedding_length", "-1"),
        ("transferred_tokens", "0"),
        ("buffered_chunks", "None"),
        ("needs_resume", "False"),
    ),
}

# (file, class) -> names that are fields, properties or attributes of it, in any order
ATTRIBUTES: dict[tuple[str, str], tuple[str, ...]] = {
    (MESSAGES, "Grant"): ("sent_tokens", "allocated_tokens"),
    (LIBRARY, "EmbeddingReceiver"): ("transferred_tokens", "buffered_chunks", "needs_resume"),
    (UTILS, "MultimodalDataBuffers"): ("aux_datas",),
    (MOONCAKE, "TransferEmbeddingInfo"): ("sent_tokens",),
}

# (file, enum) -> name: value as source text
STATUSES: dict[tuple[str, str], dict[str, str]] = {
    (STATES, "KVPoll"): {
        "Failed": "0",
        "Bootstrapping": "1",
        "WaitingForInput": "2",
        "Transferring": "3",
        "Success": "4",
    },
}

# (file, class) -> method: its parameters without self, each with its default as source text; None for any
METHODS: dict[tuple[str, str], dict[str, tuple[tuple[str, str], ...] | None]] = {
    (LIBRARY, "EmbeddingReceiver"): {
        "resume_transfer": (("allocation", "None"), ("sent_tokens", "0")),
        "init": None,
        "poll": (),
        "clear": (),
        "abort": None,
        "failure_exception": (),
    },
    (LIBRARY, "EmbeddingSender"): {
        "init": None,
        "send_embedding": None,
        "poll": (),
        "clear": (),
        "abort": None,
        "failure_exception": (),
    },
    (LANGUAGE, "MultimodalLanguagePreallocQueue"): {"pop_preallocated": None},
    (LANGUAGE, "MultimodalLanguageTransferQueue"): {"pop_transferred": None},
    (MOONCAKE, "MooncakeEmbeddingReceiver"): {
        "resume_transfer": (("allocation", "None"), ("sent_tokens", "0")),
        "init": None,
        "poll": (),
        "clear": (),
        "abort": None,
    },
    (MOONCAKE, "MooncakeEmbeddingSender"): {
        "init": None,
        "send_embedding": None,
        "poll": (),
        "clear": (),
        "abort": None,
    },
}

# Words that must occur somewhere under disaggregation/
WORDS = (
    "bootstrap_room",
    "chunk_info",
    "input_embeddings",
    "fill_ids",
    "mrope_positions",
    "aux_datas",
    "deepstack_embeddings",
    "resumed transfer",
)

# What the log says, so that the origin's searches find it
PHRASES = ("needs resume for remaining data", "Sent resume transfer request", "completed with resumed transfer")

# The older family of names. Allowed in migration material only.
OLD_WORDS = ("continuation", "partial_data", "received_tokens")
