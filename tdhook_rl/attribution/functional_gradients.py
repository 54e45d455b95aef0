"""Gradients by ``torch.func.grad``, where autograd is out of reach: inference mode, compile, functorch transforms."""

from __future__ import annotations

import torch
from torch import Tensor

from tdhook_rl.attribution.leaves import activations, as_leaves
from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.undefined import defined_rows, with_nan
from tdhook_rl.attribution.unreached import warn_unreached
from tdhook_rl.errors import TargetError
from tdhook_rl.targets import no_path

__all__ = ["functional_gradients"]


def functional_gradients(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    """For each target its gradients, as of :func:`tdhook_rl.attribution.gradients.gradients`; and the activations."""
    call, inputs, sites, targets, placed, stored, weights = question
    runtime = call.policy._hooked.runtime
    inner = placed or (activations(call, sites, inputs, stored) if sites else {})
    # To put what is computed in its own place would cut the inputs off from what follows: there the difference
    # to it, which is zero, is added.
    added = frozenset(() if placed else sites)
    points = [value.detach() for value in (*inputs.values(), *inner.values())]
    # A trace cannot ask which points a gradient reaches, and its transform writes zero for the others. So each point
    # has a mark, a zero of infinite slope, added to it: whatever comes back to it, a zero too, is no number but 0.
    marks = [value.new_zeros(()) for value in points] if torch.compiler.is_compiling() else []
    found = []
    for target in targets:

        def total(*values: Tensor, target: TargetFunction = target) -> tuple[Tensor, tuple[Tensor, dict[int, Tensor]]]:
            seen = [value + mark.sqrt() for value, mark in zip(values, values[len(points) :], strict=False)] or values
            chosen = dict(zip(inputs, seen, strict=False))
            given = dict(zip(inner, seen[len(inputs) :], strict=True))
            with as_leaves(runtime, given, added, call.totals):
                value = target(call.replay(chosen, stored))
            scalar = (value if weights is None else value * weights.to(value.dtype)).sum()
            if torch.compiler.is_compiling():
                return scalar, (value, {})
            if not value.requires_grad:
                raise TargetError(no_path(target, inputs, sites.values()))
            # Zeros from the transform would not tell a slope of zero from an input that no gradient reaches.
            own = torch.autograd.grad(scalar, values, allow_unused=True, create_graph=torch.is_grad_enabled())
            return scalar.detach(), (value, {i: one for i, one in enumerate(own) if one is not None})

        argnums = tuple(range(len(points) + len(marks)))
        one, (value, own) = torch.func.grad(total, argnums=argnums, has_aux=True)(*points, *marks)
        if torch.compiler.is_compiling():
            one = tuple(
                torch.where(mark == 0, torch.nan, slope) for slope, mark in zip(one, one[len(points) :], strict=False)
            )
        else:
            one = tuple(own.get(i) for i in range(len(points)))
            warn_unreached(runtime, target, one, inputs, [sites[slot] for slot in inner])
        filled = with_nan(one, points, defined_rows(call, value))
        found.append((dict(zip(inputs, filled, strict=False)), dict(zip(inner, filled[len(inputs) :], strict=True))))
    return found, {slot: value.detach() for slot, value in inner.items()}
