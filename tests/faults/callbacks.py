"""Functions of the user's raise, at each of their calls: nothing is left behind, and the next call is right."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.calls.provenance import is_stamp
from tdhook_rl.errors import TdhookError
from tdhook_rl.testing.subject import require_untouched, snapshot
from tests.faults.callback_cases import CASES
from tests.faults.fault import NAMED, Fault, Kind, Planned, Wrong

#: Of a function that is called more often, the calls that raise: these, and the last.
FIRST = 5


class Plan:
    """Wraps functions: they are counted, and raise at the call of a number.

    Attributes:
        at: the number of the call, from 0 on; ``None``: none.
        calls: how many there were.
    """

    def __init__(self) -> None:
        self.at: int | None = None
        self.calls = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if number == self.at:
                raise Planned(f"call {number}")
            return function(*arguments, **options)

        return call

    def __deepcopy__(self, memo: Any) -> Plan:
        return self


def kinds() -> dict[str, Kind]:
    """One kind for each sort of function."""
    return {f"raising {sort}": partial(_all, sort) for sort in CASES}


def _all(sort: str, folder: Path) -> Iterator[Fault]:
    for name, build in CASES[sort].items():
        plan = Plan()
        _, act = build(plan)
        plan.calls = 0
        expected = _run(act)
        count = plan.calls
        if not count:
            raise Wrong(f"{name}: it is never called")
        for number in sorted({*range(min(count, FIRST)), count - 1}):
            yield Fault(f"{name} raises at call {number} of {count}", partial(_try, build, number, expected))


def _try(build: Callable[[Plan], Any], number: int, expected: dict[str, Any], folder: Path) -> str:
    plan = Plan()
    policy, act = build(plan)
    before = snapshot(policy)
    hooks = _hooks(policy)
    plan.calls, plan.at = 0, number
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            _run(act)
        except Exception as error:
            _require_named(error)
        else:
            if not any("Planned" in str(one.message) for one in told):
                raise Wrong("nothing was raised, and nothing said of it")
    require_untouched(policy, before, "after the function had raised")
    if _hooks(policy) != hooks:
        raise Wrong("hooks are left on the policy")
    plan.at = None
    found = _run(act)
    if odd := sorted(name for name in found.keys() | expected.keys() if not _same(found.get(name), expected.get(name))):
        raise Wrong(f"the next call gives another {odd[0]}")
    return NAMED


def _require_named(error: BaseException) -> None:
    """The user's own error, or one of the library with that as its cause; where it arose is in the traceback."""
    one: BaseException | None = error
    while one is not None and not isinstance(one, Planned):
        one = one.__cause__ or one.__context__
    if one is None or not isinstance(error, Planned | TdhookError | RuntimeError):
        raise Wrong(f"what was raised is {type(error).__name__}: {error}") from error
    frames, trace = [], one.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    if frames[-1] != "call":
        raise Wrong(f"the traceback does not end in the function: {frames[-5:]}") from error


def _hooks(module: nn.Module) -> dict[str, int]:
    stores = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {name: sum(len(getattr(one, store)) for store in stores) for name, one in module.named_modules()}


def _run(act: Callable[[], Any]) -> dict[str, Any]:
    torch.manual_seed(5)
    found = _plain(act())
    return {**found, "the generator afterwards": torch.get_rng_state()}


def _plain(value: Any, name: str = "result") -> dict[str, Any]:
    """By name what a result holds, but for the stamps of the very policy that computed it."""
    if isinstance(value, Tensor):
        return {name: value.detach().clone()}
    parts: Any = None
    if isinstance(value, TensorDictBase):
        parts = [(key, one) for key, one in value.items(True, True) if isinstance(one, Tensor) and not is_stamp(key)]
    elif isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list | tuple):
        parts = enumerate(value)
    if parts is not None:
        return {key: one for part, entry in parts for key, one in _plain(entry, f"{name} {part}").items()}
    return {name: repr(value)}


def _same(found: Any, expected: Any) -> bool:
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        return found.shape == expected.shape and torch.equal(found.nan_to_num(7), expected.nan_to_num(7))
    return bool(found == expected)
