"""Asks the exported model in one process with the classes of Hugging Face and greedy decoding."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoTokenizer, Qwen3VLForConditionalGeneration

from training.shapes.tokenizer import IMAGE, VIDEO, VISION_END, VISION_START


class Undivided:
    """A loaded model; ``dtype`` is that of weights and arithmetic."""

    def __init__(self, directory: Path, dtype: torch.dtype = torch.float32) -> None:
        self.model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=dtype).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.processor = AutoImageProcessor.from_pretrained(directory)

    def ask_pictures(self, pictures: Sequence[Image.Image], question: str) -> str:
        """Returns the answer to a question about one picture or several."""
        seen = self.processor(list(pictures), return_tensors="pt")
        grid = seen["image_grid_thw"]
        content = [*({"type": "image"} for _ in pictures), {"type": "text", "text": question}]
        groups = [f"{VISION_START}{IMAGE * tokens}{VISION_END}" for tokens in (grid.prod(-1) // 4).tolist()]
        text = self._fill(self._prompt(content), f"{VISION_START}{IMAGE}{VISION_END}", groups)
        return self._generate(text, pixel_values=seen["pixel_values"], image_grid_thw=grid)

    def ask_video(self, frames: Sequence[Image.Image], fps: float, question: str) -> str:
        """Returns the answer to a question about sampled frames; the last is repeated if their number is odd."""
        shown = [*frames, frames[-1]] if len(frames) % 2 else list(frames)
        seen = self.processor(shown, return_tensors="pt")
        rows, columns = seen["image_grid_thw"][0, 1:].tolist()
        # A patch of a picture contains its frame twice, a temporal patch of a video two frames.
        twice = seen["pixel_values"].view(len(shown) // 2, 2, rows * columns, 3, 2, -1)
        pixels = torch.stack((twice[:, 0, :, :, 0], twice[:, 1, :, :, 0]), 3).reshape(-1, 3 * 2 * twice.shape[-1])
        group = f"{VISION_START}{VIDEO * (rows * columns // 4)}{VISION_END}"
        times = [(2 * k + 0.5) / fps for k in range(len(shown) // 2)]
        content = [{"type": "video"}, {"type": "text", "text": question}]
        groups = ["".join(f"<{time:.1f} seconds>{group}" for time in times)]
        text = self._fill(self._prompt(content), f"{VISION_START}{VIDEO}{VISION_END}", groups)
        grid = torch.tensor([[len(times), rows, columns]])
        return self._generate(text, pixel_values_videos=pixels, video_grid_thw=grid)

    def _prompt(self, content: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(
            cast(list[dict[str, str]], [{"role": "user", "content": content}]),
            tokenize=False,
            add_generation_prompt=True,
        )
        return str(text)

    @staticmethod
    def _fill(text: str, placeholder: str, groups: Sequence[str]) -> str:
        """Replaces each placeholder by the tokens of its item."""
        parts = text.split(placeholder)
        if len(parts) != len(groups) + 1:
            raise ValueError(f"{len(groups)} items for {len(parts) - 1} placeholders")
        return "".join(part + group for part, group in zip(parts, [*groups, ""], strict=True))

    @torch.inference_mode()
    def _generate(self, text: str, **vision: Tensor) -> str:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        config = self.model.config
        kinds = (ids == config.image_token_id).int() + 2 * (ids == config.video_token_id).int()
        out = self.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **vision)
        return str(self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))
