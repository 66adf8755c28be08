"""Device tensors as fields of a transfer, tested on the CPU."""

from __future__ import annotations

import pytest
import torch

from embferry.engine.device import DeviceTensor, pinned


def test_tokens_are_copied_out_and_in() -> None:
    tensor = torch.arange(60, dtype=torch.float32).to(torch.bfloat16).reshape(10, 6)
    field = DeviceTensor(tensor)
    assert field.shape == (10, 12)
    buffer = pinned(36).reshape(3, 12)
    field.copy_out(4, 7, buffer)
    other = torch.zeros(10, 6, dtype=torch.bfloat16)
    DeviceTensor(other).copy_in(4, buffer)
    assert torch.equal(other[4:7], tensor[4:7])
    assert not other[:4].any()
    assert not other[7:].any()


@pytest.mark.parametrize("tensor", [torch.zeros(4), torch.zeros(4, 6).T])
def test_a_tensor_that_is_not_contiguous_rows_is_rejected(tensor: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="contiguous"):
        DeviceTensor(tensor)
