"""The end of the application: replicas finish what they have begun, but none that has not begun is waited for."""

from __future__ import annotations

import contextlib
import logging
import time

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus, ReplicaState

from embferry.deploy.ray.application import worker_seconds
from embferry.deploy.ray.names import APPLICATION
from embferry.serve.config import Settings

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
NAMESPACE = "serve"
"""The namespace of Ray Serve's actors."""


def end_application(settings: Settings) -> None:
    """Ends the application and waits until it has ended; the rest is left to Serve after the time that workers have.

    Serve would wait for a replica that still has no place as long as for one that has work. So those that have not
    started yet are killed.
    """
    idle = _starting()
    serve.delete(APPLICATION, _blocking=False)
    deadline = time.monotonic() + worker_seconds(settings)
    while (application := serve.status().applications.get(APPLICATION)) is not None:
        if idle and application.status == ApplicationStatus.DELETING:  # from here on, Serve starts no other one
            for name in idle:
                with contextlib.suppress(ValueError):  # it has ended
                    ray.kill(ray.get_actor(name, namespace=NAMESPACE))
            idle = []
        if time.monotonic() > deadline:
            log.warning("the application has not ended in time; Ray goes on ending it")
            return
        time.sleep(POLL_SECONDS)


def _starting() -> list[str]:
    """Returns the actors of the replicas that have not started yet; some have no place on any node."""
    details = _get_global_client().get_serve_details()  # there is no public way to ask
    deployments = details["applications"].get(APPLICATION, {}).get("deployments", {})
    replicas = [replica for deployment in deployments.values() for replica in deployment["replicas"]]
    return [replica["actor_name"] for replica in replicas if replica["state"] == ReplicaState.STARTING]
