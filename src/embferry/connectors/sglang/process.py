"""The process of SGLang that the plug-in runs in: its settings, and its end if the plug-in cannot work."""

from __future__ import annotations

import os
import sys
from functools import cache
from typing import NoReturn

from embferry import EmbeddingTransferError

from .settings import PluginSettings, read

STATUS = 2
BACKEND = "start it with --encoder-transfer-backend zmq_to_scheduler, which the plug-in takes the place of"


@cache
def settings() -> PluginSettings:
    """Returns the settings, which are read once in a process. Ends the process if one is wrong."""
    try:
        return read(os.environ)
    except EmbeddingTransferError as error:
        end_process(f"the embferry plug-in cannot start: {error.detail}")


def end_process(why: str) -> NoReturn:
    """Ends the process with one sentence on standard error.

    SGLang logs the exception of a plug-in and goes on without it, with its own transfers. A process that its user
    wanted to run with the plug-in must not do that.
    """
    print(f"embferry: {why}", file=sys.stderr, flush=True)
    os._exit(STATUS)
