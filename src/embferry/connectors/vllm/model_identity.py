"""The identity of a model: all that decides an embedding besides its item.

Two engines share embeddings only if all of this is equal. What changes no more than the last bits of an embedding is
left out: devices, kernels, the number of ranks, and the other items of a batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from embferry import LocalProtocolError

if TYPE_CHECKING:
    from vllm.config import VllmConfig

LOAD_FORMATS = frozenset({"auto", "hf", "safetensors", "pt", "npcache", "mistral", "fastsafetensors", "instanttensor"})
"""Ways to load weights that read files of the model's folder."""
NO_MATTER = frozenset(
    {
        "limit_per_prompt", "enable_mm_embeds", "mm_processor_cache_gb", "mm_processor_cache_type",
        "mm_hasher_algorithm", "mm_shm_cache_max_object_size_mb", "mm_encoder_only", "mm_encoder_tp_mode",
        "interleave_mm_strings", "skip_mm_profiling", "mm_tensor_ipc", "allow_missing_mm_embeddings",
        "mm_ipc_gpu_memory_gb",
    }
)  # fmt: skip
"""Fields of vLLM's ``MultiModalConfig`` that change no embedding. Those of later versions count until they are here."""
PIECE = 8 << 20


def check(vllm_config: VllmConfig) -> None:
    """Raises LocalProtocolError if the model of this engine, or the content of items, cannot be identified."""
    model, load = vllm_config.model_config, vllm_config.load_config
    if str(load.load_format) not in LOAD_FORMATS:
        raise _refusal(f"the weights of load_format {load.load_format} are not in files of the model's folder")
    if model.model_weights or os.path.isfile(model.model):
        raise _refusal("the weights are not in the model's folder")
    if vllm_config.weight_transfer_config is not None:
        raise _refusal("the weights may be replaced while the engine runs")
    if model.multimodal_config is not None and model.multimodal_config.mm_processor_cache_type == "shm":
        raise _refusal("with mm_processor_cache_type shm the scheduler does not see what is encoded; use lru")


def identify(vllm_config: VllmConfig) -> bytes:
    """Returns a digest of the model and how it is run. Reads all files of the model.

    Raises:
        LocalProtocolError: The model's files cannot be found.
        OSError: They cannot be read, or change meanwhile.
    """
    import vllm

    model = vllm_config.model_config
    media = {} if model.multimodal_config is None else _fields(model.multimodal_config)
    factors = {
        "vllm": vllm.__version__,
        "dtype": str(model.dtype),
        "quantization": str(model.quantization),
        "config": model.hf_config.to_dict(),
        "media": {name: value for name, value in media.items() if name not in NO_MATTER},
        "loading": repr(vllm_config.load_config.model_loader_extra_config),
        "more": repr(vllm_config.additional_config),
    }
    digest = xxhash.xxh3_128(json.dumps(factors, sort_keys=True, default=repr).encode())
    digest.update(files_digest(_folder(vllm_config)))
    return bytes(digest.digest())


def files_digest(folder: Path) -> bytes:
    """Returns a digest of the names and bytes of all files below a folder, but for hidden ones.

    Raises:
        OSError: They cannot be read, or change meanwhile.
    """
    digest = xxhash.xxh3_128()
    buffer = bytearray(PIECE)
    view = memoryview(buffer)
    for path in _files(folder):
        with path.open("rb", buffering=0) as file:
            before = os.fstat(file.fileno())
            digest.update(f"{path.relative_to(folder)}\0{before.st_size}\0".encode("utf-8", "surrogateescape"))
            while count := file.readinto(buffer):
                digest.update(view[:count])
            after = os.fstat(file.fileno())
        if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
            raise OSError(f"{path} has changed while it was read")
    return bytes(digest.digest())


def _files(folder: Path) -> list[Path]:
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _folder(vllm_config: VllmConfig) -> Path:
    """Returns the folder from which the model was loaded."""
    model = vllm_config.model_config
    if os.path.isdir(model.model):
        return Path(model.model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    revision = getattr(model.hf_config, "_commit_hash", None) or model.revision  # the commit that was loaded
    place = vllm_config.load_config.download_dir
    try:
        return Path(snapshot_download(model.model, revision=revision, cache_dir=place, local_files_only=True))
    except (LocalEntryNotFoundError, ValueError) as error:
        raise _refusal(f"the files of {model.model} cannot be found: {error}") from error


def _fields(config: Any) -> dict[str, Any]:
    return {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}


def _refusal(why: str) -> LocalProtocolError:
    return LocalProtocolError(f"ec_connector_extra_config: cache: the model cannot be identified: {why}")
