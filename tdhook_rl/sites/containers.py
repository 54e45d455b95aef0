"""The tensor that an output or input stands for, in whatever it is wrapped: tuples, mappings, dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from tensordict import TensorDictBase, is_tensorclass
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.sites.known import own_class


def first_input(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any], site: str) -> Tensor:
    """The tensor that a module is given first, or the first in-key of the TensorDict that it is given."""
    return first_tensor(args if args else kwargs, module, site, "in_keys")


Side = Literal["out_keys", "in_keys"]


def first_tensor(value: Any, module: torch.nn.Module, site: str, side: Side = "out_keys") -> Tensor:
    """The tensor that an output (or input) stands for: itself, or the first in what holds several.

    Tuples, lists, mappings and dataclasses are searched in order; a TensorDict in the order of the module's keys.

    Raises:
        InputError: if there is no tensor.
    """
    if isinstance(value, Tensor):
        return value
    found = _first(value, module, side)
    if found is None:
        what = "output" if side == "out_keys" else "input"
        raise InputError(
            f"the {what} of {site.rpartition(':')[2]!r} ({own_class(module).__name__}) is a {type(value).__name__}, in "
            "which no tensor is found: it may be one, or hold one in tuples, lists, mappings, dataclasses or "
            "TensorDicts. Name a module inside of it, or one that reads what it gives"
        )
    return found


def with_first_tensor(value: Any, new: Tensor, module: torch.nn.Module, side: Side = "out_keys") -> Any:
    """The same output (or input) with the tensor of :func:`first_tensor` replaced."""
    if isinstance(value, Tensor):
        return new
    entries = _entries(value, module, side)
    key, item = next((key, item) for key, item in entries if _first(item, module, side) is not None)
    item = with_first_tensor(item, new, module, side)
    if isinstance(value, TensorDictBase):
        return value.set(key, item)
    if isinstance(value, Mapping):
        # A copy keeps the class: the outputs of transformers' models are mappings with attributes.
        changed = copy.copy(value)
        changed[key] = item  # type: ignore[index]
        return changed
    if _is_record(value):
        return _record_with(value, {key: item})
    items = [*value[:key], item, *value[key + 1 :]]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in tuples, lists, mappings and dataclasses, in order."""
    if isinstance(value, Tensor):
        return [value]
    items = value if isinstance(value, (tuple, list)) else ()
    if isinstance(value, Mapping):
        items = value.values()  # type: ignore[assignment]
    elif _is_record(value):
        items = [item for _, item in _fields(value)]
    return [tensor for item in items for tensor in tensors_of(item)]


def other_tensors(value: Any, module: torch.nn.Module) -> list[Tensor]:
    """The tensors of an output behind the one of :func:`first_tensor`, in order."""
    return _tensors(value, module)[1:]


def with_other_tensors(value: Any, new: Iterable[Tensor], module: torch.nn.Module) -> Any:
    """The same output with the tensors of :func:`other_tensors` replaced."""
    return _replaced(value, iter([_tensors(value, module)[0], *new]), module)


def _tensors(value: Any, module: torch.nn.Module) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [tensor for _, item in _entries(value, module, "out_keys") for tensor in _tensors(item, module)]


def _replaced(value: Any, new: Iterator[Tensor], module: torch.nn.Module) -> Any:
    if isinstance(value, Tensor):
        return next(new)
    entries = _entries(value, module, "out_keys")
    if isinstance(value, (TensorDictBase, Mapping)):
        changed: Any = value if isinstance(value, TensorDictBase) else copy.copy(value)
        for key, item in entries:
            if _first(item, module, "out_keys") is not None:
                item = _replaced(item, new, module)
                changed.set(key, item) if isinstance(changed, TensorDictBase) else changed.__setitem__(key, item)
        return changed
    if _is_record(value):
        return _record_with(value, {key: _replaced(item, new, module) for key, item in entries})
    if not isinstance(value, (tuple, list)):
        return value
    items = [_replaced(item, new, module) for _, item in entries]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)


def _first(value: Any, module: torch.nn.Module, side: Side) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    inner = (_first(item, module, side) for _, item in _entries(value, module, side))
    return next((found for found in inner if found is not None), None)


def _entries(value: Any, module: torch.nn.Module, side: Side) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, TensorDictBase):
        keys = getattr(module, side, None) or list(value.keys(True, True))
        return [(key, value.get(key, None)) for key in keys]
    if isinstance(value, Mapping):
        return value.items()
    if _is_record(value):
        return _fields(value)
    return enumerate(value) if isinstance(value, (tuple, list)) else ()


def _is_record(value: Any) -> bool:
    """Whether a value is of a dataclass, or of a tensorclass."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _fields(value: Any) -> list[tuple[str, Any]]:
    return [(field.name, getattr(value, field.name, None)) for field in dataclasses.fields(value)]


def _record_with(value: Any, items: Mapping[str, Any]) -> Any:
    """A copy with some fields replaced, past what its ``__init__`` makes of them, and where it is frozen."""
    tensors = is_tensorclass(value)
    changed = value.clone(recurse=False) if tensors else copy.copy(value)
    for name, item in items.items():
        setattr(changed, name, item) if tensors else object.__setattr__(changed, name, item)
    return changed
