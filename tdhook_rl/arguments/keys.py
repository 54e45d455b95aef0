"""Keys of a TensorDict: a string, or a tuple of strings for a nested entry."""

from __future__ import annotations

from tensordict import NestedKey


def key_parts(key: NestedKey) -> tuple[str, ...]:
    """The strings of a key.

    Example:
        >>> key_parts("reward"), key_parts(("next", "reward"))
        (('reward',), ('next', 'reward'))
    """
    return (key,) if isinstance(key, str) else tuple(key)
