from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.engine.cases import Split
from tests.engine.tiny import FAMILIES, build_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the directory of the random model of a family; each is built once."""
    built: dict[str, Path] = {}

    def directory(model_type: str) -> Path:
        if model_type not in built:
            built[model_type] = build_model(tmp_path_factory.mktemp(model_type), model_type)
        return built[model_type]

    return directory


@pytest.fixture(scope="session")
def split(model_dir: Callable[[str], Path]) -> Callable[[str, torch.dtype], Split]:
    """Returns encoder, language model and undivided model of a family in a dtype; each is loaded once."""
    loaded: dict[tuple[str, torch.dtype], Split] = {}

    def load(model_type: str, dtype: torch.dtype = torch.float32) -> Split:
        key = (model_type, dtype)
        if key not in loaded:
            loaded[key] = Split.load(model_dir(model_type), dtype)
        return loaded[key]

    return load


@pytest.fixture(params=FAMILIES)
def family_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)
