"""An embedding as the sending side holds it: the bytes of its fields."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from embferry.protocol.errors import LocalProtocolError

Array = npt.NDArray[np.uint8]
Fields = Mapping[str, Array]
"""Field name to its bytes, uint8 [tokens, bytes a token], rows contiguous."""


def as_fields(arrays: Mapping[str, npt.NDArray[np.generic]]) -> dict[str, Array]:
    """Returns views of arrays [tokens, ...] of any dtype as :data:`Fields`, without a copy.

    Raises:
        LocalProtocolError: An array is not contiguous.
    """
    fields = {}
    for name, array in arrays.items():
        if not array.flags.c_contiguous:
            raise LocalProtocolError(f"field {name} is not contiguous; pass numpy.ascontiguousarray of it")
        fields[name] = array.reshape(len(array), -1).view(np.uint8)
    return fields
