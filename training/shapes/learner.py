"""The model's forward pass for training: the same mathematics, in batches of equal shape.

The forward pass of Hugging Face attends to one picture at a time and uses a cache. Here all pictures of a batch have
the same size, so attention is one matrix product. All questions about a picture share its tokens: a question attends to
the picture and to itself, never to another question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from training.shapes.scenes import COLOURS, SHAPES
from training.shapes.video import DIRECTIONS

MOST_PICTURES = 4
HEADS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "row": 3, "column": 3, "motion": len(DIRECTIONS) + 1}
"""Numbers of classes of the auxiliary losses of a merged token. For shape and colour, 0 means "no centre here"."""
EMPTY_WEIGHT = 0.25
"""Weight of a token without a centre in the losses of shape and colour."""
NUMBERED_AFTER = 0
"""The text layer after which the auxiliary loss reads a picture's number from its tokens."""


@dataclass(slots=True)
class Batch:
    """B prompts of one layout, with I = B × (pictures or temporal patches) of N patches and n = N / 4 tokens each.

    Attributes:
        patches: uint8 [I, N, 192] for pictures, whose patches have two equal frames; [I, N, 384] for clips.
        grid: (rows, columns) in patches.
        ids: [B, L].
        positions: [3, B, L].
        segments: [B, L]: 0 for the prompt up to the questions, k for the k-th question.
        visual: [V], indices of the visual tokens in a row.
        answers: [M], flat indices of the tokens that are followed by ``targets``.
        targets: [M], ids of the next tokens.
        objects: [5, I × n], labels in the order of ``HEADS``; -100 where unused.
        numbers: [V], number of the picture; -100 for none.
        covered: [I, N], the shape that covers a patch; 0 for none.
        kinds: The kind of every question, in order, and how many of ``answers`` belong to it.
    """

    patches: Tensor
    grid: tuple[int, int]
    ids: Tensor
    positions: Tensor
    segments: Tensor
    visual: Tensor
    answers: Tensor
    targets: Tensor
    objects: Tensor
    numbers: Tensor
    covered: Tensor
    kinds: list[tuple[str, int]]


@dataclass(slots=True)
class Losses:
    answer: Tensor
    objects: Tensor
    covered: Tensor
    number: Tensor


def _turn_half(x: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return torch.cat((-right, left), -1)


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Computes plain softmax attention, whose backward pass is several times faster on a CPU than the fused one."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    return torch.matmul(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)


class Learner(nn.Module):
    """The model to export and the heads for training only; ``compute`` is the dtype of the arithmetic."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, compute: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.model = model
        self.compute = compute
        width = model.lm_head.in_features
        self.object_heads = nn.Linear(width, sum(HEADS.values()))
        self.number_head = nn.Linear(width, MOST_PICTURES + 1)
        self.covered_head = nn.Linear(model.model.visual.pos_embed.embedding_dim, HEADS["shape"])
        self._tables: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def _table(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns the position interpolation and rotary angles of a picture with this grid."""
        if grid not in self._tables:
            visual = self.model.model.visual
            thw = torch.tensor([[1, *grid]])
            index, weight = get_vision_interpolation_indices_and_weights(
                thw, visual.num_grid_per_side, visual.interpolation_mode, visual.interpolation_align_corners, 2
            )
            cos, sin = visual.rotary_pos_emb(weight, get_vision_position_ids(thw, 2))
            self._tables[grid] = index, weight, cos, sin
        return self._tables[grid]

    def see(self, patches: Tensor, table: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, list[Tensor], Tensor]:
        """Runs the vision encoder.

        Args:
            patches: uint8 [I, N, 192] or [I, N, 384].
            table: See :meth:`_table`.

        Returns:
            Merged tokens [I × n, width], the same of every deepstack level, and the last hidden states of the patches.
        """
        visual = self.model.model.visual
        index, weight, cos, sin = table
        pictures, length, depth = patches.shape
        kernel = visual.patch_embed.proj.weight
        flat = kernel.flatten(1) if depth == kernel[0].numel() else kernel.sum(2).flatten(1)
        x = F.linear(patches.to(self.compute) / 127.5 - 1, flat, visual.patch_embed.proj.bias).float()
        x = x + (visual.pos_embed.weight[index] * weight[..., None]).sum(1)
        levels = []
        for number, block in enumerate(visual.blocks):
            heads = block.attn.num_heads
            qkv = block.attn.qkv(block.norm1(x)).view(pictures, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            query, key = (y * cos.to(y.dtype) + _turn_half(y) * sin.to(y.dtype) for y in (qkv[0], qkv[1]))
            mixed = _attend(query, key, qkv[2], None).transpose(1, 2).reshape(pictures, length, -1)
            x = x + block.attn.proj(mixed)
            x = x + block.mlp(block.norm2(x))
            if number in visual.deepstack_visual_indexes:
                merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(number)]
                levels.append(merger(x))
        return visual.merger(x), levels, x

    def read(self, batch: Batch, seen: Tensor, levels: list[Tensor], cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Runs the text model; returns hidden states [B, L, width], the last and those after ``NUMBERED_AFTER``."""
        text = self.model.model.language_model
        rows, length = batch.ids.shape
        x = text.embed_tokens(batch.ids)
        x = x.index_copy(1, batch.visual, seen.view(rows, -1, x.shape[-1]).to(x.dtype))
        segment = batch.segments
        allowed = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        bias = torch.where(allowed.tril(), 0.0, -1e4)[:, None, None].to(self.compute)
        middle = x
        for number, layer in enumerate(text.layers):
            attention, y = layer.self_attn, layer.input_layernorm(x)
            query = attention.q_norm(attention.q_proj(y).view(rows, length, -1, attention.head_dim)).transpose(1, 2)
            key = attention.k_norm(attention.k_proj(y).view(rows, length, -1, attention.head_dim)).transpose(1, 2)
            value = attention.v_proj(y).view(rows, length, -1, attention.head_dim).transpose(1, 2)
            query, key = ((z * cos + _turn_half(z) * sin).to(value.dtype) for z in (query, key))
            grouped = query.view(rows, key.shape[1], -1, length, attention.head_dim)
            mixed = _attend(grouped, key[:, :, None], value[:, :, None], bias)
            x = x + attention.o_proj(mixed.flatten(1, 2).transpose(1, 2).reshape(rows, length, -1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            if number < len(levels):
                x = x.index_add(1, batch.visual, levels[number].view(rows, -1, x.shape[-1]).to(x.dtype))
            if number == NUMBERED_AFTER:
                middle = x
        return text.norm(x), middle

    def _object_loss(self, seen: Tensor, labels: Tensor) -> Tensor:
        logits = self.object_heads(seen).float().split(list(HEADS.values()), -1)
        weight = torch.where(labels[0] > 0, 1.0, EMPTY_WEIGHT)
        total = seen.new_zeros((), dtype=torch.float32)
        for name, scores, label in zip(HEADS, logits, labels, strict=True):
            loss = F.cross_entropy(scores, label, reduction="none", ignore_index=-100)
            used = weight if name in ("shape", "colour") else (label >= 0).float()
            total = total + (loss * used).sum() / used.sum().clamp(min=1)
        return total

    def _covered_loss(self, patches: Tensor, labels: Tensor) -> Tensor:
        loss = F.cross_entropy(self.covered_head(patches).float().flatten(0, 1), labels.flatten(), reduction="none")
        weight = torch.where(labels.flatten() > 0, 1.0, EMPTY_WEIGHT)
        return (loss * weight).sum() / weight.sum()

    def forward(self, batch: Batch, text: bool = True) -> tuple[Losses, Tensor]:
        """Returns losses and the greedy next token at every index of ``answers`` [M]; empty without the text model."""
        with torch.autocast("cpu", self.compute, enabled=self.compute is not torch.float32):
            return self._forward(batch, text)

    def _forward(self, batch: Batch, text: bool) -> tuple[Losses, Tensor]:
        seen, levels, patches = self.see(batch.patches, self._table(batch.grid))
        objects = self._object_loss(seen, batch.objects)
        covered = self._covered_loss(patches, batch.covered)
        nothing = objects.new_zeros(())
        if not text:
            return Losses(nothing, objects, covered, nothing), batch.answers[:0]
        with torch.no_grad():
            cos, sin = self.model.model.language_model.rotary_emb(seen, batch.positions)
            cos, sin = (angle[:, None].to(self.compute) for angle in (cos, sin))
        last, middle = self.read(batch, seen, levels, cos, sin)
        logits = self.model.lm_head(last.flatten(0, 1)[batch.answers]).float()
        answer = F.cross_entropy(logits, batch.targets)
        if bool((batch.numbers >= 0).any()):
            guessed = self.number_head(middle[:, batch.visual]).float().flatten(0, 1)
            number = F.cross_entropy(guessed, batch.numbers.repeat(len(batch.ids)))
        else:
            number = nothing
        return Losses(answer, objects, covered, number), logits.argmax(-1)
