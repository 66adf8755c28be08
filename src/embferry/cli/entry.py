"""The first code of the command: it imports nothing before Ctrl-C is quiet."""

from __future__ import annotations

import signal
import sys

EXTRAS = {"serve": "serve", "encode": "serve", "language": "serve", "top": "top"}
"""Extras of the verbs that need more than ``router``, the extra with the command line itself."""
LIBRARY_ALONE = """embferry {version}

The library is installed: from embferry import SendManager, ReceiveManager, ...
The command line is not. Install it with one of
  pip install 'embferry[router]'    routers, keys, ask, status
  pip install 'embferry[top]'       the same, and routers live in a terminal
  pip install 'embferry[serve]'     the same as router, and workers with a model"""


def run() -> None:
    """Runs the command line. Until all modules are there, Ctrl-C ends the process as it does one without a handler."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a job of a shell in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.argv[1:2] == ["probe"] and len(sys.argv) == 3 and not sys.argv[2].startswith("-"):
        from embferry.cli.health import probe  # in a tenth of the time that the imports below take

        sys.exit(probe(sys.argv[2]))
    try:
        import typer  # noqa: F401
    except ModuleNotFoundError:
        sys.exit(_without_command_line(sys.argv[1:]))
    from embferry.cli.main import run as run_command

    run_command()


def _without_command_line(words: list[str]) -> int:
    """Stands in for the command line where only the library is installed. Returns the exit status."""
    from embferry import __version__

    if words == ["--version"]:
        print(f"embferry {__version__}")
        return 0
    if words in ([], ["--help"]):
        print(LIBRARY_ALONE.format(version=__version__))
        return 0 if words else 2
    extra = EXTRAS.get(words[0], "router")
    print(f"embferry: typer is not installed; install it with: pip install 'embferry[{extra}]'", file=sys.stderr)
    return 2
