"""Completions across two workers over the http transport, through a proxy that cuts its connections."""

from __future__ import annotations

import pytest

from embferry.testing.proxy import ChaosProxy
from embferry.transports.http import HttpTransport
from tests.serve.embeddings.conftest import OTHER, PICTURE
from tests.serve.workers.joined import Joined, Models, run, settings_for

pytestmark = pytest.mark.integration


def test_an_answer_is_correct_although_the_connections_are_cut(models: Models) -> None:
    times = 20
    with ChaosProxy(cut_after=7000, times=times) as proxy:
        receiving, sending = HttpTransport(), HttpTransport(advertise=f"http://127.0.0.1:{proxy.port}")
        ends = iter((receiving, sending))
        with Joined(models, lambda: next(ends), settings_for(num_blocks=4, block_size=8)) as joined:
            assert sending.address
            assert sending._server is not None
            proxy.upstream = sending._server.listener.port
            answer = run(joined.ask("what?", PICTURE, OTHER))
            assert answer.last["type"] == "end", answer.last
            assert answer.tokens == joined.reference("what?", PICTURE, OTHER)
            transfer = answer.last["transfer"]
            assert transfer["transport"] == "http"
        assert proxy.cuts == times
        assert transfer["bytes"] < sum(proxy.to_clients) < 2 * transfer["bytes"]
