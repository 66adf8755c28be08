"""An error of a picture or video names its place in the client's request, also where only the decoder finds it."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve.pictures import png
from tests.serve.workers.conftest import MakeJoined
from tests.serve.workers.joined import run
from tests.serve.workers.test_failed_requests import BAD_MEDIA, PICTURE


@pytest.mark.parametrize("case", [case for case in BAD_MEDIA if BAD_MEDIA[case][2] != "invalid_request"])
@pytest.mark.parametrize("before", [[], [PICTURE]])
def test_the_error_names_the_place_of_the_item(join: MakeJoined, case: str, before: list[dict[str, Any]]) -> None:
    item, status, code = BAD_MEDIA[case]
    response = run(join().post_encode(*before, item | {"param": "messages[3].content[1]"}))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (status, code, "messages[3].content[1]")


def test_the_error_of_a_size_that_the_model_does_not_take_names_the_place(join: MakeJoined) -> None:
    joined = join(media={"max_aspect_ratio": 1000})
    response = run(joined.post_encode({"kind": "image", "data": png(1, 300), "param": "messages[0].content[2]"}))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_media", "messages[0].content[2]")


def test_an_error_that_is_not_the_pictures_names_no_place(join: MakeJoined) -> None:
    joined = join(encode={"max_held_bytes": 3_000_000})
    with joined.encode.budget.hold(1000):
        response = run(joined.post_encode({"kind": "image", "data": png(1000, 1000), "param": "messages[0]"}))
    assert (response.status_code, response.json()["error"]["param"]) == (503, None)
