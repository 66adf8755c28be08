"""``embferry ec``: shows and prunes a folder of embeddings that encoders share."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from embferry.cache.entry import Damaged, Entry
from embferry.cache.folder import FolderStore, Kept
from embferry.cli.options import fail
from embferry.cli.plain import PlainCommand

app = typer.Typer(name="ec", no_args_is_help=True, rich_markup_mode=None, help="Folders of embeddings (encoder cache).")

WIDE = 160
"""Columns of a table that does not go to a terminal."""
SHOWN_KEY = 16
"""Digits of a key in a table. ``rm`` takes as many, or more."""
UNLIMITED = 1 << 62
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Folder = Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def root() -> None:
    """Show and prune a folder of embeddings that encoders share."""


@app.command("ls", cls=PlainCommand)
def list_files(
    folder: Folder,
    limit: Annotated[int, typer.Option(min=0, metavar="FILES", help="The latest used ones; 0: all.")] = 100,
    as_json: AsJson = False,
) -> None:
    """List the embeddings of a folder, the latest used first."""
    with _failures():
        store = _opened(folder)
        files = store.files()[::-1]
        rows = [_described(store, kept) for kept in (files[:limit] if limit else files)]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    cells = [
        (
            row["key"][:SHOWN_KEY],
            row.get("model") or row.get("problem", ""),
            str(row.get("tokens", "")),
            row.get("layout", ""),
            _size(row["bytes"]),
            _ago(row["last_used"]),
        )
        for row in rows
    ]
    _table(("key", "model", "tokens", "a token", "size", "last used"), cells, right=(2, 4, 5))
    if len(rows) < len(files):
        typer.echo(f"{len(files) - len(rows)} more; --limit 0 shows all", err=True)


@app.command(cls=PlainCommand)
def rm(
    folder: Folder,
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY]...", help=f"The first {SHOWN_KEY} digits, or more.")
    ] = None,
    unused_for: Annotated[
        str | None, typer.Option(metavar="TIME", help="Those not used for so long: 90s, 15m, 12h or 30d.")
    ] = None,
    to_bytes: Annotated[
        int | None, typer.Option(min=0, metavar="BYTES", help="The least recently used, until so much is left.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Those of a model.")] = None,
    damaged: Annotated[bool, typer.Option("--damaged", help="Those that are damaged. Reads all.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="All.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove embeddings. Encoders may use the folder meanwhile: they encode again what they do not find."""
    chosen = [keys, unused_for, to_bytes is not None, model is not None, damaged, everything]
    if sum(map(bool, chosen)) != 1:
        fail("name keys, or give one of --unused-for, --to-bytes, --model, --damaged and --all")
    before = None if unused_for is None else time.time() - _seconds(unused_for)
    prefixes = [_prefix(key) for key in keys or ()]
    with _failures():
        store = _opened(folder)
        if to_bytes is not None:
            removed = store.prune(to_bytes)
        else:
            removed = [
                kept
                for kept in store.files()
                if (
                    everything
                    or kept.key.startswith(tuple(prefixes))
                    or (before is not None and kept.used_ns / 1e9 < before)
                    or (model is not None and _described(store, kept).get("model") == model)
                    or (damaged and _is_damaged(store, kept))
                )
                and store.remove(kept.key)
            ]
    count, nbytes = len(removed), sum(kept.nbytes for kept in removed)
    if as_json:
        typer.echo(json.dumps({"removed": [kept.key for kept in removed], "bytes": nbytes}))
    else:
        typer.echo(f"removed {count} embeddings, {_size(nbytes)}", err=True)


@app.command(cls=PlainCommand)
def stats(
    folder: Folder,
    verify: Annotated[bool, typer.Option("--verify", help="Read all, and count those that are damaged.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show how much a folder holds, by model."""
    with _failures():
        store = _opened(folder)
        files = store.files()
        models: dict[str, list[Kept]] = {}
        for kept in files:
            row = _described(store, kept)
            models.setdefault(row.get("model", "(not readable)") or "(no name)", []).append(kept)
        broken = sum(_is_damaged(store, kept) for kept in files) if verify else None
    rows = [
        {
            "model": name,
            "files": len(its),
            "bytes": sum(kept.nbytes for kept in its),
            "first_used": min(kept.used_ns for kept in its) / 1e9,
            "last_used": max(kept.used_ns for kept in its) / 1e9,
        }
        for name, its in sorted(models.items())
    ]
    total = {"files": len(files), "bytes": sum(kept.nbytes for kept in files), "damaged": broken, "models": rows}
    if as_json:
        typer.echo(json.dumps(total))
        return
    cells = [
        (str(row["model"]), str(row["files"]), _size(row["bytes"]), _ago(row["first_used"]), _ago(row["last_used"]))
        for row in rows
    ]
    _table(("model", "files", "size", "oldest use", "latest use"), cells, right=(1, 2, 3, 4))
    said = "" if broken is None else f", {broken} damaged"
    typer.echo(f"{len(files)} embeddings, {_size(total['bytes'])}{said}")


def _opened(folder: Path) -> FolderStore:
    if not folder.is_dir():
        fail(f"{folder}: there is no such folder")
    return FolderStore(folder, UNLIMITED)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fail(str(error), status=1)


def _described(store: FolderStore, kept: Kept) -> dict[str, Any]:
    row: dict[str, Any] = {"key": kept.key, "bytes": kept.nbytes, "last_used": kept.used_ns / 1e9}
    try:
        return row | _words(store.describe(kept.key))
    except Damaged as error:
        return row | {"problem": str(error)}
    except FileNotFoundError:
        return row | {"problem": "it was evicted meanwhile"}


def _words(entry: Entry) -> dict[str, Any]:
    layout = "".join(one if one.isprintable() else "?" for one in ", ".join(map(str, entry.layout.fields)))
    return {"model": entry.model, "tokens": entry.tokens, "layout": layout, "digest": entry.digest}


def _is_damaged(store: FolderStore, kept: Kept) -> bool:
    try:
        store.check(kept.key)
    except Damaged:
        return True
    except FileNotFoundError:
        return False
    return False


def _prefix(key: str) -> str:
    if not re.fullmatch(f"[0-9a-f]{{{SHOWN_KEY},64}}", key):
        fail(f"a key has {SHOWN_KEY} to 64 hexadecimal digits, not {key!r}")
    return key


def _seconds(text: str) -> float:
    found = re.fullmatch(r"([0-9]{1,9})([smhd])", text)
    if found is None:
        fail(f"a time is like 90s, 15m, 12h or 30d, not {text!r}")
    return int(found[1]) * _SECONDS[found[2]]


def _size(nbytes: Any) -> str:
    size, unit = float(nbytes), 0
    while size >= 1024 and unit < len(_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {_UNITS[unit]}" if unit else f"{nbytes} B"


def _ago(at: Any) -> str:
    seconds = max(0, int(time.time() - at))
    for unit in ("d", "h", "m"):
        if seconds >= _SECONDS[unit]:
            return f"{seconds // _SECONDS[unit]} {unit} ago"
    return f"{seconds} s ago"


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[int, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = WIDE
    table = Table()
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index in right else "left", no_wrap=index != 1)
    for row in rows:
        table.add_row(*row)
    console.print(table)
