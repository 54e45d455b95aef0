"""The policy's own forward as the pass that is explained.

A gradient is otherwise a second pass. Two kinds of forward compute the same numbers whether or not they are explained:
that of a chain, which a tape records in any grad mode; and that of other policies where the caller has gradients on
and every parameter asks for one, so that a graph is recorded anyway, with or without the inputs as its leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.batching import Traits
from tdhook_rl.chains import Steps, Tape
from tdhook_rl.passes import Bound, Call, Pass, Replay, draws, run_root, stored_inputs
from tdhook_rl.writing import get_entry, set_tensor

if TYPE_CHECKING:
    from tdhook_rl.module import HookedMixin

__all__ = ["can_share", "chain_pass", "graph_pass", "sharing"]


def can_share(policy: nn.Module, traits: Traits) -> bool:
    """Whether the forward of a policy may be explained itself: it draws nothing, and rows do not meet in it."""
    return not traits.batch_statistics and not any(draws(child) for child in policy.modules())


def sharing(policy: HookedMixin, steps: Sequence[Bound], data: TensorDictBase) -> tuple[list[Bound], Steps | None]:
    """The methods that can explain the forward about to run on ``data``; and the layers, where it runs as a chain."""
    if (
        torch.compiler.is_compiling()
        or type(data) is not TensorDict
        or torch.is_inference_mode_enabled()
        or policy._hooked_runtime.level >= 0
    ):
        return [], None
    own = policy.policy_out_keys
    able: list[Any] = [
        one
        for one in steps
        if getattr(one, "shares_forward", False)
        and all(key not in own and _is_plain_float(get_entry(data, key)) for key in one.declared)  # type: ignore[attr-defined]
    ]
    if not able:
        return [], None
    chain = policy._hooked_chain
    layers = chain.alone() if chain is not None and all(one.knows_targets for one in able) else None
    return able if layers is not None or _records_a_graph(policy) else [], layers


def _records_a_graph(policy: HookedMixin) -> bool:
    tie = policy._hooked_runtime.tie
    return torch.is_grad_enabled() and tie is not None and tie.asks_for_gradients()


def chain_pass(policy: HookedMixin, forward: Callable[..., Any], data: TensorDict, layers: Steps) -> tuple[Any, Call]:
    """Run a policy that is a chain, and record it; the output, and the call to explain."""
    inputs = stored_inputs(policy, data)
    with Tape(policy._hooked_runtime, list(inputs.values()), layers) as tape:
        output = run_root(policy, forward, (data,), {})
    call = Call(policy, forward, output, inputs, data)
    out_keys = policy.policy_out_keys
    record = tape.only(get_entry(output, out_keys[0]))
    if record is not None:  # else a second pass explains what came out: the weights are computed, or under autocast
        run = Pass(output, output, [], out_keys, {}, in_keys=list(inputs))
        call.chain = run, record
    return output, call


@contextmanager
def graph_pass(
    policy: HookedMixin, forward: Callable[..., Any], data: TensorDict, shared: Sequence[Any]
) -> Iterator[tuple[Any, Call]]:
    """Run the policy on ``data`` with its explained inputs as leaves; yields the output and the call to explain.

    Afterwards, and for the caller throughout, the inputs are the caller's own tensors.
    """
    runtime = policy._hooked_runtime
    inputs = stored_inputs(policy, data)
    points: dict[NestedKey, Tensor] = {
        key: inputs[key].detach().requires_grad_() for one in shared for key in one.declared
    }
    replay = Replay(data)
    slots = [slot for one in shared for slot in one.leaves]
    previous, output = runtime.replay, data
    runtime.replay, runtime.leaves = replay, dict.fromkeys(slots)
    try:
        try:
            for key, point in points.items():
                set_tensor(data, key, point)
            output = run_root(policy, forward, (data,), {})
        finally:
            runtime.replay, runtime.leaves = previous, {}
            for key, point in points.items():
                for holder in (data,) if output is data else (data, output):
                    if holder.get(key, None) is point:
                        set_tensor(holder, key, inputs[key])
        call = Call(policy, forward, output, inputs, data)
        run = Pass(
            outputs=output,
            stored=output,
            distributions=replay.distributions,
            out_keys=policy.policy_out_keys,
            watched=replay.watched,
            in_keys=list(inputs),
            supports=policy._hooked_supports,
        ).own()
        for key, point in points.items():  # a target may read them as well
            set_tensor(run.outputs, key, point)
        call.shared = run, points
        yield output, call
    finally:
        for slot in slots:
            runtime.slots.pop(slot, None)


def _is_plain_float(value: Any) -> bool:
    return type(value) is Tensor and value.is_floating_point() and not value.requires_grad
