"""Parts of the deployment on Ray that need no cluster: what is work, and how many workers it asks for."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from embferry.engine.cache import EmbeddingCache
from embferry.serve.encode.metrics import EncodeMetrics

pytestmark = pytest.mark.ray

STATES = {"decoding": 1, "bootstrapping": 10, "encoding": 2, "inflight": 100}


def test_an_encoder_is_busy_with_what_it_decodes_and_encodes_and_not_with_what_it_sends() -> None:
    from embferry.deploy.ray.measures import total, waits_for_encoder

    page = EncodeMetrics(EmbeddingCache(0), lambda: STATES).exposition().decode()
    assert total(page, waits_for_encoder) == 3


def test_an_instance_of_vllm_is_busy_with_what_runs_and_waits() -> None:
    from embferry.deploy.ray.measures import total, waits_in_vllm

    names = {"running": 2, "waiting": 5, "swapped": 9}
    page = "".join(f'vllm:num_requests_{name}{{engine="0"}} {count}\n' for name, count in names.items())
    assert total(page, waits_in_vllm) == 7


def test_a_page_that_counts_no_requests_is_an_error_and_not_zero() -> None:
    from embferry.deploy.ray.measures import total, waits_for_answer

    with pytest.raises(ValueError, match="does not say"):
        total("up 1\n", waits_for_answer)


@pytest.mark.parametrize(
    ("told", "wanted"),
    [
        ({"work": {"a": 4.0, "b": 6.0}}, 2.5),  # Ray rounds it up
        ({"work": {"a": 0.0}}, 0),  # and keeps to the least number
        ({"work": {}}, 3),
        ({}, 3),
        (None, 3),
    ],
)
def test_the_number_of_workers_goes_by_the_sum_of_the_work(
    told: dict[str, dict[str, float]] | None, wanted: float
) -> None:
    """A controller that has heard of no work, such as one that was started again, changes nothing."""
    from embferry.deploy.ray.scaling import by_work

    config = SimpleNamespace(target_ongoing_requests=4)
    context = SimpleNamespace(aggregated_metrics=told, config=config, target_num_replicas=3)
    assert by_work(context)[0] == wanted
