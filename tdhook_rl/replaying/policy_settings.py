"""What a policy is made of beside its weights: the classes of its modules, and the options that these keep.

An activation, a temperature, the bounds of a distribution: none of them is a weight, and each makes another policy.
"""

from __future__ import annotations

import dis
import functools
import inspect
from typing import Any

import torch
from tensordict.nn import TensorDictParams
from torch import nn

from tdhook_rl.files.functions import in_words, named_function
from tdhook_rl.policies.mutable_state import INTERNAL
from tdhook_rl.replaying.environment_settings import arguments_of
from tdhook_rl.sites.known import own_class
from tdhook_rl.sites.listed import named_modules

#: Whose classes are what they are called: their code comes with a version.
_LIBRARIES = frozenset((
    "torch", "tensordict", "torchrl", "tdhook_rl", "stable_baselines3", "sb3_contrib", "rsl_rl", "transformers"
))  # fmt: skip
_ATOMS = (bool, int, float, complex, str, type(None), type, torch.dtype)


def policy_settings(policy: nn.Module) -> dict[str, str]:
    """By path, in words that are the same in every process, and others where a policy computes by something else.

    What its own methods set as they run, a counter say, is left out.

    Example:
        >>> settings = [policy_settings(nn.Sequential(nn.Dropout(p), nn.Tanh())) for p in (0.1, 0.2)]
        >>> [name for name in settings[0] if settings[0][name] != settings[1][name]]
        ['0.p']
    """
    found: dict[str, str] = {}
    for path, module in named_modules(policy):
        kind = own_class(module)
        of_library = kind.__module__.partition(".")[0] in _LIBRARIES
        found[path] = f"{kind.__module__}.{kind.__qualname__}" if of_library else named_function(kind)
        if isinstance(module, TensorDictParams):  # weights
            continue
        moving = INTERNAL | _set_by_methods(kind)
        kept = {name: one for name, one in vars(module).items() if name not in moving and _stays(one)}
        dot = f"{path}." if path else ""
        found |= {f"{dot}{name}": in_words(one) for name, one in {**kept, **arguments_of(module)}.items()}
    return found


def _stays(value: Any) -> bool:
    """Whether it cannot change without being set."""
    if isinstance(value, tuple):
        return all(map(_stays, value))
    return isinstance(value, _ATOMS) or inspect.isroutine(value) or isinstance(value, functools.partial)


def _set_by_methods(kind: type) -> set[str]:
    """The attributes that methods of a class set, its constructor aside."""
    methods = [
        function
        for base in kind.__mro__
        if not base.__module__.startswith("torch.")
        for name, one in vars(base).items()
        if name != "__init__" and inspect.isfunction(function := inspect.unwrap(getattr(one, "__func__", one)))
    ]
    codes = [function.__code__ for function in methods]
    return {one.argval for code in codes for one in dis.get_instructions(code) if one.opname == "STORE_ATTR"}
