"""A prompt as rows: the embedding of every token, text and visual, as SGLang's branch transfers it.

Our own transfers carry the visual tokens alone, because the language side has the text. The encode side of that branch
sends the whole prompt, and its language side takes the rows as they are: ``fill_ids`` become its input ids. So a whole
prompt needs the table of text embeddings on the encode side, and needs no tokenizer on the language side.

The fields are those of a visual token (:mod:`.embedding`) with other contents: ``fill_ids`` are the ids of the prompt,
``mrope_positions`` the rotary positions within the prompt, and the deepstack embeddings of text are 0.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch
from torch.nn.functional import embedding

from embferry.engine.checkpoint import Checkpoint
from embferry.engine.embedding import Embedding
from embferry.engine.families import family_of
from embferry.engine.families.base import Part
from embferry.engine.prompt import Prompt
from embferry.protocol.layout import Field

TABLE = "embed_tokens.weight"
ID_LIMIT = 1 << 30
"""Ids of visual tokens are below this, so that they fit into an int32 wherever they are added to."""


def text_table(path: str | os.PathLike[str], dtype: torch.dtype) -> torch.Tensor:
    """Returns the embeddings of the text tokens of a model, ``[vocabulary, hidden]``; nothing else is read.

    Raises:
        UnsupportedModel: The model's family has no adapter.
        CheckpointError: The files have no such tensor, or cannot be read.
    """
    checkpoint = Checkpoint(path)
    text = checkpoint.config.text_config
    shapes = {TABLE: (int(text.vocab_size), int(text.hidden_size))}
    return checkpoint.read(family_of(checkpoint.config), Part.TEXT, dtype, shapes, is_all=False)[TABLE]


def visual_id(digest: bytes, vocabulary: int) -> int:
    """Returns the id of all visual tokens of an item, beyond the vocabulary.

    It depends on the content. A server that reuses the key-value cache of equal prefixes compares ids, and would answer
    about another picture if all pictures had the id of the placeholder.
    """
    return vocabulary + int.from_bytes(digest[:8], "little") % (ID_LIMIT - vocabulary)


class WholePrompt:
    """The rows of a prompt, which are complete when every item has been added.

    Args:
        prompt: The prompt.
        table: Embeddings of the text tokens, ``[vocabulary, hidden]``.
        fields: The fields of the model.

    Attributes:
        rows: Field name → ``[length, width]``, contiguous.
    """

    @torch.inference_mode()
    def __init__(self, prompt: Prompt, table: torch.Tensor, fields: Sequence[Field]) -> None:
        self.prompt = prompt
        ids = prompt.input_ids[0]
        self.rows: dict[str, torch.Tensor] = {
            "input_embeddings": embedding(ids, table),
            "fill_ids": ids.to(torch.int32).reshape(-1, 1),
            "mrope_positions": prompt.position_ids[:, 0].T.to(torch.int32).contiguous(),
        }
        for field in fields:
            if field.name not in self.rows:
                self.rows[field.name] = torch.zeros((prompt.length, field.width), dtype=getattr(torch, field.dtype))
        self._vocabulary = len(table)
        self._placed = 0

    @torch.inference_mode()
    def add(self, item: Embedding) -> None:
        """Puts the embedding of the next item, in the order of the prompt, in the place of its tokens."""
        at = self.prompt.visual_positions[self._placed : self._placed + item.num_tokens]
        for name, tensor in item.tensors.items():
            if name == "fill_ids":
                self.rows[name][at] = visual_id(item.shape.digest, self._vocabulary)
            elif name != "mrope_positions":
                self.rows[name][at] = tensor
        self._placed += item.num_tokens


def prompt_of_rows(fields: Mapping[str, torch.Tensor], position_delta: int, *, is_text: bool) -> Prompt:
    """Returns a prompt all of whose tokens are embedded elsewhere: to the language model, all are visual.

    Args:
        fields: ``fill_ids`` and ``mrope_positions`` of the rows, ``[length, width]``.
        position_delta: The position of a generated token is its index plus this.
        is_text: There are no media. The rows of such a prompt need not have positions: they are counted.
    """
    ids, positions = fields["fill_ids"].reshape(-1), fields["mrope_positions"]
    length = len(ids)
    counted = torch.arange(length).expand(3, 1, length)
    return Prompt(
        input_ids=torch.zeros((1, length), dtype=torch.int64),  # replaced by the rows; those of pictures are no ids
        mm_token_type_ids=torch.zeros((1, length), dtype=torch.int32),
        position_ids=counted if is_text else positions.T.to(torch.int64).reshape(3, 1, length),
        position_delta=0 if is_text else position_delta,
        visual_positions=torch.arange(length),
        fill_ids=ids,
        mrope_positions=positions,
        items=(),
    )
