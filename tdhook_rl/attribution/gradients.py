"""Gradients of targets with respect to inputs and inner activations, in one replay.

``torch.autograd.grad`` with respect to the explained tensors only. Where autograd is out of reach (inference mode,
compile, inside a functorch transform) ``torch.func.grad`` gives the same numbers; of a chain of known layers so do the
layers' own derivatives (:mod:`tdhook_rl.attribution.chain_gradients`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.arguments.callbacks import Held
from tdhook_rl.attribution.chain_gradients import chain_gradients
from tdhook_rl.attribution.copies import of_copies
from tdhook_rl.attribution.leaves import activations, as_leaves, in_runs, joined, require_fired
from tdhook_rl.attribution.question import Attributed, Question, TargetFunction
from tdhook_rl.attribution.undefined import defined_rows, unreached_integers, warn_unreached, with_nan
from tdhook_rl.calls.chains import MODIFIED
from tdhook_rl.calls.heads import Tangent, TrunkPass, run_trunk
from tdhook_rl.calls.passes import Call, Pass, effects_of
from tdhook_rl.calls.real_rows import surely_finite
from tdhook_rl.calls.undifferentiable import in_words
from tdhook_rl.errors import InputError, TargetError
from tdhook_rl.sites.missing import OFFER
from tdhook_rl.sites.runtime import vmap_level
from tdhook_rl.targets import NO_LOG_PROB, is_own, log_prob_keys, no_path


def _numbers(run: Pass) -> dict[NestedKey, Tensor]:
    """The outputs of the policy that are numbers."""
    found = {key: run.outputs.get(key, None) for key in run.out_keys}
    return {key: one for key, one in found.items() if isinstance(one, Tensor) and one.is_floating_point()}


def functional_gradients(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    """For each target its gradients, as of :func:`tdhook_rl.attribution.gradients.gradients`; and the activations."""
    call, inputs, sites, targets, placed, stored, weights, *_ = question
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
    for index, target in enumerate(targets):

        def total(*values: Tensor, target: TargetFunction = target) -> tuple[Tensor, tuple[Tensor, dict[Any, Tensor]]]:
            seen = [value + mark.sqrt() for value, mark in zip(values, values[len(points) :], strict=False)] or values
            chosen = dict(zip(inputs, seen, strict=False))
            given = dict(zip(inner, seen[len(inputs) :], strict=True))
            with as_leaves(runtime, given, added, call.totals):
                run = call.replay(chosen, stored)
                value = target(run)
            scalar = (value if weights is None else value * weights.to(value.dtype)).sum()
            if torch.compiler.is_compiling():
                return scalar, (value, {} if placed or stored is not None else _numbers(run))
            if not value.requires_grad:
                raise TargetError(no_path(target, inputs, sites.values()) + unreached_integers(call, inputs))
            # Zeros from the transform would not tell a slope of zero from an input that no gradient reaches.
            own = torch.autograd.grad(scalar, values, allow_unused=True, create_graph=torch.is_grad_enabled())
            return scalar.detach(), (value, {i: one for i, one in enumerate(own) if one is not None})

        argnums = tuple(range(len(points) + len(marks)))
        one, (value, own) = torch.func.grad(total, argnums=argnums, has_aux=True)(*points, *marks)
        if torch.compiler.is_compiling():
            call.traced_outputs = own
            one = tuple(
                torch.where(mark == 0, torch.nan, slope) for slope, mark in zip(one, one[len(points) :], strict=False)
            )
        else:
            one = tuple(own.get(i) for i in range(len(points)))
            warn_unreached(call, target, one, inputs, [sites[slot] for slot in inner])
        defined = defined_rows(call, value)
        if question.defined is not None:
            question.defined[index] = defined
        filled = with_nan(one, points, defined)
        found.append((dict(zip(inputs, filled, strict=False)), dict(zip(inner, filled[len(inputs) :], strict=True))))
    return found, {slot: value.detach() for slot, value in inner.items()}


#: What policies do that functorch cannot differentiate, and autograd can, by how torch says so.
_NOT_FUNCTIONAL = {
    "setup_context": "a torch.autograd.Function without setup_context",
    "saved tensor hooks": "hooks on saved tensors (torch.utils.checkpoint, torch.autograd.graph.save_on_cpu)",
    "requires_grad_()": "requires_grad_(), to differentiate by itself",
    "retain_grad()": "retain_grad()",
}
#: How often a pass is made where a learner in another thread changes the weights between its forward and its backward.
ATTEMPTS = 5


def gradients(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    """Gradients of each target, summed over rows (which do not interact), from one forward pass.

    Returns:
        for each target the gradients of the inputs by key and of the activations by slot; and these activations.

    Raises:
        TargetError: if no gradient reaches a target.
        SiteError: if an explained module does not run.
        InPlaceError: if the policy changes in place what its derivatives need.
        InputError: if it does something else of which torch takes no gradient.
    """
    try:
        return _gradients(question)
    except RuntimeError as error:
        told = in_words(error)
        if told is None:
            raise
        raise told from error


def _gradients(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    call = question.call
    if call.shared is not None:
        run, points = call.shared
        return _backward(question, run, {key: points[key] for key in question.inputs}, keep=True)
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or vmap_level() >= 0:
        try:
            if _draws_outside_transforms(call):
                return _outside_inference_mode(question)
            return functional_gradients(question)
        except RuntimeError as error:
            if torch.compiler.is_compiling() or vmap_level() >= 0:
                what = next((words for said, words in _NOT_FUNCTIONAL.items() if said in str(error)), None)
                if what is None:
                    raise
                raise InputError(
                    f"the policy runs {what}, which cannot be differentiated inside vmap or compile: explain it "
                    "outside, or write the policy without"
                ) from error
        # There is more that functorch cannot and autograd can, such as NumPy; what neither can fails once more. Of what
        # draws it is the other way round: a policy that was made under inference_mode has no tensors for autograd.
        return (functional_gradients if _draws_outside_transforms(call) else _outside_inference_mode)(question)
    for _ in range(ATTEMPTS - 1):
        try:
            return _replayed(question)
        except RuntimeError as error:
            if MODIFIED not in str(error):
                raise
            # It was another policy's: a pass of its own explains this one.
            call.chain = None
            call.forget_passes()
    return _replayed(question)


def _draws_outside_transforms(call: Call) -> bool:
    """Whether the policy may draw noise, and autograd is in reach.

    Inside a functorch transform some layers draw other noise from the same generators than outside, where the policy
    ran: dropout of attention fills its masks in the order of the memory, which is another one there.
    """
    reach = not torch.compiler.is_compiling() and vmap_level() < 0
    return reach and not effects_of(call.policy).quiet()


def _outside_inference_mode(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    """By autograd, on copies: tensors of inference mode cannot be saved for a backward pass."""
    call, inputs, sites, targets, placed, stored, weights, *_ = question
    with torch.inference_mode(False):
        own = []
        for target in targets:
            if hasattr(target, "additional"):  # what a callback reads beside the outputs
                target = copy.copy(target)
                target.additional = target.additional.clone()
            own.append(target)
        copied = Question(
            call.copied(),
            {key: value.clone() for key, value in inputs.items()},
            sites,
            own,
            {slot: value.clone() for slot, value in placed.items()},
            None if stored is None else stored.clone(),
            None if weights is None else weights.clone(),
            defined=question.defined,
        )
        return _recorded(copied)


def _replayed(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    found = chain_gradients(question)
    return _recorded(question) if found is None else (found, {})


def _recorded(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    call, inputs, placed, stored = question.call, question.inputs, question.placed, question.stored
    if question.shares and len(call.sharers) > 1:
        return _shared(question)
    given: dict[str, Tensor | None] = dict.fromkeys(question.sites)
    given.update((slot, value.detach().requires_grad_()) for slot, value in placed.items())
    inner = as_leaves(call.policy._hooked.runtime, given, totals=call.totals) if given else nullcontext()
    with torch.enable_grad(), inner:
        primals = {key: value.detach().requires_grad_() for key, value in inputs.items()}
        as_it_was = not placed and call.as_it_was(inputs, stored)
        head = call.policy._hooked.decider
        if head is not None and (found := _of_trunk(question, TrunkPass(call, head), primals, as_it_was)) is not None:
            return found
        run = call.replay(primals, stored, as_it_was=as_it_was)
        if question.own:
            call.keep_last(run.outputs)
        if call.compares and call.replayed is not None and not all(map(is_own, question.targets)):
            call.replayed = call.replayed.detach().clone()  # a function of the user's may write to what it is given
        return _backward(question, run, primals, keep=False)


def _of_trunk(
    question: Question, trunk: TrunkPass, primals: Mapping[NestedKey, Tensor], as_it_was: bool
) -> tuple[list[Attributed], dict[str, Tensor]] | None:
    """The same of log-probabilities whose derivatives are known, without what draws; ``None`` if they are not."""
    call, targets = question.call, question.targets
    keys = [log_prob_keys(target) for target in targets]
    if any(key is NO_LOG_PROB for key in keys) or not trunk.fits():
        return None
    run = call.replay(primals, question.stored, as_it_was=as_it_was, forward=run_trunk)
    known = trunk.targets(run, [getattr(target, "name", "") for target in targets], keys)
    if known is None:
        for slot in question.sites:
            call.slots.pop(slot, None)
        return None
    if question.own:
        call.keep_last(run.outputs)
    if len(primals) == 1 and not question.sites and (found := _of_tangents(question, known, primals)) is not None:
        return found, {}
    return _backward(question._replace(targets=known), run, primals, keep=False)


def _of_tangents(
    question: Question, tangents: Sequence[Tangent], primals: Mapping[NestedKey, Tensor]
) -> list[Attributed] | None:
    """The gradient with respect to one input, of targets whose derivatives are known; ``None`` if one is no number."""
    known = [tangent.on_graph(question.weights) for tangent in tangents]
    if any(one is None for one in known):
        return None
    found: list[Attributed] = []
    for index, (tangent, one) in enumerate(zip(tangents, known, strict=True)):
        values, slopes = one  # type: ignore[misc]
        more = index + 1 < len(known)
        (gradient,) = torch.autograd.grad(values, *primals.values(), slopes, retain_graph=more, allow_unused=True)
        if gradient is None:
            raise TargetError(no_path(tangent, primals) + unreached_integers(question.call, primals))
        found.append((dict.fromkeys(primals, gradient), {}))
    return found


def _shared(question: Question) -> tuple[list[Attributed], dict[str, Tensor]]:
    """The same in a pass for all methods of the call that may share one; its leaves are what any of them explains."""
    call, inputs = question.call, question.inputs
    if call.kept is None and call.kept_gradients is None:
        call.kept_gradients = of_copies(question)
    copies = call.kept_gradients or {}
    if all(id(target) in copies for target in question.targets):
        ours = [copies[id(target)][1] for target in question.targets]
        return [({key: one[key] for key in inputs}, {}) for one in ours], {}
    if call.kept is None or any(key not in call.kept[1] for key in inputs):
        known = {key: call.inputs.get(key) for one in call.sharers for key in one.declared}
        values = {key: one for key, one in known.items() if isinstance(one, Tensor) and one.is_floating_point()}
        primals = {key: value.detach().requires_grad_() for key, value in {**values, **inputs}.items()}
        with torch.enable_grad():
            call.kept = call.replay(primals, as_it_was=call.as_it_was(primals, None)), primals
    run, points = call.kept
    with torch.enable_grad():
        return _backward(question, run, {key: points[key] for key in inputs}, keep=True)


def _backward(
    question: Question, run: Pass, primals: Mapping[NestedKey, Tensor], keep: bool
) -> tuple[list[Attributed], dict[str, Tensor]]:
    """Differentiate the targets of a pass; ``keep`` its graph for the caller."""
    call, sites, targets, weights = question.call, question.sites, question.targets, question.weights
    runtime = call.policy._hooked.runtime
    if sites:
        require_fired(runtime, sites, OFFER)
    values = _values(targets, run)
    inner = {slot: in_runs(runtime.slots[slot], site) for slot, site in sites.items()}
    points = [*primals.values(), *(value for runs in inner.values() for value in runs)]
    found: list[Attributed] = []
    for index, (target, value) in enumerate(zip(targets, values, strict=False)):
        if not value.requires_grad:
            raise TargetError(no_path(target, primals, sites.values()) + unreached_integers(call, primals))
        total = value.sum()
        finite = surely_finite(total)
        explained, outer = (total, None) if weights is None else (value, weights.to(value.dtype))
        more = keep or index + 1 < len(values)
        slopes = _slopes(explained, points, outer, more)
        if finite and not sites and all(slope is not None for slope in slopes):
            found.append((dict(zip(primals, slopes, strict=True)), {}))  # type: ignore[arg-type]
            continue
        one = _beside_others(slopes, points, len(primals), inner.values())
        warn_unreached(call, target, one, primals, [sites[slot] for slot, runs in inner.items() for _ in runs])
        defined = None if finite else defined_rows(call, value.detach())
        if defined is not None and question.defined is not None:
            question.defined[index] = defined
        gradients = with_nan(one, points, defined)
        of_inner = iter(gradients[len(primals) :])
        of_leaves = {slot: tuple(next(of_inner) for _ in runs) for slot, runs in inner.items()}
        found.append(
            (
                dict(zip(primals, gradients, strict=False)),
                {slot: joined(runtime.slots[slot], runs, run, sites[slot]) for slot, runs in of_leaves.items()},
            )
        )
    activations = {slot: joined(runtime.slots[slot], runs, run, sites[slot]).detach() for slot, runs in inner.items()}
    if len(values) < len(targets):
        found += _of_others(question, len(values))
    return found, activations


def _values(targets: Sequence[TargetFunction], run: Pass) -> list[Tensor]:
    """What targets are in one pass: of all, or up to the first function of the user's that writes in place to what the
    others would be given."""
    values: list[Tensor] = []
    for target in targets:
        held = None if is_own(target) else Held(run.outputs)
        values.append(target(run))
        if held is not None:
            held.put_back()
            if held.written() is not None:
                break
    return values


def _of_others(question: Question, first: int) -> list[Attributed]:
    """The same of the targets from the first on, by a pass of their own."""
    defined = None if question.defined is None else dict[int, Tensor]()
    found, _ = gradients(question._replace(targets=question.targets[first:], own=0, defined=defined))
    if question.defined is not None and defined is not None:
        question.defined.update({first + index: rows for index, rows in defined.items()})
    return found


def _slopes(explained: Tensor, points: Sequence[Tensor], outer: Tensor | None, more: bool) -> tuple[Tensor | None, ...]:
    """The derivative at each point; ``None`` where there is no path, as at what the policy computes under no_grad."""
    on_graph = [point for point in points if point.requires_grad]
    if len(on_graph) == len(points):
        return torch.autograd.grad(explained, on_graph, outer, allow_unused=True, retain_graph=more)
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
