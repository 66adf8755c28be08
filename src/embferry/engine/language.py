"""The language side of a model: decoder and head. The weights of the vision tower are never opened.

Each call runs one chunk of a prompt or one token of a single sequence. A batch would be faster but not exact, because
the rows of a matrix product can differ in the last bits with the number of other rows.

Prefill in chunks is close to prefill in one piece but not equal to it bit by bit, because kernels sum in another order.
So the boundaries depend only on the length of the prompt and on a setting. The arrival of the embedding decides when a
chunk runs, never what is in it: a request has the same logits however its embedding arrives.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import linear
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from embferry.engine.checkpoint import Checkpoint
from embferry.engine.choice import Chooser, Logprobs
from embferry.engine.embedding import token_fields
from embferry.engine.errors import EmbeddingMismatch, PromptTooLong
from embferry.engine.families import family_of
from embferry.engine.families.base import Part
from embferry.engine.grammar import Grammars, Matcher
from embferry.engine.prompt import Prompt, PromptBuilder
from embferry.engine.sampling import SamplingParams
from embferry.engine.text import Detokenizer, StopText
from embferry.protocol.layout import Field

DEFAULT_CHUNK_TOKENS = 512
FinishReason = Literal["stop", "length"]
Fields = Mapping[str, torch.Tensor]
"""Field name → tensor ``[n, width]``."""


def chunk_boundaries(length: int, chunk_tokens: int) -> list[tuple[int, int]]:
    """Returns half-open ranges of ``chunk_tokens`` tokens that cover ``[0, length)``; the last may be shorter."""
    if length < 1 or chunk_tokens < 1:
        raise ValueError(f"cannot cut {length} tokens into chunks of {chunk_tokens}")
    return [(start, min(start + chunk_tokens, length)) for start in range(0, length, chunk_tokens)]


class Sequence:
    """The state of one answer in the model: its key-value cache, its progress, and the generated tokens.

    Attributes:
        chunks: Ranges of prompt tokens, half open, that the prefill runs one by one.
        chunks_done: How many of these have run.
        number: Which of the choices of its request it is.
        tokens: Ids generated so far, including the end token.
        text: The text of these tokens as far as it is final.
        finish_reason: None while there is more to generate.
        logits: ``[vocab]``, the model's logits for the last token; None before the first token.
    """

    def __init__(
        self,
        prompt: Prompt,
        params: SamplingParams,
        cache: Any,
        chunks: list[tuple[int, int]],
        tokenizer: Any,
        ends: frozenset[int],
        matcher: Matcher | None = None,
        number: int = 0,
    ) -> None:
        self.prompt = prompt
        self.params = params
        self.cache = cache
        self.chunks = chunks
        self.chunks_done = 0
        self.number = number
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.logits: torch.Tensor | None = None
        self._ends = (frozenset() if params.ignore_eos else ends) | params.stop_token_ids
        # A banned end token is one of the model's too, with ``ignore_eos`` as well: ``min_tokens`` is about both.
        own = None if matcher is None else matcher.copy()
        self._chooser = Chooser(params, prompt.input_ids[0], ends, own, number)
        self._tokenizer, self._model_ends, self._matcher = tokenizer, ends, matcher
        self._characters = Detokenizer(tokenizer, params.skip_special_tokens)
        self._stop = StopText(params.stop, params.include_stop)
        self._taken = 0

    @property
    def prefilled(self) -> bool:
        return self.chunks_done == len(self.chunks)

    @property
    def next_visual_range(self) -> tuple[int, int]:
        """The half-open range of visual tokens that the next chunk of the prompt needs."""
        return self.prompt.visual_range(*self.chunks[self.chunks_done])

    @property
    def logprobs(self) -> Logprobs | None:
        """Log probabilities of the last token, if the request asks for them."""
        return self._chooser.logprobs

    def take_text(self) -> str:
        """Returns the text that was added since the previous call."""
        taken, self._taken = self._taken, len(self.text)
        return self.text[taken:]

    def fork(self, number: int) -> Sequence:
        """Returns another choice of the same request, before the first token of it and after the prefill."""
        twin = Sequence(
            self.prompt,
            self.params,
            copy.deepcopy(self.cache),
            self.chunks,
            self._tokenizer,
            self._model_ends,
            self._matcher,
            number,
        )
        twin.chunks_done = self.chunks_done
        return twin

    def advance(self, logits: torch.Tensor, room: int) -> int:
        """Chooses the next token by the model's logits ``[vocab]``, and returns it.

        Args:
            logits: For the next token.
            room: The number of tokens that fit after the prompt.
        """
        self.logits = logits
        token = self._chooser.choose(logits)
        self.accept(token, room)
        return token

    def accept(self, token: int, room: int) -> None:
        """Appends a generated token and decides whether it is the last; ``room`` tokens fit after the prompt."""
        self.tokens.append(token)
        if token in self._ends:
            self.finish_reason = "stop"
            if self.params.include_stop and token in self.params.stop_token_ids:
                self.text += self._stop.push(self._characters.push(token))
        else:
            is_early = len(self.tokens) <= self.params.min_tokens
            text = self._characters.push(token)
            self.text += self._stop.pass_on(text) if is_early else self._stop.push(text)
            if self._stop.stopped or self._chooser.is_complete:
                self.finish_reason = "stop"
            elif len(self.tokens) >= min(self.params.max_tokens, room):
                self.finish_reason = "length"
        if self.finish_reason is not None:
            self.text += self._stop.push(self._characters.finish()) + self._stop.finish()


class LanguageModel:
    """Decoder and head of a model. Runs sequences whose visual tokens were embedded elsewhere."""

    def __init__(
        self, prompts: PromptBuilder, decoder: Any, head: torch.Tensor, end_tokens: frozenset[int], chunk_tokens: int
    ) -> None:
        self.prompts = prompts
        self.chunk_tokens = chunk_tokens
        self.end_tokens = end_tokens
        self.grammars = Grammars(prompts.tokenizer, len(head), end_tokens)
        self._decoder = decoder
        self._head = head

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        dtype: torch.dtype = torch.bfloat16,
        attn: str = "sdpa",
        threads: int = 1,
        prefill_chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
        limit: int | None = None,
    ) -> LanguageModel:
        """Loads the decoder and the head of a model.

        Args:
            path: Model directory.
            dtype: Dtype of the weights and of the embeddings.
            attn: Attention implementation of transformers.
            threads: Threads of torch, for the whole process; the last bits of a result depend on their number.
            prefill_chunk_tokens: Tokens of a prefill chunk; see the module.
            limit: Most tokens of a prompt together with its answer.

        Raises:
            UnsupportedModel: The model's family has no adapter.
            CheckpointError: The files of the model are incomplete or contradict each other.
        """
        torch.set_num_threads(threads)
        checkpoint = Checkpoint(path)
        family, config = family_of(checkpoint.config), checkpoint.config
        prompts = PromptBuilder.load(path, limit)
        decoder = checkpoint.build(family, Part.TEXT, family.text_class, config.text_config, dtype, attn)
        head = decoder.embed_tokens.weight
        if checkpoint.has(family, Part.HEAD) or not config.tie_word_embeddings:
            head = checkpoint.read(family, Part.HEAD, dtype, {"weight": tuple(head.shape)})["weight"]
        return cls(prompts, decoder, head, end_tokens(path, config, prompts.tokenizer), prefill_chunk_tokens)

    @property
    def fields(self) -> tuple[Field, ...]:
        """The fields of a visual token, in the model's dtype."""
        return token_fields(self.prompts.family, self.prompts.config, self._decoder.dtype)

    def start(self, prompt: Prompt, params: SamplingParams, matcher: Matcher | None = None) -> Sequence:
        """Returns a sequence of which no chunk has run.

        Args:
            prompt: The prompt.
            params: How the answer is generated.
            matcher: The grammar that each choice must match, in its first state, in which it stays.

        Raises:
            PromptTooLong: The prompt leaves no room for an answer.
        """
        if prompt.length >= self.prompts.limit:
            raise PromptTooLong(f"the prompt has {prompt.length} tokens; at most {self.prompts.limit - 1} fit")
        cache = DynamicCache(config=self.prompts.config.text_config)
        chunks = chunk_boundaries(prompt.length, self.chunk_tokens)
        return Sequence(prompt, params, cache, chunks, self.prompts.tokenizer, self.end_tokens, matcher)

    @torch.inference_mode()
    def prefill_chunk(self, sequence: Sequence, fields: Fields | None = None) -> int | None:
        """Runs the next chunk of the prompt. After the last chunk, chooses and returns the first token.

        Args:
            sequence: The sequence to advance.
            fields: The fields of the visual tokens of ``sequence.next_visual_range``, each ``[n, width]``; None if the
                chunk has no visual tokens. The tensors are not kept after the call.

        Raises:
            EmbeddingMismatch: The fields do not belong to the media of the prompt; nothing has been computed.
        """
        prompt, (start, stop) = sequence.prompt, sequence.chunks[sequence.chunks_done]
        first, last = sequence.next_visual_range
        embeds = self._decoder.embed_tokens(prompt.input_ids[:, start:stop])
        deepstack: dict[str, Any] = {}
        if last > first:
            checked = fields or {}
            self._check(prompt, first, last, checked)
            at = prompt.visual_positions[first:last] - start
            embeds[0, at] = checked["input_embeddings"].to(embeds.dtype)
            if "deepstack_embeddings" in checked:
                mask = torch.zeros(embeds.shape[:2], dtype=torch.bool)
                mask[0, at] = True
                levels = torch.split(checked["deepstack_embeddings"], embeds.shape[-1], dim=-1)
                deepstack = {"visual_pos_masks": mask, "deepstack_visual_embeds": list(levels)}
        hidden = self._run(sequence, prompt.position_ids[..., start:stop], inputs_embeds=embeds, **deepstack)
        sequence.chunks_done += 1
        return self._choose(sequence, hidden) if sequence.prefilled else None

    @torch.inference_mode()
    def fork(self, sequence: Sequence) -> list[Sequence]:
        """Returns the other choices of a request whose first choice has its first token. Each has one of its own."""
        assert sequence.logits is not None, "it has a token"
        twins = [sequence.fork(number) for number in range(1, sequence.params.n)]
        for twin in twins:
            twin.advance(sequence.logits, self._room(twin))
        return twins

    @torch.inference_mode()
    def decode_step(self, sequence: Sequence) -> int:
        """Feeds the last token back, chooses the next one and returns it."""
        index = int(sequence.cache.get_seq_length()) + sequence.prompt.position_delta
        hidden = self._run(sequence, torch.full((3, 1, 1), index), input_ids=torch.tensor([[sequence.tokens[-1]]]))
        return self._choose(sequence, hidden)

    def _run(self, sequence: Sequence, positions: torch.Tensor, **inputs: Any) -> Any:
        return self._decoder(
            position_ids=positions, past_key_values=sequence.cache, use_cache=True, **inputs
        ).last_hidden_state

    def _choose(self, sequence: Sequence, hidden: torch.Tensor) -> int:
        # The head runs on the last row alone, as in ``generate``, because a product with more rows differs in the last
        # bits.
        return sequence.advance(linear(hidden[:, -1:], self._head)[0, 0], self._room(sequence))

    def _room(self, sequence: Sequence) -> int:
        return self.prompts.limit - sequence.prompt.length

    def _check(self, prompt: Prompt, first: int, last: int, fields: Fields) -> None:
        which = f"visual tokens {first} to {last}"
        for spec in self.fields:
            field = fields.get(spec.name)
            expected = (last - first, spec.width)
            if field is None or tuple(field.shape) != expected:
                got = "nothing" if field is None else f"{tuple(field.shape)}"
                raise EmbeddingMismatch(f"{which}: {spec.name} should have shape {expected}, got {got}")
        if not torch.equal(fields["fill_ids"].reshape(-1), prompt.fill_ids[first:last]):
            raise EmbeddingMismatch(f"{which} are not of the kinds of media that the prompt has")
        if not torch.equal(fields["mrope_positions"], prompt.mrope_positions[first:last]):
            raise EmbeddingMismatch(f"{which} are of media of another size than those of the prompt")


def end_tokens(path: str | os.PathLike[str], config: Any, tokenizer: Any) -> frozenset[int]:
    """Returns the ids that end an answer.

    These are the end token of the tokenizer and those of ``generation_config.json``, or else of ``config.json``.
    """
    named = None
    if (Path(path) / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(path, local_files_only=True).eos_token_id
    if named is None:
        named = getattr(config.text_config, "eos_token_id", None)
    ids = named if isinstance(named, list) else [named]
    return frozenset(token for token in (*ids, tokenizer.eos_token_id) if token is not None)
