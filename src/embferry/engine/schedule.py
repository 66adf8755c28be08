"""Where prefill is cut into chunks.

Prefill in chunks is close to prefill in one piece, not equal to it bit by bit: the kernels sum in another order. So the
boundaries are a function of the prompt's length and of a setting, and of nothing else. The arrival of the embedding
decides when a chunk runs, never what is in it; the same request gives the same logits however its embedding came.
"""

from __future__ import annotations

DEFAULT_CHUNK_TOKENS = 512


def chunk_boundaries(length: int, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> tuple[tuple[int, int], ...]:
    """Half-open ranges that cover ``[0, length)``, each of ``chunk_tokens`` but the last.

    Raises:
        ValueError: an empty prompt, or a chunk of no tokens.
    """
    if length < 1 or chunk_tokens < 1:
        raise ValueError(f"cannot cut {length} tokens into chunks of {chunk_tokens}")
    return tuple((start, min(start + chunk_tokens, length)) for start in range(0, length, chunk_tokens))
