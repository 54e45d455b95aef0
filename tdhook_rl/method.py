"""Methods: small configuration objects that prepare a policy to be seen or changed from inside.

``with method.prepare(policy) as hooked:`` gives the hooked policy; :class:`Compose` prepares one policy
with several methods, applied in the order written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, overload

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.arguments import Checked
from tdhook_rl.batching import Traits
from tdhook_rl.chains import is_chain
from tdhook_rl.chunks import chunked_by
from tdhook_rl.classes import swap_class
from tdhook_rl.collisions import check_collisions, check_known, listed_keys
from tdhook_rl.context import ContextView, NotEntered
from tdhook_rl.controls import Controls
from tdhook_rl.draws import Draw, draws, made_inside, noise_keys, survey_draws
from tdhook_rl.errors import InputError, PreparationError, SiteError
from tdhook_rl.function_hooks import ChangeHook, ReadHook
from tdhook_rl.hooks import CaptureHook, InputCaptureHook, LeafHook, RowHook, Runtime, WatchHook
from tdhook_rl.inner_calls import place_inner_hooks
from tdhook_rl.inplace import hand_on_in_place
from tdhook_rl.missing import RowsHook, place_rows_hook
from tdhook_rl.module import HookedMixin
from tdhook_rl.paths import Run, Site, find_sites, require_apart, require_counted
from tdhook_rl.pooling import quicken_pooling
from tdhook_rl.provenance import Provenance
from tdhook_rl.q_networks import supports, value_actions
from tdhook_rl.repeats import RunHook
from tdhook_rl.replays import DecidedHook, ReplayMixin
from tdhook_rl.rows import note_intervention, survey
from tdhook_rl.shared_pass import can_share
from tdhook_rl.states import StateHook
from tdhook_rl.traceable import signs
from tdhook_rl.traits import BoundMethod
from tdhook_rl.tying import Tie, replace_tensors, tied_clone
from tdhook_rl.writing import WritingMixin, writes_by_default

__all__ = ["Binder", "BoundMethod", "Compose", "HookedModule", "HookingContext", "Method"]

#: Names that a hooked policy adds to its class; a policy that has one of its own is refused.
_ADDED_NAMES = (
    "annotate", "controls", "disable_context", "disable_context_hooks", "hooked_root", "hooking_context",
    "policy_in_keys", "policy_out_keys", "restore", "result_keys", "run",
)  # fmt: skip

Keys = Sequence[NestedKey] | Mapping[str, NestedKey]


class Method(metaclass=Checked):
    """Base of every method: configuration only; it holds no model and no results.

    Arguments of a constructor are checked against its annotations, in subclasses as well.

    Attributes:
        observes: whether it leaves the policy's outputs as they are, bit for bit.
        by_row: whether what it writes for a row comes from this row alone.
    """

    observes: bool = True
    by_row: bool = True

    @overload
    def prepare(
        self, module: nn.Module, in_keys: Any = ..., out_keys: Any = ..., return_context: Literal[True] = ...
    ) -> HookingContext: ...
    @overload
    def prepare(
        self, module: nn.Module, in_keys: Any = ..., out_keys: Any = ..., *, return_context: Literal[False]
    ) -> Any: ...
    def prepare(
        self,
        module: nn.Module,
        in_keys: Keys | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        return_context: bool = True,
    ) -> Any:
        """Prepare a policy, value network or any module; nothing of it is touched.

        Args:
            module: a ``TensorDictModule`` (any TorchRL policy or value network), or a plain ``nn.Module``,
                which is wrapped in one; paths are relative to the module that is given.
            in_keys: for a plain module, the keys of its inputs, ``["input"]`` by default; or, for inputs that it
                takes by name, ``{argument: key}``, as in ``TensorDictModule``.
            out_keys: for a plain module, the keys of its outputs; ``["output"]`` by default.
            return_context: ``True`` for a context to enter; ``False`` for the hooked policy itself, which
                stays hooked until its ``restore()`` is called.

        Returns:
            a :class:`HookingContext`, or the hooked policy.

        Raises:
            PreparationError: for a module that cannot be hooked (compiled, lazy, scripted).
        """
        context = HookingContext([*self._methods()], module, in_keys, out_keys)
        return context if return_context else context.__enter__()

    def bind(self, binder: Binder) -> BoundMethod | None:
        """Place this method's hooks on a clone; the object that computes its results, if it has any."""
        raise NotImplementedError

    def _methods(self) -> Sequence[Method]:
        return [self]


class Compose(Method):
    """Several methods on one policy, in one forward pass where they can share it.

    Hooks act in the order written: caching before steering shows the activation before it was steered.
    Attributions explain the policy as steered.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from tdhook_rl.attribution import Saliency
        >>> from tdhook_rl.latent import ActivationCaching
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with Compose(ActivationCaching("1"), Saliency()).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))
        >>> data["cache", "1"].shape, data["attr", "input"].shape
        (torch.Size([5, 8]), torch.Size([5, 4]))
    """

    def __init__(self, *methods: Method) -> None:
        if not methods:
            raise InputError("Compose() needs at least one method")
        for method in methods:
            if not isinstance(method, Method):
                raise InputError(f"Compose() takes methods such as Saliency(), got {method!r}")
        self.methods = methods

    @property
    def observes(self) -> bool:  # type: ignore[override]
        return all(method.observes for method in self.methods)

    @property
    def by_row(self) -> bool:  # type: ignore[override]
        return all(method.by_row for method in self.methods)

    def _methods(self) -> Sequence[Method]:
        return [inner for method in self.methods for inner in method._methods()]

    def __repr__(self) -> str:
        return f"Compose({', '.join(map(repr, self.methods))})"


class HookingContext(NotEntered):
    """The time during which a policy is hooked. It can be entered again after it was left."""

    def __init__(
        self,
        methods: list[Method],
        module: nn.Module,
        in_keys: Keys | None,
        out_keys: Sequence[NestedKey] | None,
    ) -> None:
        if isinstance(module, HookedMixin):
            raise PreparationError(
                "this policy is hooked already: prepare the user's policy with Compose(first, second)"
            )
        if not isinstance(module, nn.Module):
            raise PreparationError(f"a policy is an nn.Module, got a {type(module).__name__}")
        if any(f"{base.__module__}.{base.__name__}" == "torchrl.envs.common.EnvBase" for base in type(module).__mro__):
            raise PreparationError(
                f"a {type(module).__name__} is an environment: prepare the policy that acts in it, and give the hooked "
                "one to the collector or to env.rollout(steps, hooked)"
            )
        in_keys, out_keys = listed_keys("in_keys", in_keys), listed_keys("out_keys", out_keys)
        self._methods = methods
        self._module = module
        self._wrapped = isinstance(module, TensorDictModuleBase)
        if self._wrapped:
            names = [*in_keys.values()] if isinstance(in_keys, Mapping) else in_keys
            check_known("in_keys", names, module.in_keys)
            check_known("out_keys", out_keys, module.out_keys)
        self._in_keys: Any = ["input"]
        if in_keys is not None:
            self._in_keys = in_keys
        self._out_keys = out_keys or ["output"]
        self._hooked = None
        self._view = None

    def __enter__(self) -> Any:
        if self._hooked is not None:
            raise PreparationError("this context is entered already: a second prepare() gives another one")
        self._hooked = self._build()
        self._view = ContextView(self._hooked)
        return self._hooked

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooked.restore()
        self._hooked = None

    def _build(self) -> Any:
        clone = tied_clone(self._module)
        root = clone
        if not self._wrapped:
            clone = TensorDictModule(clone, in_keys=self._in_keys, out_keys=self._out_keys)
            clone.training = root.training
        taken = [name for name in _ADDED_NAMES if hasattr(clone, name)]
        if taken:
            raise PreparationError(
                f"{type(clone).__name__} has its own attribute {taken[0]!r}, which a hooked policy needs: rename it"
            )
        runtime = Runtime()
        runtime.tie = Tie(self._module, root)
        runtime.methods = tuple(self._methods)
        survey(clone, runtime)
        binder = Binder(clone, root, runtime)
        drawn = survey_draws(clone)
        place_inner_hooks(clone, runtime)
        for child in list(clone.modules()):
            if child is clone:
                continue
            if draws(child):
                swap_class(child, ReplayMixin)
                child.__dict__.update(_hooked_runtime=runtime, _hooked_draw=drawn.get(child, Draw()))
                continue
            if child in drawn:
                child.register_forward_hook(DecidedHook(runtime, drawn[child]))
            if writes_by_default(type(child)):
                swap_class(child, WritingMixin)
        bound = [one for one in (method.bind(binder) for method in self._methods) if one is not None]
        binder.place_row_hooks()
        binder.place_state_hooks()
        quicken_pooling(clone)
        check_collisions(clone, bound, binder.reads)
        steps = [one for one in bound if (one.result_keys or one.consumes) and one.when == "step"]
        traits = Traits.of(clone)
        clone.__dict__.update(
            _hooked_runtime=runtime,
            _hooked_bound=bound,
            _hooked_steps=steps,
            _hooked_traits=traits,
            _hooked_signs=signs(clone) if any(one.replays and one.when == "step" for one in bound) else [],
            _hooked_shares=can_share(clone, traits) and not drawn and chunked_by(clone) is None,
            _hooked_draws=list(drawn.values()),
            _hooked_slots={key: one.slots[key] for one in drawn.values() for key in one.rewriters},
            _hooked_actions=value_actions(clone),
            _hooked_is_chain=is_chain(clone),
            _hooked_alone=[one for one in steps if one.without_forward],
            _hooked_reads=binder.reads,
            _hooked_overwrites=[key for key in clone.in_keys if key in list(clone.out_keys)],
            _hooked_made=binder.made,
            _hooked_noise=binder.noise,
            _hooked_chunks=chunked_by(clone),
            _hooked_routes=binder.routes,
            _hooked_supports=supports(clone),
            _hooked_wraps=not self._wrapped,
        )
        swap_class(clone, HookedMixin)
        clone.__dict__["_hooked_provenance"] = Provenance(clone, bound)
        return clone


class HookedModule:
    """A hooked module without any method: for runs over a plain module.

    Example:
        >>> from tensordict import TensorDict
        >>> hooked = HookedModule.from_module(nn.Sequential(nn.Linear(4, 2)))
        >>> with hooked.run(TensorDict({"input": torch.ones(1, 4)}, batch_size=1)) as run:
        ...     proxy = run.save("0")
        >>> proxy.resolve().shape
        torch.Size([1, 2])
    """

    @staticmethod
    def from_module(module: nn.Module, in_keys: Keys | None = None, out_keys: Sequence[NestedKey] | None = None) -> Any:
        """Hook a module; arguments as of :meth:`Method.prepare`. It stays hooked until its ``restore()``."""
        return HookingContext([], module, in_keys, out_keys).__enter__()


class Binder:
    """Places the hooks of methods on a clone.

    Attributes:
        policy: the clone that will be hooked.
        root: the module that paths start from.
        runtime: what the hooks share.
        reads: per-row keys that interventions read.
        made: input keys of which the policy writes the entries itself.
        noise: input keys that hold noise, see :func:`tdhook_rl.draws.noise_keys`.
        routes: what one site hands to another during a call; each has ``close(complete)``, called at its end.
    """

    def __init__(self, policy: TensorDictModuleBase, root: nn.Module, runtime: Runtime) -> None:
        self.policy = policy
        self.root = root
        self.runtime = runtime
        self.reads: list[NestedKey] = []
        self.made = made_inside(policy)
        self.noise = noise_keys(policy)
        self.routes: list[Any] = []
        self._slots = 0
        self._cores: dict[str, nn.Module] = {}

    @property
    def observed(self) -> list[NestedKey]:
        """The input keys that are explained unless others are named: no noise, and nothing the policy makes itself."""
        return [key for key in self.policy.in_keys if key not in self.made and key not in self.noise]

    def sites(self, pattern: str | Sequence[str], *, runs: bool = False) -> list[Site]:
        """The submodules that a pattern names; with ``runs``, single runs of them too (``"act@0"``).

        See :func:`tdhook_rl.paths.find_sites`.
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
    def controls(self) -> Controls:
        """The tensors that may be changed while the policy runs, by name."""
        return self.runtime.controls

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

    def heard(self, root: nn.Module, site: Site) -> str:
        """Keep the output of a site and which rows it is of; returns the slot.

        Raises:
            InputError: if the site names one of several runs.
        """
        if site.run is not None:
            raise InputError(f"missing='nan' keeps the rows of all runs of a module: leave '@{site.run}' out")
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
        if not observes:
            note_intervention(self.root, site.path, site.name)
            if isinstance(site.module, nn.RNNBase) and not getattr(hook, "acts_on_states", False):
                self._cores[site.name] = site.module
        site.module.register_forward_hook(self._in_its_run(site, hook, observes), **options)
        if not isinstance(hook, CaptureHook):
            hand_on_in_place(site.module)

    def on_input(self, site: Site, hook: Callable[..., Any]) -> None:
        """Register a forward pre-hook, with keywords, that only looks or watches (see :meth:`on_output`)."""
        site.module.register_forward_pre_hook(self._in_its_run(site, hook, observes=True), with_kwargs=True)

    def _in_its_run(self, site: Site, hook: Callable[..., Any], observes: bool) -> Callable[..., Any]:
        if not isinstance(site.run, int) or site.run < 0:
            return hook
        return RunHook(self.runtime, self.slot(site), site.name, site.run, hook, observes)

    def read_row(self, key: NestedKey) -> NestedKey:
        """Declare a key that an intervention reads from each TensorDict."""
        key = unravel_key(key)
        if key not in self.reads and key not in self.policy.in_keys:
            self.reads.append(key)
        return key

    def place_state_hooks(self) -> None:
        """Behind all other hooks of recurrent modules, so that a first forward shows whether these act."""
        for name, module in self._cores.items():
            if not module._hooked_layout.recurrent:  # type: ignore[union-attr]
                self.runtime.cores.append(name)
                module.register_forward_hook(StateHook(self.runtime, name))

    def place_row_hooks(self) -> None:
        """Lend the declared keys to the hooks, at the root and at every TensorDict-level module below it."""
        if not self.reads:
            return
        hook = RowHook(self.runtime, tuple(self.reads))
        self.runtime.row_hook = hook
        for child in self.policy.modules():
            if child is not self.policy and isinstance(child, TensorDictModuleBase):
                child.register_forward_pre_hook(hook.before, with_kwargs=True)
                child.register_forward_hook(hook.after, always_call=True)

    def control(self, name: str, value: Tensor | float) -> str:
        """Create a tensor that may be changed while the policy runs; returns its name."""
        self.runtime.controls.add(name, torch.as_tensor(value))
        return name

    def own_parameters(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Give the clone, wherever it holds these parameters, others of its own with the given values."""
        own = {id(old): nn.Parameter(value, requires_grad=old.requires_grad) for old, value in values}
        replace_tensors(self.policy, own)
        if self.runtime.tie is not None:
            self.runtime.tie.watch(old for old, _ in values)

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
