"""The config file for Ray Serve and the manifest for KubeRay in ``deploy/ray``: every option is known."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from embferry.serve.config import Settings
from embferry.serve.http import api_keys
from embferry.serve.http.address import get
from embferry.trust import ClusterKeys, Trust
from tests.deploy.ray.conftest import DEADLINE, RAY, START, RayCluster, wait
from tests.deploy.ray.questions import Question, ask, asking

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
    from ray.serve.config import AutoscalingConfig
    from ray.serve.schema import ServeDeploySchema

    from embferry.deploy.ray.scaling import autoscaling, by_work

    (application,) = ServeDeploySchema.model_validate(config).applications
    Settings.model_validate(application.args)
    built = call_user_app_builder_with_args_if_necessary(import_attr(application.import_path), application.args)
    assert built._bound_deployment.name == "router"
    ray = Settings().ray
    expected = autoscaling(1, 1, 1, ray.upscale_delay, ray.downscale_delay).model_dump()
    assert [deployment.name for deployment in application.deployments] == ["encode", "language"]
    for deployment in application.deployments:
        scaling = AutoscalingConfig.model_validate(deployment.autoscaling_config).model_dump()
        changed = {name for name, value in scaling.items() if value != expected[name]}
        assert changed <= {"max_replicas", "target_ongoing_requests", "policy"}, deployment.name
        assert import_attr(scaling["policy"]["policy_function"]) is by_work


def test_the_manifest_fits_together() -> None:
    """A volume or a resource that a part of it names is one that another part provides."""
    from ray import __version__

    spec = manifest()["spec"]["rayClusterConfig"]
    assert spec["rayVersion"] == __version__
    (application,) = yaml.safe_load(manifest()["spec"]["serveConfigV2"])["applications"]
    args = application["args"]
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
    most = {one["name"]: one["autoscaling_config"]["max_replicas"] for one in application["deployments"]}
    assert most == {"encode": groups["vision"]["maxReplicas"], "language": groups["answers"]["maxReplicas"]}


def test_the_steps_of_the_manifest_make_keys_that_its_pods_can_use(tmp_path: Path) -> None:
    text = (DEPLOY / "rayservice.yaml").read_text("utf-8")
    steps = [shlex.split(line[1:]) for line in text.splitlines() if line.startswith("#   ")]
    for words in steps:
        if words[0] == "embferry":
            subprocess.run([sys.executable, "-m", *words], cwd=tmp_path, check=True, capture_output=True)
    (secret,) = [words for words in steps if words[0] == "kubectl"]
    files = [word.removeprefix("--from-file=") for word in secret if word.startswith("--from-file=")]
    values = {name: (tmp_path / name).read_text("utf-8") for name in files}
    made = ClusterKeys.of_file(tmp_path / "cluster-key").accepted()
    for group in manifest()["spec"]["rayClusterConfig"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        (container,), (volume,) = pod["containers"], pod["volumes"]
        environment = {one["name"]: values[one["valueFrom"]["secretKeyRef"]["key"]] for one in container["env"]}
        keys = Trust.of_environment(environment).keys
        assert keys is not None
        assert keys.accepted() == made
        assert {item["key"] for item in volume["secret"]["items"]} <= values.keys()
    assert api_keys.read(tmp_path / "api-keys")


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ({"router": {"api_key": "secret"}}, r"^args\.router\.api_key: Ray's dashboard would show it"),
        ({"ray": {"max_encoder": 2}}, r"^args\.ray\.max_encoder: no such setting; did you mean max_encoders\?$"),
        ({"ray": {"max_encoders": "many"}}, r"^args\.ray\.max_encoders: .*'many'"),
        *(
            (
                {"ray": {"vllm_arguments": words}},
                rf"^args\.ray\.vllm_arguments: {words[0][:7]}.*: Ray's dashboard .* set \w+",
            )
            for words in (["--api-key", "s"], ["--api_key=s"], ["--api-k", "s"], ["--hf-token=s"])
        ),
        ({"wire": "origin"}, "SGLang's load balancer"),
        ({"router": {"engine": "vllm"}, "ray": {"routers": 2}}, "one router"),
        ({"router": {"engine": "vllm"}, "vllm": {"prefills": 1, "decodes": 1}}, "do not run on Ray"),
    ],
)
def test_what_ray_cannot_run_is_refused_with_a_reason(args: dict[str, Any], why: str) -> None:
    from embferry.deploy.ray import app
    from embferry.serve.config_load import ConfigError

    with pytest.raises(ConfigError, match=why):
        app(args)


def fitted(cluster: RayCluster) -> dict[str, Any]:
    """Returns the file with other paths of the keys, places of the workers and an other address of the proxies."""
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
    return config


def test_the_application_of_the_config_file_answers(cluster: RayCluster, asked: list[Question], tmp_path: Path) -> None:
    cluster.start_serve()  # its proxies listen where the tests look for them
    config = fitted(cluster)
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


def test_numbers_of_workers_beside_the_settings_change_without_a_restart(
    cluster: RayCluster, asked: list[Question]
) -> None:
    """No worker is replaced, and no request fails."""
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    cluster.start_serve()
    config = fitted(cluster)

    def deploy() -> None:
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate(config))

    deploy()
    wait(lambda: get(cluster.url, "/ready", DEADLINE)[0] == 200, "ready", START)
    before = {role: cluster.workers(role) for role in ("encode", "language")}
    config["applications"][0]["deployments"][0]["autoscaling_config"]["min_replicas"] = 2
    with asking(cluster.url, asked[1:], clients=2) as clients:
        deploy()
        wait(lambda: cluster.count("encode") == 2, "two encode workers", START)
        count = clients.count
        wait(lambda: clients.count > count + 4, "more answers")
    assert clients.wrong == []
    for role, workers in before.items():
        ids = {worker["id"] for worker in workers}
        assert ids <= {worker["id"] for worker in cluster.workers(role)}, role
