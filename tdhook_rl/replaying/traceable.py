"""Whether a traced call can be explained in the step: not where its second pass would write or draw otherwise.

A traced graph cannot look at what a policy writes or draws, and cannot put it back. What the code of a policy's
modules shows is read before: whether it sets attributes or variables, works in place on what it holds, or draws.
"""

from __future__ import annotations

import dis
import types
from collections.abc import Iterable
from functools import cache
from typing import NamedTuple

from torch import nn

from tdhook_rl.errors import InputError
from tdhook_rl.policies.outside import functions_of
from tdhook_rl.sites.known import draws_noise, may_draw, may_meet, own_class, unknown_modules

#: How functions that draw are called, in torch and elsewhere.
_DRAWS = frozenset({
    "rand", "randn", "rand_like", "randn_like", "randint", "randint_like", "randperm", "normal", "normal_", "bernoulli",
    "bernoulli_", "uniform_", "exponential_", "multinomial", "poisson", "random", "uniform", "standard_normal", "gauss",
    "gumbel_softmax", "rsample",
})  # fmt: skip
#: Those that draw in training mode only, as they are used.
_DROPS = frozenset({
    "dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
    "rrelu",
})  # fmt: skip
#: What a compiler is mistaken about, in words: a hook on a tensor, after which it loses what Python had put back (so
#: that a call was under way for ever), and checkpoints, of which it takes no gradient (and turns them off for all).
_HOOKS_TENSORS = "puts a hook on a tensor"
_CHECKPOINTS = "keeps less for its gradient"
_MISTAKEN = {
    "register_hook": _HOOKS_TENSORS,
    **dict.fromkeys(("checkpoint", "checkpoint_sequential", "saved_tensors_hooks", "save_on_cpu"), _CHECKPOINTS),
}
_SETS = frozenset({"STORE_ATTR", "DELETE_ATTR", "STORE_GLOBAL", "DELETE_GLOBAL"})
_LOADS = frozenset({"LOAD_ATTR", "LOAD_METHOD", "LOAD_GLOBAL", "LOAD_NAME"})
_CHANGES = frozenset({"append", "appendleft", "extend", "update", "pop", "popleft", "insert", "setdefault", "clear"})


class TraceRisk(NamedTuple):
    """What shows that the forward of a module may write or draw, or that a compiler is mistaken about it: in words, and
    whether only in training mode."""

    module: nn.Module
    words: str
    training_only: bool

    @property
    def mistaken(self) -> bool:
        """Whether a graph of it would be wrong, or fail."""
        return any(words in self.words for words in (_HOOKS_TENSORS, _CHECKPOINTS))

    @property
    def always(self) -> bool:
        """Whether a graph of a call would be wrong also where no second pass is in it."""
        return _HOOKS_TENSORS in self.words


def trace_risks(policy: nn.Module) -> list[TraceRisk]:
    """What the code of a policy's modules shows. It is read once: a traced call cannot read code."""
    found = []
    for path, module in unknown_modules(policy):
        kind = own_class(module)
        where = f"{path!r} ({kind.__name__})" if path else kind.__name__
        if module._buffers and not may_meet(module) and kind.__module__.startswith("torch."):
            found.append(TraceRisk(module, f"{where} writes its buffers in training mode", True))
        for function in functions_of(module):
            found += [TraceRisk(module, f"{where} {words}", only) for words, only in _shown(function.__code__)]
    return found


@cache
def _shown(code: types.CodeType) -> tuple[tuple[str, bool], ...]:
    found: list[tuple[str, bool]] = []
    before, name_before = "", ""
    for one in dis.get_instructions(code):
        name = str(one.argval)
        if one.opname in _SETS or (one.opname == "STORE_DEREF" and name in code.co_freevars):
            found.append((f"writes state ({name!r})", False))
        elif one.opname in _LOADS and name in _MISTAKEN:
            found.append((f"{_MISTAKEN[name]} ({name!r})", False))
        elif one.opname in _LOADS:
            of_module = before == "LOAD_GLOBAL" or name_before == "functional" or one.opname == "LOAD_GLOBAL"
            of_attribute = before == "LOAD_ATTR" and not of_module
            if of_module and (name in _DRAWS or name in _DROPS):
                found.append((f"draws noise ({name!r})", name in _DROPS))
            elif name in _DRAWS and one.opname == "LOAD_METHOD":
                found.append((f"draws noise ({name!r})", False))
            elif of_attribute and (name in _CHANGES or (name.endswith("_") and not name.endswith("__"))):
                found.append((f"writes state ({name_before!r})", False))
            elif one.opname == "LOAD_GLOBAL" and name == "next":
                found.append(("advances an iterator ('next')", False))
        before, name_before = one.opname, name
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found += _shown(constant)
    return tuple(found)


def require_compilable(found: list[TraceRisk]) -> None:
    """Raise where a graph of a call would be wrong, whatever is in it; see :func:`require_traceable`."""
    for sign in found:
        if sign.always:
            raise _mistaken(sign)


def _mistaken(sign: TraceRisk) -> InputError:
    return InputError(
        f"a call of this hooked policy cannot be compiled: {sign.words}, of which torch.compile makes something else. "
        "Leave the policy uncompiled, or write it without"
    )


def require_traceable(modules: Iterable[nn.Module], found: list[TraceRisk]) -> None:
    """Raise where a second pass in a traced graph would not be what ran, or would move what it should not.

    Outside of ``fullgraph=True``, ``torch.compile`` may take the error for a break of the graph, and run the call
    uncompiled.

    Args:
        modules: of the policy, at least those that may draw, or in which rows may meet.
        found: what its code shows.

    Raises:
        InputError: that names the module.
    """
    reason = ""
    for child in modules:
        if may_meet(child) and child.training:
            reason = "a batch normalisation of it is in training mode, and would have its running statistics moved"
        elif may_draw(child) and draws_noise(child):
            reason = f"a {own_class(child).__name__} of it draws noise (dropout) in training mode"
    for sign in found:
        if sign.mistaken:
            raise _mistaken(sign)
        if not sign.training_only or sign.module.training:
            reason = sign.words
    if reason:
        raise InputError(
            f"a compiled call of this policy cannot be explained in the step: {reason}, and a second pass in the same "
            "graph can neither repeat nor undo that. Call eval() on it if that ends it, explain with when='batch', or "
            "leave the policy uncompiled"
        )
