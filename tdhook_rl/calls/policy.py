"""What the rooms below ``hooking`` know of a hooked policy: its state, and what it answers."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from tensordict import NestedKey
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.provenance import Provenance
from tdhook_rl.policies.draws import Draw
from tdhook_rl.policies.tying import Tie
from tdhook_rl.replaying.batching import Traits
from tdhook_rl.replaying.traceable import TraceRisk
from tdhook_rl.sites.row_values import Record
from tdhook_rl.sites.runtime import Runtime


@dataclass(kw_only=True)
class HookedState:
    """What makes a policy a hooked one. It is made by ``prepare`` and does not change; what a call changes is in
    ``runtime``.

    Attributes:
        runtime: what the hooks share, and the call under way. Read by whatever runs the policy.
        tie: holds the user's policy and its tensors together; ``None`` in copies. Read before calls and by checks.
        bound: the methods. Read by whatever computes or lists results.
        steps: those of them that write at every forward. Read by calls.
        alone: those of them that can do without the policy's own inputs. Read by calls.
        provenance: whose results are whose. Read by whatever writes or believes results.
        wraps: the policy is a wrapper of ours around the user's plain module. Read where paths start, and by messages.
        traits: whether it has memory, batch statistics, convolutions. Read by annotation and by attributions.
        trace_risks: what its code shows that writes, draws or misleads a compiler. Read by compiled calls.
        shares: some of those may explain its own forward, without a second pass. Read by calls.
        chain: where it may be a chain of known layers. Read by the passes that need no graph.
        decider: what draws in it, where the derivatives of that are known. Read by passes of gradients.
        reads: keys that methods read beside the policy's own. Read by ``in_keys``.
        records: what is written of how interventions acted. Read by replays.
        passes: what runs before it, each time. Read by whatever runs the policy.
        overwrites: its inputs that it writes over. Read by replays and by stamps.
        optional: its inputs that it can do without. Read by replays and by attributions.
        made: its input keys of which it writes the entries itself. Read by replays.
        noise: its inputs that hold noise, and are drawn where they are absent. Read by replays.
        chunks: the wrapper that plays several actions one by one, if there is one. Read by calls and annotation.
        draws: its samples that are no plain decisions. Read by replays.
        slots: where a call keeps actions that are written over later, by key. Read by targets.
        actions: what its Q-networks say about their values, by key. Read by targets.
        supports: the support of its distributional values, by key. Read by targets.
        routes: what sites hand to each other during a call. Closed after each.
    """

    runtime: Runtime
    tie: Tie | None
    bound: list[BoundMethod]
    steps: list[BoundMethod]
    alone: list[BoundMethod]
    provenance: Provenance
    wraps: bool
    traits: Traits
    trace_risks: list[TraceRisk]
    shares: bool
    chain: Any
    decider: Any
    reads: list[NestedKey]
    records: list[Record]
    passes: list[Any]
    overwrites: list[NestedKey]
    optional: list[NestedKey]
    made: list[NestedKey]
    noise: list[NestedKey]
    chunks: Any
    draws: list[Draw]
    slots: dict[NestedKey, str]
    actions: dict[NestedKey, Any]
    supports: dict[NestedKey, Tensor]
    routes: list[Any]

    def __getstate__(self) -> dict[str, Any]:
        if self.tie is not None and threading.current_thread() is threading.main_thread():
            self.tie.require_held()  # a copy, such as a worker's, cannot look any more
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"tie": None}


if TYPE_CHECKING:

    class _Module(TensorDictModuleBase):
        pass
else:
    _Module = object  # the policy's own class brings it


class HookedPolicy(_Module):
    """A hooked policy, as the rooms below ``hooking`` see it; its class is made there."""

    _hooked: HookedState
    _hooked_own_in_keys: Callable[[], list[NestedKey]]  # what the policy's own class answers
    _hooked_own_out_keys: Callable[[], list[NestedKey]]

    if TYPE_CHECKING:

        @property
        def policy_in_keys(self) -> list[NestedKey]: ...

        @property
        def policy_out_keys(self) -> list[NestedKey]: ...

        @property
        def result_keys(self) -> list[NestedKey]: ...

        @property
        def hooked_root(self) -> nn.Module: ...

        def _hooked_read_keys(self) -> list[NestedKey]: ...

        def _explain(self, args: tuple, kwargs: dict[str, Any], error: Exception) -> None: ...

        def _frozen_statistics(self) -> AbstractContextManager[None]: ...

        @staticmethod
        def _compute(bound: list[BoundMethod], call: Any) -> dict[tuple[str, ...], Tensor]: ...
