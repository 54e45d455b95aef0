"""How a function of the user's is called: with which arguments, and what is said where it reads what is not there."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from tdhook_rl.errors import InputError, MissingKeyError, TdhookError, listed, nearest

#: What tensordict says of a key that it lacks.
_LACKS = re.compile(r'key "(?P<key>.*)" not found in \w+ with keys (?P<keys>\[.*\])', re.DOTALL)


def takes_keywords(function: Callable[..., Any], names: Sequence[str], what: str, optional: Sequence[str] = ()) -> bool:
    """Whether a function has the parameters of these names; if not, it is called with the values in this order.

    Args:
        function: the user's.
        names: the documented parameters.
        what: the argument that the function was given as.
        optional: parameters that it may have too, which are always given by keyword, see :func:`has_parameter`.

    Raises:
        InputError: if it is no function, or can be called neither way.

    Example:
        >>> takes_keywords(lambda module_key, output: output, ["module_key", "output"], "steer_fn")
        True
        >>> takes_keywords(lambda k, o: o, ["module_key", "output"], "steer_fn")
        False
    """
    if not callable(function) or isinstance(function, type):
        raise InputError(f"{what}= is a function of ({', '.join(names)}), got {function!r}")
    signature = _signature(function)
    if signature is None:
        return False
    beside: dict[str, Any] = dict.fromkeys(name for name in optional if has_parameter(function, name))
    for keywords in (True, False):
        try:
            signature.bind(**dict.fromkeys(names), **beside) if keywords else signature.bind(*names, **beside)
        except TypeError:
            continue
        return keywords
    raise InputError(f"{what} must accept ({', '.join(names)}), but its signature is {signature}")


def require_accepts(function: Callable[..., Any], names: Sequence[str], what: str) -> None:
    """Raise where a function cannot be called with as many values by position.

    Args:
        function: the user's, or a class.
        names: what the values are.
        what: what the function is.

    Raises:
        InputError: if it cannot.

    Example:
        >>> require_accepts(lambda episodes: episodes, ["episodes"], "the outcome 'won'")
    """
    signature = _signature(function)
    if signature is None:
        return
    try:
        signature.bind(*names)
    except TypeError:
        given = f"with ({', '.join(names)})" if names else "without arguments"
        raise InputError(f"{what} is called {given}, but its signature is {signature}") from None


def has_parameter(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of a name, which can be given by keyword.

    Example:
        >>> has_parameter(lambda k, o, rows: o, "rows"), has_parameter(lambda k, o: o, "rows")
        (True, False)
    """
    signature = _signature(function)
    found = None if signature is None else signature.parameters.get(name)
    return found is not None and found.kind in (found.POSITIONAL_OR_KEYWORD, found.KEYWORD_ONLY)


def asked(
    function: Callable[..., Any],
    *given: Any,
    what: str,
    sees: Sequence[Any] | None = None,
    remedy: str = "",
    reads_only: bool | Sequence[Any] = False,
    **named: Any,
) -> Any:
    """What a function of the user's makes of what it is given.

    Args:
        function: the user's.
        given, named: what it is called with.
        what: how messages call it.
        sees: the TensorDicts that it can read, where they are not among what it is given.
        remedy: what to do, of an entry that they lack.
        reads_only: the TensorDicts that it can read, or these, hold the tensors of others, which it must leave as they
            are; what it sets in them is taken out again.

    Raises:
        MissingKeyError: if it reads an entry that these lack; what else it raises is its own.
        InputError: if it only reads, and has written to an entry in place. Of inference tensors nothing tells.

    Example:
        >>> from tensordict import TensorDict
        >>> try:
        ...     asked(lambda rows: rows["reward"], TensorDict({"rewards": torch.ones(2)}), what="where=")
        ... except MissingKeyError as error:
        ...     print(error)
        where= is a function that reads 'reward', which is not there; nearest: 'rewards'. It sees 'rewards'
    """
    if torch.compiler.is_compiling():
        return function(*given, **named)
    others = (given if sees is None else sees) if isinstance(reads_only, bool) else reads_only
    held = [Held(data) for data in others if isinstance(data, TensorDict)] if reads_only else []
    try:
        found = function(*given, **named)
    except KeyError as error:
        told = None if isinstance(error, TdhookError) else _lacking(error, what, given if sees is None else sees)
        if told is None:
            raise
        raise MissingKeyError(f"{told}. {remedy}" if remedy else told) from error
    for one in held:
        if (key := one.written()) is not None:
            raise InputError(
                f"{what} is a function that has written to {key!r} in place, and what was there is lost to all who "
                "read it after: let it work on a copy, "
                + (f"rows[{key!r}].clone()" if sees is None else "made by .clone()")
            )
    if held and isinstance(found, TensorDictBase):  # it may be one of these, with what it has set
        found = found.copy()
    for one in held:
        one.put_back()
    return found


class Held:
    """What a TensorDict holds before a function of the user's is called with it."""

    def __init__(self, data: TensorDictBase) -> None:
        self._data = data
        self._entries = {key: (one, version_of(one)) for key, one in data.items(True, True) if isinstance(one, Tensor)}

    def written(self) -> Any:
        """The key of an entry that was written to in place; ``None`` if there is none."""
        return next((key for key, (one, version) in self._entries.items() if version_of(one) != version), None)

    def put_back(self) -> None:
        """Leave the TensorDict with the entries that it had."""
        if self._data.is_locked:
            return
        for key, value in list(self._data.items(True, True)):
            known = self._entries.get(key)
            if isinstance(value, Tensor) and (known is None or value is not known[0]):
                self._data.del_(key) if known is None else self._data.set(key, known[0])


@contextmanager
def only_looks(seen: Sequence[Tensor], what: str) -> Iterator[None]:
    """A block in which a function of the user's is called that only looks at tensors with which the policy goes on.

    Raises:
        InputError: if one of them was written to in place.
    """
    versions = [version_of(tensor) for tensor in seen]
    yield
    if versions != [version_of(tensor) for tensor in seen]:
        raise InputError(
            f"{what} has written in place to what it was given, with which the policy goes on: let it work on a copy, "
            "output.clone()"
        )


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written to in place; of inference tensors nothing tells."""
    return 0 if tensor.is_inference() else tensor._version


def _lacking(error: KeyError, what: str, sees: Sequence[Any]) -> str | None:
    """That a function reads what is not there; ``None`` where the error is of something else."""
    found = _LACKS.fullmatch(str(error.args[0])) if error.args else None
    if found is None:
        return None
    said, places = set(ast.literal_eval(found["keys"])), []
    for data in sees:
        for prefix, nested in _within(data):
            own = set(nested.keys())
            # A TensorDict of the function's own is its business, unless it is one of these with more entries.
            if own and found["key"] not in own and own <= said:
                places.append((len(own), prefix, data))
    if not places:
        return None
    _, prefix, data = max(places, key=lambda place: place[0])
    key = (*prefix, found["key"]) if prefix else found["key"]
    known = list(data.keys(True, True))
    return (
        f"{what} is a function that reads {key!r}, which is not there; {nearest(key, known)}. It sees "
        f"{listed(map(repr, known), 8)}"
    )


def _within(data: Any, prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """A TensorDict and those inside it, with where they are."""
    if not is_tensor_collection(data):
        return
    for name, value in data.items():
        if isinstance(value, TensorDictBase):
            yield from _within(value, (*prefix, name))
    yield prefix, data


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    try:
        # What is called is a module's forward; the signature of the module itself would be anything.
        return inspect.signature(function.forward if isinstance(function, nn.Module) else function)
    except (TypeError, ValueError):
        return None
