"""Encoder caches of vLLM that are smaller than what is to be computed."""

from __future__ import annotations

from functools import partial

import pytest

from .engines import picture
from .split import TEXT, running

pytestmark = [pytest.mark.vllm_more, pytest.mark.timeout(1800)]

LARGEST, COUNT = 256, 6
"""Visual tokens of the largest picture, and pictures of a request."""


def test_pictures_need_not_fit_in_the_encoder_cache_together(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each is computed into the prompt, and evicted for the next one.

    vLLM's cache holds at least the largest item that the engine takes. A consumer that is given embeddings takes videos
    as long as a prompt, so all pictures of one prompt fit there, but not those of several requests at once.
    """
    from embferry.models.tiny_qwen import make

    folder, small = tmp_path_factory.mktemp("cache"), partial(make, max_image_tokens=LARGEST)
    options = {"limit_mm_per_prompt": {"image": COUNT, "video": 0}, "max_model_len": 2048}
    with running(folder, small, ["tcp"], max_num_batched_tokens=128, **options) as engines:
        requests = [[picture(COUNT * n + at, 448, 448) for at in range(COUNT)] for n in range(3)]
        for engine in (engines.producer, engines.undivided):
            assert engine.refresh()["encoder_cache_tokens"] < COUNT * LARGEST
        assert engines.consumer.refresh()["encoder_cache_tokens"] < 3 * COUNT * LARGEST
        params = [engines.encode(*items) for items in requests]
        asked = [(engines.message(given, *items), given) for given, items in zip(params, requests, strict=True)]
        answers = engines.consumer.ask_all(asked, max_tokens=16)
        for items, answer in zip(requests, answers, strict=True):
            assert answer["tokens"] == engines.undivided.ask(*items, TEXT, max_tokens=16)["tokens"]
        engines.wait_until_settled()
