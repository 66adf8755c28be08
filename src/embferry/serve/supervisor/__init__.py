"""Everything on one machine: processes that are started, watched, started again when they die, and ended.

``child``     what runs in each process: it ends when its parent does, however that came about
``handover``  how the settings get into it
``slot``      one process that is to be there, again and again
``cluster``   all of them: :class:`LocalCluster`
``serve``     :func:`run`, behind ``embferry serve``
"""

from embferry.serve.supervisor.cluster import LocalCluster
from embferry.serve.supervisor.serve import run
from embferry.serve.supervisor.slot import ClusterError, ProcessView

__all__ = ["ClusterError", "LocalCluster", "ProcessView", "run"]
