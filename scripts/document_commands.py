"""Writes docs/cli.md from the help of the commands. With ``--check``, only exits with status 1 if it is stale."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from embferry.cli.main import app
from embferry.cli.options import SettingsCommand
from generated_page import write_or_check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "cli.md"

HEAD = """# Commands

Generated from the help of the commands by `python scripts/document_commands.py`; edits here are lost.

The help of each command says the same. The exit status is 0 after success, 2 if the command line or a setting is
wrong, and 1 if something else is; the section of a command says if it has others. Commands that start processes take
each setting of these processes as an option. Their sections have the common ones, and link to the
[settings](configuration.md) for the rest.

## Completion

`embferry --install-completion` has the shell that runs it complete commands and options, from the next terminal on.
bash then reads `~/.bash_completions/embferry.sh`, which a line in `~/.bashrc` names, and zsh `~/.zfunc/_embferry`, by
lines in `~/.zshrc`; fish and PowerShell work too. `--show-completion` prints the script instead.
"""

COMMON = "Common options"
HELP = "Show this message and exit."


def page() -> str:
    """Returns the page."""
    return "\n".join([HEAD, *_sections("embferry", typer.main.get_command(app))])


def _sections(name: str, command: Any) -> Iterator[str]:
    """Yields the section of a command, and those of its subcommands after it."""
    context = command.make_context(name.rpartition(" ")[2], [], resilient_parsing=True)
    subcommands = {key: one for key, one in getattr(command, "commands", {}).items() if not one.hidden}
    yield f"## `{name}`\n"
    yield f"```text\n{' '.join([name, *command.collect_usage_pieces(context)])}\n```\n"
    yield inspect.cleandoc(command.help or "") + "\n"
    if subcommands:
        yield _table("command", [(_link(f"{name} {key}", key), _summary(one)) for key, one in subcommands.items()])
    arguments = [
        (f"`{one.metavar}`", one.help) for one in command.params if one.param_type_name == "argument" and one.help
    ]
    if arguments:
        yield _table("argument", arguments)
    yield from _options(command, context)
    for key, one in subcommands.items():
        yield from _sections(f"{name} {key}", one)


def _options(command: Any, context: Any) -> Iterator[str]:
    """Yields the table of the options; of those that are settings, the common ones and where the rest is."""
    rows, others = [], set()
    for option in command.get_params(context):
        record = option.get_help_record(context) if option.param_type_name == "option" else None
        if record is None or record[1] == HELP:
            continue
        title = getattr(option, "rich_help_panel", None) or COMMON
        if isinstance(command, SettingsCommand) and title != COMMON:
            section = re.search(r"\[(\w+)\]$", title)
            name = section[1] if section else "every process"
            others.add(f"[{f'`{name}`' if section else name}](configuration.md#{name.replace(' ', '-')})")
        else:
            rows.append((re.sub(r"(, | / )", r"`\1`", f"`{record[0]}`"), record[1]))
    if rows:
        yield _table("option", rows)
    if others:
        yield f"Further options are the settings of {', '.join(sorted(others))}.\n"


def _summary(command: Any) -> str:
    """Returns the first paragraph of a command's help."""
    paragraph, _, _ = inspect.cleandoc(command.help or "").partition("\n\n")
    return paragraph


def _link(heading: str, text: str) -> str:
    """Returns a link to a section of the page."""
    return f"[`{text}`](#{heading.replace(' ', '-')})"


def _table(head: str, rows: list[tuple[str, str]]) -> str:
    cells = [" | ".join(" ".join(text.replace("|", "\\|").split()) for text in row) for row in rows]
    return "\n".join([f"| {head} | meaning |", "|---|---|", *(f"| {row} |" for row in cells), ""])


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
