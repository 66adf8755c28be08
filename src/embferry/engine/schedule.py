"""The boundaries of the chunks of a prefill.

Prefill in chunks is close to prefill in one piece but not equal to it bit by bit, because kernels sum in another order.
So the boundaries depend only on the length of the prompt and on a setting. The arrival of the embedding decides when a
chunk runs, never what is in it: a request has the same logits however its embedding arrives.
"""

from __future__ import annotations

DEFAULT_CHUNK_TOKENS = 512


def chunk_boundaries(length: int, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> tuple[tuple[int, int], ...]:
    """Returns half-open ranges of ``chunk_tokens`` tokens that cover ``[0, length)``; the last may be shorter.

    Raises:
        ValueError: An argument is less than 1.
    """
    if length < 1 or chunk_tokens < 1:
        raise ValueError(f"cannot cut {length} tokens into chunks of {chunk_tokens}")
    return tuple((start, min(start + chunk_tokens, length)) for start in range(0, length, chunk_tokens))
