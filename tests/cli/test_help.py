"""The help of the commands: groups, and values with their kind and unit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from embferry.cli.main import app
from embferry.cli.metavars import is_seconds, metavar
from embferry.serve.config import SECTIONS
from embferry.serve.config_load import FIELDS, is_secret
from tests.serve.test_cli import called


@pytest.mark.parametrize(
    ("key", "kind"),
    [
        (("model",), "NAME|FOLDER"),
        (("log_level",), "debug|info|warning|error"),
        (("router", "port"), "PORT"),
        (("transfer", "http_port"), "PORT"),
        (("router", "request_timeout"), "SECONDS"),
        (("media", "max_bytes"), "BYTES"),
        (("language", "max_held_bytes"), "BYTES"),
        (("router", "client_bytes_per_second"), "BYTES_PER_SECOND"),
        (("language", "max_prompt_tokens"), "TOKENS"),
        (("media", "allowed_hosts"), "HOST,..."),
        (("media", "allowed_folders"), "FOLDER,..."),
        (("vllm", "encode_urls"), "URL,..."),
        (("transfer", "transports"), "NAME,..."),
        (("security", "tls_ca"), "FILE"),
        (("security", "insecure"), None),
    ],
)
def test_a_value_has_a_kind_and_a_unit(key: tuple[str, ...], kind: str | None) -> None:
    assert metavar(key) == kind


def test_no_value_is_of_unknown_kind() -> None:
    unknown = {".".join(key) for key in FIELDS if metavar(key) in ("TEXT", "VALUE") and not is_secret(key)}
    assert unknown == set()
    assert {metavar(key) for key in FIELDS if is_seconds(key)} == {"SECONDS"}


def test_the_help_of_serve_has_a_group_for_each_section_and_units() -> None:
    text = called("serve", "--help", COLUMNS="110")[1]
    groups = re.findall(r"^(\S.*):$", text, re.MULTILINE)
    assert groups[0] == "Common options"
    assert [name for name in SECTIONS if not any(group.endswith(f"[{name}]") for group in groups)] == []
    assert "VALUE" not in text
    flat = " ".join(text.split())
    assert "--request-timeout, --router-request-timeout SECONDS" in flat
    assert "[default: 300 s]" in flat
    assert "--tls-required / --no-tls-required" in flat
    assert "[default: on]" in flat
    assert "[default: 33554432, 32 MiB]" in flat
    assert 100 < max(len(line) for line in text.splitlines() if not line.startswith("  -")) <= 110


def commands(group: Any = None, *path: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yields each command and group with the words that lead to it."""
    group = group or typer.main.get_command(app)
    yield path, group
    for name, one in getattr(group, "commands", {}).items():
        yield from commands(one, *path, name)


def test_arguments_and_values_are_shown_as_they_are_typed() -> None:
    shown = {path: called(*path, "--help", COLUMNS="80")[1] for path, _ in commands()}
    assert len(shown) > 14
    assert "ask [OPTIONS] [IMAGE|VIDEO]... QUESTION\n" in shown["ask",]
    assert "migrate [OPTIONS] PATH...\n" in shown["migrate",]
    assert "serve [OPTIONS] [-- VLLM_ARGUMENTS...]\n" in shown["serve",]
    for path, text in shown.items():
        odd = re.findall(r"<[a-z][^>]*>|\{[\[A-Z][^:}]*\}", text)
        assert (path, odd) == (path, [])


@pytest.mark.parametrize("columns", ["60", "80", "110"])
def test_no_option_is_broken(columns: str) -> None:
    for path, _ in commands():
        broken = re.findall(r"\S*\w-$", called(*path, "--help", COLUMNS=columns)[1], re.MULTILINE)
        assert (path, broken) == (path, [])


def test_no_description_in_a_list_of_commands_is_cut_off() -> None:
    groups = [path for path, command in commands() if hasattr(command, "commands")]
    assert len(groups) == 5
    for path in groups:
        text = called(*path, "--help", COLUMNS="80")[1]
        listed = text.partition("Commands:")[2].splitlines()
        assert listed
        assert [line for line in listed if line.endswith(("...", "\u2026"))] == []
