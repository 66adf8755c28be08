"""Builds prompts: messages and the shapes of their media → token ids, positions, and where the visual tokens are.

This needs neither pixels nor embeddings, so the language side builds its prompt while the encode side is still working.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jinja2
import torch
from transformers import AutoTokenizer

from embferry.engine.checkpoint import first_line, read_config
from embferry.engine.errors import CheckpointError, PromptError, PromptTooLong
from embferry.engine.families import family_of
from embferry.engine.families.base import Family, Marks, Placeholder
from embferry.engine.media import DIGEST_BYTES
from embferry.engine.shape import TOKEN_TYPE, Kind, MediaShape, merged_positions
from embferry.models.checkpoints import TEMPLATE, chat_template, check_texts

#: Type of a content part in the OpenAI schema or in transformers → type for the chat template.
PART_KINDS: dict[str, Kind] = {"image": "image", "image_url": "image", "video": "video", "video_url": "video"}

MARK_IDS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
"""The ids in ``config.json`` of the tokens that mark media in a prompt."""

_PRIVATE_USE = 0xF0000
"""The first of 65,534 code points without a meaning."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A prompt of L tokens, N of them visual. The visual tokens of all items, in sequence order, are one stream.

    Attributes:
        input_ids: int64 ``[1, L]``, with placeholder tokens at the positions of the visual tokens.
        mm_token_type_ids: int32 ``[1, L]``: 0 text, 1 image, 2 video.
        position_ids: int64 ``[3, 1, L]``: time, height, width.
        position_delta: The position of a generated token is its index plus this.
        visual_positions: int64 ``[N]``, the index in the sequence of each visual token, ascending.
        fill_ids: int32 ``[N]``, the values that this field of the stream must have.
        mrope_positions: int32 ``[N, 3]``, the values that this field of the stream must have.
        items: The shapes of the media, in order.
    """

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    position_ids: torch.Tensor
    position_delta: int
    visual_positions: torch.Tensor
    fill_ids: torch.Tensor
    mrope_positions: torch.Tensor
    items: tuple[MediaShape, ...]

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[1])

    @property
    def num_visual(self) -> int:
        return int(self.visual_positions.shape[0])

    @property
    def digest(self) -> bytes:
        """Digest of the whole stream; empty if the digest of an item is unknown."""
        return stream_digest([item.digest for item in self.items])

    def visual_range(self, start: int, stop: int) -> tuple[int, int]:
        """Returns the half-open range of visual tokens that are in ``[start, stop)`` of the sequence."""
        bounds = torch.searchsorted(self.visual_positions, torch.tensor([start, stop]))
        return int(bounds[0]), int(bounds[1])


def stream_digest(digests: Sequence[bytes]) -> bytes:
    """Returns the digest of several items as one stream, 16 bytes; empty if there are none or one of them is empty."""
    if not digests or not all(digests):
        return b""
    return hashlib.blake2b(b"".join(digests), digest_size=DIGEST_BYTES).digest()


class PromptBuilder:
    """Builds prompts for one model, of whose tokens and those of an answer at most ``limit`` fit together."""

    def __init__(self, family: Family, config: Any, tokenizer: Any, limit: int | None = None) -> None:
        self.family = family
        self.config = config
        self.tokenizer = tokenizer
        if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
            backend.no_truncation()  # settings that a call would change, which two threads cannot do at once
            backend.no_padding()
        positions = int(config.text_config.max_position_embeddings)
        self.limit = positions if limit is None else min(limit, positions)
        self.merge = int(config.vision_config.spatial_merge_size)
        self._marks = Marks(*tokenizer.convert_ids_to_tokens([getattr(config, name) for name in MARK_IDS]))
        start, end = re.escape(self._marks.start), re.escape(self._marks.end)
        pads = f"{re.escape(self._marks.image)}|{re.escape(self._marks.video)}"
        self._mark = re.compile(f"(?:{start})?({pads})(?:{end})?")
        control = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        longest_first = sorted(control, key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        letters = sorted(set("".join(control)))
        self._without_letters = {ord(one): _PRIVATE_USE + number for number, one in enumerate(letters)}

    @classmethod
    def load(cls, path: str | os.PathLike[str], limit: int | None = None) -> PromptBuilder:
        """Loads the configuration and the tokenizer of a model directory.

        The model's own limit applies if ``limit`` is None or larger.

        Raises:
            UnsupportedModel: The model's family has no adapter.
            CheckpointError: The files are missing or cannot be read.
        """
        config = read_config(path)
        family = family_of(config)
        try:
            check_texts(Path(path))
            tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
            if not tokenizer.chat_template:  # transformers gives older files of templates to its processors alone
                tokenizer.chat_template = chat_template(Path(path))
        except Exception as error:  # the errors of the package tokenizers have no other base
            raise CheckpointError(f"cannot read the tokenizer in {path}: {first_line(error)}") from error
        _check_tokens(path, config, tokenizer)
        builder = cls(family, config, tokenizer, limit)
        builder._check_template(path)
        return builder

    def build(
        self,
        messages: Sequence[Mapping[str, Any]],
        shapes: Sequence[MediaShape] = (),
        max_new_tokens: int = 1,
        *,
        opens: bool = True,
        continues: bool = False,
    ) -> Prompt:
        """Returns the prompt for a conversation.

        Args:
            messages: ``role`` and ``content``; content is a string or parts of type "text", "image" ("image_url"),
                "video" ("video_url"). The content of a media part is ignored. Other fields, such as ``tool_calls``,
                are for the chat template.
            shapes: The shape of each media part, in order.
            max_new_tokens: Tokens of the answer that must fit after the prompt.
            opens: Whether the prompt ends with the beginning of the assistant's answer.
            continues: Whether the answer continues the last message instead.

        Raises:
            PromptTooLong: The prompt and that many tokens do not fit.
            PromptError: The messages are wrong in another way.
        """
        self._check_room(sum(shape.num_tokens(self.merge) for shape in shapes), max_new_tokens)
        chat = [self._message(message) for message in messages]
        if not chat:
            raise PromptError("there are no messages")
        ending = {"add_generation_prompt": opens and not continues, "continue_final_message": continues}
        text = self._rendered(chat, **ending)
        self._check_control(text, self._rendered(self._without_control_letters(chat), **ending))
        ids = self._token_ids(text, self._placeholders(text, shapes))
        self._check_room(len(ids), max_new_tokens)
        return self._prompt(ids, tuple(shapes))

    def build_plain(self, prompt: str | Sequence[int], max_new_tokens: int = 1) -> Prompt:
        """Returns the prompt for a text, or for the ids of its tokens, without the chat template.

        A text may have control tokens, except those for pictures and videos.

        Raises:
            PromptTooLong: The prompt and ``max_new_tokens`` do not fit.
            PromptError: The prompt is empty, or has a token that the model does not have or that stands for media.
        """
        ids = self.token_ids(prompt) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise PromptError("the prompt is empty")
        size = int(self.config.text_config.vocab_size)
        if (wrong := next((id for id in ids if not 0 <= id < size), None)) is not None:
            raise PromptError(f"the prompt has token {wrong}; the model has those from 0 to {size - 1}")
        pads = (self.config.image_token_id, self.config.video_token_id)
        if any(id in pads for id in ids):
            raise PromptError("the prompt has a token that stands for a picture or video; send it in a message")
        self._check_room(len(ids), max_new_tokens)
        return self._prompt(ids, ())

    def token_ids(self, text: str) -> list[int]:
        """Returns the ids of a text's tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text_of(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, control tokens included."""
        options = {"skip_special_tokens": False, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(list(ids), **options))

    def _rendered(self, chat: Sequence[Mapping[str, Any]], **ending: bool) -> str:
        try:
            return str(self.tokenizer.apply_chat_template(chat, tokenize=False, **ending))
        except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise PromptError(f"the model's chat template rejects the messages: {error}") from error

    def _check_template(self, path: str | os.PathLike[str]) -> None:
        """Raises CheckpointError if the chat template fails, or leaves out a picture or a text of a message."""
        instead = f"put the one that the model was trained with into {Path(path) / TEMPLATE}"
        word = "circles"
        content = [{"type": "image"}, {"type": "text", "text": word}]
        try:
            text = self._rendered([{"role": "user", "content": content}], add_generation_prompt=True)
        except PromptError as error:
            raise CheckpointError(f"the chat template in {path} cannot be used: {error}; {instead}") from error
        if self._mark.findall(text) != [self._marks.image] or word not in text:
            raise CheckpointError(f"the chat template in {path} leaves out pictures or texts of messages; {instead}")

    def _check_room(self, tokens: int, max_new_tokens: int) -> None:
        if tokens + max_new_tokens > self.limit:
            raise PromptTooLong(
                f"the prompt has at least {tokens} tokens and the answer may have {max_new_tokens}; together at most "
                f"{self.limit} fit. Shorten the prompt, send fewer or smaller pictures, or ask for fewer tokens"
            )

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str):
            raise PromptError("every message needs a role")
        self._plain(role)
        around = {name: self._plain_value(value) for name, value in message.items() if name not in ("role", "content")}
        if isinstance(content, str):
            return {"role": role, "content": self._plain(content), **around}
        if not isinstance(content, Sequence):
            kind = type(content).__name__
            raise PromptError(f"the content of a message must be a string or a list of parts, not {kind}")
        return {"role": role, "content": [self._part(part) for part in content], **around}

    def _part(self, part: Any) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": self._plain(part["text"])}
        if kind not in PART_KINDS:
            raise PromptError(f"unknown content part {kind!r}; known are text, {', '.join(PART_KINDS)}")
        return {"type": PART_KINDS[kind]}

    def _plain_value(self, value: Any) -> Any:
        """Returns a JSON value in which no text contains a control token."""
        left = [value]
        while left:
            one = left.pop()
            if isinstance(one, str):
                self._plain(one)
            elif isinstance(one, Mapping):
                left += (*one.keys(), *one.values())
            elif isinstance(one, Sequence):
                left += one
        return value

    def _plain(self, text: str) -> str:
        """Returns the text if it contains no control token; a user could forge a turn or a placeholder with one."""
        if found := self._control.search(text):
            raise PromptError(f"the text contains {found[0]}, a control token of the model; remove it")
        return text

    def _check_control(self, text: str, without: str) -> None:
        """Checks that the chat template alone has written the control tokens of a prompt.

        A template joins texts, and may cut or trim them, so texts without a control token can make one together.

        Args:
            text: The prompt.
            without: The prompt of the same messages :meth:`_without_control_letters`.

        Raises:
            PromptError: A control token has a letter that is from a message.
        """
        written, own = self._control.findall(text), self._control.findall(without)
        if written != own:
            forged = next((one for one, other in zip_longest(written, own) if one != other), None) or own[-1]
            why = f"the texts of the messages together make {forged}, a control token of the model; change them"
            raise PromptError(why)

    def _without_control_letters(self, value: Any, is_argument: bool = False) -> Any:
        """Returns messages whose texts have no letter of a control token: others of no meaning are in their place.

        Roles and types stay, because chat templates look at them, and so do the names of fields. The names of
        arguments of tool calls are texts like any other.
        """
        if isinstance(value, str):
            return value.translate(self._without_letters)
        if isinstance(value, Mapping):
            return {
                name.translate(self._without_letters) if is_argument else name: inner
                if name in ("role", "type") and not is_argument
                else self._without_control_letters(inner, is_argument or name == "arguments")
                for name, inner in value.items()
            }
        if isinstance(value, Sequence):
            return [self._without_control_letters(one, is_argument) for one in value]
        return value

    def _placeholders(self, text: str, shapes: Sequence[MediaShape]) -> list[Placeholder]:
        kinds: list[Kind] = ["image" if pad == self._marks.image else "video" for pad in self._mark.findall(text)]
        if kinds != [shape.kind for shape in shapes]:
            told = ", ".join(shape.kind for shape in shapes) or "none"
            raise PromptError(f"the messages contain these media: {', '.join(kinds) or 'none'}; prepared were: {told}")
        return [self.family.placeholder(shape, self.merge, self._marks) for shape in shapes]

    def _token_ids(self, text: str, placeholders: Sequence[Placeholder]) -> list[int]:
        """Returns the token ids, with the placeholders in place of the marks.

        The ids of pads are repeated, which is faster than tokenizing a text with one pad for each visual token.
        """
        texts = iter(placeholders)
        text = self._mark.sub(lambda _: next(texts)[0], text)
        pads = (self.config.image_token_id, self.config.video_token_id)
        counts = (count for _, each in placeholders for count in each)
        ids: list[int] = []
        for token in self.tokenizer(text, add_special_tokens=False)["input_ids"]:
            ids.extend([token] * next(counts, 0) if token in pads else [token])
        return ids

    def _prompt(self, ids: list[int], shapes: tuple[MediaShape, ...]) -> Prompt:
        input_ids = torch.tensor([ids])
        types = torch.zeros_like(input_ids, dtype=torch.int32)
        types[input_ids == self.config.image_token_id] = TOKEN_TYPE["image"]
        types[input_ids == self.config.video_token_id] = TOKEN_TYPE["video"]
        visual = types[0].nonzero().reshape(-1)
        if len(visual) != sum(shape.num_tokens(self.merge) for shape in shapes):
            raise PromptError("the tokenizer did not keep the placeholders of the media; check its special tokens")
        positions, delta = self.family.rope_index(self.config, input_ids, types, shapes)
        relative = [merged_positions(shape.grid, self.merge) for shape in shapes]
        return Prompt(
            input_ids=input_ids,
            mm_token_type_ids=types,
            position_ids=positions,
            position_delta=delta,
            visual_positions=visual,
            fill_ids=input_ids[0, visual].to(torch.int32),
            mrope_positions=torch.cat(relative) if relative else torch.empty((0, 3), dtype=torch.int32),
            items=shapes,
        )


def _check_tokens(path: str | os.PathLike[str], config: Any, tokenizer: Any) -> None:
    """Raises CheckpointError if the tokenizer is of another model than ``config.json``."""
    known = set(tokenizer.get_vocab().values())
    size = int(config.text_config.vocab_size)
    lost = [name for name in MARK_IDS if getattr(config, name, None) not in known]
    if not lost and max(known) < size:
        return
    why = f"has no token {lost[0]}" if lost else f"has token {max(known)}, and the model those below {size}"
    raise CheckpointError(f"the tokenizer in {path} is not that of its config.json: it {why}; download the model again")
