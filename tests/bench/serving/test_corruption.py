"""Damage to embeddings on their way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embferry import Field, Geometry, Layout, ReceiveManager, SendManager, TransferSettings, as_fields, wait
from embferry.bench.serving import corruption
from embferry.bench.serving.corruption import DAMAGE_EVERY, Damage
from embferry.transports.registry import TRANSPORTS
from embferry.transports.shm import transport as shm
from embferry.transports.tcp import send_link as tcp

LAYOUT = Layout((Field("input_embeddings", "float32", 256),))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Returns the file that switches damage on once it exists."""
    monkeypatch.setenv(corruption.VARIABLE, str(tmp_path / "damage"))
    return tmp_path / "damage"


@pytest.fixture
def flips(file: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Flips bits of what this process sends; returns the file that counts them."""
    for module, name in ((tcp, "Cursor"), (shm, "np")):
        monkeypatch.setattr(module, name, getattr(module, name))
    corruption.flipped_bits()
    file.touch()
    return file


def test_damage_is_done_once_in_so_many_bytes_while_the_file_exists(file: Path) -> None:
    damage = Damage()
    assert not damage.is_due(10 * DAMAGE_EVERY)
    file.touch()
    assert not damage.is_due(10)
    turns = [damage.is_due(DAMAGE_EVERY // 5) for _ in range(11)]
    assert turns == [True, *[False] * 4, True, *[False] * 4, True]
    assert file.stat().st_size == 3


def test_the_tail_of_a_large_file_is_zeroed(file: Path, tmp_path: Path) -> None:
    large, small, damage = tmp_path / "large", tmp_path / "small", Damage()
    file.touch()
    large.write_bytes(b"x" * DAMAGE_EVERY)
    small.write_bytes(b"x" * 10)
    for path in (small, large, small):
        corruption.zero_tail(path, damage)
    assert large.read_bytes() == b"x" * (DAMAGE_EVERY * 3 // 4) + bytes(DAMAGE_EVERY // 4)
    assert small.read_bytes() == b"x" * 10


@pytest.mark.integration
@pytest.mark.parametrize("transport", ["shm", "tcp"])
@pytest.mark.parametrize("verified", [True, False])
def test_a_flipped_bit_arrives_unless_the_receiver_verifies(transport: str, verified: bool, flips: Path) -> None:
    content = np.ones((500, 256), np.float32)
    settings = TransferSettings(verify=verified)
    encode_side = SendManager(LAYOUT, [TRANSPORTS[transport].load()()], settings=settings)
    language_side = ReceiveManager(Geometry(LAYOUT, 125, 8), [TRANSPORTS[transport].load()()], settings=settings)
    try:
        sender = encode_side.open(1)
        sender.init(len(content), b"digest")
        sender.send_embedding(as_fields({"input_embeddings": content}))
        receiver = language_side.open(1, encode_side.endpoint)
        receiver.init()
        wait(receiver, timeout=60)
        arrived = receiver.arrays()["input_embeddings"].view(np.float32)
        assert np.count_nonzero(arrived != content) == (0 if verified else 1)
        receiver.clear()
    finally:
        language_side.close()
        encode_side.close()
    assert flips.stat().st_size == 1
