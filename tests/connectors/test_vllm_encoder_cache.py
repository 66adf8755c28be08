"""Encoder caches of vLLM that are smaller than the pictures of one request."""

from __future__ import annotations

from functools import partial

import pytest

from .engines import picture
from .split import running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

LARGEST = 256
"""Visual tokens of the largest picture: the encoder cache holds as many, and no more."""


def test_the_pictures_of_a_request_need_not_fit_in_the_encoder_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each is computed into the prompt and evicted for the next, at the producer and at the consumer."""
    from embferry.models.tiny_qwen import make

    folder, small = tmp_path_factory.mktemp("cache"), partial(make, max_image_tokens=LARGEST)
    with running(folder, small, ["tcp"], max_num_batched_tokens=128, max_model_len=1024) as engines:
        items = [picture(1, 448, 448), picture(2, 448, 448), picture(3, 224, 224), picture(4, 448, 448)]
        for engine in (engines.producer, engines.consumer, engines.undivided):
            assert engine.refresh()["encoder_cache_tokens"] < 2 * LARGEST
        for order in (items, items[::-1]):
            assert engines.split(*order)["tokens"] == engines.whole(*order)["tokens"]
        engines.wait_until_settled()
