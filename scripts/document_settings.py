"""Writes docs/configuration.md from the settings' models. With ``--check``, only exits with status 1 if it is stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from embferry.cli.options import default_text
from embferry.serve.config import SECTIONS, Settings
from embferry.serve.config_load import CONFIG_ENV, FIELDS, SGLANG_ALIASES, Key, dotted, env_name, flag_name
from generated_page import write_or_check

PAGE = Path(__file__).resolve().parent.parent / "docs" / "configuration.md"

EXAMPLE: Key = ("transfer", "num_blocks")

HEAD = f"""# Configuration

Generated from the code by `python scripts/document_settings.py`; edits here are lost.

The setting `{dotted(EXAMPLE)}` of the file is `{env_name(EXAMPLE)}` in the environment and
`{flag_name(EXAMPLE)}` on the command line. A command accepts the flags of its own section without the section's
name: `embferry router --port 8080` is `--router-port 8080`.

Flags override the environment, the environment overrides the file, the file overrides the defaults. The file is YAML,
named by `--config FILE` or `{CONFIG_ENV}`. All processes of a deployment can share it:

```yaml
model: shapes
transfer:
  num_blocks: 128
media:
  allowed_hosts: [images.example.com]
```

In the environment and on the command line a list is written `a,b`. An unknown name or a bad value ends the command with
status 2 and one line per mistake, with its place and the reason.
"""

ALIASES = """## Variables of SGLang

They are read, with a notice on stderr, if our own variable is not set.

| variable | read as |
|---|---|
"""


def page() -> str:
    """Returns the page."""
    parts = [HEAD, _section("Every process", Settings, ())]
    parts += [_section(f"`{name}`", model, (name,)) for name, model in SECTIONS.items()]
    rows = (
        f"| `{old}` | {f'`{dotted(key)}`' if key else 'validated, but without effect'} |"
        for old, key in SGLANG_ALIASES.items()
    )
    return "\n".join([*parts, ALIASES + "\n".join(rows) + "\n"])


def _section(title: str, model: type[Any], path: Key) -> str:
    intro = " ".join((model.__doc__ or "").split()) if path else "Settings at the top of the file."
    rows = [
        f"| `{dotted(key)}` | {_default(key)} | {' '.join((field.description or '').split())} |"
        for key, field in FIELDS.items()
        if key[:-1] == path
    ]
    return "\n".join([f"## {title}\n", f"{intro}\n", "| setting | default | meaning |", "|---|---|---|", *rows, ""])


def _default(key: Key) -> str:
    text = default_text(key)
    return f"`{text}`" if text else "–"


if __name__ == "__main__":
    sys.exit(write_or_check(PAGE, page()))
