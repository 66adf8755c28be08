"""Grammars that an answer must match, compiled by llguidance: a JSON schema, a regular expression or a list of texts.

Compiling is done once for a request, together with the first mask, in which llguidance expands the grammar. The matcher
then says before each token which ones may follow. All of it is bounded by ``LIMITS``.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Sequence
from typing import Any

import torch

from embferry.engine.errors import ParameterError

LIMITS: dict[str, Any] = {
    "max_items_in_row": 500,
    "initial_lexer_fuel": 100_000,  # 50 ms, 16 MB
    "step_lexer_fuel": 100_000,  # 7 ms
    "step_max_items": 20_000,  # 1 ms
    "max_lexer_states": 20_000,  # of up to 2 kB
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
"""The most that compiling a grammar and one step of it may cost; see llguidance's ``LLParserLimits``."""
MATCHER_BYTES = 160 * LIMITS["initial_lexer_fuel"]
"""The most that a matcher takes before its answer begins, as measured with ``(a{899}){1000}``."""
PARAM = "constraint"
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,20}"
"""White space between two values of JSON. Without a bound, a small model may write nothing else."""
_NOTHING_FOLLOWS = "no text has the answer's form"


class Matcher:
    """The state of one answer in its grammar. An answer that has run into a limit is an error of its request."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def copy(self) -> Matcher:
        """Returns a matcher in the same state."""
        return Matcher(self._matcher.deep_copy())

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end may follow."""
        return bool(self._matcher.is_stopped())

    def mask(self, vocabulary: int) -> torch.Tensor:
        """Returns bool ``[vocabulary]``: the tokens that may follow.

        Raises:
            ParameterError: The grammar is too complex.
        """
        words = torch.zeros((1, (vocabulary + 31) // 32), dtype=torch.int32)
        self._matcher.unsafe_compute_mask_ptr(words.data_ptr(), words.numel() * 4)
        self._check()
        bits = (words.reshape(-1, 1) >> torch.arange(32, dtype=torch.int32)) & 1
        return bits.reshape(-1)[:vocabulary].bool()

    def accept(self, token: int) -> None:
        """Advances by a token that the mask allows."""
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            why = _first_line(self._matcher.get_error())
            why = _NOTHING_FOLLOWS if "NoExtensionBias" in why else f"the answer's grammar cannot be followed: {why}"
            raise ParameterError(why, param=PARAM)


class Grammars:
    """Compiles grammars for one model. Thread-safe.

    Args:
        tokenizer: The model's, of the fast kind.
        vocabulary: The number of logits, also an attribute.
        ends: Tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: frozenset[int]) -> None:
        self._tokenizer, self.vocabulary, self._ends = tokenizer, vocabulary, ends
        self._making = threading.Lock()
        self._compiled_for: Any = None  # llguidance's own form of the tokenizer; takes a second for a large one

    def compile(
        self,
        *,
        json_schema: Any = None,
        regex: str | None = None,
        choice: Sequence[str] | None = None,
        compact: bool = False,
    ) -> Matcher:
        """Returns a matcher for one of the three.

        Args:
            json_schema: The schema that the answer's JSON must match.
            regex: The regular expression that the whole answer must match.
            choice: The texts of which the answer must be one.
            compact: JSON has no white space between its values.

        Raises:
            ParameterError: The grammar is wrong or too complex, or llguidance is not installed.
        """
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            why = "answers of a given form need the package llguidance: pip install 'embferry[serve]'"
            raise ParameterError(why, param=PARAM) from error
        if json_schema is not None:
            options: Any = {"whitespace_flexible": False} if compact else {"whitespace_pattern": WHITE_SPACE}
            schema = {} if json_schema is True else {"enum": []} if json_schema is False else json_schema
            try:
                grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), options)
            except (ValueError, RecursionError) as error:
                raise ParameterError(f"the answer's schema cannot be read: {error}", param=PARAM) from error
        else:
            pattern = regex if regex is not None else "|".join(map(re.escape, choice or ()))
            grammar = LLMatcher.grammar_from_regex(pattern)
        matcher = LLMatcher(self._prepared(), grammar, log_level=0, limits=LLParserLimits(**LIMITS))
        if matcher.is_error():
            why = f"the answer's form cannot be compiled: {_first_line(matcher.get_error())}"
            raise ParameterError(why, param=PARAM)
        compiled = Matcher(matcher)
        try:
            # Here and not between the tokens of other answers: most of the work is in it.
            compiled.mask(self.vocabulary)
        except ParameterError as error:
            if error.detail != _NOTHING_FOLLOWS or '"$ref"' not in grammar:
                raise
            why = "the answer's schema refers to itself without an end: following $ref leads back to the same $ref"
            raise ParameterError(why, param=PARAM) from error
        return compiled

    def _prepared(self) -> Any:
        with self._making:
            if self._compiled_for is None:
                from llguidance.hf import from_tokenizer

                self._compiled_for = from_tokenizer(self._tokenizer, self.vocabulary, sorted(self._ends))
            return self._compiled_for


def _first_line(error: str) -> str:
    """Returns an error of llguidance without its marks."""
    return error.split("\\n<")[0].split("\n<")[0][:300]
