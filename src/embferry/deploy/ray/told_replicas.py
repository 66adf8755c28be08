"""Hears from Ray Serve which replicas run.

Serve copies this module's class into other processes by value, with all that its methods name. So what belongs to a
process is reached through its module.
"""

from __future__ import annotations

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica

from embferry.deploy.ray import replica_list
from embferry.deploy.ray.names import WorkerRole


class ToldReplicas(FIFOMixin, RequestRouter):  # type: ignore[misc]  # of Ray, which is not checked
    """Gets the replicas of a deployment, as what Serve calls a request router.

    It passes them on to :data:`.replica_list.REPLICAS`. Requests to the workers do not go through Serve, so it has next
    to nothing to route.
    """

    def initialize_state(self, role: WorkerRole) -> None:
        """Serve calls it once with the arguments of the deployment's configuration."""
        self._role = role

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Serve calls it on a thread of its own at every change of the replicas, or of what they tell."""
        super().update_replicas(replicas)
        replica_list.REPLICAS.put(self._role, [replica.routing_stats for replica in replicas])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Returns all replicas, for the one call with which a router introduces itself."""
        return [candidate_replicas]
