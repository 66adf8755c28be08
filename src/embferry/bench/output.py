"""Steps of both commands: measure until the end or Ctrl-C, save, show."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from . import page, terminal
from .processes import sigterm_interrupts
from .report import Report, write_markdown
from .results import Results, save


def measured(results: Results, path: Path, work: Callable[[], None]) -> None:
    """Runs ``work``, which adds to ``results``, and saves them. Ctrl-C and SIGTERM keep what was measured by then."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with sigterm_interrupts(), suppress(KeyboardInterrupt):
        work()
    save(results, path)


def present(report: Report, html: Path, markdown: Path | None) -> None:
    """Shows a report in the terminal, and writes it as an HTML page and, if asked for, as Markdown.

    Raises:
        ValueError: the Markdown file exists and has no place for results.
    """
    terminal.show(report)
    html.write_text(page.html(report))
    if markdown is not None:
        write_markdown(report, markdown)
