"""Completions across two workers over the http transport, through a proxy that cuts its connections."""

from __future__ import annotations

import pytest
import torch

from embferry.engine.encoder import Encoder
from embferry.engine.language import LanguageModel
from embferry.engine.reference import Reference
from embferry.models import model_path
from embferry.testing.proxy import ChaosProxy
from embferry.transports.http import HttpTransport
from tests.serve.embeddings.conftest import OTHER, PICTURE
from tests.serve.workers.joined import CHUNK, Joined, Models, run, settings_for

pytestmark = pytest.mark.integration


def test_an_answer_is_correct_although_the_connections_are_cut(encoder: Encoder) -> None:
    path, dtype, times = model_path("shapes"), torch.float32, 20
    models = Models(
        encoder,
        LanguageModel.load(path, dtype, prefill_chunk_tokens=CHUNK),
        Reference.load(path, dtype, prefill_chunk_tokens=CHUNK),
    )
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
