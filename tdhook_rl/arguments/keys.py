"""Keys of a TensorDict: a string, or a tuple of strings for a nested entry."""

from __future__ import annotations

from typing import Any

from tensordict import NestedKey, TensorDictBase

from tdhook_rl.errors import MissingKeyError, nearest


def key_parts(key: NestedKey) -> tuple[str, ...]:
    """The strings of a key.

    Example:
        >>> key_parts("reward"), key_parts(("next", "reward"))
        (('reward',), ('next', 'reward'))
    """
    return (key,) if isinstance(key, str) else tuple(key)


def missing(data: TensorDictBase, key: NestedKey, reader: str, remedy: str = "") -> MissingKeyError:
    """The error for an entry that is not there: who reads it, the nearest keys, and what to do.

    Example:
        >>> from tensordict import TensorDict
        >>> print(missing(TensorDict({"is_done": 0}), "done", "the schedule reads", ". Keep it with the data"))
        the schedule reads 'done', which the data lacks; nearest: 'is_done'. Keep it with the data
    """
    return MissingKeyError(f"{reader} {key!r}, which the data lacks; {nearest(key, data.keys(True, True))}{remedy}")


def required(data: TensorDictBase, key: NestedKey, reader: str, remedy: str = "") -> Any:
    """The entry under a key.

    Raises:
        MissingKeyError: as :func:`missing` says it.
    """
    value = data.get(key, None)
    if value is None:
        raise missing(data, key, reader, remedy)
    return value
