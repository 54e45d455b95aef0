"""Facts as files hold them; and checks of what was read: names, counts, tensors, module paths that end when matched."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tdhook_rl.errors import ArtifactError, InputError
from tdhook_rl.internals.python_names import codes, parser

#: No module has a longer path, and a pattern with more open repetitions may take minutes to fail on a long name.
LONGEST, MOST_REPEATS = 1000, 3


def as_stored(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as a file gives them back: numbers of NumPy and tensors of one number are numbers, tuples lists.

    Raises:
        TypeError: for what JSON cannot hold.

    Example:
        >>> import torch
        >>> as_stored({"frames": torch.tensor(3), "shape": (2, 3)})
        {'frames': 3, 'shape': [2, 3]}
    """
    return json.loads(json.dumps(dict(facts), default=_number))


def _number(fact: Any) -> Any:
    if getattr(fact, "ndim", None) == 0 and hasattr(fact, "item"):
        return fact.item()
    raise TypeError(f"Object of type {type(fact).__name__} is not JSON serializable")


def text(path: Path | str, facts: Mapping[str, Any], name: str) -> str:
    """A fact that is text.

    Raises:
        ArtifactError: if it is absent or something else.
    """
    if name not in facts:
        raise ArtifactError(f"{path} lacks the fact {name!r}")
    value = facts[name]
    if not isinstance(value, str):
        raise ArtifactError(f"{path}: {name} is {str(value)[:80]!r}, not text")
    return value


def require_free(facts: Mapping[str, Any], taken: Collection[str]) -> None:
    """Raise for facts under names that a file has for other things: it would hold only one of them.

    Raises:
        InputError: names the fact.
    """
    found = next((name for name in facts if name in taken), None)
    if found is not None:
        raise InputError(
            f"facts= has {found!r}, a name under which its file says something else ({', '.join(taken)}): give the "
            "fact another name"
        )


def module_path(path: Path | str, facts: Mapping[str, Any]) -> str:
    """A module path or pattern that was stored, of which it is sure that looking for it comes to an end.

    Raises:
        ArtifactError: if it is absent, no text, or a regular expression in which repetitions are nested.

    Example:
        >>> module_path("probe", {"module_path": "module.0.module.1"})
        'module.0.module.1'
    """
    value = text(path, facts, "module_path")
    if len(value) > LONGEST:
        raise ArtifactError(f"{path}: module_path has {len(value)} characters, more than the path of any module")
    try:
        repeats = _repeats(parser.parse(value), inside=False)
    except re.error:
        return value  # a path then, or nothing: it is never matched
    except (RecursionError, OverflowError, MemoryError, _Nested) as error:
        reason = "repetitions within repetitions" if isinstance(error, _Nested) else type(error).__name__
        raise ArtifactError(
            f"{path}: module_path is {value[:80]!r}, a regular expression ({reason}) that may take for ever to match"
        ) from None
    if repeats > MOST_REPEATS:
        raise ArtifactError(
            f"{path}: module_path is {value[:80]!r}, a regular expression of {repeats} repetitions, which may take "
            "for ever to match"
        )
    return value


class _Nested(Exception):
    """A repetition of something that can be read in several ways."""


def _repeats(parsed: Any, inside: bool) -> int:
    """How many open repetitions an expression has.

    Raises:
        _Nested: if one repeats what has several readings, so that the ways to fail multiply.
    """
    found = 0
    for operator, value in parsed:
        if operator in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
            low, high, body = value
            if inside or low > LONGEST:
                raise _Nested
            found += int(high != low) + _repeats(body, inside=high > 1)
        elif operator is codes.BRANCH:
            if inside:
                raise _Nested
            found += sum(_repeats(one, inside) for one in value[1])
        elif operator in (codes.GROUPREF, codes.GROUPREF_EXISTS):
            raise _Nested
        else:
            for one in value if isinstance(value, tuple) else (value,):
                if isinstance(one, parser.SubPattern):
                    found += _repeats(one, inside)
    return found


def tensors_named(path: Path | str, tensors: Mapping[str, Tensor], **dimensions: int) -> list[Tensor]:
    """Tensors of floats, with entries, and of so many dimensions (at least one where that is given as 0).

    Raises:
        ArtifactError: if one is absent or another, or there are others.
    """
    if tensors.keys() != dimensions.keys():
        raise ArtifactError(
            f"{path} holds the tensors {', '.join(sorted(tensors)) or 'none'}, where {', '.join(sorted(dimensions))} "
            "are expected"
        )
    for name, count in dimensions.items():
        tensor = tensors[name]
        fits = tensor.ndim == count if count else tensor.ndim > 0
        if not tensor.is_floating_point() or not fits or tensor.numel() == 0:
            raise ArtifactError(
                f"{path}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, where floats of "
                f"{count or 'one or more'} dimensions are expected"
            )
    return [tensors[name] for name in dimensions]
