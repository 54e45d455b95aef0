"""Arguments are what the signature says: a wrong name or type is refused where it is given, in words.

The annotations of constructors and functions are read once for each of them; to check a call takes microseconds.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
import typing
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Callable as AbstractCallable
from collections.abc import Sequence as AbstractSequence
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.dense import require_dense
from tdhook_rl.arguments.plain import is_config, plain, with_keys
from tdhook_rl.errors import ArgumentError, InputError, TargetError, TdhookError, nearest
from tdhook_rl.internals.python_names import is_protocol

#: What a class that is called does not return.
_RESULTS = (Tensor, TensorDictBase, TensorDict, bool, float, Tensor | None)
#: A signature, and for each annotated argument its type and how that is said.
_Declared = tuple[inspect.Signature, dict[str, tuple[Any, str]]]
_NO_HINT = (Any, "")
F = TypeVar("F", bound=Callable[..., Any])
#: Arguments of tdhook 0.1 that there are none of here, and why.
_OF_TDHOOK = {
    "clean_intermediate_keys": "nothing intermediate is written",
    "use_inputs": "inputs=[] explains none of the inputs",
    "use_outputs": "init_attr_targets may leave outputs aside",
    "init_attr_cache_in": "all of input_modules are explained",
    "output_grad_callbacks": "hooked.run(...).set_grad_output sets gradients",
    "cache_callback": "the first tensor that a module returns is taken; ActivationCaching has callback=",
    "classes_to_skip": "it acts on ReLUs only",
    "warn_on_missing_rule": "a module without a rule is an error; skip_modules names those to leave alone",
    "relative_path": "paths start at the module that is prepared",
    "output_key": "the change is that of the target which is explained",
}


class Checked(ABCMeta):
    """Metaclass of classes whose constructor's arguments are checked against its annotations."""

    @property
    def __signature__(cls) -> inspect.Signature:
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=[*signature.parameters.values()][1:])

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        declared = vars(cls).get("_declared_arguments")
        if declared is None:  # kept on the class, so that a local one can be freed
            declared = _declared(cls)
            type.__setattr__(cls, "_declared_arguments", declared)
        # What can be looked at once only is not there to be checked, or used at a second prepare.
        if any(isinstance(one, Iterator) for one in (*args, *kwargs.values())):
            args = tuple(map(_listed, args))
            kwargs = {name: _listed(one) for name, one in kwargs.items()}
        args, kwargs = _plain_arguments(declared, args, kwargs)
        return _made(super().__call__, declared, cls.__name__, args, kwargs)


def _made(make: Callable[..., Any], declared: _Declared, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What a constructor makes; arguments are checked afterwards, because its own words are better."""
    try:
        made = make(*args, **kwargs)
    except TdhookError:
        raise
    except Exception:
        _check(declared, name, args, kwargs)
        raise
    _check(declared, name, args, kwargs)
    return made


def _plain_arguments(declared: _Declared, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Arguments as files give them, which have no tuples: lists of strings are nested keys where only these fit."""
    if not any(map(_of_file, args)) and not any(map(_of_file, kwargs.values())):
        return args, kwargs
    signature, hints = declared
    names = [*signature.parameters, *[""] * len(args)]

    def one(name: str, value: Any) -> Any:
        made, (hint, _) = plain(value), hints.get(name, _NO_HINT)
        if not isinstance(made, list) or fits(made, hint):
            return made
        return next((other for other in ((*made,), with_keys(made)) if fits(other, hint)), made)

    listed = tuple(one(name, value) for name, value in zip(names, args, strict=False))
    return listed, {name: one(name, value) for name, value in kwargs.items()}


def _of_file(value: Any) -> bool:
    return type(value) is list or is_config(value)


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Iterator) else value


def checked(function: F) -> F:
    """The same function (or ``__init__``), its arguments checked against its annotations.

    Arrays, and numbers in lists, become tensors where a tensor is taken.

    Example:
        >>> @checked
        ... def double(x: int) -> int:
        ...     return 2 * x
        >>> double("a")
        Traceback (most recent call last):
            ...
        tdhook_rl.errors.ArgumentError: double(x=...) takes int, got 'a' (str)
    """
    owner, _, own_name = function.__qualname__.rpartition("<locals>.")[2].rpartition(".")
    declared: list[_Declared] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # annotations are read by eval, which is no part of a graph
            return function(*args, **kwargs)
        if not declared:
            declared.append(_declared(function))
        args, kwargs = _plain_arguments(declared[0], args, kwargs)
        owned = args[0] if owner and args and isinstance(args[0], type) else type(args[0]) if args else None
        name = f"{owned.__name__}.{own_name}" if owner and owned else own_name  # of a subclass too
        if own_name == "__init__":
            return _made(function, declared[0], type(args[0]).__name__, args, kwargs)
        given = _check(declared[0], name, args, kwargs)
        hints = declared[0][1]
        for one, value in given.arguments.items():
            if isinstance(value, Tensor) and hints.get(one, _NO_HINT)[0] is Tensor:
                require_dense(value, f"{name}({one}=...)")
        arrays = {
            one: _as_tensor(value, f"{name}({one}=...)")
            for one, value in given.arguments.items()
            if hints.get(one, _NO_HINT)[0] is Tensor and not isinstance(value, Tensor)
        }
        if not arrays:
            return function(*args, **kwargs)
        given.arguments.update(arrays)
        return function(*given.args, **given.kwargs)

    return typing.cast(F, call)


def _check(declared: _Declared, name: str, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments:
    signature, hints = declared
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise _misnamed(name, signature, kwargs, error) from None
    for argument, value in given.arguments.items():
        hint, text = hints.get(argument, _NO_HINT)
        if hint is not Any and not fits(value, hint):
            raise ArgumentError(f"{name}({argument}=...) takes {text}, got {shown(value)}{_advice(value, text)}")
    return given


def _as_tensor(value: Any, argument: str) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{argument} takes a tensor, and makes none of {shown(value)}: {error}") from error


def _declared(called: Any) -> _Declared:
    signature = inspect.signature(called)
    resolved = _resolved(called)
    hints = {}
    for one in signature.parameters.values():
        if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD) or one.annotation is one.empty:
            continue
        hint = resolved.get(one.name, Any)
        hints[one.name] = (hint, _words(hint))
    return signature, hints


def _resolved(called: Any) -> dict[str, Any]:
    """The annotations by name; those that need names which are imported for type checking only are left out."""
    found: dict[str, Any] = {}
    owners = [*reversed(called.__mro__)] if isinstance(called, type) else [called]
    if isinstance(called, type) and "__init__" in vars(called) and not hasattr(called, "__dataclass_fields__"):
        owners.append(called.__init__)
    for owner in owners:
        module = inspect.getmodule(owner)
        names = {} if module is None else vars(module)
        for name, annotation in inspect.get_annotations(owner).items():
            try:
                found[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
            except (NameError, TypeError, AttributeError):
                found[name] = Any
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is what an annotation says; in doubt it is."""
    if hint is Any or hint is object or isinstance(hint, (TypeVar, str, typing.ForwardRef)):
        return True
    if hint is None or hint is type(None):
        return value is None
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return isinstance(value, (str, int, float, bool)) and value in inner
    if origin is typing.ClassVar or origin is typing.Annotated:
        return True
    if origin is type:
        return isinstance(value, type)
    if origin is AbstractCallable:
        return _fits_function(value, inner)
    if origin is not None and isinstance(origin, type):
        return _fits_container(value, origin, inner)
    return _fits_class(value, hint)


def _fits_function(value: Any, inner: tuple) -> bool:
    """Whether it is a function of so many arguments; a class is one where it is meant to make something."""
    if not callable(value) or (isinstance(value, type) and inner and inner[-1] in _RESULTS):
        return False
    if not inner or inner[0] is Ellipsis:
        return True
    try:
        # What is called is a module's forward; the signature of the module itself would be anything.
        signature = inspect.signature(value.forward if isinstance(value, nn.Module) else value)
        signature.bind(*inner[0])
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


def _fits_container(value: Any, origin: type, inner: tuple) -> bool:
    if issubclass(origin, Mapping):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if origin is tuple:
        if not isinstance(value, (tuple, list)):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(fits(one, inner[0]) for one in value)
        return len(value) == len(inner) and all(map(fits, value, inner))
    if issubclass(origin, Iterable):
        if isinstance(value, (str, bytes, Mapping, Tensor, nn.Module, type)) or not isinstance(value, Iterable):
            return False
        # An iterator would be used up by a look.
        return not isinstance(value, (AbstractSequence, set, frozenset)) or all(fits(one, inner[0]) for one in value)
    return isinstance(value, origin)


def _fits_class(value: Any, hint: Any) -> bool:
    if is_protocol(hint):
        called = vars(hint).get("__call__")
        count = 0 if called is None else len(inspect.signature(called).parameters) - 1
        return called is None or _fits_function(value, ([Any] * count, bool))
    if not isinstance(hint, type):
        return True
    if hint is bool:
        return type(value).__name__ == "bool_" or (isinstance(value, Integral) and value in (0, 1))
    if hint is int:
        return isinstance(value, Integral) and not isinstance(value, bool) and abs(int(value)) < 2**63
    if hint is float:
        if isinstance(value, Tensor):
            return value.ndim == 0 and not value.is_complex() and not bool(value.isnan())
        if isinstance(value, Integral):
            return abs(int(value)) < 2**63
        return isinstance(value, Real) and not math.isnan(value)
    if hint is Path:
        return isinstance(value, (str, PathLike))
    if hint is Tensor:
        return isinstance(value, Tensor) or _is_array(value)
    if hint is torch.device:
        return isinstance(value, (str, torch.device))
    return isinstance(value, hint)


def _words(hint: Any) -> str:
    """A type as messages say it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is None or hint is type(None):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(_words, inner))
    if origin is Literal:
        return " | ".join(map(repr, inner))
    if origin is AbstractCallable:
        taken = "..." if not inner or inner[0] is Ellipsis else ", ".join(map(_words, inner[0]))
        return f"a function of ({taken})"
    name = getattr(origin or hint, "__name__", str(hint))
    if name == "NestedKey":
        return "a key (str, or a tuple of str)"
    parts = ["..." if one is Ellipsis else _words(one) for one in inner]
    return f"{name}[{', '.join(parts)}]" if parts else name


def _is_array(value: Any) -> bool:
    """Whether it is an array, or numbers in lists."""
    if isinstance(value, (list, tuple)):
        return all(isinstance(one, Real) or _is_array(one) for one in value)
    return hasattr(value, "__array__") and not isinstance(value, (nn.Module, type))


def require_counts(**counts: Any) -> None:
    """Refuse what is not a positive integer, by the name of its argument.

    Example:
        >>> require_counts(every=0)
        Traceback (most recent call last):
            ...
        tdhook_rl.errors.InputError: every= is a positive integer, got 0
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise InputError(f"{name}= is a positive integer, got {value!r}")


def require_target(given: Any) -> None:
    """Refuse a ``target=`` that cannot be called with a :class:`tdhook_rl.calls.passes.Pass`.

    Raises:
        TargetError: for a function of :mod:`tdhook_rl.targets` without its parentheses, a class, a module, or what
            is no function of one argument.
    """
    name = getattr(given, "__name__", None)
    if isinstance(given, types.FunctionType) and given.__module__ == "tdhook_rl.targets":
        raise TargetError(f"targets.{name} makes a target when it is called: target=targets.{name}(...)")
    if isinstance(given, (type, nn.Module)) or not callable(given):
        raise TargetError(
            f"target= is a target such as targets.entropy(), or a function of a Pass; got {shown(given)}. What a "
            "module computes is explained with target_modules= and init_attr_targets="
        )
    try:
        inspect.signature(given).bind(None)
    except TypeError:
        raise TargetError(
            f"target= is called with one argument, a Pass, which {name or shown(given)} does not take: if it makes a "
            "target, call it"
        ) from None
    except ValueError:  # a builtin without a signature
        return


def _misnamed(name: str, signature: inspect.Signature, kwargs: dict[str, Any], error: TypeError) -> ArgumentError:
    known = [key for key in signature.parameters if key != "self"]
    unknown = [key for key in kwargs if key not in known]
    if not unknown:
        names = ", ".join(known)
        return ArgumentError(f"{name}() takes the arguments {names}: {error}")
    if unknown[0] in _OF_TDHOOK:
        why = _OF_TDHOOK[unknown[0]]
        return ArgumentError(f"{name}() has no argument {unknown[0]!r}, which it has in tdhook: {why}")
    return ArgumentError(f"{name}() has no argument {unknown[0]!r}; {nearest(unknown[0], known)}")


def shown(value: Any) -> str:
    """What was given, in a line."""
    if isinstance(value, Tensor):
        if value.is_nested:  # which has no shape
            return f"a nested tensor ({value.dtype})"
        return f"a tensor of shape {tuple(value.shape)} ({value.dtype})"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = " ".join(repr(value).split())
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"


def _advice(value: Any, text: str) -> str:
    if "str" not in text and "Key" not in text:
        return ""
    inside = list(value) if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(one, nn.Module) for one in inside):
        return ": name a module by its path, such as 'module.0' (named_modules() lists them)"
    if any(isinstance(one, type) for one in inside):
        return ": a class names no module; give a path, or a regular expression of paths"
    return ""
