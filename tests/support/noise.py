"""Text that is the same in every process and no repetition of itself: nothing makes it smaller."""

from __future__ import annotations

from random import Random

MB5 = 5 * 1024 * 1024


def noise(seed: int, size: int = MB5) -> str:
    """``size`` hexadecimal digits."""
    return Random(seed).randbytes(size // 2).hex()
