"""What a method bound to one policy declares; a bound method says only where it differs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from tensordict import NestedKey, TensorDictBase
from torch import Tensor

#: Calls in a row in which a schedule selects no row, or a condition never holds, after which that is said.
PATIENCE = 100


class BoundMethod:
    """Base of bound methods: what ``Method.bind`` returns if the method computes results.

    Attributes:
        result_keys: what it writes; empty for interventions and for methods that only consume.
        when: ``"step"``: in every forward; ``"batch"``: in ``annotate`` only.
        horizon: ``"step"``: a row is explained by itself; ``"trajectory"``: it is given whole trajectories.
        reads: entries of the data that it needs beside the policy's inputs and outputs.
        declared: the inputs that it explains; their rows must be finite for a result to count. ``None`` for methods
            that explain none.
        reads_forward: uses what its hooks captured in the forward pass.
        replays: runs the policy again.
        may_draw: its own computations, or functions of the user's that it calls, may draw from generators.
        asks_functions: it calls functions of the user's, which may draw from those of Python and NumPy too.
        shares_forward: may explain the policy's own forward, without a second pass.
        shares_pass: may explain a pass that others explain as well: it needs a plain graph, and leaves it whole.
        linear: explains only targets that are linear in one output.
        plan: ``plan(data)`` decides, once for a whole batch, which rows are computed, and the key to hand it on under.
        whole_batch: cannot be computed chunk by chunk.
        only_in_forward: shows what happens while the policy acts; ``annotate`` cannot compute it.
        without_forward: can do without the policy's own inputs, and then the policy is not run.
        consumes: does something at each call although it writes nothing.
        exclusive: its mask speaks for its root alone.
        compiled: computes the same by a compiled graph, if the user asks for that.
        store: the cache of the caller's that it fills.
        last: what its last call captured.
        bound: the method that it schedules.
        method_name: the class of the method, as messages call it.
    """

    result_keys: tuple[tuple[str, ...], ...] = ()
    when: Literal["step", "batch"] = "step"
    horizon: Literal["step", "trajectory"] = "step"
    reads: Sequence[NestedKey] = ()
    declared: list[NestedKey] | None = None
    reads_forward: bool = False
    replays: bool = False
    may_draw: bool = True
    asks_functions: bool = False
    shares_forward: bool = False
    shares_pass: bool = False
    linear: bool = False
    plan: Callable[[TensorDictBase], tuple[tuple[str, ...], Tensor]] | None = None
    whole_batch: bool = False
    only_in_forward: bool = False
    without_forward: bool = False
    consumes: bool = False
    exclusive: bool = False
    compiled: Any = None
    store: Any = None
    last: Any = None
    bound: BoundMethod | None = None
    method_name: str = ""

    def compute(self, call: Any) -> Mapping[tuple[str, ...], Tensor]:
        """The results of one call by key, each with the batch shape of the call first.

        Args:
            call: what ran and may be run again, a :class:`tdhook_rl.calls.passes.Call`.
        """
        raise NotImplementedError


def observers(bound: Sequence[BoundMethod]) -> list[BoundMethod]:
    """The bound methods that write results."""
    return [one for one in bound if one.result_keys]
