"""``python -m embferry``: the command ``embferry``."""

from embferry.cli.entry import run

if __name__ == "__main__":
    run()
