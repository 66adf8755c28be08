"""Commands whose help shows arguments and options as they are typed.

Typer adds braces and the names of Python's types to arguments, and breaks lines at the hyphens of options.
"""

from __future__ import annotations

import inspect
from typing import Any

from typer.core import TyperArgument, TyperCommand

_HYPHEN = "\u2011"
"""The hyphen at which no line is broken: it takes the place of the other one while lines are made."""


def unbroken(text: str) -> str:
    """Returns a text of the help whose options stay whole, until :meth:`PlainCommand.get_help` has made its lines."""
    return text.replace("-", _HYPHEN)


class PlainCommand(TyperCommand):
    """A command whose arguments have a metavar each, which the help shows unchanged."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words of the usage line after the command."""
        return [self.options_metavar or "", *(str(argument.metavar) for argument in self._arguments(ctx))]

    def get_help(self, ctx: Any) -> str:
        """Returns the whole help."""
        return super().get_help(ctx).replace(_HYPHEN, "-")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """Writes what the command does."""
        if self.help:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(unbroken(inspect.cleandoc(self.help)))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments that have a description, and the options."""
        described = [(str(one.metavar), unbroken(one.help)) for one in self._arguments(ctx) if one.help]
        if described:
            with formatter.section("Arguments"):
                formatter.write_dl(described)
        records = [one.get_help_record(ctx) for one in self.get_params(ctx) if not isinstance(one, TyperArgument)]
        with formatter.section("Options"):
            formatter.write_dl([(names, unbroken(text)) for names, text in filter(None, records)])

    def _arguments(self, ctx: Any) -> list[TyperArgument]:
        return [one for one in self.get_params(ctx) if isinstance(one, TyperArgument)]
