"""The check of video files before they go to an instance.

An instance decodes in the process that serves all of its requests, so a decoder that crashes ends the instance. Only
containers of videos with plausible headers go there. :mod:`.instance_videos` and :mod:`.losses` deal with the rest of
that danger.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from embferry.serve.errors import ServeError
from embferry.serve.media.formats import sniff, still_picture
from embferry.serve.media.headers import asf, avi, gif, matroska, mp4, ogg, positions
from embferry.serve.media.headers.claims import ClaimError

READ = (
    "MP4/QuickTime, WebM/Matroska, AVI, MPEG-TS, MPEG-PS, FLV, ASF/WMV and Ogg videos, animated GIF, and lists of "
    "frames (data:video/jpeg;base64,FRAME,FRAME)"
)
_CLAIMS: Mapping[str, Callable[[bytes], None]] = {
    "mov": mp4.check,
    "matroska": matroska.check,
    "avi": avi.check,
    "ogg": ogg.check,
}


def checked(data: bytes) -> bytes:
    """Returns the file that may go to an instance: this one, or one without metadata by which a demuxer seeks.

    Raises:
        ServeError: media_empty, unsupported_media_type, wrong_media_kind, video_truncated, video_corrupt.
    """
    form = sniff(data, "video", READ)
    if not form.reader:  # a picture that may have several frames
        why = f"the file is a {form.name} picture, which vLLM does not read as a video"
        advice = "send a picture as image_url, and an animation as MP4, WebM or GIF"
        raise ServeError("unsupported_media_type", f"{why}; {advice}")
    if form.reader == "gif" and not gif.is_animated(data):
        raise still_picture(form.name)
    try:
        return checked_container(data, form.reader)
    except ClaimError as error:
        code = "video_truncated" if error.truncated else "video_corrupt"
        raise ServeError(code, f"the {form.name} video is refused: {error}") from error


def checked_container(data: bytes, reader: str) -> bytes:
    """Returns a file for this demuxer of FFmpeg that may go to an instance; see :func:`checked`.

    Raises:
        ClaimError: its headers make no sense.
    """
    if reader in _CLAIMS:
        _CLAIMS[reader](data)
    if reader == "asf":
        data = asf.reduced(data)
    positions.check(data, reader)
    return data
