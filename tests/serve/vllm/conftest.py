"""The real instances of ``vllm serve``, for all tests that ask them. The last test of ``test_http.py`` ends them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.vllm.servers import Servers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    started = Servers(tmp_path_factory.mktemp("servers"))
    try:
        started.wait("ready:")
        started.wait("the undivided model", f"{started.undivided}/health")
        yield started
    finally:
        started.close()
