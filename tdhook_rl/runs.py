"""Runs: capture, override or stop single modules of one forward pass, without a method.

The body of ``with hooked.run(data) as run:`` says what to do; the model runs once, at the end of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from tdhook_rl.errors import InputError, SiteError, TargetError, nearest
from tdhook_rl.paths import find_sites
from tdhook_rl.rows import RecurrentHook, as_leaf, rows_of, with_rows

if TYPE_CHECKING:
    from tdhook_rl.module import HookedMixin
    from tdhook_rl.targets import Target

__all__ = ["CacheProxy", "EarlyStop", "HookedModuleRun"]

Kind = Literal["output", "input", "grad_input", "grad_output"]
DIRECTIONS: dict[str, Kind] = {"fwd": "output", "fwd_pre": "input", "bwd": "grad_input", "bwd_pre": "grad_output"}


class EarlyStop(Exception):
    """Raised by a module after which the forward was to stop."""


class CacheProxy:
    """A value that a run will have captured; it keeps the cache alive.

    Example:
        >>> cache = TensorDict()
        >>> proxy = CacheProxy(cache, "layer_output")
        >>> cache["layer_output"] = torch.ones(2)
        >>> proxy.resolve().tolist()
        [1.0, 1.0]
    """

    def __init__(self, cache: TensorDictBase | dict[str, Any], key: str) -> None:
        self.cache = cache
        self.key = key

    def resolve(self) -> Any:
        """The captured value.

        Raises:
            SiteError: if it was not captured: the run has not ended, or the module did not run.
        """
        value = self.cache.get(self.key, None)
        if value is None:
            raise SiteError(
                f"nothing was captured under {self.key!r}: the run has not ended, the module did not run, or no "
                f"gradient reached it; captured: {', '.join(map(repr, self.cache.keys())) or 'nothing'}"
            )
        return value


class HookedModuleRun:
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
    a tuple the first tensor is meant. If the body raises, the model does not run.

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

    def __init__(
        self,
        hooked: HookedMixin,
        data: TensorDictBase,
        cache: TensorDictBase | None = None,
        run_name: str | None = None,
        run_sep: str | None = None,
        run_cache: TensorDictBase | None = None,
        grad_enabled: bool = False,
        run_callback: Callable[[Any, TensorDictBase], Any] | None = None,
        target: Target | Callable[[TensorDictBase], Tensor] | None = None,
    ) -> None:
        self.hooked = hooked
        self.data = data
        self.cache = TensorDict() if run_cache is None else run_cache
        self._save_cache = self.cache if cache is None else cache
        self._prefix = f"{'run' if run_name is None else run_name}{'.' if run_sep is None else run_sep}"
        self._grad_enabled = grad_enabled or target is not None
        self._callback = run_callback
        self._target = target
        self._handles: list[RemovableHandle] = []
        self._points: list[Tensor] = []
        self._captured: dict[tuple[str, Kind], CacheProxy] = {}
        self._state: Literal["new", "open", "ended"] = "new"
        self.stopped_at: str | None = None

    # ------------------------------------------------------------------ capturing

    def get(self, key: str, *, cache_key: str | None = None, **options: Any) -> CacheProxy:
        """Capture a module's output; after the block, find what was captured.

        Args:
            key: the module path.
            cache_key: the key in :attr:`cache`; ``f"{key}_{kind}"`` by default.
            callback: ``(module=, key=, direction=, output=...)`` returns what is captured instead.
            direction: ``"fwd"``, ``"fwd_pre"``, ``"bwd"`` or ``"bwd_pre"``.
            prepend: act before the hooks that are there.
            relative: start the path at the user's module (``True``) or at the wrapping TensorDictModule.
        """
        return self._capture(key, self.cache, cache_key, "", **options)

    def save(self, key: str, *, cache_key: str | None = None, **options: Any) -> CacheProxy:
        """As :meth:`get`, into ``cache=`` and under ``f"{run_name}{run_sep}{key}_{kind}"``."""
        return self._capture(key, self._save_cache, cache_key, self._prefix, **options)

    def get_input(self, key: str, **options: Any) -> CacheProxy:
        """Capture a module's (first) input."""
        return self.get(key, direction="fwd_pre", **options)

    def save_input(self, key: str, **options: Any) -> CacheProxy:
        """Capture a module's (first) input, as :meth:`save`."""
        return self.save(key, direction="fwd_pre", **options)

    def get_grad(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's (first) input."""
        return self.get(key, direction="bwd", **options)

    def save_grad(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's (first) input, as :meth:`save`."""
        return self.save(key, direction="bwd", **options)

    def get_grad_output(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's output."""
        return self.get(key, direction="bwd_pre", **options)

    def save_grad_output(self, key: str, **options: Any) -> CacheProxy:
        """Capture the gradient with respect to a module's output, as :meth:`save`."""
        return self.save(key, direction="bwd_pre", **options)

    # ------------------------------------------------------------------ overriding

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
            key: the module path.
            value: a tensor of the same shape, or the :class:`CacheProxy` of an earlier capture of this run.
            callback: ``(module=, value=, output=...)`` returns what is put in instead.
            direction, prepend, relative: as in :meth:`get`.
        """
        self._require("open", "set")
        kind = _kind(direction)

        def replace(module: nn.Module, original: Tensor) -> Tensor:
            new = value.resolve() if isinstance(value, CacheProxy) else value
            if callback is not None:
                new = callback(module=module, value=new, **{_argument(kind): original})
            if not isinstance(new, Tensor) or new.shape != original.shape:
                got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
                raise InputError(f"the {kind} of {key!r} has shape {tuple(original.shape)}, it cannot be set to {got}")
            return new.to(original.device, original.dtype)

        self._place(key, kind, replace, prepend, relative)

    def set_input(self, key: str, value: Any, **options: Any) -> None:
        """Override a module's (first) input."""
        self.set(key, value, direction="fwd_pre", **options)

    def set_grad(self, key: str, value: Any, **options: Any) -> None:
        """Override the gradient with respect to a module's (first) input."""
        self.set(key, value, direction="bwd", **options)

    def set_grad_output(self, key: str, value: Any, **options: Any) -> None:
        """Override the gradient with respect to a module's output."""
        self.set(key, value, direction="bwd_pre", **options)

    def stop(self, key: str, *, relative: bool = True) -> None:
        """End the forward after a module; what comes later does not run and is not written."""
        self._require("open", "stop")

        def halt(module: nn.Module, args: tuple, output: Any) -> None:
            raise EarlyStop(key)

        for module in self._modules(key, relative):
            self._handles.append(module.register_forward_hook(halt))

    # ------------------------------------------------------------------ running

    def __enter__(self) -> HookedModuleRun:
        self._require("new", "enter")
        self._state = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._state = "ended"
        try:
            if kind is None:
                self._run()
        finally:
            for handle in self._handles:
                handle.remove()
            self._handles.clear()
            self._points.clear()

    def _run(self) -> None:
        with torch.set_grad_enabled(self._grad_enabled), _without_methods(self.hooked):
            try:
                if self._callback is not None:
                    self._callback(self.hooked, self.data)
                else:
                    self.hooked(self.data)
            except EarlyStop as stop:
                self.stopped_at = str(stop)
                if self._target is not None:
                    raise TargetError(f"the run stopped at {stop}, so its target cannot be computed") from None
            if self._target is not None:
                self._differentiate()

    def _differentiate(self) -> None:
        if not self._points:
            return
        value = self._target(self.data) if callable(self._target) else self._target
        if not isinstance(value, Tensor) or not value.requires_grad:
            raise TargetError("the target of the run is no tensor with a gradient path to the captured modules")
        # With respect to the captured tensors only: no .grad of the user's parameters is written.
        torch.autograd.grad(value.sum(), self._points, allow_unused=True)

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
        kind = _kind(direction)
        if self._state == "ended":
            return self._find(key, kind)
        self._require("open", "get")
        proxy = CacheProxy(cache, cache_key or f"{prefix}{key}_{kind}")

        def keep(module: nn.Module, original: Tensor) -> None:
            value = original
            if callback is not None:
                value = callback(module=module, key=key, direction=direction, **{_argument(kind): original})
            elif isinstance(value, Tensor):
                value = value.clone()  # an in-place module would overwrite it
            proxy.cache[proxy.key] = value

        self._place(key, kind, keep, prepend, relative)
        self._captured[key, kind] = proxy
        return proxy

    def _find(self, key: str, kind: Kind) -> CacheProxy:
        if (key, kind) not in self._captured:
            known = [f"{path} ({what})" for path, what in self._captured]
            raise SiteError(
                f"the {kind} of {key!r} was not captured in this run: call run.save({key!r}) or run.get({key!r}) in "
                f"the block; {nearest(f'{key} ({kind})', known)}"
            )
        return self._captured[key, kind]

    def _place(
        self, key: str, kind: Kind, act: Callable[[nn.Module, Tensor], Tensor | None], prepend: bool, relative: bool
    ) -> None:
        if kind in ("grad_input", "grad_output"):
            self._grad_enabled = True

        runtime = self.hooked._hooked_runtime

        def on_gradient(module: nn.Module, value: Tensor) -> Tensor:
            if not value.requires_grad:
                value = as_leaf(value)
            point = value.view_as(value)  # a node of its own: it sees the gradient through this module only
            point.register_hook(lambda gradient: act(module, gradient))
            self._points.append(point)
            return point

        def before(module: nn.Module, args: tuple) -> Any:
            if not args:
                raise InputError(f"{key!r} is called without positional arguments, so it has no first input")
            value, disguise = rows_of(args[0], module, key, runtime)
            new = act(module, value) if kind == "input" else on_gradient(module, value)
            return None if new is None else (with_rows(args[0], new, module, disguise), *args[1:])

        def after(module: nn.Module, args: tuple, output: Any) -> Any:
            value, disguise = rows_of(output, module, key, runtime)
            new = act(module, value) if kind == "output" else on_gradient(module, value)
            return None if new is None else with_rows(output, new, module, disguise)

        for module in self._modules(key, relative):
            if kind in ("input", "grad_input"):
                self._handles.append(module.register_forward_pre_hook(before, prepend=prepend))
            else:
                self._handles.append(module.register_forward_hook(after, prepend=prepend))

    def _modules(self, key: str, relative: bool) -> list[nn.Module]:
        root = self.hooked.hooked_root if relative else self.hooked
        return [site.module for site in find_sites(root, key, type(root).__name__)]

    def _require(self, state: str, what: str) -> None:
        if self._state != state:
            raise SiteError(
                f"run.{what} belongs inside `with hooked.run(...) as run:`; this run is "
                f"{'not entered yet' if self._state == 'new' else 'open' if self._state == 'open' else 'over'}"
            )


class Handles:
    """The hooks of one request; :meth:`remove` takes them away."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def direct_methods() -> dict[str, Callable[..., Any]]:
    """The requests of a run as methods of the hooked module itself: they last until their handle is removed.

    ``set*(key, value)`` and ``stop(key)`` return a handle, ``get*(cache, key)`` a handle and a proxy. ``stop`` raises
    :class:`EarlyStop` out of the call.
    """

    def request(name: str) -> Callable[..., Any]:
        def method(self: HookedMixin, *args: Any, **options: Any) -> Any:
            captures = name.startswith("get")
            run = HookedModuleRun(self, TensorDict(), run_cache=args[0] if captures else None)
            run._state = "open"
            proxy = getattr(run, name)(*(args[1:] if captures else args), **options)
            return (Handles(run._handles), proxy) if captures else Handles(run._handles)

        method.__name__ = name
        method.__doc__ = f"As ``run.{name}``, until the returned handle is removed."
        return method

    names = [f"{verb}{kind}" for verb in ("get", "set") for kind in ("", "_input", "_grad", "_grad_output")]
    return {name: request(name) for name in (*names, "stop")}


def _kind(direction: str) -> Kind:
    if direction not in DIRECTIONS:
        raise InputError(f"no direction is named {direction!r}; {nearest(direction, DIRECTIONS)}")
    return DIRECTIONS[direction]


def _argument(kind: Kind) -> str:
    return "args" if kind == "input" else kind


@contextmanager
def _without_methods(hooked: HookedMixin) -> Iterator[None]:
    """A run captures what it was asked for; per-step methods of the context that observe are left out."""
    steps, hooked._hooked_steps = hooked._hooked_steps, []
    try:
        yield
    finally:
        hooked._hooked_steps = steps


@contextmanager
def disabled_hooks(hooked: HookedMixin) -> Iterator[HookedMixin]:
    """The hooked module without the hooks and results of its methods, for a while."""
    stores: list[tuple[Mapping[int, Any], dict[int, Any]]] = []
    for module in hooked.modules():
        for store in (module._forward_hooks, module._forward_pre_hooks):
            if any(_ours(hook) for hook in store.values()):
                stores.append((store, dict(store)))
    try:
        for store, entries in stores:
            for number, hook in entries.items():
                if _ours(hook):
                    del store[number]  # type: ignore[attr-defined]
        with _without_methods(hooked):
            yield hooked
    finally:
        for store, entries in stores:
            added = {number: hook for number, hook in store.items() if number not in entries}
            store.clear()  # type: ignore[attr-defined]
            store.update(entries | added)  # type: ignore[attr-defined]


def _ours(hook: Any) -> bool:
    owner = type(getattr(hook, "__self__", hook))
    if owner is RecurrentHook:  # it neither acts nor writes
        return False
    return owner.__module__.startswith("tdhook_rl.")
