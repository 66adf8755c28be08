"""The checklist must notice when a name goes: it is run on copies of the source with one thing changed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import check_names

PACKAGE = Path("src/embferry/disaggregation")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The source alone, without what others have beside it."""
    shutil.copytree(check_names.ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def missing(root: Path) -> list[str]:
    check_names.tree_of.cache_clear()
    return [what for what, holds in check_names.all_checks(root) if not holds]


def replace(root: Path, file: str, old: str, new: str) -> None:
    path = root / PACKAGE / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_nothing_is_missing_from_the_project(copy, capsys):
    assert missing(copy) == []
    assert check_names.main(copy) == 0
    assert "0 missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("utils.py", "MetadataAllocation", "BlockAllocation", "utils.py: MetadataAllocation"),
        ("multimodal_language.py", "needs_resume: bool = False", "more: bool = False", "MultimodalLanguageRequest("),
        ("multimodal_language.py", "transferred_tokens: int = 0", "transferred_tokens: int = 1", "LanguageRequest("),
        ("multimodal_language.py", "def pop_preallocated", "def pop_ready", "pop_preallocated"),
        ("multimodal_language.py", "needs resume for remaining data", "goes on", "needs resume for remaining data"),
        ("common/receiver.py", "sent_tokens: int = 0", "sent_tokens: int = 1", "EmbeddingReceiver.resume_transfer"),
        ("common/receiver.py", "def resume_transfer", "def go_on", "EmbeddingReceiver.resume_transfer"),
        ("common/receiver.py", "Sent resume transfer request", "Asked", "Sent resume transfer request"),
        ("mooncake/wire/receiver.py", "needs resume for remaining data", "goes on", "the origin's wire says"),
        ("mooncake/wire/sending.py", "class MooncakeEmbeddingSender", "class Sender", "MooncakeEmbeddingSender"),
        ("protocol/states.py", "Success = 4", "Success = 5", "KVPoll is"),
        ("protocol/messages.py", "    sent_tokens: Tokens", "    offset: Tokens", "Grant.sent_tokens"),
        ("protocol/errors.py", "EmbeddingTransferError", "TransferError", "errors.py: EmbeddingTransferError"),
    ],
)
def test_a_name_that_goes_is_missed(copy, file, old, new, complaint):
    replace(copy, file, old, new)
    assert any(complaint in what for what in missing(copy))
    assert check_names.main(copy) == 1


def test_fields_keep_their_order(copy):
    path = copy / PACKAGE / "multimodal_language.py"
    lines = path.read_text().splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if line.startswith("    req: "))
    second = next(i for i, line in enumerate(lines) if line.startswith("    embedding_receiver: "))
    lines[first], lines[second] = lines[second], lines[first]
    path.write_text("".join(lines))
    assert len(missing(copy)) == 1


def test_old_words_are_found_wherever_they_hide_except_in_migration_material(copy):
    (copy / "docs").mkdir()
    old = "contin" + "uation"
    (copy / "docs" / "migration.md").write_text(f"needs_{old} is needs_resume now")
    assert missing(copy) == []
    (copy / "docs" / "guide.md").write_text(f"A {old.title()}.")
    assert [what for what in missing(copy) if "docs/guide.md" in what and "migration.md" not in what]


def test_the_names_of_the_mooncake_connection_are_required_together(copy):
    (copy / PACKAGE / "mooncake").mkdir(exist_ok=True)
    (copy / PACKAGE / "mooncake" / "conn_multimodal.py").write_text(
        "class TransferEmbeddingInfo:\n    sent_tokens: int\n"
    )
    complaints = missing(copy)
    assert "mooncake/conn_multimodal.py: MooncakeEmbeddingReceiver" in complaints
    assert "mooncake/conn_multimodal.py: TransferEmbeddingInfo" not in complaints
