"""Commands whose help shows arguments as they are typed: typer adds braces and the names of Python's types."""

from __future__ import annotations

from typing import Any

from typer.core import TyperArgument, TyperCommand


class PlainCommand(TyperCommand):
    """A command whose arguments have a metavar each, which the help shows unchanged."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Returns the words of the usage line after the command."""
        return [self.options_metavar or "", *(str(argument.metavar) for argument in self._arguments(ctx))]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the arguments that have a description, and the options."""
        described = [(str(one.metavar), one.help) for one in self._arguments(ctx) if one.help]
        if described:
            with formatter.section("Arguments"):
                formatter.write_dl(described)
        records = [one.get_help_record(ctx) for one in self.get_params(ctx) if not isinstance(one, TyperArgument)]
        with formatter.section("Options"):
            formatter.write_dl([record for record in records if record])

    def _arguments(self, ctx: Any) -> list[TyperArgument]:
        return [one for one in self.get_params(ctx) if isinstance(one, TyperArgument)]
