"""The commands in README, CONTRIBUTING and ``docs/`` use subcommands, options, targets, extras and files that exist."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from embferry.cli.engines import check_router, check_serve
from embferry.cli.main import app
from embferry.cli.options import SettingsCommand
from embferry.connectors.sglang.settings import PluginSettings
from embferry.connectors.vllm.config import parse
from embferry.serve.config import SECTIONS
from embferry.serve.config_load import FIELDS, dotted, load

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PROGRAM = r"(?:\S+/)?(?:embferry|make|pip|python|vllm)\b"
ASSIGNMENTS = r"(?:[A-Z_]+=\S+ +)*"
NOT_OURS = {
    "--",  # the separator before the arguments of vLLM
    *(
        "--middleware",
        "--api-server-count",
        "--nnodes",
        "--master-addr",
        "--otlp-traces-endpoint",
        "--tensor-parallel-size",
        "--shutdown-timeout",
        "--hf-token",
    ),  # of vLLM
    *("--reset-then-reuse-values", "--reuse-values"),  # of Helm
    *("--encoder-only", "--language-only", "--encoder-urls", "--encoder-transfer-backend"),  # of SGLang
    *("--dp-size", "--enable-dp-attention", "--tokenizer-worker-num"),  # of SGLang
    *("--enable-trace", "--trace-modules", "--otlp-service-name"),  # of SGLang
}
CHECKS = {"serve": check_serve, "router": check_router}


def commands_of(page: str) -> Iterator[str]:
    """Yields the commands of fenced blocks, with continued lines and quotes kept together, and of inline code."""
    for language, block in BLOCK.findall(page):
        lines = iter(block.splitlines())
        for line in lines:
            line = line.removeprefix("$ ")
            if language in ("", "sh", "console") and re.match(f"{ASSIGNMENTS}{PROGRAM} ", line):
                while line.endswith("\\") or line.partition(" #")[0].count("'") % 2:
                    line = f"{line.removesuffix(chr(92))}\n{next(lines)}"
                yield line
    yield from re.findall(rf"`({ASSIGNMENTS}{PROGRAM} [^`]+)`", BLOCK.sub("", page))


def words_of(command: str) -> list[str]:
    """Returns the words without variables that are set and without the folder of the program."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    return [words[0].rpartition("/")[2], *words[1:]]


COMMANDS = sorted({(page.name, command) for page in PAGES for command in commands_of(page.read_text())})


def named(program: str) -> pytest.MarkDecorator:
    """Parametrizes a test with all commands that call ``program``."""
    found = [(page, words) for page, command in COMMANDS if (words := words_of(command))[0] == program]
    assert found, program
    ids = [f"{page} {' '.join(words)[:60]}" for page, words in found]
    return pytest.mark.parametrize("words", [words for _, words in found], ids=ids)


def parsed(words: list[str]) -> None:
    """Parses a command as ``embferry`` does and checks its settings. Runs nothing.

    Raises:
        KeyError: the subcommand does not exist.
        ClickException, ConfigError, Exit: an option or an argument is wrong.
    """
    command: Any = typer.main.get_command(app)
    name = "embferry"
    if words[0].startswith("-"):  # an option of the command itself
        if not any(words[0] in parameter.opts for parameter in command.params):
            raise KeyError(words[0])
        return
    while words and hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    if not words:  # the page names the subcommand only
        return
    options = command.make_context(name, list(words)).params
    if not isinstance(command, SettingsCommand):
        return
    keys = {"__".join(key): key for key in FIELDS}
    flags = {keys[option]: value for option, value in options.items() if option in keys and value is not None}
    settings = load(flags, {}, None).settings
    if name in CHECKS:
        CHECKS[name](settings, frozenset(flags))


@named("embferry")
def test_a_command_of_embferry_is_accepted(words: list[str]) -> None:
    for subcommand in words[1].split("|"):  # `embferry router|encode` names two
        parsed([subcommand, *("http://host:1" if word == "…" else word for word in words[2:])])


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("serv", "serv"),
        ("serve --no-such-option", "No such option"),
        ("bench serve --rounds 0", "greater than or equal to 1"),
        ("encode --port x", "valid integer"),
        ("router --engine vllm --encode-urls http://10.0.0.2:8001", "2"),  # exit status: --language-urls is missing
    ],
)
def test_a_wrong_command_is_not_accepted(command: str, reason: str) -> None:
    with pytest.raises(Exception, match=reason):
        parsed(command.split())


@named("make")
def test_a_target_of_make_exists(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    (parts,) = re.findall(r"^PARTS := (.*)$", makefile, re.MULTILINE)
    targets = [*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), *(f"part-{name}" for name in parts.split())]
    variables = re.findall(r"^([A-Z_]+) [:?]?=", makefile, re.MULTILINE)
    for word in words[1:]:
        name, is_variable, _ = word.partition("=")
        assert name in (variables if is_variable else targets)


@named("pip")
def test_pip_installs_a_checkout_with_extras_that_exist(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    install, what = words[1:]
    assert install == "install"
    if what not in ("openai", "nixl", "sglang[tracing]"):
        chosen = re.fullmatch(r"\.(?:\[([a-z,]+)\])?", what)
        assert chosen is not None, "the project is not on PyPI"
        assert set((chosen[1] or "").split(",")) <= {"", *extras}


@named("python")
def test_a_program_in_python_exists(words: list[str]) -> None:
    if words[1] == "-c":
        compile(words[2], "page", "exec")
    else:
        paths = [words[1]]
        if words[1] == "-m":
            if words[2] == "sglang.launch_server":
                assert {word for word in words if word.startswith("--")} <= NOT_OURS | {
                    "--model-path",
                    "--host",
                    "--port",
                }
                return
            module = words[2].replace(".", "/")
            paths = [f"{module}.py", f"src/{module}.py", f"src/{module}/__main__.py"]
        assert any((ROOT / path).is_file() for path in paths)


@named("vllm")
def test_the_settings_of_the_connector_are_accepted(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBFERRY_CLUSTER_KEY", "0" * 64)
    for option, value in itertools.pairwise(words):
        if option == "--ec-transfer-config":
            parse(json.loads(value)["ec_connector_extra_config"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_options_and_settings_that_a_page_names_exist(page: Path) -> None:
    code = re.findall(r"`([^`]+)`", BLOCK.sub("", page.read_text()))
    options = {name for text in code if (name := text.partition(" ")[0]).startswith("--")}
    settings = {text for text in code if re.fullmatch(rf"(?:{'|'.join(SECTIONS)})\.\w+", text)}
    assert options <= options_of(typer.main.get_command(app)) | NOT_OURS
    values = set(chart_values()) if page.name == "kubernetes.md" else set()
    assert settings <= {dotted(key) for key in FIELDS} | {"serve.json", "serve.html"} | values


def chart_values() -> Iterator[str]:
    """Yields the names of the chart's values, with a dot between the name of a map and that of an entry."""

    def named(found: dict[str, Any], before: str) -> Iterator[str]:
        for key, value in found.items():
            yield before + key
            if isinstance(value, dict):
                yield from named(value, f"{before}{key}.")

    yield from named(yaml.safe_load((ROOT / "deploy/helm/embferry/values.yaml").read_text()), "")


def test_the_page_about_sglang_has_every_setting() -> None:
    page = (ROOT / "docs" / "sglang.md").read_text()
    named = set(re.findall(r"EMBFERRY_SGLANG_([A-Z_]+)`", page))
    assert named == {name.upper() for name in PluginSettings.__struct_fields__}


def options_of(command: Any) -> set[str]:
    """Returns the options of a command and its subcommands."""
    own = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    return own.union(*(options_of(each) for each in getattr(command, "commands", {}).values()))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    for name in re.findall(r"`(tests/[^`\s]+)`", page.read_text()):
        assert (ROOT / name).exists(), name
