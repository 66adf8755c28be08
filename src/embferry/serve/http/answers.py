"""JSON in the answers of other servers, which may be anything."""

from __future__ import annotations

import json
from typing import Any


def read_json(body: bytes | str) -> Any:
    """Returns the value of a JSON text.

    Raises:
        ValueError: It is none, or is nested thousands deep.
    """
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("the JSON is nested too deep") from error
