"""A replica with an instance of vLLM that runs this project's connector."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import ray

from embferry.deploy.ray import proxies
from embferry.deploy.ray.child import Child
from embferry.deploy.ray.measures import waits_in_vllm
from embferry.deploy.ray.names import WorkerRole
from embferry.deploy.ray.replica import Replica
from embferry.deploy.ray.secrets import with_api_key
from embferry.serve.config import Settings
from embferry.serve.http.address import bracketed
from embferry.serve.supervisor import temporary
from embferry.serve.supervisor.local import LOOPBACK
from embferry.serve.supervisor.reserved_ports import ReservedPorts
from embferry.serve.supervisor.vllm import Place, instance_program


class VllmReplica(Replica):
    """Runs ``vllm serve`` as ``embferry serve --engine vllm`` does, at the address of the node.

    Instances that answer tell the router of failures through the proxy of their own node.
    """

    health_path = "/health"

    def __init__(self, role: WorkerRole, settings: Settings) -> None:
        self.counted = waits_in_vllm
        super().__init__(role, settings)

    @property
    def start_seconds(self) -> tuple[float, str]:
        return self.settings.vllm.instance_timeout, "vllm.instance_timeout"

    def make_child(self, held: ExitStack) -> Child:
        host = ray.util.get_node_ip_address()
        self._ports = ReservedPorts(host, 3)  # which this object keeps reserved
        held.callback(self._ports.release)
        folder = temporary.new_root()
        temporary.remove_abandoned(folder)
        held.callback(temporary.release, folder, temporary.hold(folder))
        proxy, port = proxies.address()
        router = f"http://{bracketed(LOOPBACK.get(proxy, proxy))}:{port}"
        place = Place(self.name, folder / self.name, self._ports.numbers, router, host)
        settings = with_api_key(self.settings)
        program = instance_program(settings, self.role, place, self.settings.ray.vllm_arguments)
        return Child(self.name, self.role, program, self.ended)

    def describe(self) -> dict[str, Any]:
        return {"url": self.url}
