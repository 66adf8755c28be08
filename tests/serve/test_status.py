"""The router beside chat: health, readiness, models, metrics, request ids, keys, logs."""

from __future__ import annotations

import json
import re

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from embferry import __version__
from embferry.observe.logs import configure
from tests.serve import pictures
from tests.serve.conftest import user
from tests.serve.fakes import Deployment

pytestmark = pytest.mark.integration

BODY = {
    "model": "shapes",
    "messages": user({"type": "image_url", "image_url": {"url": pictures.data_url(pictures.png())}}, "?"),
}


def test_health_and_version(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/version").json() == {"version": __version__}


def test_the_served_model_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["shapes"]
    assert client.models.retrieve("shapes").owned_by == "embferry"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("deployment", [{"served_model_name": "org/my-model"}], indirect=True)
def test_the_served_model_can_have_another_name(client: openai.OpenAI) -> None:
    assert client.models.retrieve("org/my-model").id == "org/my-model"
    assert client.chat.completions.create(model="org/my-model", messages=user("?")).model == "org/my-model"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="shapes", messages=user("?"))


@pytest.mark.parametrize("role", ["encode", "language"])
def test_ready_needs_a_worker_of_each_role(deployment: Deployment, http: httpx.Client, role: str) -> None:
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    workers = deployment.workers
    deployment.workers = [entry for entry in workers if entry["role"] != role]
    deployment.wait(lambda: http.get("/ready").status_code == 503)
    assert http.get("/ready").json()["missing"] == [f"no {role} worker has a live lease"]
    deployment.workers = workers
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    assert http.get("/ready").json() == {"ready": True, "missing": [], "workers": {"encode": 1, "language": 1}}


def test_workers_of_another_model_do_not_count(deployment: Deployment, http: httpx.Client) -> None:
    deployment.workers = [
        deployment.entry("encode0", model="/data/other"),
        deployment.entry("language0", model="/x/shapes"),
    ]
    deployment.wait(lambda: http.get("/ready").json()["workers"] == {"encode": 0, "language": 1})


@pytest.mark.parametrize("deployment", [{"lease": 0.5}], indirect=True)
@pytest.mark.parametrize("fault", ["status", "list"])
def test_the_last_list_of_workers_stays_in_use_and_ready_reports_it(
    deployment: Deployment, http: httpx.Client, fault: str
) -> None:
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    if fault == "status":
        deployment.bootstrap_fails = True
    else:
        deployment.workers = "none"  # type: ignore[assignment]
    deployment.wait(lambda: http.get("/ready").status_code == 503)
    assert deployment.fake_url in http.get("/ready").json()["missing"][0]
    assert http.post("/v1/chat/completions", json=BODY).status_code == 200


def test_a_bad_lease_is_left_out_with_one_log_line_and_hides_no_other(
    deployment: Deployment, http: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    good = deployment.workers
    bad = [
        {"role": "encode"},
        *({**good[0], "url": url} for url in ("nonsense", "ftp://h", "http://[::1", "http://h:x")),
    ]
    for more in ("encode1", "language1"):
        deployment.workers = [*bad, *good, deployment.entry(more)]
        role = more.rstrip("1")
        deployment.wait(lambda role=role: http.get("/ready").json()["workers"][role] == 2)  # type: ignore[misc]
    lines = [record for record in caplog.records if record.getMessage() == "a lease is left out"]
    assert len(lines) == len(bad)
    assert http.post("/v1/chat/completions", json=BODY).status_code == 200


def test_workers_that_are_missing_in_an_incomplete_list_stay_in_use(deployment: Deployment, http: httpx.Client) -> None:
    """Such is the list of a bootstrap server that was just started, until all workers have registered again."""
    deployment.wait(lambda: http.get("/ready").status_code == 200)
    deployment.list_is_complete = False
    deployment.workers = [deployment.entry("encode1")]
    deployment.wait(lambda: http.get("/ready").json()["workers"] == {"encode": 2, "language": 1})
    deployment.list_is_complete = True
    deployment.wait(lambda: http.get("/ready").json()["workers"] == {"encode": 1, "language": 0})


def test_the_request_id_reaches_both_workers(deployment: Deployment, http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=BODY, headers={"X-Request-Id": "my-id.1"})
    assert answer.headers["x-request-id"] == "my-id.1"
    for name in ("encode0", "language0"):
        assert deployment.fakes[name].requests[0]["request_id"] == "my-id.1"
        assert deployment.fakes[name].headers[0]["x-request-id"] == "my-id.1"


@pytest.mark.parametrize("given", [None, "", "with space", "x" * 129, "ünï"])
def test_an_unusable_request_id_is_replaced(http: httpx.Client, given: str | None) -> None:
    headers = {} if given is None else {"X-Request-Id": given.encode()}
    made = http.get("/health", headers=headers).headers["x-request-id"]  # type: ignore[arg-type]
    assert len(made) == 32
    assert made != http.get("/health").headers["x-request-id"]


def test_unknown_paths_and_methods_are_refused(http: httpx.Client) -> None:
    nowhere, wrong = http.get("/v1/nowhere"), http.get("/v1/chat/completions")
    assert (nowhere.status_code, nowhere.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"
    assert "x-request-id" in nowhere.headers


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE"])
def test_another_method_is_told_those_of_the_path(http: httpx.Client, method: str) -> None:
    known = http.get("/v1/nowhere").json()["error"]["message"].partition("there are ")[2].split(", ")
    assert len(known) > 10
    for wanted, path in (entry.split() for entry in known):
        if wanted != method:
            response = http.request(method, path.replace("NAME", "shapes"))
            assert response.status_code == 405
            message = response.json()["error"]["message"]
            assert re.search(f"the path accepts ([A-Z]+, )*{wanted}(, [A-Z]+)*$", message), message


@pytest.mark.parametrize("deployment", [{"api_key": "right"}], indirect=True)
def test_requests_need_the_api_key(deployment: Deployment, http: httpx.Client) -> None:
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}):
        answer = http.post("/v1/chat/completions", json=BODY, headers=given)
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert http.get("/health").status_code == 200
    good = {"Authorization": "Bearer right"}
    assert http.post("/v1/chat/completions", json=BODY, headers=good).status_code == 200
    wrong = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="wrong", max_retries=0)
    with wrong as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_metrics_count_requests_tokens_and_transfers(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=BODY)
    http.post("/v1/chat/completions", json={**BODY, "model": "other"})
    http.get("/somewhere/else")
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    samples = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }
    assert samples["embferry_router_http_requests_total", "/v1/chat/completions", "200"] == 1
    assert samples["embferry_router_http_requests_total", "/v1/chat/completions", "404"] == 1
    assert samples["embferry_router_http_requests_total", "404", "other"] == 1
    assert samples["embferry_router_chat_errors_total", "model_not_found"] == 1
    assert samples["embferry_router_completion_tokens_total",] == 3
    assert samples["embferry_router_transfers_total", "initial"] == 1
    assert samples["embferry_router_transfers_total", "resumed"] == 7
    assert samples["embferry_router_transfer_bytes_total",] == 4096
    assert samples["embferry_router_media_items_total", "image"] == 1
    assert samples["embferry_router_workers", "encode"] == 1
    assert samples["embferry_router_chat_first_token_seconds_count",] == 1


def test_an_internal_error_reveals_nothing_but_its_id(
    deployment: Deployment, http: httpx.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret detail")

    monkeypatch.setattr("embferry.serve.router.asked.parse_messages", fail)
    answer = http.post("/v1/chat/completions", json=BODY)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert answer.headers["x-request-id"]
    deployment.wait(lambda: "a secret detail" in caplog.text)


def test_the_log_of_a_failure_names_request_and_room(
    deployment: Deployment, http: httpx.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    configure("info", "json")
    deployment.fakes["language0"].script = []
    http.post("/v1/chat/completions", json=BODY, headers={"X-Request-Id": "r7"})
    room = deployment.fakes["encode0"].requests[0]["room"]
    lines: list[dict[str, object]] = []

    def logged() -> bool:
        lines.extend(map(json.loads, capsys.readouterr().err.splitlines()))
        return any(line["message"] == "request" for line in lines)

    deployment.wait(logged)
    (refused,) = (line for line in lines if line.get("code") == "worker_failed")
    assert (refused["request_id"], refused["room"], refused["status"]) == ("r7", room, 502)
