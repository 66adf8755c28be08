"""The answers of one undivided process, to compare with those of the split. For tests and the demo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from embferry.engine.media import MediaProcessor
from embferry.engine.prompt import PromptBuilder
from embferry.engine.reference import Reference
from embferry.engine.sampling import SamplingParams
from embferry.models import model_path
from embferry.serve.config import Settings
from embferry.serve.encode.messages import EncodeItem
from embferry.serve.encode.preparation import prepare
from embferry.serve.worker.transfer_settings import DTYPES


@dataclass(frozen=True, slots=True)
class UndividedAnswer:
    """``tokens`` are the generated ids, with the end token; ``visual_tokens`` is the length of the embedding."""

    text: str
    tokens: tuple[int, ...]
    visual_tokens: int


class Undivided:
    """The whole model in this process.

    It uses the settings' dtype, threads and prefill chunks, because these decide the last bits of a result.
    """

    def __init__(self, settings: Settings) -> None:
        path = model_path(settings.model)
        self.settings = settings
        self._media = MediaProcessor.load(path)
        self._prompts = PromptBuilder.load(path, settings.language.max_prompt_tokens)
        self._reference = Reference.load(
            path,
            DTYPES[settings.dtype],
            threads=settings.threads,
            prefill_chunk_tokens=settings.language.prefill_chunk_tokens,
        )

    def answer(self, media: Sequence[EncodeItem], question: str, max_tokens: int | None = None) -> UndividedAnswer:
        """Returns the greedy answer to one user message: the media, then the question.

        Raises:
            ServeError: a file is refused, as by the servers.
            MediaError: the model does not support a picture or video.
            PromptError: no prompt can be built.
        """
        limit = max_tokens or self.settings.router.default_max_tokens or self.settings.language.max_new_tokens
        items = prepare(media, self._media, self.settings.media)
        content = [*({"type": item.kind} for item in items), {"type": "text", "text": question}]
        shapes = [item.shape for item in items]
        prompt = self._prompts.build([{"role": "user", "content": content}], shapes, max_new_tokens=max_tokens or 1)
        limit = min(limit, self._prompts.limit - prompt.length)
        tokens = self._reference.run(prompt, items, SamplingParams(max_tokens=limit)).tokens
        text = self._prompts.tokenizer.decode(tokens, skip_special_tokens=True)
        return UndividedAnswer(text, tuple(tokens), prompt.num_visual)
