"""What ``MODULE:FUNCTION`` names: a policy and an environment of the user's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tdhook_rl.errors import InputError, nearest

__all__ = ["EXAMPLE", "made", "made_with_environment", "one_environment"]

#: What is looked at where nothing is named.
EXAMPLE = "tdhook_rl.examples.check:setup"


def made(target: str) -> Any:
    """What the function that ``MODULE:FUNCTION`` names returns."""
    from tdhook_rl.arguments.callbacks import require_accepts

    function = named_function(target)
    require_accepts(function, (), target)
    return function()


def is_function(text: str) -> bool:
    """Whether it is written as ``MODULE:FUNCTION``, of names that Python takes."""
    module, _, name = text.partition(":")
    return name.isidentifier() and all(part.isidentifier() for part in module.split("."))


def named_function(target: str) -> Any:
    """The function that ``MODULE:FUNCTION`` names.

    Raises:
        InputError: if it names none.
    """
    module_name, _, name = target.partition(":")
    if module_name.endswith(".py") and Path(module_name).is_file():
        named = ".".join(Path(module_name).with_suffix("").parts)
        raise InputError(f"{module_name} is a file: write the module as `import` names it, '{named}:{name or 'setup'}'")
    if not name or not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(
            f"{target!r} names no function: write MODULE:FUNCTION, such as 'my_agent:setup', with the module as "
            "`import` names it, not as a file"
        )
    folder = str(Path.cwd())
    if folder not in sys.path:  # as for `python -m`; an installed command does not look there
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise InputError(f"no module is named {error.name!r}, in {folder} or among the installed ones") from None
    function = getattr(module, name, None)
    if not callable(function):
        names = [other for other, value in vars(module).items() if callable(value)]
        raise InputError(f"{module_name!r} has no function {name!r}; {nearest(name, names)}")
    return function


def made_with_environment(target: str) -> tuple[Any, ...]:
    """The same, checked to be a policy, an environment, perhaps arguments."""
    found = made(target)
    if not isinstance(found, tuple) or len(found) not in (2, 3):
        got = f"a tuple of {len(found)}" if isinstance(found, tuple) else type(found).__name__
        raise InputError(
            f"{target} returned {got}: it must return (hooked policy, environment), or with collector arguments third"
        )
    env, options = found[1], found[2] if len(found) == 3 else {}
    several = isinstance(env, Sequence) and not isinstance(env, str)  # of a collector with workers
    if not (callable(env) or several):
        raise InputError(f"{target} returned {env!r:.80} for an environment: return one, or a function that makes one")
    if not isinstance(options, Mapping):
        raise InputError(f"{target} returned {options!r:.80} third: return the collector's arguments by name, a dict")
    return found


def one_environment(given: Any) -> Any:
    """An environment of what a set-up returns: itself, or what a function makes; of several the first."""
    several = isinstance(given, Sequence) and not isinstance(given, str)
    if several and not given:
        raise InputError("the set-up returned no environment: an empty list")
    first = given[0] if several else given
    return first() if isinstance(first, type) or not hasattr(first, "reset") else first


def hooked(policy: Any) -> Any:
    """A policy as a hooked one, without methods where it was plain; the plain one has to be kept alive."""
    from tdhook_rl import HookedModule
    from tdhook_rl.hooking.hooked import HookedMixin
    from tdhook_rl.method import HookingContext

    if isinstance(policy, HookingContext):
        return policy.__enter__()
    return policy if isinstance(policy, HookedMixin) else HookedModule.from_module(policy)
