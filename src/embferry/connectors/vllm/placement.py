"""Which ranks of an engine run on which host.

With ``--nnodes``, vLLM starts an equal number of ranks on each host. The scheduler runs on host 0, beside the first
ranks. Only the ranks of the first pipeline stage have an encoder cache, and they are the first of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from embferry.trust.policy import is_loopback

if TYPE_CHECKING:
    from vllm.config import ParallelConfig


@dataclass(frozen=True, slots=True)
class Placement:
    """Where the ranks with an encoder cache run.

    Attributes:
        ranks: Their number.
        per_host: Ranks of the engine on each host, those of later pipeline stages included.
        host: This host's number.
        address: The address of host 0.
    """

    ranks: int
    per_host: int
    host: int
    address: str

    @property
    def hosts(self) -> int:
        """The number of hosts with such ranks."""
        return -(-self.ranks // self.per_host)

    @property
    def ranks_here(self) -> int:
        """The number of such ranks on this host."""
        return min(self.per_host, max(0, self.ranks - self.host * self.per_host))

    def check(self, listens: str, ranks_port: int | None, replicas: int) -> None:
        """Raises ValueError if embeddings cannot reach every host with these settings.

        Args:
            listens: The setting ``host`` on this host.
            ranks_port: The setting of that name.
            replicas: vLLM's ``data_parallel_size``.
        """
        if self.hosts == 1:
            return
        if replicas > 1:
            raise ValueError(f"data_parallel_size is {replicas}: then all ranks of a replica must be on one host")
        if ranks_port is None:
            why = "name a free port of the first one as ranks_port, at all of them"
            raise ValueError(f"ec_connector_extra_config: the ranks are on {self.hosts} hosts; {why}")
        if is_loopback(listens) and not is_loopback(self.address):
            why = f"no other host reaches the host {listens}; name this host's own address"
            raise ValueError(f"ec_connector_extra_config: the ranks are on {self.hosts} hosts, and {why}")


def placement(parallel: ParallelConfig) -> Placement:
    """Returns the placement that vLLM's configuration says."""
    ranks = parallel.tensor_parallel_size * parallel.prefill_context_parallel_size
    return Placement(ranks, parallel.local_world_size, parallel.node_rank_within_dp, parallel.master_addr)
