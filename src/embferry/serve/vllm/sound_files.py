"""The sound files that may go to an instance: only formats of sound, and containers of videos, which may hold one.

vLLM gives a file to several readers in turn. The last one, FFmpeg, knows hundreds of formats by their first bytes,
among them some that name other files. Rates and lengths are left to the instance (:mod:`.instance_sounds`).
"""

from __future__ import annotations

from embferry.serve.errors import ServeError
from embferry.serve.media.formats import format_of, other_than_media, with_article
from embferry.serve.media.headers.claims import ClaimError
from embferry.serve.vllm.video_files import checked_container

READ = (
    "WAV, MP3, FLAC, Ogg, AAC, AIFF, AU, CAF and AMR sounds, and MP4/QuickTime, WebM/Matroska, AVI, MPEG-TS, MPEG-PS, "
    "FLV and ASF/WMA files with a sound"
)
_WAVE64 = b"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\0\0"
_FORMS = {b"RIFF": (b"WAVE",), b"RIFX": (b"WAVE",), b"RF64": (b"WAVE",), b"FORM": (b"AIFF", b"AIFC")}
"""The first four bytes of a file, and the four at 8."""
_STARTS = (_WAVE64, b".snd\0\0", b"caff\0\1", b"#!AMR", b"fLaC")
_TAG, _TAG_HEAD, _HAS_FOOTER = b"ID3", 10, 0x10
MAX_TAGS, MAX_ZEROS = 16, 65_536
"""Tags before a sound (ID3), and zeros after them."""


def checked(data: bytes) -> bytes:
    """Returns the file that may go to an instance: this one, or one without metadata by which a demuxer seeks.

    Raises:
        ServeError: media_empty, unsupported_media_type, wrong_media_kind, audio_corrupt.
    """
    if not data:
        raise ServeError("media_empty", "the sound is empty")
    if _is_sound(data):
        return data
    found = format_of(data)
    if found is None:
        known = (other_than_media(data) or "the format of the bytes is unknown").partition(";")[0]
        raise ServeError("unsupported_media_type", f"{known}; supported are {READ}")
    if found.kind == "image":
        raise ServeError("wrong_media_kind", f"the file is {with_article(found.name)} picture; this part takes a sound")
    try:
        return checked_container(data, found.reader)
    except ClaimError as error:
        raise ServeError("audio_corrupt", f"the {found.name} file is refused: {error}") from error


def _is_sound(data: bytes) -> bool:
    at = _after_tags(data)
    if at:  # as the readers do, which look at what follows: it may be another format
        start = data[at : at + MAX_ZEROS].lstrip(b"\0")[:4]
        return start == b"fLaC" or _is_mpeg(start)
    return data[8:12] in _FORMS.get(data[:4], ()) or data.startswith(_STARTS) or _is_mpeg(data)


def _is_mpeg(data: bytes) -> bool:
    """Returns whether this is the head of a frame of MP3, MP2 or AAC (ADTS).

    It has no name. Eleven bits are set; then come the version and the layer, and later the rate, which have values that
    are not used.
    """
    if len(data) < 3 or data[0] != 0xFF or data[1] & 0xE0 != 0xE0:
        return False
    if data[1] & 0xF6 == 0xF0:  # ADTS
        return data[2] >> 2 & 0xF < 13
    version, layer, rate = data[1] >> 3 & 3, data[1] >> 1 & 3, data[2] >> 2 & 3
    return version != 1 and layer in (1, 2) and rate != 3 and data[2] >> 4 != 15


def _after_tags(data: bytes) -> int:
    """Returns the position after the tags (ID3) at the beginning of a file."""
    at = 0
    for _ in range(MAX_TAGS):
        head = data[at : at + _TAG_HEAD]
        if len(head) < _TAG_HEAD or not head.startswith(_TAG):
            break
        size = 0
        for byte in head[6:]:
            size = size << 7 | byte & 0x7F
        at += _TAG_HEAD + size + (_TAG_HEAD if head[5] & _HAS_FOOTER else 0)
    return at
