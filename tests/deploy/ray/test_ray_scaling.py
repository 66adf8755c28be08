"""Encode workers come with a burst of requests and go with its end, and no request is lost by either."""

from __future__ import annotations

import pytest

from embferry.serve.config import EncodeSettings, TransferSettings
from tests.deploy.ray.conftest import RAY, START, RayCluster, measured, wait
from tests.deploy.ray.questions import Question, asking

pytestmark = RAY


@pytest.fixture(scope="module")
def running(cluster: RayCluster) -> RayCluster:
    """The application with one encode worker, and a second one while more than two requests wait to be encoded.

    The pool is large and encode workers keep nothing, so that what takes long is the encoder.
    """
    scaled = {"max_encoders": 2, "work_per_encoder": 2, "max_languages": 1}
    delays = {"upscale_delay": 0.1, "downscale_delay": 5}
    changes = {
        "ray": cluster.settings.ray.model_copy(update={**scaled, **delays}),
        "encode": EncodeSettings(cache_bytes=0),
        "transfer": TransferSettings(),
    }
    cluster.run(cluster.settings.model_copy(update=changes))
    return cluster


def test_a_burst_brings_a_second_encode_worker_and_its_end_takes_it_away(
    running: RayCluster, asked: list[Question]
) -> None:
    (first,) = running.workers("encode")
    with asking(running.url, asked[:1], clients=12) as burst:
        wait(lambda: running.count("encode") == 2, "a second encode worker", START)
        (second,) = [one for one in running.workers("encode") if one["id"] != first["id"]]
        wait(lambda: measured(second["url"], "embferry_encode_rooms_ended_total") > 3, "work for it")
        assert running.count("language") == 1
    with asking(running.url, asked[1:], clients=1) as trickle:
        wait(lambda: running.count("encode") == 1, "one encode worker", START)
        before = trickle.count
        wait(lambda: trickle.count >= before + 4, "answers of the one that is left")
    assert burst.wrong == []
    assert trickle.wrong == []
