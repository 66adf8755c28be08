"""The identity of a model changes with everything that decides an embedding."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from embferry import LocalProtocolError
from embferry.connectors.vllm.model_identity import check, files_digest, identify


@dataclass
class Media:
    mm_processor_kwargs: dict[str, Any] | None = None
    mm_encoder_attn_dtype: str | None = None
    video_pruning_rate: float | None = None
    mm_processor_cache_type: str = "lru"
    mm_processor_cache_gb: float = 4
    limit_per_prompt: dict[str, int] = field(default_factory=dict)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path


@pytest.fixture
def config(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    vllm = ModuleType("vllm")
    vllm.__version__ = "0.32.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    return SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(folder),
            model_weights="",
            revision=None,
            dtype="torch.bfloat16",
            quantization=None,
            hf_config=SimpleNamespace(to_dict=lambda: {"hidden_size": 8}),
            multimodal_config=Media(),
        ),
        load_config=SimpleNamespace(load_format="auto", download_dir=None, model_loader_extra_config={}),
        weight_transfer_config=None,
        additional_config={},
    )


def set_version(config: Any) -> None:
    sys.modules["vllm"].__version__ = "0.33.0"  # type: ignore[attr-defined]


def test_equal_models_have_one_identity(config: Any, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Also in another folder, with other times and other hidden files."""
    before = identify(config)
    other = tmp_path_factory.mktemp("copy")
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
        os.utime(other / path.name, (0, 0))
    (other / ".cache").mkdir()
    (other / ".cache" / "lock").write_text("x")
    config.model_config.model = str(other)
    config.model_config.multimodal_config = Media(mm_processor_cache_gb=1, limit_per_prompt={"image": 1})
    assert identify(config) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda config: setattr(config.model_config, "dtype", "torch.float16"),
        lambda config: setattr(config.model_config, "quantization", "fp8"),
        lambda config: setattr(config.model_config.hf_config, "to_dict", lambda: {"hidden_size": 9}),
        lambda config: setattr(config.model_config.multimodal_config, "mm_processor_kwargs", {"max_pixels": 1}),
        lambda config: setattr(config.model_config.multimodal_config, "mm_encoder_attn_dtype", "fp8"),
        lambda config: setattr(config.model_config.multimodal_config, "video_pruning_rate", 0.5),
        lambda config: setattr(config.load_config, "model_loader_extra_config", {"a": 1}),
        lambda config: setattr(config, "additional_config", {"a": 1}),
        set_version,
    ],
)
def test_another_setting_is_another_model(config: Any, change: Callable[[Any], None]) -> None:
    before = identify(config)
    change(config)
    assert identify(config) != before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(bytes(999) + b"\1"),
        lambda folder: (folder / "model.safetensors").write_bytes(bytes(999)),
        lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"),
        lambda folder: (folder / "more.bin").write_bytes(b""),
        lambda folder: (folder / "config.json").write_text('{"a": 1}'),
        lambda folder: [(folder / "sub").mkdir(), (folder / "sub" / "weights.bin").write_bytes(b"1")],
    ],
)
def test_other_weights_are_another_model(folder: Path, change: Callable[[Path], None]) -> None:
    before = files_digest(folder)
    change(folder)
    assert files_digest(folder) != before


def test_files_do_not_run_into_each_other(tmp_path: Path) -> None:
    digests = set()
    for number, contents in enumerate([(b"ab", b"c"), (b"a", b"bc"), (b"", b"abc")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, content in zip("xy", contents, strict=True):
            (folder / name).write_bytes(content)
        digests.add(files_digest(folder))
    assert len(digests) == 3


def test_files_may_be_symbolic_links(tmp_path: Path, folder: Path) -> None:
    """As in the cache of the Hugging Face Hub."""
    before = files_digest(folder)
    blobs = tmp_path / ".blobs"
    blobs.mkdir()
    (folder / "model.safetensors").rename(blobs / "0")
    os.symlink(blobs / "0", folder / "model.safetensors")
    assert files_digest(folder) == before


def test_files_that_change_are_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, path = os.fstat, folder / "model.safetensors"

    def fstat(fd: int) -> os.stat_result:
        status = real(fd)
        path.write_bytes(bytes(path.stat().st_size + 1))
        return status

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(OSError, match="has changed"):
        files_digest(folder)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda config: setattr(config.load_config, "load_format", "dummy"), "dummy"),
        (lambda config: setattr(config.load_config, "load_format", "runai_streamer"), "runai_streamer"),
        (lambda config: setattr(config.model_config, "model_weights", "s3://bucket"), "not in the model's folder"),
        (lambda config: setattr(config.model_config, "model", __file__), "not in the model's folder"),
        (lambda config: setattr(config, "weight_transfer_config", object()), "may be replaced"),
        (lambda config: setattr(config.model_config.multimodal_config, "mm_processor_cache_type", "shm"), "shm"),
    ],
)
def test_a_model_that_cannot_be_identified_is_refused(config: Any, change: Callable[[Any], None], why: str) -> None:
    check(config)
    change(config)
    with pytest.raises(LocalProtocolError, match=why):
        check(config)


def test_a_model_of_the_hub_is_the_commit_that_was_loaded(config: Any, folder: Path, tmp_path: Path) -> None:
    hub = tmp_path / ".hub" / "models--owner--name"
    for commit in ("0" * 40, "1" * 40):
        snapshot = hub / "snapshots" / commit
        snapshot.mkdir(parents=True)
        for path in folder.glob("*.*"):
            if path.is_file():
                (snapshot / path.name).write_bytes(path.read_bytes() + commit[:1].encode() * int(commit[0]))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1" * 40)  # was loaded before another program has fetched this one
    local = identify(config)
    config.model_config.model, config.load_config.download_dir = "owner/name", str(tmp_path / ".hub")
    assert identify(config) != local
    config.model_config.hf_config._commit_hash = "0" * 40
    assert identify(config) == local
    config.model_config.model = "owner/unknown"
    with pytest.raises(LocalProtocolError, match="cannot be found"):
        identify(config)
