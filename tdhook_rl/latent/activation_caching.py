"""Activation caching: what named modules compute, beside the action that it led to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.errors import InputError, KeyCollisionError, SiteError, nearest
from tdhook_rl.latent.caches import CacheStore, Key, LastCall, Staging, holds_still
from tdhook_rl.latent.caching_hooks import FORWARD, GRADIENT, CachingHook, Callback, GradientHook, escaped
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.missing import OFFER, Absent, Missing, check_missing
from tdhook_rl.sites.paths import Site, find_sites


@dataclass(frozen=True, eq=False)
class ActivationCaching(Method):
    """Write what modules compute under ``("cache", path)``; their gradients, and the last call, into a cache.

    Args:
        key_pattern: a module path or pattern (see :mod:`tdhook_rl.sites.paths`), or several of them.
        relative: ``True``: paths start at the module that is prepared; ``False``: at the TensorDict module around
            it, which differs for a plain ``nn.Module`` only (``"module.0"`` in place of ``"0"``).
        cache: a TensorDict of the caller's (see below).
        callback: what to keep, as a function of some of ``module``, ``args``, ``kwargs``, ``output`` (in the
            direction ``"fwd"``), ``grad_input`` (``"bwd"``), ``grad_output`` (``"bwd_pre"``), ``key`` (the path) and
            ``direction``. It is called with those keywords that it has parameters for, or with all if it takes
            ``**kwargs``, and returns one tensor, in the forward directions with a row for each row of the batch.
            It only looks, and is refused where it writes in place to what it is given.
            ``lambda output: output[1]`` keeps the second tensor of a tuple; without a callback the first is kept.
            ``grad_input`` and ``grad_output`` are tuples of one tensor, the gradient of the first tensor.
        directions: ``"fwd"`` for what modules return, ``"fwd_pre"`` for what they receive, ``"bwd"`` for the
            gradient of what they receive, ``"bwd_pre"`` for the gradient of what they return.
        use_nested_keys: split paths at their dots, so that the keys form the tree of the modules.
        clear_cache: empty the cache whenever the context is entered.
        cache_key: the root of the result keys.
        missing: ``"raise"`` where a named module did not run in a call, or ran on some of its rows only; ``"nan"`` for
            NaN and a false mask in the rows without a value (experts, action chunks). The mask is true where every
            module of this method has one: give each expert a method with a ``cache_key`` of its own.

    **Keys.** One direction: ``(cache_key, path)``. Several: ``(cache_key, direction, path)``. With
    ``use_nested_keys``, ``(cache_key, direction, "layer", "5", "mlp")``, for one direction as well. In the cache
    the keys are the same without the root.

    **Forward directions** are written at every forward, batch + features, detached and copied, and by ``annotate``
    on data that lacks them. A module that runs several times in one forward shows its last run; ``"act@0"`` is its
    first one, and ``"act@all"`` has all of them in a dimension after the batch (gradients once each run has one). In
    nets of many agents they are batch + agents + features, inside ``vmap`` too; the core of a recurrent module has one
    row for each step, in recurrent mode as in collection.

    **Gradient directions** need a cache: a gradient exists only once somebody runs a backward pass through what
    the policy returned, or through a loss that uses the policy (``get_dist`` included). It is written to the cache
    then: the gradient of the whole loss, through this module alone, of the last run of the module in its call.
    Where no gradient is computed (``no_grad``, or ``torch.autograd.grad`` with respect to what lies behind the
    module) there is no entry. A tensor that no gradient would reach, such as the observation, is made to require
    one, so that outputs of a frozen policy do too. Where a module that works in place would make the gradient pass
    by unseen, the forward raises. No graph is kept.

    **The cache** is filled at the end of each call of the hooked policy (with a TensorDict or with tensors; by
    ``run`` as well, but not by ``annotate``, ``get_dist`` or a call that raised) and holds the captures of the last
    one: entries of earlier calls go, gradients included. Its batch size becomes that of the call, as far as other
    entries of the caller's allow (none for a call with tensors). Its tensors are those of the TensorDict, not
    copies of them. A locked or memory-mapped cache needs ``clear_cache=False`` and entries of the right shape, which
    are written in place; where a module did not run, the old numbers stay. The cache is also at
    ``hooked.hooking_context.cache``. Deep copies of the hooked policy fill the same cache; copies in other
    processes (collector workers) and unpickled ones cannot reach it and fill an empty one of their own. What their
    modules compute is in the TensorDicts that they send. In a compiled policy a cache breaks the graph.

    Raises:
        SiteError: if a pattern matches nothing, or a named module does not run.
        InputError: for an unknown direction, a gradient direction without a cache, a callback that cannot be called
            or returns something else, or a capture that does not fit a locked cache.
        MissingKeyError: if a locked cache lacks an entry.
        KeyCollisionError: if nested keys need a node where a tensor is, or two methods fill the same entry.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torch import nn
        >>> net, cache = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), TensorDict()
        >>> method = ActivationCaching("(0|1)$", directions=["fwd", "bwd_pre"], cache=cache)
        >>> with method.prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4)}, batch_size=3))
        ...     data["output"].sum().backward()
        >>> data["cache", "fwd", "1"].shape, cache["bwd_pre", "1"].shape, cache.batch_size
        (torch.Size([3, 8]), torch.Size([3, 8]), torch.Size([3]))
    """

    key_pattern: str | Sequence[str]
    _: KW_ONLY
    relative: bool = True
    cache: TensorDictBase | None = None
    callback: Callable[..., Tensor] | None = None
    directions: Sequence[str] = ("fwd",)
    use_nested_keys: bool = False
    clear_cache: bool = True
    cache_key: str = "cache"
    missing: Missing = "raise"

    def __post_init__(self) -> None:
        known = [*FORWARD, *GRADIENT]
        if isinstance(self.directions, str) or not self.directions:
            raise InputError(f"directions={self.directions!r} is no list of some of {', '.join(map(repr, known))}")
        for direction in self.directions:
            if direction not in known:
                raise InputError(f"no direction is named {direction!r}; {nearest(direction, known, count=4)}")
        gradients = [direction for direction in self.directions if direction in GRADIENT]
        if gradients and self.cache is None:
            raise InputError(
                f"the direction {gradients[0]!r} is a gradient, which exists only after the forward and cannot be in "
                "its TensorDict: pass cache=TensorDict(), which is written when a backward pass runs"
            )
        check_missing(self.missing)
        if self.missing == "nan" and (self.callback, self.cache, tuple(self.directions)) != (None, None, ("fwd",)):
            raise InputError("missing='nan' writes what modules return: leave out cache=, callback= and directions=")
        if self.callback is not None:
            Callback(self.callback, self.directions)  # raises
        self._check_cache()

    def _check_cache(self) -> None:
        if self.cache is None:
            return
        if not isinstance(self.cache, TensorDictBase):
            raise InputError(f"cache= is a TensorDict, which is filled at each call, got a {type(self.cache).__name__}")
        if self.clear_cache and holds_still(self.cache):
            raise InputError(
                "a locked or memory-mapped cache is written in place and cannot be emptied: pass clear_cache=False"
            )

    def bind(self, binder: Binder) -> _BoundCaching:
        sites = find_sites(binder.root if self.relative else binder.policy, self.key_pattern, runs=True)
        _require_leaves([self._key("fwd", site) for site in sites])
        if tuple(self.directions) == ("fwd",) and self.cache is None and self.callback is None:
            # What most collectors run at every step: plain capture hooks, results written as they are.
            root = binder.root if self.relative else binder.policy
            keep = binder.capture if self.missing == "raise" else partial(binder.capture_partly, root)
            slots = {self._key("fwd", site): (keep(site), site.name, site.explicit) for site in sites}
            paths = {site.name: (site.path, self.relative) for site in sites}
            bound = _BoundCaching(slots) if self.missing == "raise" else _BoundMissing(slots, paths)
        else:
            bound = self._bind_all(binder, sites)
        if self.cache is None:
            bound.last = LastCall([key[1:] for key in bound.result_keys])
            binder.routes.append(bound.last)
        return bound

    def _bind_all(self, binder: Binder, sites: list[Site]) -> _BoundCaptures:
        directions = list(dict.fromkeys(self.directions))
        keys = {(direction, site): self._key(direction, site) for direction in directions for site in sites}
        staging = self._staging(binder, {key[1:]: site for (_, site), key in keys.items()})
        callback = None if self.callback is None else Callback(self.callback, directions)
        slots, gradients = {}, {}
        for (direction, site), key in keys.items():
            if direction in GRADIENT:
                assert staging is not None  # __post_init__
                hook = GradientHook(binder.runtime, site, key[1:], direction, callback, staging)
                if direction == "bwd":
                    binder.on_input(site, hook.before)
                else:
                    binder.on_output(site, hook.after, observes=True, with_kwargs=True)
                gradients[key[1:]] = site.name, site.explicit
                continue
            slot = binder.slot(site)
            capture = CachingHook(binder.runtime, slot, site, key[1:], callback, staging)
            if direction == "fwd_pre":
                binder.on_input(site, capture.before)
            else:
                binder.on_output(site, capture.after, observes=True, with_kwargs=True)
            slots[key] = slot, site.name, site.explicit
        return _BoundCaptures(slots, gradients, staging, callback is not None)

    def _key(self, direction: str, site: Site) -> Key:
        path = tuple(part for part in site.name.split(".") if part) if self.use_nested_keys else (site.name,)
        several = self.use_nested_keys or len(set(self.directions)) > 1
        return (self.cache_key, direction, *path) if several else (self.cache_key, *path)

    def _staging(self, binder: Binder, sites: dict[Key, Site]) -> Staging | None:
        if self.cache is None:
            return None
        self._check_cache()
        others = [route for route in binder.routes if isinstance(route, Staging) and route.store.data is self.cache]
        for other in others:
            taken = set(other.keys) & set(sites)
            if taken:
                raise KeyCollisionError(
                    f"two methods would fill the entry {min(taken)!r} of one cache: give each a cache of its own"
                )
        store = others[0].store if others else CacheStore(self.cache)
        if self.clear_cache:
            self.cache.clear()
            self.cache.batch_size = ()
        store.require([key for key, site in sites.items() if site.explicit])
        staging = Staging(store, tuple(sites))
        binder.routes.append(staging)
        return staging


class _BoundCaching(BoundMethod):
    reads_forward = True
    last: LastCall | None = None  # without a cache of the caller's

    def __init__(self, slots: dict[Key, tuple[str, str, bool]]) -> None:
        # The sites' modules stay out of here: the clone owns them.
        self._slots = slots
        self._settled = all(explicit for _, _, explicit in slots.values())

    @property
    def result_keys(self) -> tuple[tuple[str, ...], ...]:
        return tuple(self._slots)

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        if not self._settled:
            self._settle(call)
        found = {key: call.captured(slot, name, OFFER) for key, (slot, name, _) in self._slots.items()}
        self._keep(found, call)
        return found

    def _keep(self, found: dict[Key, Tensor], call: Call) -> None:
        # Neither a compiled call nor a tensor of the caller's vmap can be kept.
        if self.last is not None and not torch.compiler.is_compiling() and call.policy._hooked.runtime.level < 0:
            self.last.stage(found, call.batch_size)

    def _settle(self, call: Call) -> None:
        """After the first forward, stop declaring the matches of a pattern that never run."""
        fired = {key: entry for key, entry in self._slots.items() if entry[2] or entry[0] in call.slots}
        if not fired:
            raise _none_ran(name for _, name, _ in self._slots.values())
        self._slots = fired
        self._settled = True


class _BoundMissing(_BoundCaching):
    """Of modules that run in some calls, or on some rows, only."""

    exclusive = True

    def __init__(self, slots: dict[Key, tuple[str, str, bool]], paths: dict[str, tuple[str, bool]]) -> None:
        super().__init__(slots)
        self._settled = True
        self._paths = paths
        self._absent = Absent()

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        batch, found = call.batch_size, {}
        masks = []
        for key, (slot, name, _) in self._slots.items():
            captured: Any = call.slots.get(slot)
            if captured is None:
                path, relative = self._paths[name]
                module = (call.policy.hooked_root if relative else call.policy).get_submodule(path)
                value = self._absent.value(name, module, batch, call.data.device)
                mask = torch.zeros(batch, dtype=torch.bool, device=value.device)
            else:
                value, mask = captured.together(batch, name)
                self._absent.note(name, value, batch)
            found[key] = value
            masks.append(mask)
        self._keep(dict(found), call)
        found["computed", next(iter(found))[0]] = torch.stack(masks).all(0)
        return found


class _BoundCaptures(_BoundCaching):
    """With a callback, other directions than ``"fwd"``, or a cache."""

    def __init__(
        self,
        slots: dict[Key, tuple[str, str, bool]],
        gradients: dict[Key, tuple[str, bool]],
        staging: Staging | None,
        has_callback: bool,
    ) -> None:
        super().__init__(slots)
        self._gradients = gradients
        self._staging = staging
        self._has_callback = has_callback
        if staging is not None:
            self.store = staging.store
            self.consumes = True  # it is filled also where no result key is written

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        if not self._settled:
            self._settle(call)
        found = {key: self._captured(call, key, slot, name) for key, (slot, name, _) in self._slots.items()}
        if self._staging is not None:
            self._require_gradient_sites(self._staging)
            self._staging.stage({key[1:]: escaped(value) for key, value in found.items()}, call.batch_size)
        self._keep(found, call)
        return found

    def _captured(self, call: Call, key: Key, slot: str, name: str) -> Tensor:
        try:
            return call.captured(slot, name)
        except InputError:
            what = "what the callback kept" if self._has_callback else "what was captured"
            raise InputError(
                f"{what} for {key!r} has shape {tuple(call.slots[slot].shape)}, which does not start with the batch "
                f"shape {tuple(call.batch_size)}: a result has a row for each row of the batch"
            ) from None

    def _require_gradient_sites(self, staging: Staging) -> None:
        ran = staging.record.ran
        for key, (name, explicit) in self._gradients.items():
            if explicit and key not in ran:
                raise SiteError(
                    f"the module {name!r} did not run in this call, so it has no gradient; name a module that the "
                    "policy's forward executes"
                )
        if self._gradients and not any(key in ran for key in self._gradients):
            raise _none_ran(name for name, _ in self._gradients.values())


def _none_ran(names: Iterable[str]) -> SiteError:
    listed = ", ".join(map(repr, dict.fromkeys(names)))
    return SiteError(f"none of the modules that the pattern matched ran in this call: {listed}")


def _require_leaves(keys: Sequence[Key]) -> None:
    """With nested keys, refuse modules inside others: a tensor cannot be where a node is."""
    for outer, inner in pairwise(sorted(keys)):
        if inner[: len(outer)] == outer and inner != outer:
            raise KeyCollisionError(
                f"with use_nested_keys the key {outer!r} would be a tensor and, for {inner!r}, a node: name modules of "
                "which none lies inside another, or leave use_nested_keys off"
            )
