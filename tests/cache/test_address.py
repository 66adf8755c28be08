"""URLs of stores."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.cache.address import FolderAddress, MooncakeAddress, open_store, parse
from embferry.cache.folder import FolderStore
from embferry.protocol.errors import LocalProtocolError


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("file:///var/cache/e", FolderAddress("/var/cache/e")),
        ("file://localhost/a%20b", FolderAddress("/a b")),
        ("mooncake://10.0.0.1:50051", MooncakeAddress("10.0.0.1:50051", {})),
        (
            "mooncake://store:1/?protocol=rdma&device=mlx5_0&segment_bytes=1024",
            MooncakeAddress("store:1", {"protocol": "rdma", "device": "mlx5_0", "segment_bytes": 1024}),
        ),
    ],
)
def test_a_url_names_a_store(url: str, address: object) -> None:
    assert parse(url) == address


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("/var/cache", "begins with"),
        ("s3://bucket", "begins with"),
        ("file://host/path", "like file:///"),
        ("file:relative", "like file:///"),
        ("file:///a?b", "like file:///"),
        ("file:///a%00b", "like file:///"),
        ("file://[", "cannot be read"),
        ("mooncake://host", "like mooncake://"),
        ("mooncake://host:99999", "cannot be read"),
        ("mooncake://host:1/path", "like mooncake://"),
        ("mooncake://host:1?speed=9", "'speed'"),
        ("mooncake://host:1?segment_bytes=much", "cannot be read"),
        ("mooncake://host:1?segment_bytes=-1", "not negative"),
        ("mooncake://host:1?buffer_bytes=0", "positive"),
    ],
)
def test_another_url_says_what_is_wrong(url: str, why: str) -> None:
    with pytest.raises(LocalProtocolError, match=why):
        parse(url)


def test_a_store_is_opened(tmp_path: Path) -> None:
    assert isinstance(open_store(FolderAddress(str(tmp_path / "cache")), 1, ""), FolderStore)
    with pytest.raises(LocalProtocolError, match="No such file"):
        open_store(FolderAddress(str(tmp_path / "a" / "b")), 1, "")
    tmp_path.joinpath("cache").chmod(0o755)
    with pytest.raises(LocalProtocolError, match="must be 700"):
        open_store(FolderAddress(str(tmp_path / "cache")), 1, "")
