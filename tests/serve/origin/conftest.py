from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.serve.origin.joined import Models, OriginWorkers, settings_for


@pytest.fixture(scope="session")
def models() -> Models:
    return Models.load()


@pytest.fixture
def workers(models: Models) -> Iterator[OriginWorkers]:
    with OriginWorkers(models, settings_for()) as workers:
        yield workers
