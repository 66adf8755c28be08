"""The meaning of vLLM's refusal of a file, in plain words: its own texts are those of the libraries that it uses."""

from __future__ import annotations

from typing import Any

from embferry.serve.vllm.items import Item
from embferry.serve.vllm.losses import ItemError
from embferry.serve.vllm.media_parts import WORDS

_NO_VIDEO = "it is damaged, or OpenCV does not read its format or codec there; send it as H.264 in an MP4 file"
_NO_SOUND = "it is damaged, or its format is not read there; send it as WAV, FLAC or MP3"
_PLAIN = {
    "picture": (
        ("Failed to apply", "the model's processor does not take it; is one side much longer than the other?"),
        ("Failed to load image", "it is damaged, or Pillow does not read its format there; send it as PNG or JPEG"),
    ),
    "video": (
        ("Failed to apply", "none of its frames could be decoded; send it as H.264 in an MP4 file"),
        ("Could not open video", _NO_VIDEO),
        ("Failed to load video", _NO_VIDEO),
    ),
    "sound": (
        ("too short to be represented", "it has no samples, or too few"),
        ("No audio found", "there is no sound in it"),
        ("Invalid or corrupted audio", _NO_SOUND),
        ("Invalid or unsupported audio", _NO_SOUND),
        ("Failed to apply", "the model's processor does not take it"),
    ),
}
"""Words in a refusal → what they mean."""
_OPTIONS = ("mm_processor_kwargs", "media_io_kwargs")


def refused_item(item: Item, answer: bytes, request: dict[str, Any]) -> ItemError | None:
    """Returns the error for an item that an instance cannot read; None if its refusal may have another reason.

    Args:
        item: the picture, video or sound.
        answer: the refusal.
        request: the client's request, whose options for the processor may be the reason.
    """
    if any(request.get(name) for name in _OPTIONS):
        return None
    word, text = WORDS[item.kind], answer[:2000].decode(errors="replace")
    why = next((plain for sign, plain in _PLAIN[word] if sign in text), None)
    return None if why is None else ItemError(f"{item.kind}_corrupt", f"vLLM cannot read this {word}: {why}", item)
