"""Trust between the parts of a cluster: its key, proofs of it, where a part may listen without, and digests."""

from .keys import ClusterKeys, Key
from .trust import Trust

__all__ = ["ClusterKeys", "Key", "Trust"]
