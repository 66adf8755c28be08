"""Who may talk to the parts of a cluster: the cluster key, its proofs, and where a part may listen without one."""

from .keys import ClusterKeys, Key
from .trust import Trust

__all__ = ["ClusterKeys", "Key", "Trust"]
