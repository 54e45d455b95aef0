"""What the hooks of one hooked policy share: switches, and the state of the call under way."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from tdhook_rl.arguments.keys import is_tensordict
from tdhook_rl.errors import InactiveError, SiteError
from tdhook_rl.internals.functorch_names import (
    are_transforms_active,
    decrement_nesting,
    increment_nesting,
    transform_stack,
)
from tdhook_rl.sites.controls import Controls
from tdhook_rl.sites.forking import Switch, TurnLock, survive_forks
from tdhook_rl.sites.held_controls import HeldControls


class Runtime:
    """What the hooks of one hooked policy share: switches, and the slots of the call under way.

    Slots are emptied after each call, so that nothing of a call outlives it. One call at a time: whoever runs the
    policy, or a part of a batch, holds ``lock`` meanwhile.
    """

    def __init__(self) -> None:
        self.controls = Controls()
        self.held = HeldControls(self.controls)  # what calls read of them
        self.active = True
        # Tells copies in other processes that the hooking is over; this process has no need to look.
        self.switch = Switch()
        self.home = os.getpid()
        self.away = False
        self.methods: tuple[Any, ...] | None = None  # what it was prepared with; copies cannot tell
        self.recording = False
        self.depth = 0
        self.caller = 0  # the thread whose call is under way
        # Of the call under way: the nesting level of functorch transforms around it, and its batch size if known;
        # and inside a recurrent module the batch size and the resets that this reads.
        self.level = -1
        self.batch: torch.Size | None = None
        self.time: tuple[torch.Size, Tensor | None] | None = None
        # The batch sizes that modules called by others in a forward of their own were called with.
        self.inner: tuple[torch.Size | None, ...] = ()
        self.steps: frozenset[str] = frozenset()  # the paths of modules that get one step at a time, on tensors
        # What the policy, and, by slot, the modules around a site that may miss rows, are called with.
        self.source: Any = None
        self.around: dict[str, list[list[Tensor]]] = {}
        # Of `replaying`: the replay under way, what is known of how the policy runs, where the call under way started.
        self.replay: Any = None
        self.effects: Any = None
        self.start: Any = None
        self.row_hook: Any = None
        # Sites on modules that may return several tensors, of which only the first is changed, until a forward has
        # shown that this is read; and what watches the forward under way.
        self.cores: list[str] = []
        self.reads: Any = None
        self.maps: frozenset[int] = frozenset()  # how many dimensions the maps of the policy's convolutions have
        self.time_first = False  # whether a module of the policy takes time first
        self.runs: dict[str, int] | None = None  # of the call under way: how often each hook that counts has run
        self.slots: dict[str, Any] = {}
        self.drawn: dict[str, Tensor] = {}  # samples of the call under way that its data may not hold in the end
        self.warned: set[str] = set()  # of what: once is enough
        self.leaves: dict[str, Tensor | None] = {}
        self.added: frozenset[str] = frozenset()
        self.totals: Mapping[str, int] = {}  # of the values that are given: how often their modules ran
        self.explaining: str | None = None
        # Groups of intervention sites of which one must run in a forward, and whether the first forward is over.
        self.expected: list[frozenset[str]] = []
        self.checked = False
        # Why a site may run without its hooks, where that may happen in later calls too: for a message.
        self.unhooked = ""
        self.mismatch_warned = False
        # How often the policy was called, and whether somebody has used annotate, or has it.
        self.calls = 0
        self.taken = False
        self.said: set[str] = set()  # what is said once
        self.fired: set[str] = set()
        self.rows: dict[NestedKey, Tensor] = {}
        # Of the call under way: what functions and probes have found of its rows, by slot.
        self.decided: dict[str, Any] | None = None
        self.lock = TurnLock()
        survive_forks(self)

    def inside(self) -> bool:
        """Whether this thread is within the policy's own forward; another's is none of its business."""
        return bool(self.depth) and (torch.compiler.is_compiling() or self.caller == threading.get_ident())

    def stop(self) -> None:
        """End the hooking, here and in the copies that workers run."""
        self.active = False
        self.switch.off()
        self.controls.ended = True

    def require_active(self) -> None:
        """Raise :class:`InactiveError` if the hooking is over, also in a worker."""
        if self.away and self.active and not torch.compiler.is_compiling():
            self.active = self.switch.on()
        self.require_open()

    def forget_call(self) -> None:
        """Drop what a call has left that will never end, because its thread is not in this process."""
        self.lock = TurnLock()
        self.recording, self.depth, self.caller = False, 0, 0
        self.level, self.batch, self.time, self.replay, self.explaining = -1, None, None, None, None
        self.slots, self.drawn, self.leaves, self.rows, self.added = {}, {}, {}, {}, frozenset()
        self.runs, self.totals, self.reads = None, {}, None
        self.inner, self.source, self.around, self.decided = (), None, {}, None
        self.held.forget_call()

    def begin(self, args: tuple, kwargs: dict[str, Any], root: bool = False) -> tuple[Any, ...]:
        """Note what the policy is about to run on; returns what :meth:`end` puts back.

        Args:
            args, kwargs: what it is called with.
            root: it is called as a whole, and not by a method of its own such as ``get_dist``.
        """
        data = args[0] if args else kwargs.get("tensordict")
        previous = self.level, self.batch, self.runs, self.time, self.source, self.decided
        batch = data.batch_size if is_tensordict(data) else None
        if root or self.decided is None or batch != self.batch:
            self.decided = {}
        self.source = data
        self.level, self.batch = vmap_level(), batch
        if root and self.replay is not None and self.depth == 1:
            self.runs = self.replay.runs
        elif root or self.runs is None:
            self.runs = {}
        return previous

    def end(self, previous: tuple[Any, ...]) -> None:
        self.level, self.batch, self.runs, self.time, self.source, self.decided = previous

    def run_of(self, key: str) -> int:
        """Count one more run of the hook of this name in the call under way; which run it is, from 0."""
        runs = self.runs
        if runs is None:
            return 0
        index = runs.get(key, 0)
        runs[key] = index + 1
        return index

    @contextmanager
    def explained_by(self, owner: str) -> Iterator[None]:
        """Let the hooks of one method change gradients in the passes that follow."""
        previous, self.explaining = self.explaining, owner
        try:
            yield
        finally:
            self.explaining = previous

    def intervene_at(self, site: str) -> None:
        """Called by the hooks of interventions: not after the hooking is over; one that never acts is noticed."""
        self.require_open()
        if self.checks_sites():
            self.fired.add(site)

    def checks_sites(self) -> bool:
        """Whether the forward under way is looked at for interventions that do not act: the first, or a traced one.

        What the traced answer reads must not change afterwards, or the next call would compile again.
        """
        return bool(self.expected) and (torch.compiler.is_compiling() or not self.checked)

    def require_fired(self) -> None:
        """After the first forward: raise for a named intervention site, or a whole pattern, that did not run."""
        for group in self.expected:
            if not group & self.fired:
                names = ", ".join(map(repr, sorted(group)))
                raise SiteError(
                    f"an intervention was placed on {names}, which did not run in this forward, so it changed "
                    f"nothing: name a module that the policy's forward executes{self.unhooked}"
                )
        if not torch.compiler.is_compiling():
            self.checked, self.fired = not self.unhooked, set()

    def require_open(self) -> None:
        """As :meth:`require_active`, by what this process knows already."""
        if not self.active:
            raise InactiveError(
                "this hooked policy was called after its context had ended; keep the `with` block open, or, for a "
                "collector that outlives the block, use `prepare(..., return_context=False)` and `.restore()` at the "
                "end"
            )

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["lock"]
        self.switch.share()
        return state | {
            "slots": {},
            "drawn": {},
            "leaves": {},
            "rows": {},
            "replay": None,
            "effects": None,
            "start": None,
            "recording": False,
            "depth": 0,
            "caller": 0,
            "methods": None,
            "time": None,
            "inner": (),
            "source": None,
            "around": {},
            "runs": None,
            "reads": None,
            "decided": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.away = self.home != os.getpid()
        self.lock = TurnLock()
        survive_forks(self)


def vmap_level() -> int:
    """The nesting level of functorch transforms around the caller; -1 outside."""
    if not torch.compiler.is_compiling():
        stack = transform_stack()
        return -1 if not stack else stack[-1].level()
    if not are_transforms_active():
        return -1
    # The compiler knows the level of a vmap that is entered, and no way to ask for the present one.
    level = increment_nesting(1, "error") - 1
    decrement_nesting()
    return level
