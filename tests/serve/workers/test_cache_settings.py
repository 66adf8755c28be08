"""The folder of the shared cache is opened before the model is loaded, so that a wrong one ends the start at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from embferry.cache.folder import FolderStore
from embferry.protocol.errors import LocalProtocolError
from embferry.serve.config import CacheSettings, Settings
from embferry.serve.encode.shared_cache import open_store


def settings(folder: Path, **more: int) -> Settings:
    return Settings(cache=CacheSettings(url=f"file://{folder}", **more))


def test_without_a_url_there_is_no_cache() -> None:
    assert open_store(Settings()) is None


def test_the_folder_is_made_for_this_user_alone(tmp_path: Path) -> None:
    store = open_store(settings(tmp_path / "cache", max_bytes=1000))
    assert isinstance(store, FolderStore)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir(mode=0o755)
    for folder, why in ((tmp_path / "open", "must be 700"), (tmp_path / "no" / "folder", "No such file")):
        with pytest.raises(LocalProtocolError, match=f"--cache-url: the cache cannot be used: .*{why}"):
            open_store(settings(folder))
        placed = settings(folder).with_places({"cache.url": "--cache"})
        with pytest.raises(LocalProtocolError, match=r" --cache: the cache cannot be used"):
            open_store(placed)
