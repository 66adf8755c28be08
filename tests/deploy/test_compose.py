"""``compose.yaml``: valid, true to the command line, and its services answer a question together."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.containers import ROOT, Image, Network, Running
from tests.deploy.waiting import until

pytestmark = pytest.mark.deploy
FILE = ROOT / "compose.yaml"
GIVEN = {"EMBFERRY_CLUSTER_KEY": "5a" * 32, "EMBFERRY_ROUTER_API_KEY": "a-key-of-this-test"}
"""The variables of ``.env``."""
_VARIABLE = re.compile(r"\$\{(\w+)(?:(:-|:\?)([^}]*))?\}")


class MissingError(Exception):
    """A variable is required and not set: its message."""


def read(given: Mapping[str, str]) -> dict[str, Any]:
    """Returns the file with its variables replaced, as Compose reads it."""

    def value(match: re.Match[str]) -> str:
        name, how, rest = match.groups()
        if given.get(name):
            return given[name]
        if how == ":?":
            raise MissingError(rest)
        return str(rest or "")

    return dict(yaml.safe_load(_VARIABLE.sub(value, re.sub(r"^#.*$", "", FILE.read_text(), flags=re.MULTILINE))))


SERVICES: dict[str, dict[str, Any]] = read(GIVEN)["services"]


def test_the_file_is_one_of_compose() -> None:
    import compose_spec

    def accepted(text: str) -> None:
        compose_spec.PyCompose.from_yaml(text).validate()

    text = yaml.safe_dump(read(GIVEN))
    accepted(text)
    for right, wrong in (
        ("read_only:", "readonly:"),
        ("service_healthy", "service_well"),
        ("start_period: 30s", "start_period: 30 x"),
    ):
        assert right in text
        with pytest.raises((ValueError, TypeError)):
            accepted(text.replace(right, wrong))


@pytest.mark.parametrize("missing", GIVEN)
def test_the_keys_are_required(missing: str) -> None:
    with pytest.raises(MissingError, match="the head of"):
        read({name: value for name, value in GIVEN.items() if name != missing})


def test_each_service_has_no_rights_and_a_health_check() -> None:
    assert SERVICES.keys() == {"bootstrap", "encode", "language", "router"}
    for name, service in SERVICES.items():
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["command"][0] == name
        assert service["healthcheck"]["test"][:3] == ["CMD", "embferry", "probe"]
        assert (name == "router") == ("ports" in service)
        assert (name == "router") == ("EMBFERRY_ROUTER_API_KEY" in service["environment"])
    assert SERVICES["router"]["ports"] == ["127.0.0.1:8000:8000"], "only this machine, unless EMBFERRY_ADDRESS says so"


def test_the_services_answer_a_question_together(image: Image, tmp_path: Path) -> None:
    """Each with its command, environment and rights, and with the names of the others; in the order of the file."""
    addresses = {name: f"172.30.0.{number}" for number, name in enumerate(SERVICES, 2)}
    hosts = tmp_path / "hosts"
    hosts.write_text("".join(f"{address} {name}\n" for name, address in addresses.items()) + "127.0.0.1 localhost\n")
    tmp_path.chmod(0o755)
    models = tmp_path / "models"
    models.mkdir()
    running: dict[str, Running] = {}
    with ExitStack() as stack:
        network = stack.enter_context(Network(*addresses.values()))

        def how(name: str) -> dict[str, Any]:
            service = SERVICES[name]
            mounted = {volume.partition(":")[2]: models for volume in service.get("volumes", ())}
            return {
                "network": network, "read_only": service["read_only"], "temporary": service["tmpfs"],
                "bound": {"/etc/hosts": hosts, **mounted},
            }  # fmt: skip

        def start(name: str) -> None:
            if name in running:
                return
            for other, condition in SERVICES[name].get("depends_on", {}).items():
                assert condition == {"condition": "service_healthy"}
                start(other)
            environ = SERVICES[name]["environment"]
            one = image.start(stack, tmp_path / name, image.entry(SERVICES[name]["command"]), environ, **how(name))
            running[name] = one
            check = image.words(SERVICES[name]["healthcheck"]["test"][1:], environ, **how(name))

            def is_healthy() -> bool:
                assert one.process.poll() is None, one.text
                return subprocess.run(check, capture_output=True, check=False).returncode == 0

            until(is_healthy)

        for name in SERVICES:
            start(name)
        asked = [
            "embferry",
            "ask",
            "--url",
            "http://router:8000",
            "/media/coins.png",
            "How many circles are there?",
            "-v",
        ]
        bound = {"/etc/hosts": hosts, "/media": ROOT / "examples/media"}
        answer = image.run(
            asked,
            {"EMBFERRY_ROUTER_API_KEY": GIVEN["EMBFERRY_ROUTER_API_KEY"]},
            network=network,
            bound=bound,
            temporary=["/tmp"],
        )
        assert answer.splitlines()[0] == "4"
        assert "tcp" in answer
        for one in running.values():
            one.terminate()
        for name, one in running.items():
            seconds = int(SERVICES[name]["stop_grace_period"].removesuffix("s"))
            assert one.end(seconds) == 0, one.text
