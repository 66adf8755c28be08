"""A real Mooncake store on this machine's CPUs: its master, a process with its memory, and two clients."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from embferry.cache.address import MooncakeAddress, open_store, parse
from embferry.cache.contract import TooLarge
from embferry.cache.entry import Damaged, Entry
from embferry.cache.mooncake import PREFIX, MooncakeSettings, MooncakeStore
from embferry.protocol.errors import LocalProtocolError
from tests.ports import free_port

from .mooncake_master import HOST, running_master
from .samples import found, has, keep, key_of, sample

pytestmark = [pytest.mark.integration, pytest.mark.engines]

BUFFER, SEGMENT = 16 << 20, 64 << 20


@pytest.fixture(scope="module")
def master() -> Iterator[str]:
    """The address of a running master."""
    with running_master() as address:
        yield address


def joined(master: str, segment: int = 0) -> MooncakeStore:
    return MooncakeStore(MooncakeSettings(master, HOST, segment_bytes=segment, buffer_bytes=BUFFER))


@pytest.fixture(scope="module")
def memory(master: str) -> Iterator[MooncakeStore]:
    """A member that brings the memory."""
    with closing(joined(master, SEGMENT)) as store:
        yield store


def test_an_embedding_outlives_the_encoder_that_wrote_it(master: str, memory: MooncakeStore) -> None:
    with closing(joined(master)) as encoder:
        assert not has(encoder, "a")
        assert keep(encoder, "a") > 0
        assert keep(encoder, "a") == 0
        assert has(encoder, "a")
    with closing(joined(master)) as restarted:
        assert has(restarted, "a")
    assert has(memory, "a")


def test_a_damaged_object_is_removed(memory: MooncakeStore) -> None:
    entry, data = sample("b")
    raw = bytearray(entry.head() + bytes(data))
    raw[-1] ^= 1
    for name, value in (("b", bytes(raw)), ("c", entry.head() + bytes(data)), ("d", b"short")):
        assert memory._client.put(PREFIX + key_of(name), value) == 0
        with pytest.raises(Damaged):
            found(memory, name)
        assert not has(memory, name)
        assert keep(memory, name) > 0
        assert has(memory, name)


def test_an_embedding_of_another_shape_is_removed(memory: MooncakeStore) -> None:
    keep(memory, "e")

    def accept(entry: Entry) -> memoryview:
        raise Damaged("wrong shape")

    with pytest.raises(Damaged):
        memory.read(key_of("e"), accept)
    assert not has(memory, "e")


def test_an_embedding_larger_than_the_buffer_is_refused(memory: MooncakeStore) -> None:
    with pytest.raises(TooLarge):
        keep(memory, "large", BUFFER // 36)


def test_a_full_store_is_an_error_of_the_system(memory: MooncakeStore) -> None:
    """Mooncake evicts what was not read lately, or refuses; neither is a wrong answer."""
    for name in range(12):
        try:
            keep(memory, name, BUFFER // 36 - 1000)
        except OSError as error:
            assert "has not taken" in str(error)  # noqa: PT017  (either may happen)
    for name in range(12):
        has(memory, name, BUFFER // 36 - 1000)


def test_a_master_that_is_not_there_fails_the_start() -> None:
    port = free_port()
    with pytest.raises(LocalProtocolError, match="the cache cannot be used"):
        open_store(MooncakeAddress(f"{HOST}:{port}", {}), 1, HOST)


def test_the_options_of_the_url_are_those_of_the_client(master: str) -> None:
    address = parse(f"mooncake://{master}?buffer_bytes={BUFFER}&protocol=tcp")
    with closing(open_store(address, 1, HOST)) as store:
        assert not has(store, "nothing")
