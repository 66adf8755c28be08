"""``python -m embferry``: the command ``embferry``."""

from embferry.cli.main import run

if __name__ == "__main__":
    run()
