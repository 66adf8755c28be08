"""Cuts pictures and videos into the patches of pixels that the vision tower takes.

Pictures go through the PIL image processor of transformers. Its video processors need torchvision; so the frames of a
video go through the same steps as a picture (convert, resize, rescale, normalise) and are then cut into patches of time
and space.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import resize
from transformers.image_utils import ChannelDimension
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from embferry.engine.checkpoint import first_line, read_config
from embferry.engine.errors import CheckpointError, MediaError
from embferry.engine.families import family_of
from embferry.engine.families.base import Family, VideoLimits
from embferry.engine.shape import Kind, MediaShape
from embferry.models.checkpoints import PROCESSOR, VIDEOS, check_pictures, read_object

#: The longer side divided by the shorter one, from the ``smart_resize`` of the families.
MAX_ASPECT_RATIO = 200
#: The time of a frame, which stands in the prompt of some families.
MAX_VIDEO_SECONDS = 10**9
DIGEST_BYTES = 16
#: Bytes that the steps of the image processor take at most for each pixel, after the picture has been resized.
PICTURE_BYTES = 88
_CHW = ChannelDimension.FIRST


@dataclass(frozen=True, slots=True)
class Video:
    """A decoded video: frames of one size. All frames are used, so the decoder has to choose which to take."""

    frames: Sequence[Image.Image]
    fps: float


MediaItem = Image.Image | Video


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """The frames that a model wants of a video: ``fps`` frames per second of the video, within the bounds."""

    fps: float
    min_frames: int
    max_frames: int


@dataclass(frozen=True, slots=True, eq=False)
class PreparedItem:
    """A preprocessed item, ready for the vision tower.

    Attributes:
        pixel_values: float32 ``[patches, channels × temporal_patch × patch × patch]``.
        grid_thw: Patches in time, height and width.
        timestamps: Seconds of each temporal patch; see :class:`MediaShape`.
        digest: 16 bytes. Items with equal digests have equal embeddings, bit by bit.
    """

    kind: Kind
    pixel_values: torch.Tensor
    grid_thw: tuple[int, int, int]
    num_tokens: int
    timestamps: tuple[float, ...]
    digest: bytes

    @property
    def shape(self) -> MediaShape:
        return MediaShape(self.kind, self.grid_thw, self.timestamps, self.digest)


class MediaProcessor:
    """Prepares items for one model. It needs no weights, so a router can count tokens with it."""

    def __init__(self, family: Family, images: Any, video_settings: dict[str, Any], fingerprint: bytes = b"") -> None:
        self.family = family
        self._images = images
        self._video = {**images.to_dict(), **video_settings}
        self._fingerprint = fingerprint
        self.patch_size = int(images.patch_size)
        self.merge_size = int(images.merge_size)
        self.temporal_patch_size = int(images.temporal_patch_size)
        size = self._video["size"]
        self._pixels_of_picture = int(images.size["shortest_edge"]), int(images.size["longest_edge"])
        self._limits = VideoLimits(
            min_pixels=int(video_settings.get("min_pixels") or size["shortest_edge"]),
            max_pixels=int(video_settings.get("max_pixels") or size["longest_edge"]),
            factor=self.patch_size * self.merge_size,
            temporal_patch_size=self.temporal_patch_size,
            cap_pixels_per_frame=bool(self._video.get("cap_pixels_per_frame")),
            max_video_tokens=int(self._video.get("max_video_tokens") or 0),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], fingerprint: bytes = b"") -> MediaProcessor:
        """Loads the preprocessor settings of a model directory.

        ``preprocessor_config.json`` applies to pictures, and also to videos where ``video_preprocessor_config.json``
        says nothing; what ``processor_config.json`` says of either goes before both. The fingerprint identifies the
        weights and how they are run; it is part of every digest.

        Raises:
            UnsupportedModel: The model's family has no adapter.
            CheckpointError: The settings are missing or cannot be read.
        """
        config = read_config(path)
        family = family_of(config)
        try:
            check_pictures(Path(path))
            images = Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
            # Processors that transformers 5 has saved are in one file.
            settings = read_object(Path(path) / PROCESSOR).get("video_processor")
            settings = read_object(Path(path) / VIDEOS) if settings is None else settings
            media = cls(family, images, settings, fingerprint)
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(f"cannot read the preprocessor settings in {path}: {first_line(error)}") from error
        vision = config.vision_config
        cut = (media.patch_size, media.temporal_patch_size, media.merge_size)
        taken = (vision.patch_size, vision.temporal_patch_size, vision.spatial_merge_size)
        if cut != taken:
            raise CheckpointError(
                f"the preprocessor settings in {path} cut pictures into patches of other sizes (patch, frames, merged: "
                f"{cut}) than the model of its config.json takes ({taken}); download the model again"
            )
        return media

    @property
    def frame_sampling(self) -> FrameSampling:
        """The frames that the decoder of a video should take."""
        fps, least, most = (self._video.get(name) for name in ("fps", "min_frames", "max_frames"))
        return FrameSampling(float(fps or 2.0), int(least or 4), int(most or 768))

    def grid_of(self, size: tuple[int, int], frames: int | None = None) -> tuple[int, int, int]:
        """Returns the number of patches in time, height and width.

        Args:
            size: Width and height in pixels, in the order of PIL.
            frames: Frames of a video; None for a picture.

        Raises:
            MediaError: The picture is empty or too elongated, or the video has no frames.
        """
        width, height = size
        if min(width, height) < 1:
            raise MediaError(f"the picture is {width}×{height} pixels; both sides must be at least one pixel")
        if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
            limit = f"one side may be at most {MAX_ASPECT_RATIO} times the other"
            raise MediaError(f"the picture is {width}×{height} pixels; {limit}")
        if frames is not None and frames < 1:
            raise MediaError("the video has no frames")
        try:
            if frames is None:
                t, (h, w) = 1, smart_resize(height, width, self._limits.factor, *self._pixels_of_picture)
            else:
                t = -(-frames // self.temporal_patch_size)
                h, w = self.family.video_size(frames, height, width, self._limits)
        except ValueError as error:
            raise MediaError(f"{width}×{height} pixels cannot be resized to a size the model takes: {error}") from error
        return t, h // self.patch_size, w // self.patch_size

    def tokens_of(self, size: tuple[int, int], frames: int | None = None) -> int:
        """Returns the number of tokens of the embedding. Arguments and errors are those of :meth:`grid_of`."""
        return math.prod(self.grid_of(size, frames)) // self.merge_size**2

    def prepare(self, item: MediaItem) -> PreparedItem:
        """Cuts an item into patches.

        Raises:
            MediaError: The item cannot be decoded, or cannot be resized to a size that the model takes.
        """
        if isinstance(item, Video):
            return self._prepare_video(item)
        if not isinstance(item, Image.Image):
            raise MediaError(f"expected a PIL image or a Video, got {type(item).__name__}")
        grid = self.grid_of(item.size)
        pixels = self._patches(_decoded(item), grid)
        if tuple(pixels["image_grid_thw"][0]) != grid:
            raise MediaError(f"the picture became {tuple(pixels['image_grid_thw'][0])} patches instead of {grid}")
        patches = np.ascontiguousarray(pixels["pixel_values"], dtype=np.float32)
        # Kernels may sum in an order that depends on alignment. Torch aligns memory alike in every run, numpy does not.
        return self._prepared("image", torch.from_numpy(patches).clone(), grid, ())

    def working_bytes(self, item: MediaItem) -> int:
        """Returns the bytes that :meth:`prepare` takes at most beside the item, its result included.

        Raises:
            MediaError: As :meth:`grid_of`.
        """
        if not isinstance(item, Video):
            return PICTURE_BYTES * math.prod(self.grid_of(item.size)) * self.patch_size**2
        if not item.frames:
            return 0
        grid = self.grid_of(item.frames[0].size, len(item.frames))
        step = PICTURE_BYTES * self.temporal_patch_size * grid[1] * grid[2] * self.patch_size**2
        return math.prod(grid) * self._patch_values * np.dtype(np.float32).itemsize + step

    @property
    def _patch_values(self) -> int:
        return 3 * self.temporal_patch_size * self.patch_size**2

    def _patches(self, image: Image.Image, grid: tuple[int, int, int]) -> Any:
        """Returns what the image processor makes of a picture.

        It would resize the picture by way of several copies, which of a large one take gigabytes. So the picture is
        resized here, in the same way, and the processor is told not to: the size that it takes of a picture which has
        the right size already may be another one.
        """
        settings = self._images
        if image.mode != "RGB" or not settings.do_resize:
            return settings(image, return_tensors="np")
        size = (self.patch_size * grid[2], self.patch_size * grid[1])
        return settings(image.resize(size, resample=settings.resample), do_resize=False, return_tensors="np")

    def _prepare_video(self, video: Video) -> PreparedItem:
        if not (math.isfinite(video.fps) and video.fps > 0):
            raise MediaError(f"a video needs a positive number of frames per second, not {video.fps}")
        sizes = {frame.size for frame in video.frames}
        if len(sizes) > 1:
            raise MediaError(f"the frames of a video must have one size; these have {len(sizes)}")
        count = len(video.frames)
        timestamps = self.family.timestamps(count, video.fps, self.temporal_patch_size)
        if not all(seconds <= MAX_VIDEO_SECONDS for seconds in timestamps):
            raise MediaError(f"{count} frames at {video.fps} per second last more than {MAX_VIDEO_SECONDS:,} seconds")
        grid = self.grid_of(sizes.pop() if sizes else (1, 1), count)
        side = (grid[1] * self.patch_size, grid[2] * self.patch_size)
        rows, length = grid[1] * grid[2], self.temporal_patch_size
        patches = torch.empty((math.prod(grid), self._patch_values), dtype=torch.float32)
        for step in range(grid[0]):
            frames = [self._pixels(_decoded(frame), side) for frame in video.frames[step * length :][:length]]
            frames += frames[-1:] * (length - len(frames))
            cut = patchify(np.stack(frames), self.patch_size, length, self.merge_size)
            patches.numpy()[rows * step : rows * (step + 1)] = cut
        return self._prepared("video", patches, grid, timestamps)

    def _pixels(self, frame: Image.Image, side: tuple[int, int]) -> np.ndarray:
        """Returns one frame, float32 ``[3, height, width]``, after the same steps as a picture."""
        settings = self._video
        is_resized = settings.get("do_resize", True)
        if is_resized and frame.mode == "RGB":  # before it is copied
            frame, is_resized = frame.resize(side[::-1], resample=settings["resample"]), False
        pixels: np.ndarray = np.moveaxis(self._images.convert_to_rgb(frame), -1, 0)
        if is_resized:
            pixels = resize(pixels, side, settings["resample"], data_format=_CHW, input_data_format=_CHW)
        if settings.get("do_rescale", True):
            pixels = self._images.rescale(pixels, settings["rescale_factor"])
        if settings.get("do_normalize", True):
            pixels = self._images.normalize(pixels, settings["image_mean"], settings["image_std"])
        return np.asarray(pixels, dtype=np.float32)

    def _prepared(
        self, kind: Kind, patches: torch.Tensor, grid: tuple[int, int, int], timestamps: tuple[float, ...]
    ) -> PreparedItem:
        values = patches.numpy()
        digest = hashlib.blake2b(self._fingerprint, digest_size=DIGEST_BYTES)
        digest.update(f"{kind} {values.dtype}".encode() + struct.pack("<3q", *grid))
        digest.update(values.data.cast("B"))
        tokens = math.prod(grid) // self.merge_size**2
        return PreparedItem(kind, patches, grid, tokens, timestamps, digest.digest())


def _decoded(image: Image.Image) -> Image.Image:
    try:
        image.load()
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError(f"the picture cannot be decoded: {error}") from error
    return image


def patchify(frames: np.ndarray, patch: int, temporal_patch: int, merge: int) -> np.ndarray:
    """Cuts frames ``[T, C, H, W]`` into patches ``[patches, C × temporal_patch × patch × patch]``.

    Patches are ordered by time, then by blocks of ``merge × merge``, so that the patches of one token are adjacent. T
    must be a multiple of ``temporal_patch``, H and W of ``patch × merge``.
    """
    _, channels, height, width = frames.shape
    rows, columns = (side // (patch * merge) for side in (height, width))
    blocks = frames.reshape(-1, temporal_patch, channels, rows, merge, patch, columns, merge, patch)
    # t, row of blocks, column of blocks, row in block, column in block | channel, time, y, x
    patches = blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return patches.reshape(-1, channels * temporal_patch * patch * patch)
