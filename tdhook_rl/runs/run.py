"""Runs: capture, override or stop single modules of one forward pass, without a method.

The body of ``with hooked.run(data) as run:`` says what to do; the model runs once, at the end of the block.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictModule
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdhook_rl.arguments.callbacks import asked, only_looks
from tdhook_rl.arguments.checked import checked, shown
from tdhook_rl.calls.decisions import require_own_parameters
from tdhook_rl.calls.passes import Pass
from tdhook_rl.calls.policy import HookedPolicy
from tdhook_rl.errors import InputError, SiteError, TargetError, nearest
from tdhook_rl.replaying.samples import Drawn, Replay, samples
from tdhook_rl.runs.placing import Placing
from tdhook_rl.runs.requests import (
    OFFERED,
    CacheProxy,
    EarlyStop,
    KeptRuns,
    Kind,
    caller,
    kind_of,
    request_sites,
    without_methods,
)
from tdhook_rl.sites.containers import tensors_of
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.repeats import part_of, several_runs
from tdhook_rl.sites.states import StateHook, may_give_several, watching
from tdhook_rl.targets import Target


class HookedModuleRun(Placing):
    """One forward pass of a hooked module, with what was asked for in the body of its ``with`` block.

    Args:
        hooked: the hooked module.
        data: the TensorDict it is called on; outputs are written into it.
        cache: where :meth:`save` writes, a TensorDict of the caller's; the run's own by default.
        run_name, run_sep: saved keys are ``f"{run_name}{run_sep}{path}_{kind}"``.
        run_cache: where :meth:`get` writes; a fresh one by default.
        grad_enabled: run with gradients; asking for a gradient does this by itself.
        run_callback: ``(module, data)`` runs the module; by default ``module(data)``.
        target: what gradients are of: a target of :mod:`tdhook_rl.targets`, or ``(data) -> tensor``, which is
            summed. Without it, ``run_callback`` calls ``backward`` itself.

    The kinds: ``output`` and ``input`` of a module's forward, ``grad_input`` and ``grad_output`` of its backward. Of
    a tuple or mapping the first tensor is meant. If the body raises, the model does not run.

    A ``callback`` is called with those of these keywords that it takes: ``module``, ``key``, ``direction``, ``value``
    (where one is set), and as torch gives them to hooks ``args`` and ``kwargs``, ``output``, or ``grad_input`` or
    ``grad_output`` (tuples of one).

    Of a module that runs several times in the forward, what is captured is of its last run, value and gradient alike;
    ``"act@0"`` names one run, and ``"act@all"`` has all in a dimension after the batch (gradients once each run has
    one). To override the module, say which run (a value of all runs fits ``"act@all"``) or give a callback, which acts
    in each.

    What is asked for acts in the forward of this run only: other calls of the hooked module, and other runs, are
    clean, whether in the block, in a callback or in another thread.

    Raises:
        SiteError: if a path names nothing, if :meth:`set` or :meth:`stop` names a module that did not run, or if what
            is asked for was not captured.
        InputError: if a value has another shape than what it replaces.
        TargetError: if no gradient reaches the captured modules from the target.

    Example:
        >>> from tdhook_rl.latent import ActivationCaching
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> with ActivationCaching("0").prepare(net) as hooked:
        ...     with hooked.run(TensorDict({"input": torch.randn(3, 4)}, batch_size=3)) as run:
        ...         _ = run.save("1")
        ...         run.set("0", torch.zeros(3, 8))
        ...     run.get("1").resolve().abs().max()
        tensor(0.)
    """

    @checked
    def __init__(
        self,
        hooked: HookedPolicy,
        data: TensorDictBase,
        cache: TensorDictBase | dict[str, Any] | None = None,
        run_name: str | None = None,
        run_sep: str | None = None,
        run_cache: TensorDictBase | dict[str, Any] | None = None,
        grad_enabled: bool = False,
        run_callback: Callable[[Any, TensorDictBase], Any] | None = None,
        target: Target | Callable[[TensorDictBase], Tensor] | None = None,
    ) -> None:
        self.hooked = hooked
        self.data = data
        self.cache: Any = TensorDict() if run_cache is None else run_cache
        self._save_cache: Any = cache
        self._prefix = f"{'run' if run_name is None else run_name}{'.' if run_sep is None else run_sep}"
        self._grad_enabled = grad_enabled or target is not None
        self._callback = run_callback
        self._target = target
        self._handles: list[RemovableHandle] = []
        self._points: list[Tensor] = []
        self._captured: list[tuple[str, Kind, CacheProxy]] = []
        self._idle: dict[object, str] = {}  # overrides and stops that have not acted yet
        self._given: list[tuple[str, int, dict[str, int]]] = []  # overrides of all runs: site, how many, how many were
        self._running = self._busy = False  # in the run's own forward; in a callback of the run's
        self._cores: list[str] = []  # overridden sites that may return several tensors
        self._acts_always = False  # a request outside a run
        self._state: Literal["new", "open", "ended"] = "new"
        self.stopped_at: str | None = None

    # ------------------------------------------------------------------ overriding

    @checked
    def set(
        self,
        key: str,
        value: Any,
        *,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> None:
        """Override a module's output.

        Args:
            key: the module path; of a slice or pattern every module.
            value: a tensor of the same shape (or a tuple with it), or the :class:`CacheProxy` of an earlier capture
                of this run.
            callback: returns what is put in instead, or ``None`` to leave it.
            direction, prepend, relative: as in :meth:`get`.
        """
        self._require("open", "set")
        kind = kind_of(direction)
        call = None if callback is None else caller(callback, ("value", *OFFERED[kind]), key)
        token, times, runtime = object(), {"": 0}, self.hooked._hooked.runtime
        every, one = key.endswith("@all"), kind in ("output", "input") and call is None and "@" not in key

        def replace(module: nn.Module, original: Tensor, given: dict[str, Any], index: int) -> Tensor | None:
            self._idle.pop(token, None)
            if index and one:
                raise several_runs(key)
            new = value.resolve() if isinstance(value, CacheProxy) else value
            if every and isinstance(new, Tensor) and new.ndim == original.ndim + 1:
                dim = len(runtime.batch or ())
                if not index and call is None:
                    self._given.append((key, new.shape[dim], times))
                times[""] = index + 1
                new = part_of(new, index, "all", new.shape[dim], original, runtime.batch)
            if call is not None:
                new = call(module=module, key=key, direction=direction, value=new, **given)
                if new is None:
                    return None
            while isinstance(new, (tuple, list)) and new:
                new = new[0]
            if not isinstance(new, Tensor) or new.is_nested or new.shape != original.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) and not new.is_nested else shown(new)
                raise InputError(f"the {kind} of {key!r} has shape {tuple(original.shape)}, it cannot be set to {got}")
            return in_dtype(new, original, f"the {kind} that run.set puts", key)

        self._place(key, kind, replace, prepend, relative)
        for site in request_sites(self.hooked, key, relative) if kind == "output" else ():
            if may_give_several(site.module) and not getattr(site.module._hooked_layout, "recurrent", False):
                self._cores.append(key)
                with runtime.lock:
                    self._handles.append(site.module.register_forward_hook(StateHook(runtime, key)))
        if kind in ("output", "input"):  # a gradient may be overridden in a backward after the run
            self._idle[token] = f"run.set named {key!r}, which did not run, so nothing was overridden"

    def set_input(self, key: str, value: Any, **options: Any) -> None:
        """Override a module's (first) input."""
        self.set(key, value, direction="fwd_pre", **options)

    def set_grad(self, key: str, value: Any, **options: Any) -> None:
        """Override the gradient with respect to a module's (first) input."""
        self.set(key, value, direction="bwd", **options)

    def set_grad_output(self, key: str, value: Any, **options: Any) -> None:
        """Override the gradient with respect to a module's output."""
        self.set(key, value, direction="bwd_pre", **options)

    @checked
    def stop(self, key: str, *, relative: bool = True) -> None:
        """End the forward after a module; what comes later does not run and is not written."""
        self._require("open", "stop")

        runtime = self.hooked._hooked.runtime
        for site in request_sites(self.hooked, key, relative, acts=True):
            name = self._name()

            def halt(module: nn.Module, args: tuple, output: Any, wanted: Any = site.run, name: str = name) -> None:
                if self._acts() and (not isinstance(wanted, int) or runtime.run_of(name) == wanted):
                    raise EarlyStop(key)

            with runtime.lock:
                self._handles.append(site.module.register_forward_hook(halt))
        self._idle[object()] = f"run.stop named {key!r}, which did not run, so nothing was stopped"

    # ------------------------------------------------------------------ running

    def __enter__(self) -> HookedModuleRun:
        self._require("new", "enter")
        self._state = "open"
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._state = "ended"
        try:
            if kind is None:
                self._run()
        finally:
            with self.hooked._hooked.runtime.lock:
                for handle in self._handles:
                    handle.remove()
            self._handles.clear()
            self._points.clear()

    def _run(self) -> None:
        runtime = self.hooked._hooked.runtime
        # What the run leaves out, and what it does, calls of other threads are not to miss or to see.
        with runtime.lock, torch.set_grad_enabled(self._grad_enabled), without_methods(self.hooked):
            self._running = True
            try:
                with watching(runtime) if self._cores else nullcontext() as reads:
                    self._call()
                    if reads is not None:
                        reads.hand_out(self.data, self.hooked)
            except EarlyStop as stop:
                self.stopped_at = str(stop)
                if self._target is not None:
                    raise TargetError(f"the run stopped at {stop}, so its target cannot be computed") from None
                return
            finally:
                self._running = False
            for key, given, times in self._given:
                if given != times[""]:
                    raise SiteError(f"run.set was given {given} runs for {key!r}, but the module ran {times['']} times")
            if self._idle:
                raise SiteError(f"{next(iter(self._idle.values()))}: name a module that the forward executes")
            if self._target is not None:
                self._differentiate()

    def _call(self) -> None:
        if self._callback is not None:
            asked(self._callback, self.hooked, self.data, what="run_callback=")
        else:
            self.hooked(self.data)

    def _differentiate(self) -> None:
        if not self._points:
            return
        value = self._value()
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise TargetError("the target of the run is no tensor with a gradient path to the captured modules")
        # With respect to the captured tensors only: no .grad of the user's parameters is written.
        torch.autograd.grad(value.sum(), self._points, allow_unused=True)

    def _value(self) -> Any:
        if not isinstance(self._target, Target):
            return asked(self._target, self.data, what="target= of a run") if callable(self._target) else self._target
        # The distributions of this very forward: their parameters are among its outputs.
        hooked, stored = self.hooked, self.data.detach()
        drawing = [child for child in hooked.modules() if isinstance(child, ProbabilisticTensorDictModule)]
        require_own_parameters(drawing, "a target of a run")
        drawn = []
        for child in drawing:
            distribution = child.get_dist(self.data)
            found = samples(child, child._hooked_draw, distribution, self.data, Replay(stored))  # type: ignore[arg-type]
            drawn.append(Drawn(child, distribution, found))
        return self._target(
            Pass(
                self.data, stored, drawn, hooked.policy_out_keys, {}, hooked._hooked.supports, hooked._hooked.slots,
                hooked._hooked.actions, hooked._hooked.runtime.warned,
            )
        )  # fmt: skip

    def _capture(
        self,
        key: str,
        cache: TensorDictBase,
        cache_key: str | None,
        prefix: str,
        *,
        callback: Callable[..., Any] | None = None,
        direction: str = "fwd",
        prepend: bool = False,
        relative: bool = True,
    ) -> CacheProxy:
        kind = kind_of(direction)
        if self._state == "ended":
            return self._find(key, kind, cache_key)
        self._require("open", "get")
        proxy = CacheProxy(cache, cache_key or f"{prefix}{key}_{kind}")
        call = None if callback is None else caller(callback, OFFERED[kind], key)
        sites = request_sites(self.hooked, key, relative)
        if len(sites) > 1:
            names = ", ".join(repr(site.name) for site in sites[:4])
            raise SiteError(f"{key!r} names {len(sites)} modules where one is captured: {names}")
        kept = KeptRuns(key, sites[0].run, self.hooked._hooked.runtime)

        def keep(module: nn.Module, original: Tensor, given: dict[str, Any], index: int) -> None:
            # A copy: an in-place module would overwrite it.
            value: Any = original
            if call is not None:
                with only_looks(tensors_of(list(given.values())), f"the callback for {key!r}"):
                    value = call(module=module, key=key, direction=direction, **given)
            value = value.clone() if isinstance(value, Tensor) else value
            if not isinstance(value, (Tensor, TensorDictBase)):
                raise InputError(
                    f"the callback for {key!r} must return a tensor or a TensorDict, got a {type(value).__name__}"
                )
            value = kept.of_runs(value, index)
            if value is None:
                return
            if getattr(proxy.cache, "is_locked", False) and proxy.cache.get(proxy.key, None) is not None:
                proxy.cache.set_(proxy.key, value)  # a preallocated cache, such as a memory-mapped one
            else:
                proxy.cache[proxy.key] = value

        self._place(key, kind, keep, prepend, relative, kept)
        self._captured.append((key, kind, proxy))
        return proxy

    def _find(self, key: str, kind: Kind, cache_key: str | None) -> CacheProxy:
        found = [proxy for path, what, proxy in self._captured if (path, what) == (key, kind)]
        if not found:
            known = [f"{path} ({what})" for path, what, _ in self._captured]
            raise SiteError(
                f"the {kind} of {key!r} was not captured in this run: call run.save({key!r}) or run.get({key!r}) in "
                f"the block; {nearest(f'{key} ({kind})', known)}"
            )
        return next((proxy for proxy in found if proxy.key == cache_key), found[-1])

    def _require(self, state: str, what: str) -> None:
        if self._state != state:
            raise SiteError(
                f"run.{what} belongs inside `with hooked.run(...) as run:`; this run is "
                f"{'not entered yet' if self._state == 'new' else 'open' if self._state == 'open' else 'over'}"
            )
