"""Models of the Hugging Face Hub by name: found in the local cache, or downloaded into it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from embferry.models.checkpoints import check_family

FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")
"""The files that the engine reads of a repository. Others hold the same weights again, or programs."""
SETTINGS = ("config.json", "preprocessor_config.json", "processor_config.json")
"""The files that say which embeddings a model has; a few kilobytes."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")


def is_hub_name(name: str) -> bool:
    """Returns whether a model is named as on the hub: ``owner/name``."""
    return _NAME.fullmatch(name) is not None


def cached(name: str) -> Path | None:
    """Returns the directory of a model in the local cache, which may be incomplete; None if there is none."""
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True, allow_patterns=["config.json"]))
    except (ImportError, OSError, ValueError):  # the hub's own errors are of these types
        return None


def download(name: str, say: Callable[[str], None]) -> Path:
    """Downloads a model, with bars of progress on a terminal. What was downloaded before is not downloaded again.

    The family is checked before the weights are downloaded.

    Args:
        name: as on the hub.
        say: gets a sentence before the download begins.

    Raises:
        ValueError: it cannot be downloaded, or is of another family; the message says what to do.
    """

    def fetch(snapshot_download: Callable[..., str]) -> str:
        from huggingface_hub.utils.tqdm import enable_progress_bars

        check_family(Path(snapshot_download(name, allow_patterns=["config.json"])))
        if sys.stderr.isatty():
            enable_progress_bars()
        say(f"downloading {name} from the Hugging Face Hub")
        return snapshot_download(name, allow_patterns=list(FILES))

    return _fetched(name, fetch)


def download_settings(name: str) -> Path:
    """Downloads the settings of a model of any family, without weights.

    Args:
        name: as on the hub.

    Raises:
        ValueError: they cannot be downloaded; the message says what to do.
    """
    return _fetched(name, lambda snapshot_download: snapshot_download(name, allow_patterns=list(SETTINGS)))


def _fetched(name: str, fetch: Callable[[Callable[..., str]], str]) -> Path:
    """Returns the directory that ``fetch`` downloads with ``snapshot_download``.

    Raises:
        ValueError: it cannot be downloaded; the message says what to do.
    """
    instead = f"or download it elsewhere and give its directory: hf download {name} --local-dir DIR"
    try:
        from huggingface_hub import errors, snapshot_download
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ImportError as error:
        raise ValueError(
            f"{name} is not on this machine, and huggingface_hub, which downloads models, is not installed: "
            f"pip install huggingface_hub; {instead}"
        ) from error
    disable_progress_bars()
    try:
        return Path(fetch(snapshot_download))
    except errors.GatedRepoError as error:
        why = f"https://huggingface.co/{name} asks for its terms to be accepted; accept them there and set HF_TOKEN"
        raise ValueError(f"{why}, {instead}") from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hugging Face Hub has no model {name} that this machine may see; check its name, "
            "or set HF_TOKEN if it is private"
        ) from error
    except (OSError, errors.HfHubHTTPError) as error:
        why = next(iter(str(error).strip().splitlines()), "").removeprefix("Got: ") or type(error).__name__
        raise ValueError(f"{name} cannot be downloaded: {why}; try again, {instead}") from error
