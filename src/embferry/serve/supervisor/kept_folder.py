"""The folder in memory that the language workers of a deployment on this machine share."""

from __future__ import annotations

import logging
from pathlib import Path

from embferry.serve.config import LanguageSettings
from embferry.serve.supervisor import temporary

log = logging.getLogger(__name__)


class SharedFolder:
    """The folder. It is made when the deployment starts, and removed with everything in it when it has ended.

    Attributes:
        path: None before it is made, and if none is wanted or possible.
    """

    def __init__(self, settings: LanguageSettings) -> None:
        self._is_wanted = settings.kept_folder is None and settings.kept_bytes > 0
        self._lock = -1
        self.path: Path | None = None

    def make(self) -> None:
        """Makes the folder, and removes those of deployments that were killed. Without one, nothing is kept."""
        root = temporary.new_kept_root() if self._is_wanted else None
        if root is None:
            return
        temporary.remove_abandoned(root)
        try:
            self._lock = temporary.hold(root)
        except OSError as error:
            log.warning("what arrives at a language worker that is killed will not be kept: %s", error)
            return
        self.path = root

    def remove(self) -> None:
        """Removes the folder. Idempotent."""
        path, self.path = self.path, None
        if path is not None:
            temporary.release(path, self._lock)

    def given_to(self, settings: LanguageSettings) -> LanguageSettings:
        """Returns the settings of a language worker that uses the folder."""
        return settings if self.path is None else settings.model_copy(update={"kept_folder": self.path})
