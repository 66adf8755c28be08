"""The cluster key, its proofs, and where a part of a cluster may listen without one."""

from .keys import ClusterKeys, Key
from .trust import Trust

__all__ = ["ClusterKeys", "Key", "Trust"]
