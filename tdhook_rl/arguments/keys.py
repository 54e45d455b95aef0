"""Keys of a TensorDict: a string, or a tuple of strings for a nested entry."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, TypeGuard

from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor

from tdhook_rl.errors import InputError, MissingKeyError, listed, nearest
from tdhook_rl.internals.tensordict_names import store_of


def is_tensordict(value: Any) -> TypeGuard[TensorDictBase]:
    """``isinstance(value, TensorDictBase)``, which takes four times as long of the class that it mostly is.

    Example:
        >>> is_tensordict(TensorDict()), is_tensordict({})
        (True, False)
    """
    return type(value) is TensorDict or isinstance(value, TensorDictBase)


def key_parts(key: NestedKey) -> tuple[str, ...]:
    """The strings of a key.

    Example:
        >>> key_parts("reward"), key_parts(("next", "reward"))
        (('reward',), ('next', 'reward'))
    """
    return (key,) if isinstance(key, str) else tuple(key)


def get_entry(data: TensorDictBase, key: NestedKey) -> Any:
    """``data.get(key, None)``; a tensor at the top, or one below, without the detour through nested keys.

    There is nothing below a tensor, of which ``get`` would say that it is no TensorDict.
    """
    if type(data) is TensorDict:
        if type(key) is str:
            value = store_of(data).get(key)
            if value is None or type(value) is Tensor:
                return value
        elif len(key) == 2:
            node = store_of(data).get(key[0])
            if node is None:
                return None
            if type(node) is TensorDict:
                return get_entry(node, key[1])
    if type(key) is not str:
        holder: Any = data
        for step in key[:-1]:
            holder = holder.get(step, None)
            if not is_tensor_collection(holder):
                return None
        return _stacked(holder, key[-1])
    return _stacked(data, key)


def _stacked(data: Any, key: str) -> Any:
    """An entry of one name, of which the rows of a lazy stack may differ in shape."""
    try:
        return data.get(key, None)
    except RuntimeError as error:
        parts = [one.get(key, None) for one in getattr(data, "tensordicts", ())]
        shapes = dict.fromkeys(str(tuple(one.shape)) for one in parts if one is not None)
        if len(shapes) < 2:
            raise
        raise InputError(
            f"{key!r} has other shapes in other parts of a lazy stack ({listed(shapes, 4, 'and {} more')}), which are "
            "no rows of one batch: take the parts one by one, as in "
            "lazy_stack([hooked.annotate(one) for one in data.tensordicts]), or pad them"
        ) from error


def surely_lacks(data: TensorDictBase, names: Set[str]) -> bool:
    """Whether a TensorDict has no entry under any of these names: one question, where ``get`` would be one for each.

    Of other classes, such as lazy stacks, it is not known.

    Example:
        >>> surely_lacks(TensorDict({"action": 0}), {"mask", "computed"}), surely_lacks(TensorDict(mask=0), {"mask"})
        (True, False)
    """
    return type(data) is TensorDict and names.isdisjoint(store_of(data))


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
    value = get_entry(data, key)
    if value is None:
        raise missing(data, key, reader, remedy)
    return value


def reward_key(data: TensorDictBase, key: NestedKey = ("next", "reward")) -> NestedKey:
    """Where the reward of each step is: ``MultiStep`` puts sums of several in its place, and keeps it beside them.

    Example:
        >>> rows = TensorDict({"next": {"reward": 1.9, "original_reward": 1.0}})
        >>> reward_key(rows), reward_key(rows, ("next", "cost"))
        (('next', 'original_reward'), ('next', 'cost'))
    """
    parts = key_parts(key)
    beside = (*parts[:-1], "original_reward")
    return beside if parts[-1] == "reward" and isinstance(get_entry(data, beside), Tensor) else key
