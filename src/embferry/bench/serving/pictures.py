"""Pixels for a picture of the workload, as the ``data:`` URL of a PNG."""

from __future__ import annotations

import base64
import io

import numpy as np

from .workload import Picture

GRAIN = 7
"""Pixels a side of a square of one colour. No two patches are alike, and the file is as large as that of a photograph
(0.15 MB for 1,280 tokens)."""


def url(picture: Picture) -> str:
    from PIL import Image

    rows, columns = -(-picture.height // GRAIN), -(-picture.width // GRAIN)
    colours = np.random.default_rng(picture.key).integers(0, 255, (rows, columns, 3), dtype=np.uint8)
    pixels = colours.repeat(GRAIN, 0).repeat(GRAIN, 1)[: picture.height, : picture.width]
    data = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(data, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
