"""A policy hooked once at its sites: what they compute in a pass, and what comes of it if they give something else.

All causal tests go through here. One hook sits at each site; what it does in a pass, and for which rows, is told pass
by pass, so that thousands of interventions are rows of few passes, and the policy is prepared once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl.arguments.checked import require_counts
from tdhook_rl.calls.inputs import stored_inputs
from tdhook_rl.calls.passes import Call, Pass, effects_of
from tdhook_rl.calls.repeatable import require_rows_apart
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.latent.patch_hooks import other_count
from tdhook_rl.method import Binder, Method
from tdhook_rl.replaying.batching import GeneratorState, conv_chunk, in_recurrent_mode, repeat_rows
from tdhook_rl.sites.containers import other_tensors, with_other_tensors
from tdhook_rl.sites.paths import Site, find_sites
from tdhook_rl.sites.repeats import Several, several_runs
from tdhook_rl.sites.rows import as_leaf, rows_of, with_batch, with_rows, without_vmap
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.sites.unit_axes import UnitAxes, given_axis

#: Rows of one pass, unless the network is convolutional (see ``conv_chunk``).
ROWS = 4096

#: What is put in the place of what a run of a site computes: given this, and which run it is.
Change = Callable[[Tensor, int], Tensor]


@dataclass
class Work:
    """What the hooks are to do in the pass under way, and what they have found in it.

    Attributes:
        under_way: whether there is one; in other calls of the policy the hooks do nothing, unless changes are given.
        keep: the sites whose activations are kept.
        graph: they are kept with their graph, as points that gradients are taken at.
        in_place: what follows a site may work in place on what it gives.
        changes: what is put in, by site.
        kept: by site the activations of its runs, rows first.
        others: by site and run what a module gives beside its first tensor.
        times: by site how often it runs in a call, once it was seen.
    """

    under_way: bool = False
    keep: frozenset[str] = frozenset()
    graph: bool = False
    in_place: bool = True
    changes: Mapping[str, Change] = field(default_factory=dict)
    kept: dict[str, list[Tensor]] = field(default_factory=dict)
    others: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    ran: dict[str, int] = field(default_factory=dict)
    times: dict[str, int] = field(default_factory=dict)


class SwapHook:
    """Forward hook that keeps what its module gives, and puts in what the pass under way says."""

    def __init__(self, runtime: Runtime, work: Work, slot: str, site: Site, whole: bool) -> None:
        self.runtime = runtime
        self.work = work
        self.slot = slot
        self.site = site
        self.acts_on_states = whole  # all that a module gives is put in

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        work, name = self.work, self.site.name
        change = work.changes.get(name)
        keeps = work.under_way and name in work.keep
        if change is None and not keeps and not work.under_way:
            return None
        index = self.runtime.run_of(self.slot)
        if not self._meant(index):
            return None
        if isinstance(self.site.run, int) and self.site.run < 0:
            index = 0
        work.ran[name] = work.ran.get(name, 0) + 1
        if change is None and not keeps:
            return None
        value, disguise = rows_of(output, module, name, self.runtime)
        if self.runtime.batch is not None:
            with_batch(value, self.runtime.batch, name)  # raises where its rows are not those of the batch
        new = value if change is None else change(value, index)
        result = output
        if change is not None:
            result = with_rows(output, new, module, disguise)
            if others := getattr(change, "others", None):
                result = self._with_others(result, module, others(index))
        if keeps:
            if work.graph:
                # A point of its own: what a module keeps of its output, or hands on unchanged, has other gradients.
                new = new.view_as(new) if new.requires_grad or not new.is_floating_point() else as_leaf(new)
                result = with_rows(result, new.clone() if work.in_place else new, module, disguise)
            else:
                new = new.detach().clone() if work.in_place else new.detach()
                work.others.setdefault(name, []).append(self._others(output, module))
            work.kept.setdefault(name, []).append(new)
        return None if change is None and not work.graph else result

    def _meant(self, index: int) -> bool:
        run = self.site.run
        if run == "all" or (isinstance(run, int) and run >= 0):  # of one run the hook is called in that run alone
            return True
        times = self.work.times.get(self.site.name)
        if run is None:
            if index:
                raise several_runs(self.site.name)
            return True
        return times is None or index == times + run

    def _others(self, output: Any, module: nn.Module) -> list[Tensor]:
        layout = module._hooked_layout
        if isinstance(output, Tensor) or (layout is not None and layout.recurrent):  # type: ignore[union-attr]
            return []
        found = other_tensors(output, module)
        return [without_vmap(one, module, self.runtime)[0].detach().clone() for one in found]

    def _with_others(self, output: Any, module: nn.Module, given: Sequence[Tensor]) -> Any:
        if not given:
            return output
        values = []
        for tensor, new in zip(other_tensors(output, module), given, strict=True):
            value, back = without_vmap(tensor, module, self.runtime)
            if new.shape != value.shape:
                raise InputError(
                    f"{self.site.name!r} gives a tensor of {tuple(value.shape)}, where {tuple(new.shape)} is put in"
                )
            values.append(new if back is None else back(new))
        return with_other_tensors(output, values, module)


@dataclass(frozen=True, eq=False)
class _AtSites(Method):
    """The method that places the hooks; what they do is told by the bench."""

    observes = False

    patterns: Sequence[str]
    work: Any
    found: dict[str, str]
    whole: bool

    def bind(self, binder: Binder) -> None:
        for site in binder.changed_sites(self.patterns, nested=True):
            slot = binder.slot(site)
            binder.on_output(site, SwapHook(binder.runtime, self.work, slot, replace(site, module=None), self.whole))
            self.found[site.name] = site.path


@dataclass(frozen=True)
class Ran:
    """One pass.

    Args:
        result: what came out.
        kept: by site the activations of its runs, ``(rows, ...)`` each.
        others: by site and run what a module gave beside.
        copies: how many times over the states were run.
    """

    result: Pass
    kept: Mapping[str, Sequence[Tensor]]
    others: Mapping[str, Sequence[Sequence[Tensor]]]
    copies: int = 1


class Bench:
    """A policy, hooked at sites, in eval mode: no dropout, running statistics, and nothing is drawn.

    Args:
        policy: the policy, or any module; it is not touched.
        sites: paths or patterns; nested ones too.
        whole: only whole activations are put in, and with them what modules give beside.
        units: which axis of a site holds its units, by site or for all, where the modules do not tell.
        chunk_size: rows of one pass.

    Attributes:
        sites: their names, in order.
        paths: the module of each.
        hooked: the hooked policy.
    """

    def __init__(
        self,
        policy: nn.Module,
        sites: str | Sequence[str],
        *,
        whole: bool = False,
        units: int | Mapping[str, int] | None = None,
        chunk_size: int | None = None,
    ) -> None:
        if chunk_size is not None:
            require_counts(chunk_size=chunk_size)
        self.work = Work()
        self.paths: dict[str, str] = {}
        self._policy = policy  # the hooked copy knows it by a weak reference only
        patterns = [sites] if isinstance(sites, str) else list(sites)
        method = _AtSites(patterns, self.work, self.paths, whole)
        self.hooked: Any = method.prepare(policy, return_context=False)
        self.sites = list(self.paths)
        for child in self.hooked.modules():
            child.training = False
        self._units = dict(units) if isinstance(units, Mapping) else units
        self._chunk = chunk_size
        self._axes: dict[str, int] = {}
        self._follower: UnitAxes | None = None

    def close(self) -> None:
        """End the hooking."""
        self.hooked.restore()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def named(self, patterns: str | Sequence[str]) -> list[str]:
        """The sites that patterns name, which are among those of the bench."""
        return [site.name for site in find_sites(self.hooked.hooked_root, patterns, runs=True)]

    @property
    def reads(self) -> list[NestedKey]:
        """What the policy reads."""
        return list(self.hooked.policy_in_keys)

    def rows_at_once(self, states: TensorDictBase) -> int:
        """How many rows a pass has at most."""
        if self._chunk is not None:
            return self._chunk
        if self.hooked._hooked.traits.convolutional:
            return conv_chunk((states.get(key, None) for key in self.reads), states.batch_size)
        return ROWS

    # ------------------------------------------------------------------ passes

    def look(self, states: TensorDictBase, keep: Sequence[str] | None = None, graph: bool = False) -> Ran:
        """A pass as it is, in which activations are kept.

        Args:
            states: ``(rows,)``.
            keep: of which sites; all unless given.
            graph: keep them as points that gradients are taken at.

        Raises:
            SiteError: for a site that does not run, or runs several times where none of its runs is named.
        """
        wanted = frozenset(self.sites if keep is None else keep)
        found = self.run(states, keep=wanted, graph=graph)
        for name in wanted:
            if name not in found.kept:
                raise SiteError(
                    f"the module {name!r} did not run on these states (or not so often), so there is nothing to put "
                    "in: name a module that the policy's forward executes"
                )
        return found

    def run(
        self,
        states: TensorDictBase,
        changes: Mapping[str, Change] | None = None,
        *,
        copies: int = 1,
        keep: frozenset[str] = frozenset(),
        graph: bool = False,
    ) -> Ran:
        """One pass over states, or over as many copies of them, in which sites are given something else.

        Args:
            states: ``(rows,)``.
            changes: by site what is put in; of copies, all rows come, then all rows again.
            copies: how many times over the states are run.
            keep: the sites whose activations are kept, as changed.
            graph: keep them as points that gradients are taken at.

        Raises:
            SiteError: for a site that is changed and does not run.
        """
        work, policy, changes = self.work, self.hooked, changes or {}
        effects = effects_of(policy)
        data = states if copies == 1 else repeat_rows(states, copies)
        before = GeneratorState(data.device or effects.device, others=not effects.watch.idle)
        work.kept, work.others, work.ran = {}, {}, {}
        try:
            with (
                policy._hooked.runtime.lock,
                torch.inference_mode(False),
                torch.set_grad_enabled(graph),
                set_exploration_type(ExplorationType.DETERMINISTIC),
                self._by_step(),
            ):
                call = Call(policy, type(policy)._base.forward, data, stored_inputs(policy, data)).of_step({})
                require_rows_apart(call, "causal tests compute all states, and copies of them, as rows")
                call.learn()  # in a pass of its own, which is not counted
                work.under_way, work.keep, work.graph, work.changes = True, keep, graph, changes
                work.in_place = effects.watch.may_write_input
                result = call.replay()
        finally:
            before.restore()
            kept, others = work.kept, work.others
            work.under_way, work.keep, work.graph = False, frozenset(), False
            work.changes, work.kept, work.others = {}, {}, {}
            policy._close_routes()
        self._require_as_often(changes, keep)
        return Ran(result, self._chosen(kept), self._chosen(others), copies)

    def _by_step(self) -> Any:
        if not self.hooked._hooked.traits.recurrent or not in_recurrent_mode(self.hooked):
            return nullcontext()
        from torchrl.modules import set_recurrent_mode

        return set_recurrent_mode(False)

    def _require_as_often(self, changes: Mapping[str, Change], keep: frozenset[str]) -> None:
        """Sites run as often as in the first pass in which they were seen."""
        work = self.work
        for name in {*changes, *keep}:
            ran = work.ran.get(name, 0)
            known = work.times.setdefault(name, ran) if name in keep else work.times.get(name, ran)
            last = isinstance(run := self._run(name), int) and run < 0
            if name in changes and not ran:
                raise SiteError(f"the module {name!r} did not run on the states that are patched")
            if known != ran and not last:
                raise other_count(name, known, ran)

    def require_apart(self) -> None:
        """Raise a ``SiteError`` where two sites are, or share, a run of one module, once they were seen."""
        known: dict[tuple[int, int], str] = {}
        for name, path in self.paths.items():
            run, times = self._run(name), self.work.times[name]
            counted = range(times) if name.endswith("@all") else [run + times if run and run < 0 else run or 0]
            for index in counted:
                other = known.setdefault((id(self.hooked.get_submodule(path)), index), name)
                if other != name:
                    raise SiteError(
                        f"{other!r} and {name!r} are one run of a module, or share one, which would count twice: name "
                        "it once"
                    )

    def _run(self, name: str) -> Any:
        tail = name.rpartition("@")
        try:
            return int(tail[2]) if tail[1] else None
        except ValueError:
            return None

    def _chosen(self, kept: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Of a site that is counted from the last run, that run alone."""
        found = dict(kept)
        for name, values in kept.items():
            run = self._run(name)
            if isinstance(run, int) and run < 0 and len(values) > 1:
                found[name] = list(Several(run, tuple(values)).points(name))
        return found

    @contextmanager
    def acting(self, changes: Mapping[str, Change]) -> Iterator[Any]:
        """A block in which the hooked policy, called as one likes, has these changes in it."""
        with self.hooked.disable_context() as original:
            self.hooked.training = original.training  # or it would warn that the two differ
        previous, self.work.changes = self.work.changes, changes
        try:
            yield self.hooked
        finally:
            self.work.changes = previous

    # ------------------------------------------------------------------ units

    def unit_axis(self, name: str, activation: Tensor, states: TensorDictBase) -> int:
        """Which axis of an activation ``(rows, ...)`` holds the units of a site, counted from its end.

        Raises:
            InputError: if nothing tells, or there are no units.
        """
        if name in self._axes:
            return self._axes[name]
        axis = given_axis(self._units, name, activation)
        if axis is None and activation.ndim <= 2:
            axis = -1
        if axis is None:
            if self._follower is None:  # one pass for all sites
                self._follower = UnitAxes(self.hooked.hooked_root)
                with self._follower.following():
                    self._followed = self.look(states[:2])
            axis = self._follower.of(name, self._followed.kept[name][0], rows=1)
        if activation.ndim < 2 or not activation.shape[axis]:
            raise InputError(f"{name!r} gives {tuple(activation.shape)} and has no units: name a module with features")
        self._axes[name] = axis
        return axis
