"""Checks of what is left behind: on the user's policy, after a context, and where something raises."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDictBase
from torch import nn

from tdhook_rl.errors import InactiveError, TdhookError
from tdhook_rl.testing.subject import (
    Subject,
    Switch,
    annotated_keys,
    as_tuples,
    require,
    require_untouched,
    same_bits,
    snapshot,
)


def original_is_untouched(subject: Subject) -> None:
    """Inside the context and while it is called, the user's policy is what it was, and acts as it did."""
    policy = subject.new_policy()
    torch.manual_seed(2)
    expected = policy(subject.rows(4))
    before = snapshot(policy)
    with subject.method().prepare(policy) as hooked:
        require_untouched(policy, before, "inside the context")
        data = hooked(subject.rows(4))
        require_untouched(policy, before, "after a call of the hooked policy")
        hooked.annotate(data)
        require_untouched(policy, before, "after annotate()")
        torch.manual_seed(2)
        found = policy(subject.rows(4))
        same_bits(found, expected, "the user's own policy, called inside the context")
        extra = as_tuples(found.keys(True, True)) - as_tuples(expected.keys(True, True))
        require(not extra, f"the user's own policy writes {min(extra, default='')!r} inside the context")


def restored_after_exit(subject: Subject) -> None:
    """After the context the user's policy is what it was, and the hooked one refuses to be called."""
    policy = subject.new_policy()
    before = snapshot(policy)
    with subject.method().prepare(policy) as hooked:
        hooked(subject.rows(4))
    require_untouched(policy, before, "after the context")
    for call in (hooked, hooked.annotate):
        try:
            call(subject.rows(4))
        except InactiveError:
            continue
        require(False, "the hooked policy can be called after its context has ended")


def restored_after_an_exception(subject: Subject) -> None:
    """Also where the body of the block raises."""
    policy = subject.new_policy()
    before = snapshot(policy)
    context = subject.method().prepare(policy)
    try:
        with context as hooked:
            hooked(subject.rows(4))
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    require_untouched(policy, before, "after a body that raised")
    with context as hooked:
        hooked(subject.rows(4))


def a_raising_model_leaves_nothing_behind(subject: Subject) -> None:
    """Where the model raises, the data has no results, and the next call is as if nothing had been."""
    policy = subject.new_policy()
    nets = [module for module in policy.modules() if isinstance(module, nn.Sequential)]
    if not nets:
        return  # there is nothing to put the raising module into
    nets[0].append(Switch())
    before = snapshot(policy)
    try:
        context = subject.method().prepare(policy)
        context.__enter__()
    except TdhookError:
        return  # a method may refuse modules that it does not know
    context.__exit__(None, None, None)
    with context as hooked:
        expected = _call(hooked, subject)
        data = subject.rows(4)
        keys = as_tuples(data.keys(True, True))
        Switch.broken = True
        try:
            for call in (hooked, hooked.annotate) if annotated_keys(hooked) else (hooked,):
                try:
                    call(data)
                except (ZeroDivisionError, TdhookError):
                    continue
                require(False, "the model raises, and the hooked policy does not")
        finally:
            Switch.broken = False
        extra = as_tuples(data.keys(True, True)) - keys - as_tuples(hooked.policy_out_keys)
        require(not extra, f"after a call that raised, the data has {min(extra, default='')!r}")
        asking = [key for key in keys if data[key].requires_grad]
        require(not asking, f"after a call that raised, {asking[0] if asking else ''!r} requires a gradient")
        same_bits(_call(hooked, subject), expected, "the call after one that raised")
    require_untouched(policy, before, "after a model that raised")


def _call(hooked: Callable[[TensorDictBase], TensorDictBase], subject: Subject) -> TensorDictBase:
    torch.manual_seed(5)
    return hooked(subject.rows(4))


RESTORING: list[Callable[[Subject], None]] = [
    original_is_untouched, restored_after_exit, restored_after_an_exception, a_raising_model_leaves_nothing_behind,
]  # fmt: skip
