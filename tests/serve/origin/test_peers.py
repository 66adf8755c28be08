"""Each worker of ours alone, with the other side of SGLang's branch after the description of its wire.

That side sends and expects the rows of the whole prompt. They are put together here without the code under test: text
from the undivided model's own table, pictures from the vision tower, positions from transformers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from embferry.discovery.bootstrap_server import BootstrapServer
from embferry.engine.embedding import row_bytes
from tests.disaggregation.mooncake.builders import PeerDouble, register_rank
from tests.disaggregation.mooncake.origin_peers import (
    BLOCK,
    BLOCKS,
    SUCCESS,
    TRANSFERRING,
    OriginReceiver,
    OriginSender,
)
from tests.serve.origin.joined import MAX_TOKENS, Answer, Models, OriginWorkers, eventually, post, run
from tests.serve.origin.test_both_workers import BLUE, LONG, RED, chat

pytestmark = pytest.mark.integration

QUESTION = "what colour is it?"
PAD = 1 << 20
"""Ids of visual tokens in SGLang's branch are hashes, far beyond the vocabulary."""


@torch.inference_mode()
def expected_rows(models: Models, *pictures: bytes) -> tuple[dict[str, np.ndarray], int]:
    """Returns the rows of a prompt, and its mrope position delta."""
    prompt, items = models.prompt(chat(QUESTION, *pictures), *pictures)
    ids = prompt.input_ids[0].clone()
    rows = models.undivided.model.get_input_embeddings()(ids).clone()
    deepstack = torch.zeros((len(ids), models.token_bytes["deepstack_embeddings"] // 2), dtype=torch.bfloat16)
    at = 0
    for number, item in enumerate(items):
        embedding = models.encoder.encode(item)
        place = prompt.visual_positions[at : at + item.num_tokens]
        rows[place] = embedding.tensors["input_embeddings"]
        deepstack[place] = embedding.tensors["deepstack_embeddings"]
        ids[place] = PAD + number
        at += item.num_tokens
    tensors = {
        "input_embeddings": rows,
        "fill_ids": ids.to(torch.int32).reshape(-1, 1),
        "mrope_positions": prompt.position_ids[:, 0].T.to(torch.int32).contiguous(),
        "deepstack_embeddings": deepstack,
    }
    return {name: row_bytes(tensor) for name, tensor in tensors.items()}, prompt.position_delta


# Our encode worker, a language side of SGLang


@pytest.fixture
def receiver(models: Models, workers: OriginWorkers) -> Iterator[OriginReceiver]:
    port = workers.encode.manager.port
    receiver = OriginReceiver(PeerDouble(workers.network), "127.0.0.1", port, token_bytes=models.token_bytes)
    yield receiver
    receiver.close()


def received(receiver: OriginReceiver, room: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """Receives an embedding through all blocks of the pool, as often as it takes. Returns rows and ``aux_datas``."""
    blocks = list(range(BLOCKS))
    receiver.register()
    receiver.init(room, blocks)
    parts: list[dict[str, np.ndarray]] = []
    aux: list[int] = []
    sent = 0
    while True:
        _, status = receiver.status()
        assert int(status) in (TRANSFERRING, SUCCESS)
        aux = aux or receiver.buffers.aux[0].tolist()
        count = min(BLOCKS * BLOCK, aux[0] - sent)
        parts.append(receiver.take(blocks, count))
        sent += count
        if int(status) == SUCCESS:
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}, aux
        receiver.resume(room, blocks, sent)


@pytest.mark.parametrize("pictures", [(), (RED,), (RED, BLUE, RED), LONG], ids=["text", "one", "three", "long"])
def test_a_language_side_of_sglang_gets_the_rows_of_the_whole_prompt(workers, models, receiver, pictures):
    asked: dict[str, Any] = {"messages": chat(QUESTION, *pictures), "stream": False} | workers.place(7)

    async def both() -> tuple[Any, Any]:
        encoding = asyncio.create_task(post(workers.encode_app, asked))
        arrived = await asyncio.to_thread(received, receiver, 7)
        return await encoding, arrived

    response, (rows, aux) = run(both())
    wanted, delta = expected_rows(models, *pictures)
    length = len(wanted["fill_ids"])
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["prompt_tokens"] == length
    assert aux[:2] == [length, delta]
    for name in ("input_embeddings", "mrope_positions", "deepstack_embeddings"):
        assert np.array_equal(rows[name], wanted[name]), name
    ids, want = (part["fill_ids"].copy().view(np.int32).reshape(-1) for part in (rows, wanted))
    is_text = want < PAD
    assert np.array_equal(ids[is_text], want[is_text])
    vocabulary = len(models.table)
    assert (ids[~is_text] >= vocabulary).all()
    of_item = [set(ids[want == PAD + number].tolist()) for number in range(len(pictures))]
    assert all(len(found) == 1 for found in of_item), "one id for all tokens of a picture"
    same = dict(zip(pictures, map(frozenset, of_item), strict=True))
    assert len(set().union(*of_item)) == len(same), "equal pictures have equal ids, others have others"


# Our language worker, an encode side of SGLang


@pytest.fixture
def sender(models: Models, workers: OriginWorkers) -> Iterator[OriginSender]:
    sender = OriginSender(PeerDouble(workers.network), token_bytes=models.token_bytes)
    with BootstrapServer() as workers.bootstrap:  # at the other one, our own encode worker has registered
        register_rank(workers.bootstrap, sender.port)
        yield sender
    sender.close()


def serve_all(sender: OriginSender, rows: dict[str, np.ndarray], delta: int) -> None:
    """Sends an embedding in as many parts as its receiver asks for."""
    sender.total = len(rows["fill_ids"])
    while True:
        frames = sender.hear()
        sent = sender.sent(frames)
        part = {name: array[sent : sent + sender.allocated(frames)] for name, array in rows.items()}
        if sender.answer_with(frames, part, delta) == SUCCESS:
            return


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pictures", [(), (RED,), (RED, BLUE), LONG], ids=["text", "one", "two", "long"])
def test_our_language_worker_answers_with_an_encode_side_of_sglang(workers, models, sender, pictures, stream):
    rows, delta = expected_rows(models, *pictures)
    if not pictures:
        rows["mrope_positions"] = np.full_like(rows["mrope_positions"], 99)  # it does not write those of texts
    texts = chat(QUESTION)
    asked = {"messages": texts, "max_tokens": MAX_TOKENS, "stream": stream} | workers.place(8)
    sending = threading.Thread(target=serve_all, args=(sender, rows, delta))
    sending.start()
    response = run(post(workers.language_app, asked))
    sending.join()
    assert response.status_code == 200, response.text
    wanted = models.answer(chat(QUESTION, *pictures), *pictures)
    answer = Answer(response, response)
    assert (answer.streamed if stream else answer.text) == wanted


def test_an_embedding_shorter_than_the_texts_is_refused(workers, models, sender):
    rows, delta = expected_rows(models)
    rows = {name: array[:-1] for name, array in rows.items()}
    sending = threading.Thread(target=serve_all, args=(sender, rows, delta))
    sending.start()
    response = run(post(workers.language_app, {"messages": chat(QUESTION)} | workers.place(9)))
    sending.join()
    assert response.status_code >= 400
    assert "fewer than" in response.json()["error"]["message"]


def test_the_load_balancer_may_abort_a_request(workers, sender):
    asked = {"messages": chat(QUESTION)} | workers.place(10)

    async def aborted() -> Any:
        asking = asyncio.create_task(post(workers.language_app, asked))
        await asyncio.to_thread(sender.hear)
        told = await post(workers.language_app, {"rid": "rid-10"}, "/abort_request")
        assert told.status_code == 200
        return await asking

    response = run(aborted())
    assert response.json()["error"]["code"] == "aborted"
    eventually(lambda: workers.language.load == 0)
