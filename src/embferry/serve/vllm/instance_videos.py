"""Protects an instance of vLLM from video files that would end it.

vLLM's reader gives OpenCV a file in memory. OpenCV does not look whether a call of the file's ``seek`` has failed, and
crashes. A damaged file makes it seek to a negative position, which ``io.BytesIO`` refuses with an exception.
"""

from __future__ import annotations

import logging
from io import BytesIO

from embferry.serve.vllm.instance_part import part_of_vllm

log = logging.getLogger(__name__)

READER = "vllm.multimodal.video_decoders.opencv"
DANGER = "a damaged video may end the instance"


class SeekableBytes(BytesIO):
    """A file in memory that answers an impossible ``seek`` with -1, as C's functions do."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        try:
            return super().seek(offset, whence)
        except (ValueError, OverflowError):
            return -1


def protect() -> None:
    """Gives vLLM's reader such files, in this process, if vLLM is installed here."""
    if (reader := part_of_vllm(READER, DANGER)) is None:
        return
    if getattr(reader, "BytesIO", None) is BytesIO:
        reader.BytesIO = SeekableBytes  # type: ignore[attr-defined]
    elif getattr(reader, "BytesIO", None) is not SeekableBytes:
        log.warning("%s opens videos in another way: %s", READER, DANGER)
