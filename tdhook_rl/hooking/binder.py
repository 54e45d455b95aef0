"""Where the hooks of methods go on a clone: what ``Method.bind`` is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey
from tensordict.nn import EnsembleModule, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.errors import InputError, PreparationError, SiteError
from tdhook_rl.internals.torch_names import held_parameters
from tdhook_rl.policies.draws import made_inside, noise_keys
from tdhook_rl.policies.optional import optional_keys
from tdhook_rl.policies.tying import Tie, replace_tensors
from tdhook_rl.sites.held_controls import HeldControls
from tdhook_rl.sites.hooks import CaptureHook, ChangeHook, InputCaptureHook, LeafHook, ReadHook, WatchHook
from tdhook_rl.sites.inplace import hand_on_in_place
from tdhook_rl.sites.listed import modules
from tdhook_rl.sites.missing import RowsHook, place_rows_hook
from tdhook_rl.sites.paths import Run, Site, find_sites, require_apart, require_counted
from tdhook_rl.sites.repeats import RunHook
from tdhook_rl.sites.row_values import Record, RowFunction, RowHook, portable_rows
from tdhook_rl.sites.rows import note_intervention
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.sites.states import StateHook, may_give_several


class Binder:
    """Places the hooks of methods on a clone.

    Attributes:
        policy: the clone that will be hooked.
        root: the module that paths start from.
        runtime: what the hooks share.
        tie: holds the tensors of the user's policy and of the clone together.
        reads: per-row keys that interventions read.
        records: what is written of how interventions acted, which explanations of that call read back.
        passes: what runs before the policy, each time: ``run(policy, forward, data)``.
        made: input keys of which the policy writes the entries itself.
        noise: input keys that hold noise, see :func:`tdhook_rl.policies.draws.noise_keys`.
        optional: input keys that it can do without, see :func:`tdhook_rl.policies.optional.optional_keys`.
        routes: what one site hands to another during a call; each has ``close(complete)``, called at its end.
    """

    def __init__(self, policy: TensorDictModuleBase, root: nn.Module, runtime: Runtime, tie: Tie) -> None:
        self.policy = policy
        self.root = root
        self.runtime = runtime
        self.tie = tie
        self.reads: list[NestedKey] = []
        self.records: list[Record] = []
        self.passes: list[Any] = []
        self.made = made_inside(policy)
        self.noise = noise_keys(policy)
        self.optional = optional_keys(policy)
        self.routes: list[Any] = []
        self._rows: list[NestedKey] = []
        self._finite: list[NestedKey] = []
        self._functions: list[RowFunction] = []
        self._slots = 0
        self._cores: dict[str, nn.Module] = {}

    @property
    def observed(self) -> list[NestedKey]:
        """The input keys that are explained unless others are named: no noise, and nothing the policy makes itself."""
        return [key for key in self.policy.in_keys if key not in self.made and key not in self.noise]

    def second_inputs(self) -> tuple[list[NestedKey], list[NestedKey]]:
        """What a second set of inputs holds, and what of that it may lack as the first may."""
        keys = [key for key in self.policy.in_keys if key not in self.made]
        return keys, [key for key in keys if key in self.optional or key in self.noise]

    @property
    def has_sites(self) -> bool:
        """Whether anything is kept or changed at a module."""
        return bool(self._slots or self.runtime.expected)

    def sites(self, pattern: str | Sequence[str], *, runs: bool = False) -> list[Site]:
        """The submodules that a pattern names; with ``runs``, single runs of them too (``"act@0"``).

        See :func:`tdhook_rl.sites.paths.find_sites`.
        """
        return find_sites(self.root, pattern, runs=runs)

    def site(self, path: str, *, runs: bool = False) -> Site:
        """The one submodule that a path or pattern names."""
        sites = self.sites(path, runs=runs)
        if len(sites) > 1:
            raise SiteError(
                f"{path!r} names {len(sites)} modules of {type(self.root).__name__} where one is needed: "
                f"{', '.join(repr(site.name) for site in sites[:4])}"
            )
        return sites[0]

    def intervention_sites(self, pattern: str | Sequence[str]) -> list[Site]:
        """As :meth:`sites`, each place once; the first forward raises if a named one, or all of a pattern, did not run.

        Raises:
            SiteError: if a pattern catches a module with what is inside of it, or longer names than were meant; or
                if a run is counted from the last, which is not known before it is over.
        """
        sites = self.changed_sites(pattern)
        require_counted(sites)
        self.runtime.expected += [frozenset([site.name]) for site in sites if site.explicit]
        if matched := frozenset(site.name for site in sites if not site.explicit):
            self.runtime.expected.append(matched)
        return sites

    def changed_sites(self, pattern: str | Sequence[str], *, runs: bool = True, nested: bool = False) -> list[Site]:
        """As :meth:`sites`, for something that changes what is computed there (see ``paths.require_apart``)."""
        sites = self.sites(pattern, runs=runs)
        for one in [pattern] if isinstance(pattern, str) else pattern:
            require_apart(self.root, one, self.sites(one, runs=runs), nested=nested)
        return sites

    @property
    def controls(self) -> HeldControls:
        """The tensors that may be changed while the policy runs, by name; in a call, as they were when it began."""
        return self.runtime.held

    def capture(self, site: Site, run: Run = None, read: Callable[[Any], Tensor] | None = None) -> str:
        """Keep the output of a site in every recorded forward; returns the slot it is kept in.

        Args:
            site: where; of several runs the last is kept, or those that the site says.
            run: which runs are kept in place of what the site says.
            read: ``read(output)`` gives the tensor to keep, batch first; by default the first tensor of the output.
        """
        slot, run = self.slot(site), run or site.run
        hook = CaptureHook(self.runtime, slot, run) if read is None else ReadHook(self.runtime, slot, read, run)
        self.on_output(site, hook)
        return slot

    def intervene(self, pattern: str | Sequence[str], change: Callable[[Tensor], Tensor]) -> None:
        """Replace what sites put out, in every forward.

        Args:
            pattern: the sites; the first forward raises if a named one, or all of a pattern, did not run.
            change: ``change(rows)`` returns rows of the same shape (batch, agents, features), and leaves those that
                it is given as they are.
        """
        for site in self.intervention_sites(pattern):
            self.on_output(site, ChangeHook(self.runtime, site.name, change))

    def capture_input(self, site: Site) -> str:
        """Keep the first input of a site in every recorded forward; returns the slot it is kept in."""
        slot = self.slot(site)
        self.on_input(site, InputCaptureHook(self.runtime, slot, site.run))
        return slot

    def leaf(self, site: Site, partial: bool = False) -> str:
        """Let explanation passes differentiate with respect to the output of a site, which may be of some rows only."""
        slot = self.slot(site)
        self.on_output(site, LeafHook(self.runtime, slot, site.name, site.run, partial))
        return slot

    def capture_partly(self, root: nn.Module, site: Site) -> str:
        """Keep the output of a site and which rows it is of; returns the slot.

        Raises:
            InputError: if the site names one of several runs.
        """
        if site.run is not None:
            raise InputError(f"missing='nan' keeps the rows of all runs of a module: leave '@{site.run}' out")
        self._require_one_of_a_row(site)
        slot = self.slot(site)
        place_rows_hook(root, site.path, RowsHook(self.runtime, slot, site.name))
        return slot

    def watch(self, site: Site) -> str:
        """Show the output of a site, with its graph, to the targets of replays (``Pass.watched``)."""
        if site.run == "all" or (isinstance(site.run, int) and site.run < -1):
            raise SiteError(
                f"a target reads one run of a module, and {site.name!r} is not one: count from the first, as in "
                "'act@0', or name the last, 'act@-1'"
            )
        slot = self.slot(site)
        self.on_output(site, WatchHook(self.runtime, slot, site.name, site.run))
        return slot

    def on_output(self, site: Site, hook: Callable[..., Any], *, observes: bool = False, **options: bool) -> None:
        """Register a forward hook; hooks of one site run in the order of registration.

        Args:
            site: where; the hook is called in the run that it names, or in every run.
            hook: as torch calls it.
            observes: it only looks.
            **options: of ``register_forward_hook``.
        """
        observes = observes or isinstance(hook, (CaptureHook, WatchHook, LeafHook))
        if observes:
            self._require_one_of_a_row(site)
        else:
            note_intervention(self.root, site.path, site.name)
            if may_give_several(site.module) and not getattr(hook, "acts_on_states", False):
                self._cores[site.name] = site.module
        site.module.register_forward_hook(self._in_its_run(site, hook, observes), **options)
        if not isinstance(hook, CaptureHook):
            hand_on_in_place(site.module)

    def on_input(self, site: Site, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook, with keywords, that only looks or watches (see :meth:`on_output`)."""
        self._require_one_of_a_row(site)
        site.module.register_forward_pre_hook(self._in_its_run(site, hook, observes=True), with_kwargs=True)

    def _require_one_of_a_row(self, site: Site) -> None:
        """Refuse to read a site of which there are copies: an ensemble puts these before the rows, the site after."""
        ensembles = [child for child in modules(self.policy) if isinstance(child, EnsembleModule)]
        if any(child is site.module for one in ensembles for child in modules(one) if child is not one):
            raise SiteError(
                f"{site.name!r} is in an EnsembleModule, and has an activation for each of its copies: these are "
                "neither kept nor explained. Steer it, explain the inputs, or read what the ensemble puts out"
            )

    def _in_its_run(self, site: Site, hook: Callable[..., Any], observes: bool) -> Callable[..., Any]:
        if not isinstance(site.run, int) or site.run < 0:
            return hook
        return RunHook(self.runtime, self.slot(site), site.name, site.run, hook, observes)

    def read_row(self, key: NestedKey, *, finite: bool = False) -> NestedKey:
        """Declare a key that an intervention reads from each TensorDict; ``finite``: it must hold such numbers."""
        key = unravel_key(key)
        if key not in self.reads and key not in self.policy.in_keys:
            self.reads.append(key)
        if key not in self._rows:
            self._rows.append(key)
        if finite:
            self._finite.append(key)
        return key

    def read_rows(
        self, function: Callable[..., Any], what: str, *, truths: bool, found: str, reads: Sequence[NestedKey] = ()
    ) -> str:
        """Declare a function of each TensorDict that an intervention reads; returns the slot of what it finds.

        Args:
            function: called with a TensorDict once in each call of the policy; it travels to workers.
            what: how messages call it.
            truths: whether it says yes or no for each row; else it gives a number.
            found: the slot of the record that stands in its place where a call is explained.
            reads: the entries that it reads, where they are known.
        """
        for key in reads:
            self.read_row(key)
        self._slots += 1
        slot = f"{self._slots}:rows"
        known = tuple(map(unravel_key, reads))
        self._functions.append(RowFunction(slot, what, portable_rows(function, what), truths, known, found))
        return slot

    def place_state_hooks(self) -> None:
        """Behind all other hooks of modules that may return several tensors: does what these do act?"""
        for name, module in self._cores.items():
            if not getattr(module._hooked_layout, "recurrent", False):
                self.runtime.cores.append(name)
                module.register_forward_hook(StateHook(self.runtime, name))

    def place_row_hooks(self) -> None:
        """Lend the declared keys to the hooks, at the root and at every TensorDict-level module below it."""
        if not (self._rows or self._functions or self.records):
            return
        hook = RowHook(self.runtime, self._rows, self._finite, self._functions, self.records)
        self.runtime.row_hook = hook
        for child in modules(self.policy):
            if child is not self.policy and isinstance(child, TensorDictModuleBase):
                child.register_forward_pre_hook(hook.before, with_kwargs=True)
                child.register_forward_hook(hook.after, always_call=True)

    def control(self, name: str, value: Tensor | float) -> str:
        """Create a tensor that may be changed while the policy runs; returns its name.

        A number has the default dtype, or that of a policy which computes in float64.
        """
        if isinstance(value, float) and any(
            one.dtype in (torch.float64, torch.complex128) for one in held_parameters(self.policy).values()
        ):
            value = torch.tensor(value, dtype=torch.float64)
        self.runtime.controls.add(name, value)
        return name

    def own_parameters(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Give the clone, wherever it holds these parameters, others of its own with the given values."""
        own = {id(old): nn.Parameter(value, requires_grad=old.requires_grad) for old, value in values}
        replace_tensors(self.policy, own)
        self.tie.watch(old for old, _ in values)

    def expose(self, name: str, value: Any) -> None:
        """Add an attribute to the hooked policy; it travels with copies of it."""
        if hasattr(self.policy, name):
            raise PreparationError(
                f"{type(self.policy).__name__} has its own attribute {name!r}, which a method (or the same method "
                "twice) adds to the hooked policy: rename it"
            )
        self.policy.__dict__[name] = value

    def owner(self) -> str:
        """A name of its own for a method whose hooks act only while it explains."""
        self._slots += 1
        return f"{self._slots}:owner"

    def slot(self, site: Site) -> str:
        """A name under which a hook keeps what it captures at a site, for the duration of a call."""
        self._slots += 1
        return f"{self._slots}:{site.path}"
