"""The config file for Ray Serve and the manifest for KubeRay in ``deploy/ray``: every option is known."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from embferry.serve.config import Settings
from embferry.serve.http.address import get
from tests.deploy.ray.conftest import DEADLINE, RAY, START, RayCluster, wait
from tests.deploy.ray.questions import Question, ask

pytestmark = RAY

DEPLOY = Path(__file__).parents[3] / "deploy" / "ray"


def config_file() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "serve-config.yaml").read_text("utf-8")))


def manifest() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "rayservice.yaml").read_text("utf-8")))


@pytest.mark.parametrize("config", [config_file(), yaml.safe_load(manifest()["spec"]["serveConfigV2"])])
def test_every_option_is_known_and_the_application_is_found(config: dict[str, Any]) -> None:
    from ray._common.utils import import_attr
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
    from ray.serve.schema import ServeDeploySchema

    (application,) = ServeDeploySchema.model_validate(config).applications
    Settings.model_validate(application.args)
    built = call_user_app_builder_with_args_if_necessary(import_attr(application.import_path), application.args)
    assert built._bound_deployment.name == "router"


def test_the_manifest_fits_together() -> None:
    """A volume or a resource that a part of it names is one that another part provides."""
    from ray import __version__

    spec = manifest()["spec"]["rayClusterConfig"]
    assert spec["rayVersion"] == __version__
    args = yaml.safe_load(manifest()["spec"]["serveConfigV2"])["applications"][0]["args"]
    provided: set[str] = set()
    for group in spec["workerGroupSpecs"]:
        given = yaml.safe_load(yaml.safe_load(group["rayStartParams"]["resources"]))
        assert set(given) == {group["groupName"]}
        provided |= given.keys()
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        (folder,) = [mount["mountPath"] for mount in container["volumeMounts"]]
        (volume,) = pod["volumes"]
        files = [f"{folder}/{item['path']}" for item in volume["secret"]["items"]]
        assert args["router"]["api_keys_file"] in files
        assert [one["name"] for one in container["env"]] == ["EMBFERRY_CLUSTER_KEY"]
    wanted = {name for role in ("router", "encoder", "language") for name in args["ray"][f"{role}_resources"]}
    assert wanted == provided
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups["vision"]["maxReplicas"] == args["ray"]["max_encoders"]
    assert groups["answers"]["maxReplicas"] == args["ray"]["max_languages"]


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"router": {"api_key": "secret"}}, "Ray's dashboard would show it"),
        ({"wire": "origin"}, "SGLang's load balancer"),
        ({"router": {"engine": "vllm"}, "ray": {"routers": 2}}, "one router"),
        ({"router": {"engine": "vllm"}, "vllm": {"prefills": 1, "decodes": 1}}, "do not run on Ray"),
    ],
)
def test_what_ray_cannot_run_is_refused_with_a_reason(args: dict[str, Any], why: str) -> None:
    from embferry.deploy.ray import app
    from embferry.serve.config_load import ConfigError

    with pytest.raises(ConfigError, match=why):
        app(Settings.model_validate(args))


def test_the_application_of_the_config_file_answers(cluster: RayCluster, asked: list[Question], tmp_path: Path) -> None:
    """The file as it is, but for the paths of the keys, the place of the workers, and the address of the proxies."""
    cluster.start_serve()  # its proxies listen where the tests look for them
    config = config_file()
    config |= {"proxy_location": "HeadOnly", "http_options": {"host": "127.0.0.1", "port": cluster.port}}
    args = config["applications"][0]["args"]
    del args["router"]["api_keys_file"]
    args["security"]["cluster_key_file"] = str(cluster.settings.security.cluster_key_file)
    args["serve"] = {"start_timeout": START}
    own = cluster.settings.ray
    args["ray"] |= {
        name: getattr(own, name) for name in ("router_resources", "encoder_resources", "language_resources")
    }
    path = tmp_path / "serve-config.yaml"
    path.write_text(yaml.safe_dump(config), "utf-8")
    environment = {**os.environ, "RAY_ADDRESS": cluster.cluster.address}
    command = [sys.executable, "-m", "ray.serve.scripts", "run", str(path)]
    with (tmp_path / "log").open("wb") as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait(lambda: running.poll() is not None or get(cluster.url, "/ready", DEADLINE)[0] == 200, "ready", START)
            assert running.poll() is None, (tmp_path / "log").read_text()
            for question in asked:
                assert ask(cluster.url, question)[0] == ""
        finally:
            running.send_signal(signal.SIGINT)
            running.wait(DEADLINE)
