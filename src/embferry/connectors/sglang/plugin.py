"""Entry point that SGLang calls in each of its processes: ``embferry`` of the group ``sglang.srt.plugins``."""

from __future__ import annotations

import os
import sys

from embferry import EmbeddingTransferError

from .process import end_process, settings
from .settings import is_switched_on


def register() -> None:
    """Puts the plug-in in its place, if the environment asks for it. Ends the process if it cannot work."""
    try:
        if not is_switched_on(os.environ):
            return
        settings()
        install(sys.argv)
    except EmbeddingTransferError as error:
        end_process(f"the embferry plug-in cannot start: {error.detail}")
    except Exception as error:  # noqa: BLE001 - SGLang would log it, and go on without the plug-in
        end_process(f"the embferry plug-in cannot start: {type(error).__name__}: {error}")


def install(argv: list[str]) -> None:
    """Installs the hooks of an encoder, of a language server, or of both if the arguments do not say which it is.

    An encoder's modules import its models, which takes seconds, so a language server does without them.
    """
    from .inside import hooks

    found = []
    if "--language-only" not in argv:
        from .inside import encoder_hooks

        found += encoder_hooks.HOOKS
    if "--encoder-only" not in argv:
        from .inside import language_hooks

        found += language_hooks.HOOKS
    hooks.install(found)
