"""The user's own arguments for ``vllm serve``, checked before anything is started.

vLLM takes many seconds to load before it looks at its arguments. Its source names them, and is read here without
loading it. Where an argument seems wrong by that, vLLM's own parser has the last word.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from embferry.serve.config_load import UNREADABLE

log = logging.getLogger(__name__)

_SET_HERE = {
    "model": "name the model with --model before --",
    "model-tag": "name the model with --model before --",
    "host": "embferry serve gives each instance an address; --host before -- is that of the router",
    "port": "embferry serve gives each instance a port of its own; --port before -- is that of the router",
    "ec-transfer-config": "embferry serve writes it for each instance; --transports before -- chooses the transports",
    "no-enable-mm-embeds": "instances that answer need --enable-mm-embeds, which embferry serve gives them",
}
"""Options that embferry serve gives to each instance, and the advice for each. On the command line the last one counts,
so the user's own would replace them; in a file of ``--config`` they have no effect."""
_API_KEY = "set EMBFERRY_ROUTER_API_KEY, which guards the router and is passed on to the instances"
_UNREACHABLE = {
    "uds": "the router asks each instance at a port",
    "grpc": "the router asks each instance by HTTP",
    "headless": "the router needs the HTTP server of each instance",
    "ssl-keyfile": "the router asks the instances of this machine without TLS; EMBFERRY_TLS_CERT is for the router",
    "ssl-certfile": "the router asks the instances of this machine without TLS; EMBFERRY_TLS_CERT is for the router",
    "api-key": _API_KEY,
}
"""Options with which the router could not reach the instances, also in a file."""
_SECRETS = (("api-key", "api-k", "EMBFERRY_ROUTER_API_KEY"), ("hf-token", "hf-t", "HF_TOKEN"))
"""Options whose value is a secret, the shortest form that vLLM reads as each, and the variable to use instead."""
_SOURCES = ("engine/arg_utils.py", "entrypoints/launchers/cli_args.py", "entrypoints/openai/cli_args.py")
"""The files of vLLM that name its options; the last one is that of earlier versions."""
_LITERAL = re.compile(r"[\"']--([a-zA-Z][\w-]*)[\"']")
_FIELD = re.compile(r"^    ([a-z]\w*): *([^=\n]+)", re.MULTILINE)
_ALIAS = re.compile(r"^(\w+)(?:: TypeAlias)? = (Literal\[[^\]]*\])", re.MULTILINE)
_QUOTED = re.compile(r"[\"']([^\"']*)[\"']")
_ERROR = re.compile(r"\berror: (.+)")
_NUMBER = re.compile(r"auto|-?[\d.]+(e-?\d+)?[kmgt]?", re.IGNORECASE)
_PARSE = """
import sys
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
make_arg_parser(FlexibleArgumentParser(prog="vllm serve")).parse_args(sys.argv[1:])
"""
PARSE_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Known:
    """The options of a version of vLLM, each name without its hyphens.

    Attributes:
        names: all of them.
        switches: those without a value.
        singles: those with one value at most.
        numbers: those whose value is a number.
        choices: the values of each option that takes one of a few.
    """

    names: frozenset[str]
    switches: frozenset[str]
    singles: frozenset[str]
    numbers: frozenset[str]
    choices: dict[str, frozenset[str]]


def problems(extra: Sequence[str], known: Known | None, refusal: Callable[[Sequence[str]], str]) -> list[str]:
    """Returns a sentence for each thing that is wrong with the arguments; empty if nothing is.

    Args:
        extra: the arguments.
        known: the options of vLLM; None if they cannot be told.
        refusal: asks vLLM's own parser about arguments that seem wrong; returns its reason, or "" if it takes them.
    """
    if extra and not extra[0].startswith("-"):
        return [positional(extra[0])]
    if "--omni" in extra:  # options of vLLM-Omni, which vLLM then starts in its place
        known = None
    given = options(extra)
    found = [f"{word}: {why}" for word, name in given for why in _refused(_whole(name, known))]
    for file in values(extra).get("config", ())[:1]:
        told = told_in(file)
        found += [f"{name} in {file}: {why}" for name, why in _UNREACHABLE.items() if told.get(name)]
    doubtful = [] if known is None or found else list(_doubtful(extra, known))
    if doubtful and (reason := refusal(extra)):
        return [f"vllm serve: {reason}", *(f"{word}: {why}" for word, why in doubtful if why)]
    return found


def positional(word: str) -> str:
    """Returns what to do instead of naming a model as ``vllm serve MODEL`` does."""
    return f"{word} is no option: name a model with --model {word}"


def secrets(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns each option whose value is a secret, as it was typed, and the variable to use in its place."""
    given = values(words)
    return [
        (word, variable)
        for word, name in options(words)
        for whole, least, variable in _SECRETS
        if name.startswith(least) and whole.startswith(name) and given[name]  # a bare --hf-token names a file
    ]


def options(words: Sequence[str]) -> list[tuple[str, str]]:
    """Returns each option as it was typed, and its name: without hyphens before it, a value, or a key behind a dot.

    vLLM reads underscores as hyphens in the names of options.
    """
    typed = [word.partition("=")[0] for word in words if word.startswith("--")]
    return [(word, word[2:].partition(".")[0].replace("_", "-")) for word in typed]


def values(words: Sequence[str]) -> dict[str, list[str]]:
    """Returns the values of each option, of which the last one counts."""
    found: dict[str, list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            ((_, name),) = options([word])
            found[name] = [word.partition("=")[2]] if "=" in word else []
        elif name:
            found[name].append(word)
    return found


def told_in(file: str) -> dict[str, Any]:
    """Returns what a file of ``--config`` says, by the names of options; empty if it cannot be read: vLLM says why."""
    with contextlib.suppress(OSError, AttributeError, *UNREADABLE):
        return {str(key).replace("_", "-"): value for key, value in yaml.safe_load(Path(file).read_text()).items()}
    return {}


def _whole(name: str, known: Known | None) -> str:
    """Returns the option that an abbreviation stands for, or else the name itself."""
    if known is None or name in known.names:
        return name
    longer = [one for one in known.names if one.startswith(name)]
    return longer[0] if len(longer) == 1 else name


def _refused(name: str) -> Iterator[str]:
    yield from (why for why in (_SET_HERE.get(name), _UNREACHABLE.get(name)) if why)


def _doubtful(extra: Sequence[str], known: Known) -> Iterator[tuple[str, str]]:
    """Yields each word that vLLM may not take, and a hint for it, which may be empty."""
    option, room = "", False  # whether the option may have another value
    for word in extra:
        if word.startswith("--"):
            ((typed, name),) = options([word])
            option, room = _whole(name, known), "=" not in word
            if not any(one.startswith(option) for one in known.names):
                close = difflib.get_close_matches(option, known.names, 1, 0.8)
                yield typed, f"did you mean --{close[0]}?" if close else ""
            elif not room and not _fits(option, word.partition("=")[2], known):
                yield word, ""
        elif word.startswith("-") and not _NUMBER.fullmatch(word):  # a short option
            option, room = "", True
        elif not room or option in known.switches:
            yield word, f"if it is the model, use --model {word} before --"
        else:
            room = option not in known.singles
            if not _fits(option, word, known):
                yield word, ""


def _fits(option: str, value: str, known: Known) -> bool:
    if option in known.choices:
        return value in known.choices[option]
    return option not in known.numbers or _NUMBER.fullmatch(value) is not None


def known_options(package: Path) -> Known | None:
    """Returns the options that the source of vLLM names; None if it is not written as this reads it."""
    names: set[str] = {"help", "config"}
    kinds: dict[str, set[str]] = {}
    for file in _SOURCES:
        with contextlib.suppress(OSError):
            text = (package / file).read_text()
            names.update(_LITERAL.findall(text))
            for field, kind in _FIELD.findall(text):
                kinds.setdefault(field.replace("_", "-"), set()).add(kind.strip())
    if not {"port", "enforce-eager", "max-model-len"} <= {*names, *kinds}:
        return None
    switches = {name for name, found in kinds.items() if found <= {"bool", "bool | None"}}
    numbers = {name for name, found in kinds.items() if found <= {"int", "float", "int | None", "float | None"}}
    switches |= {f"no-{name}" for name in switches}
    singles = {name for name, found in kinds.items() if not re.search("list|tuple|set|dict", " ".join(found))}
    aliases = _aliases(package)
    choices = {name: few for name, found in kinds.items() if (few := _choices(found, aliases))}
    names |= {*kinds, *switches}
    return Known(frozenset(names), frozenset(switches), frozenset(singles), frozenset(numbers), choices)


def _aliases(package: Path) -> dict[str, str]:
    """Returns the kinds of values that vLLM's configuration names: for each name, the values as they are written."""
    found: dict[str, str] = {}
    for file in sorted((package / "config").glob("*.py")):
        with contextlib.suppress(OSError):
            found.update(_ALIAS.findall(file.read_text()))
    return found


def _choices(kinds: set[str], aliases: dict[str, str]) -> frozenset[str]:
    """Returns the values of an option of these kinds; empty if it takes others too, or none that are texts."""
    values: set[str] = set()
    for kind in kinds:
        alone = kind.removesuffix(" | None")
        written = aliases.get(alone, alone)
        if not written.startswith("Literal[") or _QUOTED.sub("", written[8:-1]).strip(", \n"):
            return frozenset()
        values.update(_QUOTED.findall(written), ["None"] if alone != kind else [])
    return frozenset(values)


def installed() -> Known | None:
    """Returns the options of the vLLM beside the running Python, which is not loaded; None without one."""
    if not os.access(Path(sys.executable).with_name("vllm"), os.X_OK):
        return None
    found = importlib.util.find_spec("vllm")
    folders = found.submodule_search_locations if found is not None else None
    return known_options(Path(folders[0])) if folders else None


def parser_refusal(extra: Sequence[str]) -> str:
    """Returns why vLLM's own parser refuses the arguments, "" if it takes them or cannot be asked. Takes seconds."""
    log.info("asking vllm serve whether it takes %s", shlex.join(extra))
    command = [sys.executable, "-P", "-c", _PARSE, "MODEL", *extra]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PARSE_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    found = _ERROR.findall(done.stderr) if done.returncode == 2 else []
    return found[-1] if found else ""
