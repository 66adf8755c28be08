"""The cluster key, its proofs, where a part of a cluster may listen without one, and digests of messages."""

from .keys import ClusterKeys, Key
from .trust import Trust

__all__ = ["ClusterKeys", "Key", "Trust"]
