"""What a policy is made of beside its weights: the classes of its modules, the options that these keep, and hooks.

An activation, a temperature, the bounds of a distribution: none of them is a weight, and each makes another policy.
"""

from __future__ import annotations

import itertools
from typing import Any

from tensordict.nn import TensorDictParams
from torch import nn

from tdhook_rl.files.functions import in_words, named_function
from tdhook_rl.policies.attribute_sync import forward_code, stored_names
from tdhook_rl.policies.mutable_state import INTERNAL
from tdhook_rl.replaying.environment_settings import is_setting
from tdhook_rl.sites.known import may_draw, may_meet, own_class
from tdhook_rl.sites.listed import named_modules
from tdhook_rl.sites.root_hooks import hooks_of

#: Whose classes are what they are called: their code comes with a version.
_LIBRARIES = frozenset((
    "torch", "tensordict", "torchrl", "tdhook_rl", "stable_baselines3", "sb3_contrib", "rsl_rl", "transformers"
))  # fmt: skip


def policy_settings(policy: nn.Module) -> dict[str, str]:
    """By path, in words that are the same in every process, and others where a policy computes by something else.

    What its own forward changes, a counter say, is left out. Those of a hooked policy are those of the user's.

    Example:
        >>> settings = [policy_settings(nn.Sequential(nn.Dropout(p), nn.Tanh())) for p in (0.1, 0.2)]
        >>> [name for name in settings[0] if settings[0][name] != settings[1][name]]
        ['0.p']
    """
    found: dict[str, str] = {}
    for path, module in named_modules(policy):
        kind, dot = own_class(module), f"{path}." if path else ""
        found[path] = f"{kind.__module__}.{kind.__qualname__}" if _is_of_library(kind) else named_function(kind)
        if isinstance(module, TensorDictParams):  # weights
            continue
        moving = INTERNAL | stored_names(kind) | _changed_in_place(kind)
        own = {name: one for name, one in vars(module).items() if not name.startswith("_hooked")}
        kept = {name: one for name, one in own.items() if name not in moving and is_setting(one)}
        found |= {f"{dot}{name}": in_words(one) for name, one in kept.items()}
        if may_draw(module) or may_meet(module):
            found[f"{dot}training"] = repr(module.training)
        if hooks := [one for one in hooks_of(module) if not _is_of_library(one)]:
            found[f"{dot}hooks"] = in_words(hooks)
    return found


def _is_of_library(one: Any) -> bool:
    home = getattr(one, "__module__", None) or type(one).__module__
    return home.partition(".")[0] in _LIBRARIES


def _changed_in_place(kind: type) -> set[str]:
    """The tensors in attributes that the forward of a class changes by their own methods (``self.mean.mul_(2)``)."""
    return {
        before.argval
        for steps in forward_code(kind)
        for before, step in itertools.pairwise(steps)
        if before.opname == "LOAD_ATTR" and str(step.argval).endswith("_") and not str(step.argval).startswith("_")
    }
