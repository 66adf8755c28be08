"""Generators of pictures and videos for tests, valid and invalid."""

from __future__ import annotations

import base64
import io
import struct
import tempfile
import zlib
from pathlib import Path

import av
import numpy as np
from PIL import Image


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def noise(width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    bands = len(Image.new(mode, (1, 1)).getbands())
    pixels = np.random.default_rng(7).integers(0, 256, width * height * bands, dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def png(width: int = 16, height: int = 16, colour: str = "red") -> bytes:
    return encoded(Image.new("RGB", (width, height), colour))


def claimed_png(width: int, height: int) -> bytes:
    """Returns a PNG whose header claims a size, and that has almost no pixel data."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def gif(frames: int) -> bytes:
    first, *rest = [Image.new("RGB", (20, 10), (60 * n, 60 * n, 60 * n)) for n in range(frames)]
    return encoded(first, "GIF", save_all=True, append_images=rest, duration=100)


def video(
    frames: int = 20, rate: int = 10, size: tuple[int, int] = (64, 48), suffix: str = ".mp4", index_first: bool = False
) -> bytes:
    """Returns a video whose frame ``n`` is grey of brightness ``10 n % 256``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"video{suffix}"
        options = {"movflags": "faststart"} if index_first else {}
        with av.open(str(path), "w", options=options) as container:
            stream = container.add_stream("mpeg4", rate=rate)
            stream.width, stream.height = size
            stream.pix_fmt = "yuv420p"
            stream.thread_type = "NONE"
            for number in range(frames):
                grey = np.full((size[1], size[0], 3), number * 10 % 256, np.uint8)
                for packet in stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")):
                    container.mux(packet)
            for packet in stream.encode():
                container.mux(packet)
        return path.read_bytes()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
