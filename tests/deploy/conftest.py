"""The image, built once for all tests that run it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.deploy.containers import Image, build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The image of the Dockerfile, its steps run one by one on this machine's system and Python."""
    if os.geteuid() != 0:
        pytest.fail("the steps of the image need root: mounts, and files of other users")
    folder = tmp_path_factory.mktemp("image")
    folder.parent.parent.chmod(0o755)  # others than root run in it
    folder.parent.chmod(0o755)
    folder.chmod(0o755)
    return build(ROOT / "Dockerfile", "embferry", folder, {"TORCH_INDEX": ""})
