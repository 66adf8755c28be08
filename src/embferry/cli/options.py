"""Options of the command line that are derived from the settings, and how commands fail.

An option has the name, description and default of its setting. Options are passed on as text: the settings' models
parse and validate them, as they do values from other sources.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperOption

from embferry.cli.metavars import metavar, with_unit
from embferry.cli.plain import PlainCommand, unbroken
from embferry.cli.wrapping import folded, width_of
from embferry.observe.logs import configure, is_json
from embferry.protocol.errors import EmbferryError
from embferry.serve import security
from embferry.serve.config import SECTIONS, Settings
from embferry.serve.config_load import FIELDS, ConfigError, Key, dotted, env_name, flag_name, is_secret, load
from embferry.serve.config_values import api_key

BAD_USAGE = 2
"""Exit status of a command with wrong arguments or settings."""

CONFIG_HELP = "YAML file with settings. Flags override the environment, the environment overrides the file."


COMMON: tuple[Key, ...] = (
    ("model",), ("host",), ("router", "port"), ("router", "api_keys_file"), ("router", "engine"),
    ("serve", "runs_on"), ("serve", "encode_workers"), ("serve", "language_workers"),
    ("media", "allowed_hosts"), ("transfer", "transports"), ("transfer", "num_blocks"), ("log_level",),
)  # fmt: skip
"""Settings that come first in the help of a command that has them, with the port of its own process."""
_COMMON, _OTHERS = "Common options", "Further settings of every process"
_SHORT: dict[Key, str] = {("cache", "url"): "--cache", ("serve", "runs_on"): "--on"}
"""Options with a short name beside their own."""

_EXTRA = re.compile(r"Got unexpected extra argument(?:s|\(s\))? \((\S.*)\)", re.DOTALL)
"""The words of typer about arguments that no option takes."""

TYPED = "embferry.typed"
"""Key of a context's ``meta``: the words of the command line."""


class SettingsCommand(PlainCommand):
    """A command whose help has a heading for each section of the settings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Remembers the words as they were typed, so that messages can name them."""
        ctx.meta[TYPED] = typed = tuple(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # of click, or of the copy of it in later versions of typer
            takes_rest = any(one.name == "rest" for one in self.params)
            if takes_rest and type(error).__name__ == "NoSuchOption" and _names_vllm(typed):
                error.message += f". Options of vllm serve go after --: -- {error.option_name}"  # type: ignore[attr-defined]
            if found := _EXTRA.fullmatch(str(getattr(error, "message", ""))):
                word = found[1].split()[0]
                error.message = f"{word} is no option; if it is the model, use --model {word}"  # type: ignore[attr-defined]
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes the options, the common ones first."""
        groups: dict[str, list[tuple[str, str]]] = {_COMMON: [], _OTHERS: []}
        for parameter in self.get_params(ctx):
            # The usage line shows arguments.
            if isinstance(parameter, TyperOption) or parameter.name == "help":
                record = parameter.get_help_record(ctx)
                title = getattr(parameter, "rich_help_panel", None) or _COMMON
                groups.setdefault(title, []).extend([record] if record else [])
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl([(names, unbroken(text)) for names, text in records])


def _names_vllm(words: Iterable[str]) -> bool:
    """Returns whether vLLM is chosen by words that cannot be parsed, or by the environment."""
    named = [word.rpartition("=")[2] for word in words]
    return "vllm" in [*named, os.environ.get(env_name(("router", "engine")))]


def _heading(key: Key, own: tuple[str, ...]) -> str:
    """Returns the heading of an option in the help of a command."""
    if _is_common(key, own):
        return _COMMON
    if len(key) == 1:
        return _OTHERS
    about, _, _ = (SECTIONS[key[0]].__doc__ or "").partition("\n")
    sentence, _, _ = about.partition(". ")
    return f"{sentence.removesuffix('.')} [{key[0]}]"


def _is_common(key: Key, own: tuple[str, ...]) -> bool:
    return key in COMMON or key == (own[0], "port")


def default_text(key: Key) -> str:
    """Returns the default as a user would type it; empty for None."""
    value = FIELDS[key].default
    if isinstance(value, tuple | dict):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _names(key: Key, own: tuple[str, ...]) -> list[str]:
    """Returns the names of the option of a setting; those of ``own`` sections also go without the section's name."""
    is_own = len(key) > 1 and key[0] in own
    names = [flag_name(key[1:]), flag_name(key)] if is_own and key[0] != "security" else [flag_name(key)]
    return [_SHORT[key], *names] if key in _SHORT else names


def _as_typed(key: Key, own: tuple[str, ...], words: Iterable[str]) -> str:
    """Returns the name by which an option stands on the command line; the last one counts, as its value does."""
    names = {spelling: name for name in _names(key, own) for spelling in (name, f"--no-{name[2:]}")}
    typed = [word.partition("=")[0] for word in words]
    return next((word for word in reversed(typed) if word in names), flag_name(key))


def _option(key: Key, own: tuple[str, ...]) -> Any:
    """Returns the annotation of the option: bool for a switch, text for everything else."""
    annotation = FIELDS[key].annotation
    names = _names(key, own)
    if annotation is bool:
        names = [f"{name}/--no-{name[2:]}" for name in names]
    text = " ".join((FIELDS[key].description or "").split())
    if default := default_text(key):
        text += f" [default: {with_unit(key, default)}]"
    option = typer.Option(
        *names,
        help=text,
        show_default=False,
        metavar=metavar(key),
        rich_help_panel=_heading(key, own),
        hidden=is_secret(key),  # it is refused, with a sentence that says what to do instead
    )
    return Annotated[bool | None if annotation is bool else str | None, option]


def settings_command(
    *own: str,
    also: tuple[str, ...] = (),
    check: Callable[[Settings, frozenset[Key]], None] = lambda settings, given: None,
    rest: str = "",
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a function of the settings a command with ``--config`` and one option for every setting that it uses.

    The command configures the log. It ends the process with status 2 and the reasons if the settings are invalid, also
    if the function raises ConfigError; with status 1 and the reason if it raises an EmbferryError.

    Args:
        own: The sections whose options also exist without the section's name.
        also: Further sections. The settings of every process are always among the options.
        check: Called with the settings and the keys of the command line; ends the process if they do not fit together.
        rest: The name of the words after ``--`` in the help; if given, the function also takes the list of them.
    """
    used = [key for key in FIELDS if len(key) == 1 or key[0] in (*own, *also, "security")]
    used.sort(key=lambda key: COMMON.index(key) if key in COMMON else 2 if _is_common(key, own) else len(COMMON))
    keys = {"__".join(key): key for key in used}
    parameters = {"config": Annotated[str | None, typer.Option("--config", help=CONFIG_HELP, metavar="FILE")]}
    parameters |= {name: _option(key, own) for name, key in keys.items()}
    if rest:
        parameters["rest"] = Annotated[list[str] | None, typer.Argument(metavar=f"[-- {rest}...]", show_default=False)]

    def decorated(body: Callable[..., None]) -> Callable[..., None]:
        def command(context: typer.Context, **options: Any) -> None:
            if (options.get("log_format") or os.environ.get(env_name(("log_format",)))) == "json":
                configure("info", "json", context.info_name or "")  # what is wrong with the settings is told so too
            flags = {keys[name]: str(value) for name, value in options.items() if name in keys and value is not None}
            typed = {key: _as_typed(key, own, context.meta.get(TYPED, ())) for key in flags}
            if secrets := [key for key in flags if is_secret(key)]:
                where = [f"set {env_name(key)}, or {dotted(key)} in the file of --config" for key in secrets]
                fail(*(_shown_to_all(typed[key], advice) for key, advice in zip(secrets, where, strict=True)))
            try:
                loaded = load(flags, os.environ, options.get("config"), typed)
            except ConfigError as error:
                # With the values of vLLM's option of this name, which are others than those of ours.
                moved = rest and ("dtype",) in flags and _names_vllm(context.meta.get(TYPED, ()))
                fail(*error.problems, *(["with --engine vllm, --dtype goes after --: -- --dtype"] if moved else ()))
            settings = loaded.settings
            if settings.log_format == "json":
                configure(settings.log_level, "json", context.info_name or "")
            for notice in loaded.notices:
                tell(f"note: {notice}")
            check(settings, frozenset(flags))
            configure(settings.log_level, settings.log_format, context.info_name or "")
            try:
                security.apply(settings, replaces=True)
                body(settings, *([options.get("rest") or []] if rest else []))
            except ConfigError as error:
                fail(*error.problems)
            except EmbferryError as error:
                fail(error.detail, status=1)

        _declare(command, parameters)
        command.__doc__ = body.__doc__
        return command

    return decorated


def _declare(command: Callable[..., None], parameters: dict[str, Any]) -> None:
    """Gives a command the annotated parameters that typer reads, besides the context."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__annotations__ = {"context": typer.Context, **parameters, "return": None}
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context),
            *(inspect.Parameter(name, keyword, default=None, annotation=each) for name, each in parameters.items()),
        ]
    )


def not_on_command_line(context: typer.Context, parameter: typer.CallbackParam, value: str) -> str:
    """The callback of an option with an API key, which has to come from the environment."""
    source = context.get_parameter_source(str(parameter.name))
    if source is not None and source.name == "COMMANDLINE":
        fail(_shown_to_all(parameter.opts[0], f"set {parameter.envvar}"))
    try:
        return api_key(value) if value else ""
    except ValueError as error:
        fail(f"{parameter.envvar}: {error}")


def _shown_to_all(option: str, advice: str) -> str:
    return f"{option}: every user of this machine can read a command line (ps); {advice}"


def fail(*problems: str, status: int = BAD_USAGE) -> NoReturn:
    """Ends the process with one line per problem on stderr."""
    for problem in problems:
        tell(problem, logging.ERROR)
    raise typer.Exit(status)


def tell(sentence: str, level: int = logging.INFO) -> None:
    """Writes a sentence to standard error; as a line of the log if those are JSON, which a program reads."""
    if is_json():
        logging.getLogger(__name__).log(level, "%s", sentence)
    else:
        typer.echo(folded(f"embferry: {sentence}", width_of(sys.stderr)), err=True)


def need(extra: str, *modules: str) -> None:
    """Ends the process with status 2 if a module of the extra ``embferry[extra]`` is not installed."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            fail(f"{module} is not installed; install it with: pip install 'embferry[{extra}]'")
