"""Picklable hook objects that live on the clone, and the state of one call that they share.

Hooks are small importable objects: no closures (workers unpickle them), no counters and no growing lists
(each would make ``torch.compile`` recompile in silence).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.containers import first_input, first_tensor, with_first_tensor
from tdhook_rl.controls import Controls
from tdhook_rl.errors import InactiveError, MissingKeyError, SiteError, nearest
from tdhook_rl.forking import Switch, Turns, survive_forks
from tdhook_rl.inner_calls import require_whole_batch, step_of_batch
from tdhook_rl.repeats import Several, added, part_of, several_runs
from tdhook_rl.rows import as_leaf, lent_rows, rows_of, unbatched, vmap_level, with_rows

if TYPE_CHECKING:
    from tdhook_rl.paths import Run
    from tdhook_rl.replays import Replay
    from tdhook_rl.start import Conduct, Start
    from tdhook_rl.states import _Reads
    from tdhook_rl.tying import Tie

__all__ = [
    "CaptureHook",
    "InputCaptureHook",
    "LeafHook",
    "Portable",
    "RowHook",
    "Runtime",
    "WatchHook",
    "first_input",
    "first_tensor",
    "rows_of",
    "unbatched",
    "vmap_level",
    "with_first_tensor",
    "with_rows",
]


class Runtime:
    """What the hooks of one hooked policy share: switches, and the slots of the call under way.

    Slots are emptied after each call, so that nothing of a call outlives it. One call at a time: whoever runs the
    policy, or a part of a batch, holds ``lock`` meanwhile.
    """

    def __init__(self) -> None:
        self.controls = Controls()
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
        # What the policy, and, by slot, the modules around a site that may miss rows, are called with.
        self.source: Any = None
        self.around: dict[str, list[list[Tensor]]] = {}
        self.replay: Replay | None = None
        # What is known of how the policy runs, and where the call under way started.
        self.conduct: Conduct | None = None
        self.start: Start | None = None
        self.tie: Tie | None = None
        self.row_hook: RowHook | None = None
        # Sites on recurrent modules of which only the sequence is changed, until a forward has shown that this is read;
        # and what watches the forward under way.
        self.cores: list[str] = []
        self.reads: _Reads | None = None
        self.maps: frozenset[int] = frozenset()  # how many dimensions the maps of the policy's convolutions have
        self.time_first = False  # whether a module of the policy takes time first
        self.runs: dict[str, int] | None = None  # of the call under way: how often each hook that counts has run
        self.slots: dict[str, Tensor | Several] = {}
        self.drawn: dict[str, Tensor] = {}  # samples of the call under way that its data may not hold in the end
        self.told: set[str] = set()  # what the user was told once
        self.leaves: dict[str, Tensor | None] = {}
        self.added: frozenset[str] = frozenset()
        self.totals: Mapping[str, int] = {}  # of the values that are given: how often their modules ran
        self.explaining: str | None = None
        # Groups of intervention sites of which one must run in a forward, and whether the first forward is over.
        self.expected: list[frozenset[str]] = []
        self.checked = False
        self.mismatch_warned = False
        # How often the policy was called, and whether somebody has used annotate, or has it.
        self.calls = 0
        self.taken = False
        self.said: set[str] = set()  # what is said once
        self.fired: set[str] = set()
        self.rows: dict[NestedKey, Tensor] = {}
        self.lock = Turns()
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
        if not self.active:
            self.refuse()

    def forget_call(self) -> None:
        """Drop what a call has left that will never end, because its thread is not in this process."""
        self.lock = Turns()
        self.recording, self.depth, self.caller = False, 0, 0
        self.level, self.batch, self.time, self.replay, self.explaining = -1, None, None, None, None
        self.slots, self.drawn, self.leaves, self.rows, self.added = {}, {}, {}, {}, frozenset()
        self.runs, self.totals, self.reads = None, {}, None
        self.inner, self.source, self.around = (), None, {}

    def begin(self, args: tuple, kwargs: dict[str, Any], root: bool = False) -> tuple[Any, ...]:
        """Note what the policy is about to run on; returns what :meth:`end` puts back.

        Args:
            args, kwargs: what it is called with.
            root: it is called as a whole, and not by a method of its own such as ``get_dist``.
        """
        data = args[0] if args else kwargs.get("tensordict")
        previous = self.level, self.batch, self.runs, self.time, self.source
        self.source = data
        self.level, self.batch = vmap_level(), data.batch_size if isinstance(data, TensorDictBase) else None
        if root and self.replay is not None and self.depth == 1:
            self.runs = self.replay.runs
        elif root or self.runs is None:
            self.runs = {}
        return previous

    def end(self, previous: tuple[Any, ...]) -> None:
        self.level, self.batch, self.runs, self.time, self.source = previous

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

    def note_fired(self, site: str) -> None:
        """Called by the hooks of interventions, so that one that never acts is noticed."""
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
                    "nothing: name a module that the policy's forward executes"
                )
        if not torch.compiler.is_compiling():
            self.checked, self.fired = True, set()

    def refuse(self) -> None:
        raise InactiveError(
            "this hooked policy was called after its context had ended; keep the `with` block open, or, for a "
            "collector that outlives the block, use `prepare(..., return_context=False)` and `.restore()` at the end"
        )

    def __getstate__(self) -> dict[str, Any]:
        if self.tie is not None and threading.current_thread() is threading.main_thread():
            self.tie.require_held()  # a copy, such as a worker's, cannot look any more
        state = self.__dict__.copy()
        del state["lock"]
        self.switch.share()
        return state | {
            "slots": {},
            "drawn": {},
            "leaves": {},
            "rows": {},
            "replay": None,
            "conduct": None,
            "start": None,
            "tie": None,
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
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.away = self.home != os.getpid()
        self.lock = Turns()
        survive_forks(self)


class CaptureHook:
    """Forward hook that keeps the output of its module while the root call records.

    The output is detached and copied: an in-place activation after the module, or an environment that
    reuses its observation buffer, would otherwise overwrite what was captured.
    """

    def __init__(self, runtime: Runtime, slot: str, run: Run = None) -> None:
        self.runtime = runtime
        self.slot = slot
        self.run = None if run == -1 or (isinstance(run, int) and run >= 0) else run  # the last is what remains

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        runtime = self.runtime
        if not runtime.active:
            runtime.refuse()
        if runtime.recording:
            self._store(rows_of(output, module, self.slot, runtime)[0])

    def _store(self, value: Tensor) -> None:
        runtime = self.runtime
        value = (value.detach() if value.requires_grad else value).clone()
        if runtime.inner and step_of_batch(runtime, self.slot.partition(":")[2]):
            before = runtime.slots.get(self.slot) if runtime.run_of(self.slot) else None
            runtime.slots[self.slot] = added(before, value, "steps")  # type: ignore[arg-type]
        elif self.run is not None:
            before = runtime.slots.get(self.slot) if runtime.run_of(self.slot) else None
            runtime.slots[self.slot] = added(before, value, self.run)  # type: ignore[arg-type]
        else:
            runtime.slots[self.slot] = value


class InputCaptureHook(CaptureHook):
    """Forward pre-hook (with keywords) that keeps the first input of its module while the root call records."""

    def __call__(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self.runtime.recording or not self.runtime.active:
            super().__call__(module, args, first_input(module, args, kwargs, self.slot))


class WatchHook:
    """Forward hook that keeps the output of its module, with its graph, for the targets of a replay.

    What follows is given a copy, which an in-place activation may overwrite.
    """

    def __init__(self, runtime: Runtime, slot: str, site: str, run: Run = None) -> None:
        self.runtime = runtime
        self.slot = slot
        self.site = site
        self.run = run

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        runtime = self.runtime
        if runtime.replay is None:
            return None
        require_whole_batch(runtime, self.site)
        if self.run is None and runtime.run_of(self.slot):
            raise several_runs(self.site)
        value, disguise = rows_of(output, module, self.slot, runtime)
        runtime.replay.watched[self.slot] = value
        return with_rows(output, value.clone(), module, disguise)


class LeafHook:
    """Forward hook that makes the output of its module a leaf of the explanation pass.

    A leaf is the output itself where a gradient already reaches it, otherwise a detached copy that requires a
    gradient; or a given value in its place (or, in a functional pass, added to it as a difference of zero). What
    follows is given a copy: an in-place activation would overwrite the leaf, and be explained in its place.

    A site of all runs has a leaf in each of them; a value that is given for it has a dimension for the runs.
    """

    def __init__(self, runtime: Runtime, slot: str, site: str, run: Run = None, partial: bool = False) -> None:
        self.runtime = runtime
        self.slot = slot
        self.site = site
        self.run = None if isinstance(run, int) and run >= 0 else run
        self.partial = partial  # the rows of the site are found out

    def __call__(self, module: torch.nn.Module, args: tuple, output: Any) -> Any:
        runtime = self.runtime
        if self.slot not in runtime.leaves:
            return None
        require_whole_batch(runtime, self.site, self.partial)
        index = runtime.run_of(self.slot)
        if index and self.run is None:
            raise several_runs(self.site)
        value, disguise = rows_of(output, module, self.slot, runtime)
        given = runtime.leaves[self.slot]
        if given is None:
            if not value.requires_grad and torch.is_grad_enabled():
                value = as_leaf(value)
            before = runtime.slots.get(self.slot) if index else None
            kept = value if self.run is None else added(before, value, self.run)  # type: ignore[arg-type]
        else:
            part = part_of(given, index, self.run, runtime.totals.get(self.slot), value, runtime.batch)
            if part is None:
                return None
            value = value + (part - part.detach()) if self.slot in runtime.added else part
            kept = given
        runtime.slots[self.slot] = kept
        return with_rows(output, value.clone(), module, disguise)


class RowHook:
    """Pre-hook and hook of a TensorDict-level module: lends per-row keys to the hooks inside it.

    It sits on the modules below the root because ``get_dist`` skips the root's hooks.
    """

    def __init__(self, runtime: Runtime, keys: tuple[NestedKey, ...]) -> None:
        self.runtime = runtime
        self.keys = keys

    def before(self, module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        data = args[0] if args else kwargs.get("tensordict")
        if not isinstance(data, TensorDictBase):
            return
        for key in self.keys:
            value = data.get(key, None)
            if value is None:
                raise MissingKeyError(
                    f"a steered policy reads the per-row key {key!r}, which the TensorDict lacks; "
                    f"{nearest(str(key), map(str, data.keys(True, True)))}. Set it on every step "
                    "(a TensorDictPrimer adds a key to an environment) or give a number instead of a key"
                )
            self.runtime.rows[key] = lent_rows(value, module, self.runtime)

    def after(self, module: torch.nn.Module, args: tuple, output: Any) -> None:
        # Inside a root call the root takes the rows back; after get_dist nobody else would.
        if not self.runtime.depth:
            self.runtime.rows.clear()


class Portable:
    """A user's callable that travels to spawned workers by cloudpickle, lambdas included."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __deepcopy__(self, memo: dict) -> Portable:
        return self

    def __reduce__(self) -> tuple:
        import cloudpickle

        return _load_portable, (cloudpickle.dumps(self.function),)


def _load_portable(data: bytes) -> Portable:
    import cloudpickle

    return Portable(cloudpickle.loads(data))
