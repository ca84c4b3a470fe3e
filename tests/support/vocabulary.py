"""A vocabulary of ``tiktoken`` from a handful of ranks: no network."""

from __future__ import annotations

import tiktoken


def tiny() -> tiktoken.Encoding:
    """Every byte, and ``ab``."""
    ranks = {bytes([byte]): byte for byte in range(256)} | {b"ab": 256}
    return tiktoken.Encoding("tiny", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={})
