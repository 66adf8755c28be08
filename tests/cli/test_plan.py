"""``embferry plan``, called as a user calls it."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from embferry.bench import machine
from embferry.bench.results import save
from embferry.bench.serving.results import ServingResults
from embferry.plan.speeds import decoded, encoded
from tests.bench.serving import stub_endpoint as stub
from tests.plan.examples import SPEEDS
from tests.plan.test_comparison import run
from tests.serve.test_cli import called

GIVEN = (
    "--encode-seconds-per-token", "1e-4", "--prefill-seconds-per-token", "5e-5", "--step-seconds", "0.02",
)  # fmt: skip
PAGE = Path(__file__).parents[2] / "docs" / "planning.md"
EXAMPLES = re.findall(r"^```console\n\$ ((?:.*\\\n)*.*)\n((?s:.*?))^```$", PAGE.read_text(), re.MULTILINE)


@pytest.fixture
def speeds(tmp_path: Path) -> str:
    path = tmp_path / "speeds.json"
    path.write_bytes(encoded(SPEEDS))
    return str(path)


def test_a_plan_from_given_speeds() -> None:
    status, out, err = called("plan", *GIVEN, "--images", "2", "--size", "128x128", "--rate", "3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("shapes: 2 pictures a request (128x128 = 64 visual tokens), 768 B a visual token; 3")
    assert lines[-1].startswith(("Worth it: ", "Not worth it: "))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_examples_of_the_page_print_what_it_shows(number: int) -> None:
    command, shown = EXAMPLES[number]
    assert called(*shlex.split(command.replace("\\\n", " "))[1:]) == (0, shown, "")


@pytest.mark.parametrize("words", [("--rate", "999999"), ("--rate", "1000", "--devices", "3")])
@pytest.mark.parametrize("more", [(), ("--json",), ("--cores", "2")])
def test_a_rate_that_the_devices_do_not_carry_recommends_nothing(words: tuple[str, ...], more: tuple[str, ...]) -> None:
    status, out, err = called("plan", *GIVEN, "--image-tokens", "100", *words, *more)
    assert (status, out) == (1, "")
    assert err.startswith(f"embferry: plan_rate_not_carried: --rate {words[1]}: ")
    assert "by the demand law" in err.lower()


@pytest.mark.parametrize("more", [(), ("--json",)])
def test_a_goal_that_cannot_be_met_recommends_nothing(more: tuple[str, ...]) -> None:
    words = ("--image-tokens", "100", "--requests", "20", "--ttft-goal", "0.001")
    status, out, err = called("plan", *GIVEN, *words, *more)
    assert (status, out) == (1, "")
    assert err.startswith("embferry: plan_goal_not_met: --ttft-goal 0.001: it cannot be met with up to 64 devices: ")


def test_one_picture_a_request_still_mixes_the_sizes() -> None:
    words = ("--rate", "0.1", "--requests", "10", "--json")
    small, large, both = (
        json.loads(called("plan", *GIVEN, *words, *sizes)[1])
        for sizes in (
            ("--size", "96x128"),
            ("--size", "128x128"),
            ("--size", "96x128", "--size", "128x128"),
        )
    )
    assert both["sizes"] == [{"size": "96x128", "tokens": 48}, {"size": "128x128", "tokens": 64}]
    assert small["images"] == both["images"] == 1
    inverse = [1 / one["rows"][0]["capacity"] for one in (small, large, both)]
    assert inverse[2] == pytest.approx((inverse[0] + inverse[1]) / 2)


def test_sizes_are_taken_in_turn() -> None:
    status, out, _ = called("plan", *GIVEN, "--images", "3", "--size", "128x128", "--size", "96x128")
    assert (status, "128x128 = 64 visual tokens, 96x128 = 48 visual tokens" in out) == (0, True)


def test_json_and_a_plot(tmp_path: Path, speeds: str) -> None:
    drawn = tmp_path / "plan.svg"
    words = ("--image-tokens", "100", "--devices", "3", "--plot", str(drawn), "--requests", "50")
    status, out, _ = called("plan", "--speeds", speeds, *words, "--json")
    assert status == 0
    found = json.loads(out)
    assert [(row["encoders"], row["languages"]) for row in found["rows"]] == [(0, 3), (1, 2), (2, 1)]
    assert drawn.read_text().startswith("<svg")


def test_options_go_before_the_file_and_the_result_is_saved(tmp_path: Path, speeds: str) -> None:
    saved = tmp_path / "new.json"
    words = ("--speeds", speeds, "--step-seconds", "0.5", "--bandwidth", "1e9", "--cores", "4", "--save", str(saved))
    assert called("plan", *words, "--image-tokens", "10", "--output-tokens", "2", "--rate", "0.1")[0] == 0
    found = decoded(saved.read_bytes(), "x")
    assert (found.step.base, found.bandwidth, found.cores) == (0.5, 1e9, 4.0)
    assert found.encode == SPEEDS.encode
    assert found.source == "given; step as given"
    again = ("--speeds", str(saved), "--cores", "0", "--save", str(saved), "--image-tokens", "10", "--rate", "0.1")
    assert called("plan", *again)[0] == 0
    assert decoded(saved.read_bytes(), "x").cores is None


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        ((), "plan_speeds_missing", "--measure URL"),
        (GIVEN[:4], "plan_speeds_missing", "--step-seconds"),
        ((*GIVEN, "--rate", "0"), "plan_workload_invalid", "--rate"),
        ((*GIVEN, "--rate", "nan"), "plan_workload_invalid", "--rate"),
        ((*GIVEN, "--images", "0"), "plan_workload_invalid", "--images 0"),
        ((*GIVEN, "--size", "big"), "plan_workload_invalid", "--size big"),
        ((*GIVEN, "--size", "0x5"), "plan_workload_invalid", "--size 0x5"),
        ((*GIVEN, "--size", "9000x2"), "plan_workload_invalid", "refuses"),
        ((*GIVEN, "--size", "8x8", "--image-tokens", "5"), "plan_workload_invalid", "two ways"),
        ((*GIVEN, "--output-tokens", "0"), "plan_workload_invalid", "--output-tokens"),
        ((*GIVEN, "--prompt-tokens", "0"), "plan_workload_invalid", "--prompt-tokens"),
        ((*GIVEN, "--requests", "1"), "plan_workload_invalid", "--requests"),
        ((*GIVEN, "--requests", "999999999"), "plan_workload_invalid", "fewer requests"),
        ((*GIVEN, "--seed", "-1"), "plan_workload_invalid", "--seed"),
        ((*GIVEN, "--burstiness-cv", "-1"), "plan_workload_invalid", "--burstiness-cv"),
        ((*GIVEN, "--model", "/nowhere"), "plan_model_unknown", "/nowhere"),
        ((*GIVEN, "--bandwidth", "0"), "plan_speeds_invalid", "bandwidth"),
        ((*GIVEN, "--cores", "-1"), "plan_speeds_invalid", "or 0 if each instance has a device of its own"),
        ((*GIVEN, "--cores", "nan"), "plan_speeds_invalid", "--cores nan"),
        ((*GIVEN, "--plot", "x.png"), "plan_workload_invalid", "--plot x.png: plots are drawn as SVG"),
        ((*GIVEN, "--plot", "/nowhere/x.svg"), "plan_workload_invalid", "/nowhere/x.svg"),
        ((*GIVEN, "--save", "/nowhere/x.json"), "plan_speeds_invalid", "/nowhere/x.json"),
        (("--speeds", "/nowhere.json"), "plan_speeds_invalid", "/nowhere.json"),
        (("--speeds", "x", "--measure", "http://x"), "plan_speeds_invalid", "two ways"),
        ((*GIVEN, "--check", "/nowhere.json"), "plan_results_invalid", "/nowhere.json"),
    ],
)  # fmt: skip
def test_wrong_input_is_named_with_a_stable_code(words: tuple[str, ...], code: str, told: str) -> None:
    status, out, err = called("plan", *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"embferry: {code}: ")
    assert told in " ".join(err.split())


def test_a_file_that_is_no_speeds_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("{}")
    status, _, err = called("plan", "--speeds", str(path))
    assert (status, "plan_speeds_invalid" in err, "--measure" in err) == (2, True, True)


def results(tmp_path: Path, *factors: float) -> str:
    """Writes results whose runs took so many times as long as predicted."""
    found = ServingResults.begin(machine.describe({}))
    found.runs = [run(factor, scenario=f"workload {number}") for number, factor in enumerate(factors)]
    save(found, tmp_path / "serve.json")
    return str(tmp_path / "serve.json")


def test_a_check_prints_both_figures(tmp_path: Path, speeds: str) -> None:
    status, out, _ = called("plan", "--speeds", speeds, "--check", results(tmp_path, 1.0, 1.1))
    assert status == 0
    assert len(out.splitlines()) == 3
    status, out, _ = called("plan", "--speeds", speeds, "--check", results(tmp_path, 1.0, 1.5), "--json")
    assert status == 1
    assert json.loads(out)[1]["measured_ttft"] > 0


def test_a_check_of_runs_that_cannot_be_predicted(tmp_path: Path, speeds: str) -> None:
    path = results(tmp_path)
    status, _, err = called("plan", "--speeds", speeds, "--check", path)
    assert (status, "has no run with samples" in err) == (2, True)


def test_runs_of_a_check_that_cannot_be_predicted_are_left_out(tmp_path: Path, speeds: str) -> None:
    found = ServingResults.begin(machine.describe({}))
    found.runs = [run(), run(plan=None, title="pictures in turn", scenario="again")]
    save(found, tmp_path / "serve.json")
    status, out, err = called("plan", "--speeds", speeds, "--check", str(tmp_path / "serve.json"))
    assert (status, len(out.splitlines())) == (0, 2)
    assert err.startswith("left out: pictures in turn has no workload")


@pytest.mark.integration
def test_measured_speeds_are_saved_and_name_their_source(tmp_path: Path) -> None:
    saved = tmp_path / "speeds.json"
    documents = {"/v1/models": '{"data": [{"id": "m"}]}'}
    with stub.serving(lambda request: request.answer([5] * request.body["max_tokens"]), documents) as url:
        words = ("--measure", url, "--save", str(saved), "--size", "128x128", "--requests", "20", "--rate", "0.5")
        status, out, err = called("plan", *words)
    assert status == 0, err
    found = decoded(saved.read_bytes(), "x")
    assert found.source.startswith("measured at an undivided engine on 20")
    assert found.cores is not None
    assert found.cores >= 1, "it ran on this machine, whose cores all share"
    assert "measuring: warming" in err
    assert "share" in out


@pytest.mark.integration
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--measure", "http://127.0.0.1:9"), "lists no model"),
        (("--measure", "localhost:9"), "http://"),
        (("--measure", "http://127.0.0.1:9", "--extra", "{"), "--extra"),
        (("--measure", "http://127.0.0.1:9", "--extra", "1"), "--extra"),
    ],
)
def test_a_deployment_that_does_not_answer_is_told(words: tuple[str, ...], told: str) -> None:
    status, _, err = called("plan", *words)
    assert (status, "plan_measuring_failed" in err, told in err) == (1, True, True)


@pytest.mark.integration
def test_an_undivided_engine_is_no_router() -> None:
    documents = {"/v1/models": '{"data": [{"id": "m"}]}'}
    with stub.serving(lambda request: request.answer([5]), documents) as url:
        status, _, err = called("plan", "--measure-split", url)
    assert (status, "is no router of embferry" in err) == (1, True)
