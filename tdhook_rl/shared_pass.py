"""The policy's own forward as the pass that is explained, where it records a graph anyway.

A gradient is otherwise a second pass. Where the caller has gradients on and every parameter asks for one, the
forward computes the same numbers whether or not its inputs are leaves of the graph: one pass then serves both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.batching import Traits
from tdhook_rl.hooks import vmap_level
from tdhook_rl.passes import Bound, Call, Pass, Replay, draws, run_root, stored_inputs
from tdhook_rl.writing import set_tensor

if TYPE_CHECKING:
    from tdhook_rl.module import HookedMixin

__all__ = ["can_share", "shared_pass", "sharing"]


def can_share(policy: nn.Module, traits: Traits) -> bool:
    """Whether the forward of a policy may be explained itself: it draws nothing, and rows do not meet in it."""
    return not traits.batch_statistics and not any(draws(child) for child in policy.modules())


def sharing(policy: HookedMixin, steps: Sequence[Bound], data: TensorDictBase) -> list[Bound]:
    """The methods that can explain the forward about to run on ``data``, instead of a second pass."""
    tie = policy._hooked_runtime.tie
    if (
        tie is None
        or torch.compiler.is_compiling()
        or type(data) is not TensorDict
        or not torch.is_grad_enabled()
        or torch.is_inference_mode_enabled()
        or vmap_level() >= 0
        or not tie.asks_for_gradients()
    ):
        return []
    own = policy.policy_out_keys
    return [
        one
        for one in steps
        if getattr(one, "shares_forward", False)
        and all(key not in own and _is_plain_float(data.get(key, None)) for key in one.declared)  # type: ignore[attr-defined]
    ]


@contextmanager
def shared_pass(
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
            output, output, replay.distributions, policy.policy_out_keys, replay.watched, policy._hooked_supports
        )
        call.shared = run, points
        yield output, call
    finally:
        for slot in slots:
            runtime.slots.pop(slot, None)


def _is_plain_float(value: Any) -> bool:
    return type(value) is Tensor and value.is_floating_point() and not value.requires_grad
