"""Pictures and videos from outside: fetching, checking, decoding. Nothing here is trusted before it is checked.

The router fetches and checks headers (:mod:`.fetch`, ``check_*``); encode workers decode (``decode_*``). Every refusal
is a :class:`~embferry.serve.errors.ServeError` with its own code.
"""

from embferry.serve.media.image import check_image, decode_image
from embferry.serve.media.video import Frames, check_frames, check_video, decode_frames, decode_video

__all__ = ["Frames", "check_frames", "check_image", "check_video", "decode_frames", "decode_image", "decode_video"]
