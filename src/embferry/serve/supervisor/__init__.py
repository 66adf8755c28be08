"""Everything on one machine: processes that are started, watched, restarted when they die, and ended.

``cluster``         all processes of a deployment
``local``           :class:`LocalCluster`: the processes of this project
``vllm``            instances of vLLM and the router before them
``vllm_arguments``  the user's own arguments for ``vllm serve``, checked before anything is started
``process``         one process, over all its restarts
``ports``           whether the ports are free, asked before any process starts
``reserved_ports``  ports that no other process takes before the one they are meant for
``handover``        the pipes between supervisor and child, and the settings on their way
``child``           the main module of a child
``vllm_child``      the main module of a child that runs ``vllm serve``
``temporary``       temporary folders of deployments
``kept_folder``     the folder in memory that language workers share
``descendants``     all that a process has started, and the end of it
``serve``           :func:`run`, behind ``embferry serve``
``first_question``  the commands that it shows when all is ready
"""

from embferry.serve.supervisor.local import LocalCluster
from embferry.serve.supervisor.process import ClusterError, ProcessView
from embferry.serve.supervisor.serve import run

__all__ = ["ClusterError", "LocalCluster", "ProcessView", "run"]
