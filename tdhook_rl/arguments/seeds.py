"""One seed of the user's, and many streams of random numbers that have nothing to do with each other."""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex


def stream_of(seed: SupportsIndex, *names: str | int) -> int:
    """The seed of one of the streams that follow from a seed.

    What is seeded with the same number draws the same numbers, or nearly so: of an environment, and of a policy that
    acts in it, the first noise would be the first state. No stream is that of the seed itself, by which environments,
    data and weights may have been drawn.

    Args:
        seed: of the user's, a whole number of whatever class.
        names: of the stream, such as what is drawn and when.

    Raises:
        TypeError: for a seed that is no whole number.

    Example:
        >>> len({stream_of(0), stream_of(0, "noise", 0), stream_of(0, "noise", 1), stream_of(1, "noise", 0)})
        4
    """
    told = repr((operator.index(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=8).digest(), "big") >> 1
