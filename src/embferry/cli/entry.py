"""The first code of the command: it imports nothing before Ctrl-C is quiet."""

from __future__ import annotations

import signal


def run() -> None:
    """Runs the command line. Until all modules are there, Ctrl-C ends the process as it does one without a handler."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a job of a shell in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from embferry.cli.main import run as run_command

    run_command()
