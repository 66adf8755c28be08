"""Loads settings from flags, environment, YAML file and defaults, in this order of precedence."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import SecretStr, ValidationError
from pydantic.fields import FieldInfo

from embferry.serve.config import SECTIONS, Settings
from embferry.serve.config_values import plain_words
from embferry.trust.trust import KEY_ENV

ENV_PREFIX = "EMBFERRY_"
UNREADABLE = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
"""Exceptions of PyYAML for a bad document: the last five for values such as ``2001-99-99``, ``!!bool x``, ``[[[…``."""
CONFIG_ENV = "EMBFERRY_CONFIG"
NOT_SETTINGS = (CONFIG_ENV, KEY_ENV)
"""Variables that are read elsewhere. The cluster key is no setting: all users of the machine see the options."""

Key = tuple[str, ...]
"""``("transfer", "num_blocks")``, or ``("model",)`` for a setting of every process."""

FIELDS: dict[Key, FieldInfo] = {
    (name,): field for name, field in Settings.model_fields.items() if name not in SECTIONS
} | {(section, name): field for section, model in SECTIONS.items() for name, field in model.model_fields.items()}

SGLANG_ALIASES: dict[str, Key | None] = {
    "SGLANG_EMBEDDING_CACHE_BUFFER_SIZE": ("transfer", "num_blocks"),
    "SGLANG_EMBEDDING_CACHE_BLOCK_SIZE": ("transfer", "block_size"),
    "SGLANG_EMBEDDING_DEFAULT_ALLOCATE_BUFFER_SIZE": ("transfer", "default_allocate_tokens"),
    "SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT": ("transfer", "bootstrap_timeout"),
    "SGLANG_DISAGGREGATION_WAITING_TIMEOUT": ("transfer", "waiting_timeout"),
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": ("transfer", "heartbeat_interval"),
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": ("transfer", "heartbeat_max_failures"),
    # One thread drives all transfers, so there is no pool and no queue to size.
    "SGLANG_DISAGGREGATION_THREAD_POOL_SIZE": None,
    "SGLANG_DISAGGREGATION_QUEUE_SIZE": None,
}
"""The setting of each variable that users of SGLang have set; None for a variable without a counterpart."""


def dotted(key: Key) -> str:
    return ".".join(key)


def env_name(key: Key) -> str:
    return ENV_PREFIX + "_".join(_spoken(key)).upper()


def flag_name(key: Key) -> str:
    return "--" + "-".join(_spoken(key)).replace("_", "-")


def _spoken(key: Key) -> Key:
    """Returns the parts of a setting's name outside the file, where section ``security`` goes unnamed."""
    return key[1:] if key[0] == "security" else key


ENV_KEYS: dict[str, Key] = {env_name(key): key for key in FIELDS}


class ConfigError(Exception):
    """The settings are invalid. ``problems`` holds one sentence per mistake, which begins with its place."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Given(NamedTuple):
    """A value as the user wrote it, and its place."""

    value: Any
    place: str


class Loaded(NamedTuple):
    """Valid settings, and notices for the user, such as that a variable of SGLang was read."""

    settings: Settings
    notices: tuple[str, ...]


def load(
    flags: Mapping[Key, str],
    environ: Mapping[str, str],
    config: str | None = None,
    typed: Mapping[Key, str] | None = None,
) -> Loaded:
    """Loads and validates the settings.

    Args:
        flags: the values of the command line, by key.
        environ: the environment.
        config: path of the YAML file. None: the path in ``EMBFERRY_CONFIG``, or no file if that is not set.
        typed: the options as they were typed, where they differ from the names of the settings.

    Raises:
        ConfigError: unknown names, bad values or an unreadable file; it lists all mistakes.
    """
    problems: list[str] = []
    notices: list[str] = []
    path = config or environ.get(CONFIG_ENV)
    given: dict[Key, Given] = {}
    given.update(_from_file(Path(path), problems) if path else ())
    given.update(_from_aliases(environ, problems, notices))
    given.update(_from_environment(environ, problems))
    spelled = typed or {}
    given.update((key, Given(value, spelled.get(key, flag_name(key)))) for key, value in flags.items())
    settings = _validated(given, problems)
    if settings is None or problems:
        raise ConfigError(problems)
    places = {dotted(key): entry.place for key, entry in given.items()}
    return Loaded(settings.with_places(places) if places else settings, tuple(notices))


def _from_environment(environ: Mapping[str, str], problems: list[str]) -> Iterator[tuple[Key, Given]]:
    """Yields the values of our own variables. An empty variable counts as not set."""
    for name, value in environ.items():
        if name.startswith(ENV_PREFIX) and name not in NOT_SETTINGS and value:
            if key := ENV_KEYS.get(name):
                yield key, Given(value, name)
            else:
                without_section = _in_sections(name.removeprefix(ENV_PREFIX).lower())
                problems.append(
                    f"{name}: no such setting{_did_you_mean(name, ENV_KEYS, map(env_name, without_section))}"
                )


def _from_aliases(environ: Mapping[str, str], problems: list[str], notices: list[str]) -> Iterator[tuple[Key, Given]]:
    for name, key in SGLANG_ALIASES.items():
        if not (value := environ.get(name)):
            continue
        if key is None:
            if not (value.isascii() and value.isdigit() and int(value) > 0):
                problems.append(f"{name}: {value!r} is not a positive whole number")
            notices.append(f"{name} has no effect: one thread drives all transfers")
        elif environ.get(env_name(key)):
            notices.append(f"{name} is ignored, because {env_name(key)} is set")
        else:
            yield key, Given(value, name)
            notices.append(f"{name} is read as {env_name(key)}={value}")


def _from_file(path: Path, problems: list[str]) -> list[tuple[Key, Given]]:
    text = ""
    try:
        text = path.read_text("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return list(_pairs(root, path, (), problems)) if root is not None else []
    except OSError as error:
        reason = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or error
        problems.append(f"{path}: cannot be read: {reason}")
    except UnicodeDecodeError:
        problems.append(f"{path}: cannot be read: it is no text in UTF-8")
    except UNREADABLE as error:
        problems.append(f"{path}{_where_and_why(error, text)}")
    return []


def _where_and_why(error: Exception, text: str) -> str:
    """Returns the line and the reason of an error of PyYAML, on one line."""
    line, reasons = 0, [str(error)]
    if isinstance(error, yaml.MarkedYAMLError):
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 0
        reasons = [reason for reason in (error.context, error.problem) if reason]
    elif isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        reasons = [f"the character #x{error.character:04x} is not allowed"]
    return f"{f':{line}' if line else ''}: is not valid YAML: {' '.join(', '.join(reasons).split())}"


def _pairs(node: yaml.Node, path: Path, section: Key, problems: list[str]) -> Iterator[tuple[Key, Given]]:
    """Yields the settings of one mapping of the file; sections are one level down."""
    if not isinstance(node, yaml.MappingNode):
        if section == () or _value(node) is not None:  # an empty section is fine
            subject = f"section {dotted(section)}" if section else "the file"
            problems.append(f"{path}:{node.start_mark.line + 1}: {subject} must hold names and values")
        return
    known = _known(section)
    seen: set[str] = set()
    for name_node, value_node in node.value:
        name = str(_value(name_node))
        place = f"{path}:{name_node.start_mark.line + 1}: {dotted((*section, name))}"
        if name in seen:
            problems.append(f"{place}: is set twice")
        elif name not in known:
            problems.append(f"{place}: no such setting{_hint(name, section)}")
        elif not section and name in SECTIONS:
            yield from _pairs(value_node, path, (name,), problems)
        else:
            yield (*section, name), Given(_value(value_node), place)
        seen.add(name)


def of_mapping(values: Mapping[str, Any], place: str) -> Settings:
    """Returns the settings that a part of another file holds, such as a config file of Ray Serve.

    Args:
        values: as in a settings file.
        place: the name of that part, for messages.

    Raises:
        ConfigError: unknown names or bad values; it lists all mistakes.
    """
    problems: list[str] = []
    settings = _validated(dict(_entries(values, place, (), problems)), problems)
    if settings is None or problems:
        raise ConfigError(problems)
    return settings.with_places({dotted(key): f"{place}.{dotted(key)}" for key in FIELDS})


def _entries(values: Mapping[str, Any], place: str, section: Key, problems: list[str]) -> Iterator[tuple[Key, Given]]:
    """Yields the settings of one mapping; sections are one level down."""
    known = _known(section)
    for key, value in values.items():
        name = str(key)
        where = f"{place}.{dotted((*section, name))}"
        if name not in known:
            problems.append(f"{where}: no such setting{_hint(name, section)}")
        elif section or name not in SECTIONS:
            yield (*section, name), Given(value, where)
        elif isinstance(value, Mapping):
            yield from _entries(value, place, (name,), problems)
        elif value is not None:  # an empty section is fine
            problems.append(f"{where}: must hold names and values")


def _known(section: Key) -> list[str]:
    """Returns the names that a section may hold, or the file outside of sections."""
    return [key[-1] for key in FIELDS if key[:-1] == section] + ([] if section else list(SECTIONS))


def _hint(name: str, section: Key) -> str:
    """Returns the end of a sentence that suggests another name than this unknown one; "" if there is none."""
    elsewhere = map(dotted, _in_sections(name)) if not section else ()
    return _about_nesting(name, section) or _did_you_mean(name, _known(section), elsewhere)


def _in_sections(name: str) -> list[Key]:
    """Returns the settings that have this name within a section; only the router's, if it has one."""
    found = [key for key in FIELDS if len(key) > 1 and key[-1] == name]
    return [("router", name)] if ("router", name) in found else found


def _about_nesting(name: str, section: Key) -> str:
    """Returns the end of a sentence about a dotted name in the file, such as ``transfer.num_blocks``; "" for others."""
    outer, _, inner = name.partition(".")
    known = [key[-1] for key in FIELDS if key[:-1] == (outer,)]
    if outer not in SECTIONS or not inner or section not in ((), (outer,)):
        return ""
    if inner not in known:
        return _did_you_mean(inner, known)
    return f"; write {inner}: below {outer}:, indented" if not section else f"; here it is {inner}"


def _did_you_mean(name: str, known: Iterable[str], better: Iterable[str] = ()) -> str:
    """Returns the end of a sentence that suggests ``better``, or else the known name closest to ``name``, if any is."""
    close = [*better] or difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def _value(node: yaml.Node) -> Any:
    try:
        return yaml.SafeLoader("").construct_object(node, deep=True)
    except yaml.YAMLError:
        raise
    except UNREADABLE as error:  # of a date such as 2001-99-99, which has no line
        raise yaml.MarkedYAMLError(problem=str(error) or type(error).__name__, problem_mark=node.start_mark) from error


def _validated(given: Mapping[Key, Given], problems: list[str]) -> Settings | None:
    nested: dict[str, Any] = {}
    for key, entry in given.items():
        target = nested.setdefault(key[0], {}) if len(key) > 1 else nested
        target[key[-1]] = entry.value
    try:
        return Settings.model_validate(nested)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            loc = tuple(str(part) for part in mistake["loc"])
            key = next((loc[:n] for n in (2, 1) if loc[:n] in given), loc)
            place = given[key].place if key in given else dotted(loc)
            shown = "" if is_secret(key) else f" (got {mistake['input']!r})"
            problems.append(f"{place}: {plain_words(mistake['msg'])}{shown}")
        return None


def is_secret(key: Key) -> bool:
    """Returns whether the value of a setting must not be shown."""
    return key in FIELDS and SecretStr in getattr(FIELDS[key].annotation, "__args__", ())
