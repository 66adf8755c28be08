"""The names of the origin that mean something else here are as docs/origin-wire.md has them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from embferry.disaggregation.mooncake.conn_multimodal import (
    EncodeManager,
    LanguageManager,
    MooncakeEmbeddingBootstrapServer,
    MooncakeEmbeddingReceiver,
    MooncakeEmbeddingSender,
    TransferEmbeddingChunk,
)
from embferry.disaggregation.multimodal_embedding import (
    EmbeddingTransferError,
    MultimodalEmbeddingBootstrapQueue,
    MultimodalEmbeddingInflightQueue,
)
from embferry.disaggregation.multimodal_language import (
    MultimodalLanguagePreallocQueue,
    MultimodalLanguageTransferQueue,
)
from embferry.disaggregation.utils import MetadataAllocation, MultimodalDataBuffers, ReqToMetadataBlockAllocator

SIGNATURES: dict[Callable[..., Any], str] = {
    EmbeddingTransferError: "detail room retryable",
    EncodeManager.open: "self room",
    LanguageManager.open: "self room bootstrap_addr",
    MooncakeEmbeddingSender.init: "self total_tokens content_digest aux",
    MooncakeEmbeddingSender.send_embedding: "self fields ready_tokens",
    MooncakeEmbeddingReceiver.init: "self allocation",
    MooncakeEmbeddingReceiver.resume_transfer: "self allocation sent_tokens",
    MetadataAllocation: "blocks block_size",
    ReqToMetadataBlockAllocator: "num_blocks block_size",
    ReqToMetadataBlockAllocator.alloc: "self num_tokens req_id",
    ReqToMetadataBlockAllocator.free: "self blocks req_id",
    MultimodalDataBuffers: "geometry shared",
    MultimodalEmbeddingBootstrapQueue: "failed",
    MultimodalEmbeddingInflightQueue: "failed",
    MultimodalLanguagePreallocQueue: "failed",
    MultimodalLanguageTransferQueue: "failed",
    MultimodalEmbeddingBootstrapQueue.add: "self req embedding_sender total_tokens content_digest aux",
    MultimodalLanguagePreallocQueue.add: "self req embedding_receiver",
}


@pytest.mark.parametrize(
    ("function", "names"), SIGNATURES.items(), ids=lambda value: getattr(value, "__qualname__", "")
)
def test_arguments_have_the_documented_order(function: Callable[..., Any], names: str) -> None:
    assert list(inspect.signature(function).parameters) == names.split()


def test_the_first_arguments_of_the_bootstrap_server_are_host_and_port() -> None:
    assert list(inspect.signature(MooncakeEmbeddingBootstrapServer).parameters)[:2] == ["host", "port"]


def test_a_chunk_lies_at_tokens_and_an_allocation_has_a_number_of_them() -> None:
    assert TransferEmbeddingChunk(7, (1, 2), True, 300, sent_tokens=256).chunk_info == (256, 44)
    assert MetadataAllocation((4, 2), 128).allocated_tokens == 256


def test_every_name_of_the_table_is_imported_here() -> None:
    page = (Path(__file__).parents[2] / "docs" / "origin-wire.md").read_text()
    table = page.partition("## Names that mean something else here")[2].partition("\n## ")[0]
    classes = {
        name
        for row in table.splitlines()
        if row.startswith("|")
        for name in re.findall(r"`([A-Z]\w+)", row.split("|")[1])
    }
    assert len(classes) > 5
    assert not [name for name in classes if name not in globals() and name != "MultimodalLanguageRequest"]
