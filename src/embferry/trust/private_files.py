"""The rule for files with secrets: which of them strangers cannot read."""

from __future__ import annotations

import os


def is_private(status: os.stat_result) -> bool:
    """Returns whether only those may read a file that are meant to.

    These are its owner alone; or, if root owns it and this process is not root's, also its group. The latter is how
    Kubernetes mounts a secret for a process that is not root: nothing but the group lets it read the file.

    Args:
        status: Of the open file.
    """
    others = status.st_mode & 0o077
    return not others or (others == 0o040 and status.st_uid == 0 and os.geteuid() != 0)
