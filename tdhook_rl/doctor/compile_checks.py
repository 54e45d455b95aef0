"""Whether a hooked policy compiles as one graph, and stays compiled."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from tensordict import TensorDictBase

from tdhook_rl.doctor.dry_run import Deadline, first_line, trial_copy
from tdhook_rl.doctor.findings import Finding
from tdhook_rl.internals.dynamo_names import TorchDynamoException

#: Calls of a compiled policy. The first may compile once more at the second: one that explores reads its step count.
CALLS = 4


def compile_findings(policy: Any, data: TensorDictBase, deadline: Deadline, *, fullgraph: bool) -> Iterator[Finding]:
    """Compile copies of the hooked policy and of the user's with a backend that only counts graphs.

    Where the collector would compile with ``fullgraph=True``, a break of the graph is an error.
    """
    deadline.waiting_for = "torch.compile of the hooked policy"
    graphs, reason = _compiled(trial_copy(policy), data)
    tie = policy._hooked.tie
    original = None if tie is None else tie.original()
    plain_reason = None
    if original is not None and policy.hooked_root is policy and reason is not None:
        deadline.waiting_for = "torch.compile of the user's policy"
        _, plain_reason = _compiled(copy.deepcopy(original), data)
    if reason is not None:
        yield Finding(
            "compile",
            "error" if fullgraph else "warning",
            f"it does not compile as one graph: {reason}",
            "the user's policy does not either: change its forward"
            if plain_reason is not None
            else "leave out the method or the function that the reason names, or compute it with when='batch'",
        )
        return
    yield Finding("compile", "ok", "one graph")
    if graphs[-1] > graphs[1]:
        yield Finding(
            "recompilation",
            "warning",
            f"{graphs[-1] - graphs[1]} more graphs were compiled in {CALLS} calls on the same data",
            "a Python number changes at every call: keep it in a tensor, such as one of policy.controls",
        )
    else:
        yield Finding("recompilation", "ok", f"none in {CALLS} calls")


def _compiled(module: Any, data: TensorDictBase) -> tuple[list[int], str | None]:
    """How many graphs there were after each call; or why there is no single one."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def call(data: TensorDictBase) -> TensorDictBase:
        return module(data)

    # Compiled code is kept, and its number limited, for each code object: that of the user's policy is not used.
    call.__code__ = call.__code__.replace()
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    counts = []
    try:
        for _ in range(CALLS):
            compiled(data.clone())
            counts.append(len(graphs))
    except TorchDynamoException as error:
        return counts, first_line(error)
    return counts, None
