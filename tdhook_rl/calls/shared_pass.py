"""The policy's own forward as the pass that is explained, so that no second one is needed.

A gradient is otherwise a second pass. Two kinds of forward compute the same numbers whether or not they are explained:
that of a chain of known layers, which is recorded in any grad mode; and that of other policies where the caller has
gradients on and every parameter asks for one: there is a graph anyway, with or without the inputs as its leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.keys import get_entry
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.chains import Record, Steps, chain_layers
from tdhook_rl.calls.inputs import recorded, stored_inputs
from tdhook_rl.calls.passes import Call, Pass, effects_of, in_rows, run_root
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.calls.undifferentiable import in_words
from tdhook_rl.calls.writing import set_tensor, tensors_as_entries
from tdhook_rl.policies.draws import draws
from tdhook_rl.policies.memory import same_values
from tdhook_rl.replaying.batching import GeneratorState, Traits
from tdhook_rl.replaying.samples import Replay
from tdhook_rl.sites.known import is_vmapped
from tdhook_rl.sites.listed import modules


def can_share(policy: nn.Module, traits: Traits) -> bool:
    """Whether the forward of a policy may be explained itself: it draws nothing, and rows do not meet in it.

    And it gives the same bits where its inputs ask for a gradient, which a product inside ``vmap`` does not.
    """
    return not traits.batch_statistics and not any(draws(child) or is_vmapped(child) for child in modules(policy))


def sharing(
    policy: HookedPolicy, steps: Sequence[BoundMethod], data: TensorDictBase
) -> tuple[list[BoundMethod], Steps | None]:
    """The methods that can explain the forward about to run on ``data``; and the layers, where it runs as a chain."""
    if (
        torch.compiler.is_compiling()
        or type(data) is not TensorDict
        or torch.is_inference_mode_enabled()
        or policy._hooked.runtime.level >= 0
    ):
        return [], None
    own = policy.policy_out_keys
    able: list[Any] = [
        one
        for one in steps
        if one.shares_forward and all(key not in own and _is_plain_float(get_entry(data, key)) for key in one.declared)  # type: ignore[attr-defined]
    ]
    layers = None
    if able and _is_only_a_chain(policy) and all(one.linear for one in able):
        layers = chain_layers(policy, get_entry(data, policy.policy_in_keys[0]))
    return able if able and (layers is not None or _records_a_graph(policy, data.batch_size)) else [], layers


def _is_only_a_chain(policy: HookedPolicy) -> bool:
    return policy._hooked.chain is not None and policy._hooked.chain.head is None


def _records_a_graph(policy: HookedPolicy, batch: torch.Size) -> bool:
    tie = policy._hooked.tie
    if not torch.is_grad_enabled() or tie is None or not tie.asks_for_gradients():
        return False
    # What a forward keeps, such as a running mean of its inputs, would keep the graph of the leaves.
    effects = effects_of(policy)
    if effects.watch.idle:
        return True
    return effects.watch.writes_nothing() and effects.same_bits.get(batch, False) and all(effects.same_bits.values())


def chain_pass(policy: HookedPolicy, forward: Callable[..., Any], data: TensorDict, layers: Steps) -> Call:
    """Run a policy that is a chain of these layers, and record it; the call to explain."""
    key, out_key = policy.policy_in_keys[0], policy.policy_out_keys[0]
    try:
        record = Record(layers, get_entry(data, key))
        set_tensor(data, out_key, record.output)
    except RuntimeError:
        run_root(policy, forward, (data,), {})  # says it in its own words
        raise
    outputs = tensors_as_entries({key: record.input, out_key: record.output}, data.batch_size)
    call = Call(policy, forward, data, {key: record.input}, data)
    call.chain = Pass(outputs, data, distributions=[], out_keys=[out_key], watched={}), record
    return call


@contextmanager
def graph_pass(
    policy: HookedPolicy, forward: Callable[..., Any], data: TensorDict, shared: Sequence[Any]
) -> Iterator[tuple[Any, Call]]:
    """Run the policy on ``data`` with its explained inputs as leaves; yields the output and the call to explain.

    Afterwards, and for the caller throughout, the inputs are the caller's own tensors.
    """
    runtime = policy._hooked.runtime
    inputs = stored_inputs(policy, data)
    points: dict[NestedKey, Tensor] = {
        key: inputs[key].detach().requires_grad_() for one in shared for key in one.declared
    }
    brought = dict(data.items(True, True))
    # A leaf cannot be worked on in place: until a forward was seen to leave its inputs alone, it is given copies.
    effects = effects_of(policy)
    given = points if effects.keeps_input else {key: point.clone() for key, point in points.items()}
    replay = Replay(data, is_forward=True)
    slots = [slot for one in shared for slot in one.leaves]
    previous, output = runtime.replay, data
    runtime.replay, runtime.leaves = replay, dict.fromkeys(slots)
    try:
        try:
            for key, tensor in given.items():
                set_tensor(data, key, tensor)
            output = run_root(policy, forward, (data,), {})
        except RuntimeError as error:  # with inputs that have no graph it may run
            told = in_words(error)
            if told is None:
                raise
            raise told from error
        finally:
            runtime.replay, runtime.leaves = previous, {}
            for key, tensor in given.items():
                for holder in (data,) if output is data else (data, output):
                    if holder.get(key, None) is tensor:
                        set_tensor(holder, key, inputs[key])
        if policy._hooked.records:
            inputs |= recorded(policy, output)
        if given is not points:
            before, inputs = inputs, inputs | {key: point.detach().clone() for key, point in points.items()}
            effects.keeps_input = _hand_on(given, points, before)
        seen = in_rows(output, data.batch_size)
        call = Call(policy, forward, seen, inputs, data)
        # A target must not find entries of the caller's that the policy neither reads nor writes.
        own = (*inputs, *policy.policy_out_keys)
        foreign = [key for key, value in brought.items() if key not in own and output.get(key, None) is value]
        outputs = seen.exclude(*foreign)
        for key, point in points.items():
            set_tensor(outputs, key, point)
        run = Pass(
            outputs, seen, replay.distributions, policy.policy_out_keys, replay.watched, policy._hooked.supports,
            actions=policy._hooked.actions, warned=runtime.warned,
        )  # fmt: skip
        call.shared = run, points
        with _stream_kept(shared, data.device or effects.device):
            yield output, call
    finally:
        for slot in slots:
            runtime.slots.pop(slot, None)


@contextmanager
def _stream_kept(shared: Sequence[BoundMethod], device: torch.device | None) -> Iterator[None]:
    """After what explains a forward the stream of noise goes on as if there had been none: a target may draw."""
    others = any(one.asks_functions for one in shared)
    after = GeneratorState(device, others) if any(one.may_draw for one in shared) else None
    try:
        yield
    finally:
        if after is not None:
            after.restore()


def _hand_on(given: Mapping[NestedKey, Tensor], points: Mapping[NestedKey, Tensor], brought: Any) -> bool:
    """Do to the caller's tensors what a forward has done in place to the copies; whether that was nothing."""
    changed = [key for key, point in points.items() if not same_values(given[key].detach(), point.detach())]
    with torch.no_grad():
        for key in changed:
            brought[key].copy_(given[key])
    return not changed


def _is_plain_float(value: Any) -> bool:
    return type(value) is Tensor and value.is_floating_point() and not value.requires_grad
