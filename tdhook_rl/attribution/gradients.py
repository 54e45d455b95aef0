"""Gradients of targets with respect to inputs and inner activations, in one replay.

``torch.autograd.grad`` with respect to the explained tensors only; where autograd is out of reach
(inference mode, compile, inside a functorch transform) ``torch.func.grad`` gives the same numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.attribution.chain_gradients import chain_gradient, is_linear, replayed_chain
from tdhook_rl.attribution.undefined import defined_rows, nan_undefined_rows, surely_finite
from tdhook_rl.attribution.unreached import warn_unreached
from tdhook_rl.calls.chains import MODIFIED
from tdhook_rl.calls.passes import Call, Pass
from tdhook_rl.errors import InPlaceError, InputError, MissingKeyError, SiteError, TargetError, nearest
from tdhook_rl.sites.repeats import Several, stacked
from tdhook_rl.sites.runtime import Runtime, vmap_level
from tdhook_rl.targets import no_path

__all__ = ["activations", "explainable_inputs", "gradients"]

#: How torch says that a function without ``setup_context`` was met in a functorch transform.
_OLD_FUNCTION = "setup_context"
Scalar = Callable[[Pass], Tensor]

#: How often a pass is made where a learner in another thread changes the weights between its forward and its backward.
ATTEMPTS = 5
NO_TOTALS: Mapping[str, int] = {}
Gradients = tuple[dict[NestedKey, Tensor], dict[str, Tensor]]


def explainable_inputs(call: Call, keys: Sequence[NestedKey] | None) -> dict[NestedKey, Tensor]:
    """The inputs to explain, as floats: those asked for, else every input that is not boolean, if there is one.

    Raises:
        InputError: if a key is not an input, an integer input cannot be explained as floats, or one is complex.
    """
    own = call.policy.policy_in_keys
    if keys is None:
        noise = call.policy._hooked.noise
        known = {key: call.inputs.get(key) for key in own if key not in noise}
        tensors = {key: value for key, value in known.items() if isinstance(value, Tensor)}
        # Booleans beside other inputs are masks; a policy that sees nothing else decides by them.
        keys = [key for key, value in tensors.items() if value.dtype != torch.bool] or list(tensors)
    elif unknown := [key for key in keys if key not in own]:
        raise InputError(f"{unknown[0]!r} is not an input of the policy; {nearest(str(unknown[0]), map(str, own))}")
    chosen = {}
    for key in keys:
        value = call.inputs.get(key)
        if value is None:
            raise MissingKeyError(f"{key!r} is to be explained, and the data does not hold it: the policy does without")
        if value.is_complex():
            raise InputError(
                f"the complex input {key!r} ({value.dtype}) has no gradient as one number: let the policy read real "
                "and imaginary parts (torch.view_as_real), or leave it out with inputs=[...]"
            )
        if not value.is_floating_point():
            value = value.to(torch.get_default_dtype())
            _require_same_outputs(call, key, value)
        chosen[key] = value
    return chosen


def gradients(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    *,
    stored: TensorDictBase | None = None,
    weights: Tensor | None = None,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    """Gradients of each target, summed over rows (which do not interact), from one forward pass.

    Args:
        call: the call that is explained.
        inputs: the explained inputs, floating point.
        leaves: the inner activations that are explained, by slot: a value to put in their place, or ``None`` for
            what the policy computes.
        sites: the names of the leaves' sites, for messages.
        targets: each maps a replay to one number for each row.
        stored: where the other inputs and the samples come from; the call's data by default.
        weights: a weight for each row; ones by default.

    Returns:
        for each target the gradients of the inputs by key and of the leaves by slot; and the values of the leaves.

    Raises:
        TargetError: if no gradient reaches a target.
        SiteError: if an explained module does not run.
        InPlaceError: if the policy changes in place what its derivatives need.
    """
    try:
        return _gradients(call, inputs, leaves, sites, targets, stored, weights)
    except RuntimeError as error:
        if MODIFIED not in str(error):
            raise
        raise InPlaceError(
            "what a derivative of the policy needs is changed in place: by its own forward, such as an in-place ReLU "
            "over the output of a Tanh, which no gradient can be taken of (write the layer with inplace=False), or by "
            f"a learner that changes the weights all the time. torch says: {str(error).partition('. Hint')[0]}"
        ) from error


def _gradients(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    stored: TensorDictBase | None,
    weights: Tensor | None,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    if call.shared is not None:
        run, points = call.shared
        return _backward(call, run, {key: points[key] for key in inputs}, leaves, sites, targets, weights, keep=True)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or vmap_level() >= 0:
        try:
            return _functional(call, inputs, leaves, sites, targets, stored, weights)
        except RuntimeError as error:
            if _OLD_FUNCTION not in str(error):
                raise
            if torch.compiler.is_compiling() or vmap_level() >= 0:
                raise InputError(
                    "the policy runs a torch.autograd.Function without setup_context, which cannot be differentiated "
                    "inside vmap or compile: explain it outside, or give the function a setup_context"
                ) from error
        return _outside_inference_mode(call, inputs, leaves, sites, targets, stored, weights)
    for _ in range(ATTEMPTS - 1):
        try:
            return _replayed(call, inputs, leaves, sites, targets, stored, weights)
        except RuntimeError as error:
            if MODIFIED not in str(error):
                raise
            call.chain = None  # it was another policy's: a pass of its own explains this one
    return _replayed(call, inputs, leaves, sites, targets, stored, weights)


def _outside_inference_mode(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    stored: TensorDictBase | None,
    weights: Tensor | None,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    """By autograd, on copies: tensors of inference mode cannot be saved for a backward pass."""
    with torch.inference_mode(False):
        own = []
        for target in targets:
            if hasattr(target, "additional"):  # what a callback reads beside the outputs
                target = copy.copy(target)
                target.additional = target.additional.clone()
            own.append(target)
        return _recorded(
            call.copied(),
            {key: value.clone() for key, value in inputs.items()},
            {slot: None if value is None else value.clone() for slot, value in leaves.items()},
            sites,
            own,
            None if stored is None else stored.clone(),
            None if weights is None else weights.clone(),
        )


def _replayed(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    stored: TensorDictBase | None,
    weights: Tensor | None,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    if len(inputs) == 1 and not leaves and is_linear(targets):
        chain = call.chain or replayed_chain(call, inputs, stored)
        found = [] if chain is None else [chain_gradient(call, chain, target, weights) for target in targets]
        if found and all(one is not None for one in found):
            return [(dict.fromkeys(inputs, one), {}) for one in found], {}
    return _recorded(call, inputs, leaves, sites, targets, stored, weights)


def _recorded(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    stored: TensorDictBase | None,
    weights: Tensor | None,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    runtime = call.policy._hooked.runtime
    given = {slot: None if value is None else value.detach().requires_grad_() for slot, value in leaves.items()}
    with torch.enable_grad(), _leaves(runtime, given, totals=call.totals):
        primals = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        same = all(value is None for value in leaves.values()) and call.as_it_was(inputs, stored)
        run = call.replay(primals, stored, as_it_was=same)
        return _backward(call, run, primals, leaves, sites, targets, weights, keep=False)


def _backward(
    call: Call,
    run: Pass,
    primals: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    weights: Tensor | None,
    keep: bool,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    """Differentiate the targets of a pass; ``keep`` its graph for the caller."""
    runtime = call.policy._hooked.runtime
    values = [target(run) for target in targets]
    _require_fired(runtime, leaves, sites)
    inner = {slot: _in_runs(runtime.slots[slot], sites[slot]) for slot in leaves}
    points = [*primals.values(), *(value for runs in inner.values() for value in runs)]
    found = []
    for index, (target, value) in enumerate(zip(targets, values, strict=True)):
        if not value.requires_grad:
            raise TargetError(no_path(target, primals, sites.values()))
        total = value.sum()
        finite = surely_finite(total)
        explained, outer = (total, None) if weights is None else (value, weights.to(value.dtype))
        more = keep or index + 1 < len(values)
        slopes = _slopes(explained, points, outer, more)
        one = _beside_others(slopes, points, len(primals), inner.values())
        warn_unreached(runtime, target, one, primals, [sites[slot] for slot, runs in inner.items() for _ in runs])
        defined = None if finite else defined_rows(call, value.detach())
        gradients = _filled(one, points, defined)
        of_inner = iter(gradients[len(primals) :])
        of_leaves = {slot: tuple(next(of_inner) for _ in runs) for slot, runs in inner.items()}
        found.append(
            (
                dict(zip(primals, gradients, strict=False)),
                {slot: _joined(runtime.slots[slot], runs, run, sites[slot]) for slot, runs in of_leaves.items()},
            )
        )
    return found, {slot: _joined(runtime.slots[slot], runs, run, sites[slot]).detach() for slot, runs in inner.items()}


def _slopes(explained: Tensor, points: Sequence[Tensor], outer: Tensor | None, more: bool) -> tuple[Tensor | None, ...]:
    """The derivative at each point; ``None`` where there is no path, as at what the policy computes under no_grad."""
    on_graph = [point for point in points if point.requires_grad]
    found = iter(
        torch.autograd.grad(explained, on_graph, outer, allow_unused=True, retain_graph=more) if on_graph else ()
    )
    return tuple(next(found) if point.requires_grad else None for point in points)


def _beside_others(
    one: Sequence[Tensor | None], points: Sequence[Tensor], start: int, groups: Iterable[Sequence[Tensor]]
) -> list[Tensor | None]:
    """A run that no gradient reaches, where one reaches others of its module, has no effect: its slope is zero."""
    found = list(one)
    for runs in groups:
        end = start + len(runs)
        if len(runs) > 1 and any(gradient is not None for gradient in found[start:end]):
            found[start:end] = [
                torch.zeros_like(point) if gradient is None else gradient
                for gradient, point in zip(found[start:end], points[start:end], strict=True)
            ]
        start = end
    return found


def _in_runs(value: Tensor | Several, site: str) -> tuple[Tensor, ...]:
    return value.points(site) if isinstance(value, Several) else (value,)


def _joined(kept: Tensor | Several, runs: tuple[Tensor, ...], run: Pass, site: str) -> Tensor:
    """What belongs to the leaves of a site, one for each of its runs, as one tensor."""
    return stacked(runs, run.outputs.batch_size, site) if isinstance(kept, Several) and kept.run == "all" else runs[0]


def activations(
    call: Call,
    sites: Mapping[str, str],
    inputs: Mapping[NestedKey, Tensor] | None = None,
    stored: TensorDictBase | None = None,
) -> dict[str, Tensor]:
    """What the policy computes at sites, by slot, on the call's inputs or on others.

    Raises:
        SiteError: if a module does not run, or if the runs of a site are counted and are not as many as before.
    """
    runtime = call.policy._hooked.runtime
    with torch.no_grad(), _leaves(runtime, dict.fromkeys(sites)):
        run = call.replay(inputs, stored)
        _require_fired(runtime, dict.fromkeys(sites), sites)
        found = {}
        for slot, site in sites.items():
            value = runtime.slots[slot]
            if isinstance(value, Several):
                times = len(value.values)
                if call.totals.setdefault(slot, times) != times:
                    raise SiteError(
                        f"the module of {site!r} ran {call.totals[slot]} times on some inputs and {times} times on "
                        "others, so that its runs cannot be compared: count from the first, as in 'act@0'"
                    )
                value = value.chosen(run.outputs.batch_size, site)
            found[slot] = value.detach()
        return found


def _functional(
    call: Call,
    inputs: Mapping[NestedKey, Tensor],
    leaves: Mapping[str, Tensor | None],
    sites: Mapping[str, str],
    targets: Sequence[Scalar],
    stored: TensorDictBase | None,
    weights: Tensor | None,
) -> tuple[list[Gradients], dict[str, Tensor]]:
    runtime = call.policy._hooked.runtime
    computed = activations(call, sites, inputs, stored) if leaves else {}
    inner = {slot: computed[slot] if value is None else value for slot, value in leaves.items()}
    # To put what is computed in its own place would cut the inputs off from what follows: there the difference
    # to it, which is zero, is added.
    added = frozenset(slot for slot, value in leaves.items() if value is None)
    points = [value.detach() for value in (*inputs.values(), *inner.values())]
    # A trace cannot ask which points a gradient reaches, and its transform writes zero for the others. So each point
    # has a mark, a zero of infinite slope, added to it: whatever comes back to it, a zero too, is no number but 0.
    marks = [value.new_zeros(()) for value in points] if torch.compiler.is_compiling() else []
    found = []
    for target in targets:

        def total(*values: Tensor, target: Scalar = target) -> tuple[Tensor, tuple[Tensor, dict[int, Tensor]]]:
            seen = [value + mark.sqrt() for value, mark in zip(values, values[len(points) :], strict=False)] or values
            chosen = dict(zip(inputs, seen, strict=False))
            placed = dict(zip(inner, seen[len(inputs) :], strict=True))
            with _leaves(runtime, placed, added, call.totals):
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
        filled = _filled(one, points, defined_rows(call, value))
        found.append((dict(zip(inputs, filled, strict=False)), dict(zip(inner, filled[len(inputs) :], strict=True))))
    return found, {slot: value.detach() for slot, value in inner.items()}


def _filled(one: Sequence[Tensor | None], points: Sequence[Tensor], defined: Tensor | None) -> list[Tensor]:
    """The gradients; ``defined`` says for which rows there is one, if not for all.

    What no gradient reaches is NaN: zero would say that it does not matter.
    """
    filled = [
        torch.full_like(point, torch.nan) if gradient is None else gradient
        for point, gradient in zip(points, one, strict=True)
    ]
    if defined is None:
        return filled
    return [
        value if gradient is None else nan_undefined_rows(defined, value)
        for value, gradient in zip(filled, one, strict=True)
    ]


@contextmanager
def _leaves(
    runtime: Runtime,
    leaves: Mapping[str, Tensor | None],
    added: frozenset[str] = frozenset(),
    totals: Mapping[str, int] = NO_TOTALS,
) -> Iterator[None]:
    runtime.leaves, runtime.added, runtime.totals = dict(leaves), added, totals
    try:
        yield
    finally:
        runtime.leaves, runtime.added, runtime.totals = {}, frozenset(), NO_TOTALS
        for slot in leaves:
            runtime.slots.pop(slot, None)


def _require_fired(runtime: Runtime, leaves: Mapping[str, Tensor | None], sites: Mapping[str, str]) -> None:
    for slot in leaves:
        if slot not in runtime.slots:
            raise SiteError(
                f"the module {sites[slot]!r} did not run (or not so often), so its activation cannot be explained"
            )


def _require_same_outputs(call: Call, key: NestedKey, floats: Tensor) -> None:
    """An integer input is explained as floats only where the policy computes the same from them."""
    remedy = (
        f"the integer input {key!r} ({call.inputs[key].dtype}) cannot be explained as numbers; explain the output of "
        "the module that reads it with input_modules=[path], use Occlusion, which needs no gradient, or leave it out "
        "with inputs=[...]"
    )
    with torch.no_grad():
        expected = call.replay().outputs
        try:
            found = call.replay({key: floats}).outputs
        except Exception as error:  # whatever the user's network raises, its own checks of the dtype included
            raise InputError(f"{remedy} ({type(error).__name__}: the module does not accept floats)") from error
    for name in call.policy.policy_out_keys:
        value = expected.get(name, None)
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.equal(value, found.get(name)):
            raise InputError(f"{remedy} (the output {name!r} differs when it is given as floats)")
