"""A report as one HTML page that loads nothing from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import jinja2
from markupsafe import Markup

from .report import Report

TEMPLATE = Path(__file__).with_name("page.html.jinja")
_ID = re.compile(r'(id="|href="#|url\(#)')


def html(report: Report) -> str:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    drawings = [(drawing, Markup(_own_ids(drawing.svg, index))) for index, drawing in enumerate(report.drawings)]
    return environment.from_string(TEMPLATE.read_text()).render(report=report, drawings=drawings)


def _own_ids(svg: str, index: int) -> str:
    """Prefixes all element ids of a drawing, because those of several drawings on one page would collide."""
    return _ID.sub(lambda match: f"{match[1]}d{index}-", svg)
