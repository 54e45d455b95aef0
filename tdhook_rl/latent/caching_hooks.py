"""The hooks of activation caching beyond the plain capture: callbacks, caches, gradients."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.callbacks import only_looks
from tdhook_rl.errors import InputError
from tdhook_rl.internals.functorch_names import (
    add_batch_dim,
    get_unwrapped,
    in_transform,
    is_batchedtensor,
    is_wrapped,
    maybe_get_bdim,
    maybe_get_level,
)
from tdhook_rl.latent.caches import CallRecord, Key, Staging
from tdhook_rl.sites.containers import first_input, first_tensor, tensors_of, with_first_tensor
from tdhook_rl.sites.hooks import CaptureHook, Portable
from tdhook_rl.sites.layouts import time_comes_first
from tdhook_rl.sites.paths import Site
from tdhook_rl.sites.repeats import added, stacked
from tdhook_rl.sites.rows import rows_of, rows_of_part, unbatched
from tdhook_rl.sites.runtime import Runtime

#: What a callback is offered, by direction.
FORWARD = {
    "fwd": ("module", "args", "kwargs", "output", "key", "direction"),
    "fwd_pre": ("module", "args", "kwargs", "key", "direction"),
}
GRADIENT = {
    "bwd": ("module", "grad_input", "key", "direction"),
    "bwd_pre": ("module", "grad_output", "key", "direction"),
}


class Callback:
    """The user's function on what was captured; it is passed what it has parameters for.

    Raises:
        InputError: if it has no parameter of a known name, or needs one that a direction does not offer.
    """

    def __init__(self, function: Callable[..., Any], directions: Sequence[str]) -> None:
        self.function = Portable(function)
        offered = FORWARD | GRADIENT
        known = list(dict.fromkeys(name for direction in directions for name in offered[direction]))
        try:
            parameters = inspect.signature(getattr(function, "forward", function)).parameters.values()
        except (TypeError, ValueError):
            raise InputError(
                f"callback={function!r} has no signature to read: write it as a function of some of {', '.join(known)}"
            ) from None
        self.names = None
        if any(one.kind is one.VAR_KEYWORD for one in parameters):
            return
        named = {one.name for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
        needed = [
            one.name
            for one in parameters
            if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
        ]
        asked = f"callback= has the parameters ({', '.join(one.name for one in parameters)})"
        if not named & set(known):
            raise InputError(
                f"{asked}, none of which is offered: it is called with keywords, {', '.join(known)}; "
                "write for instance `lambda output: output[0]`"
            )
        for direction in directions:
            lacking = [name for name in needed if name not in offered[direction] or name not in named]
            if lacking:
                raise InputError(
                    f"{asked}, but in the direction {direction!r} there is no keyword {lacking[0]!r}, only "
                    f"{', '.join(offered[direction])}: give {lacking[0]!r} a default, or take **kwargs"
                )
        self.names = named

    def __call__(self, *, key: str, **offered: Any) -> Tensor:
        offered["key"] = key
        names = self.names
        seen = [] if torch.compiler.is_compiling() else tensors_of(list(offered.values()))
        with only_looks(seen, f"the callback for {key!r}"):
            value = self.function(**{name: value for name, value in offered.items() if names is None or name in names})
        if not isinstance(value, Tensor):
            raise InputError(
                f"the callback returned a {type(value).__name__} for {key!r}: return the one tensor to keep"
            )
        return value


class CachingHook(CaptureHook):
    """Hook or pre-hook (with keywords) that captures through a callback, and for a cache.

    Calls of the policy with tensors have no TensorDict to write to, but do fill the cache.
    """

    def __init__(
        self, runtime: Runtime, slot: str, site: Site, key: Key, callback: Callback | None, staging: Staging | None
    ) -> None:
        super().__init__(runtime, slot, site.run)
        self.path = site.name
        self.key = key
        self.callback = callback
        self.staging = staging

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._captures():
            if self.callback is None:
                self._keep(module, None, first_input(module, args, kwargs, self.path))
            else:
                value = self.callback(module=module, args=args, kwargs=kwargs, key=self.path, direction="fwd_pre")
                self._keep(module, value, args if args else kwargs)

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if self._captures():
            value = None
            if self.callback is not None:
                value = self.callback(
                    module=module, args=args, kwargs=kwargs, output=output, key=self.path, direction="fwd"
                )
            self._keep(module, value, output)

    def _captures(self) -> bool:
        runtime = self.runtime
        runtime.require_open()
        return runtime.recording or (self.staging is not None and runtime.depth > 0 and runtime.replay is None)

    def _keep(self, module: nn.Module, value: Tensor | None, whole: Any) -> None:
        """Keep what a callback chose of the whole input or output, or what is first in it."""
        if self.runtime.recording:
            if value is None:
                rows, _ = rows_of(whole, module, self.path, self.runtime)
            else:
                rows, _ = rows_of_part(value, whole, module, self.path, self.runtime)
            self._store(rows)
        elif self.staging is not None:
            value = first_tensor(whole, module, self.path) if value is None else value
            value = escaped(value.detach().clone())
            if self.run is not None:
                before = self.staging.several.get(self.key) if self.runtime.run_of(self.slot) else None
                self.staging.several[self.key] = several = added(before, value, self.run)
                value = several.chosen(torch.Size(()), self.path)
            self.staging.loose[self.key] = value


class GradientHook:
    """Hook or pre-hook (with keywords) that lets the gradient of an output or input arrive in the cache.

    What the backward pass calls holds no tensor.
    """

    def __init__(
        self, runtime: Runtime, site: Site, key: Key, direction: str, callback: Callback | None, staging: Staging
    ) -> None:
        self.runtime = runtime
        self.path = site.name
        self.run = site.run
        self.key = key
        self.direction = direction
        self.callback = callback
        self.staging = staging

    def before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self._captures():
            return None
        value = first_input(module, args, kwargs, self.path)
        if isinstance(next(iter((*args, *kwargs.values()))), TensorDictBase):
            raise InputError(
                f"{self.path!r} is given a TensorDict, whose entries are not its own to watch: use the direction "
                "'bwd_pre', or name a module inside it"
            )
        if getattr(module, "inplace", False) is True:
            raise InputError(
                f"{self.path!r} ({type(module).__name__}) changes its input in place, so that the gradient of what it "
                "was given passes by: use the direction 'bwd_pre' on the module before it"
            )
        # The module is given a tensor of its own: others that read the same one add nothing to the gradient.
        point = self._watched(value, module, own=False)
        if args:
            return (with_first_tensor(args[0], point, module), *args[1:]), kwargs
        name, given = next(iter(kwargs.items()))
        return args, kwargs | {name: with_first_tensor(given, point, module)}

    def after(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        if not self._captures():
            return None
        value = first_tensor(output, module, self.path)
        given = [_base(one) for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
        own = value is output and all(_base(value) is not one for one in given)
        point = self._watched(value, module, own)
        return None if point is value else with_first_tensor(output, point, module)

    def _captures(self) -> bool:
        runtime = self.runtime
        runtime.require_open()
        record = self.staging.record
        record.ran.add(self.key)
        # A replay that records is the forward itself, explained; those of annotate() have gradients off.
        if not torch.is_grad_enabled() or (runtime.replay is not None and not runtime.recording):
            return False
        record.under_way = runtime.depth > 0
        record.times[self.key] = record.times.get(self.key, 0) + 1
        return True

    def _watched(self, value: Tensor, module: nn.Module, own: bool) -> Tensor:
        if not (value.is_floating_point() or value.is_complex()):
            what = "input" if self.direction == "bwd" else "output"
            raise InputError(
                f"the {what} of {self.path!r} is of {value.dtype}, which has no gradient: name a module that "
                "computes with floating-point numbers"
            )
        record = self.staging.record
        return watched(value, functools.partial(self._arrive, module, record, record.times[self.key] - 1), own)

    def _arrive(self, module: nn.Module, record: CallRecord, index: int, gradient: Tensor) -> None:
        # Where no run is named the last one in a call counts, as for its output; its gradient is the first to
        # arrive. A single run is told from others by a RunHook. While the call is under way, gradients are those of
        # other methods, which explain it.
        times = record.times[self.key]
        meant = times + self.run if isinstance(self.run, int) and self.run < 0 else times - 1
        if record.under_way or (self.run != "all" and index != meant):
            return
        value = gradient
        if self.callback is not None:
            name = "grad_input" if self.direction == "bwd" else "grad_output"
            value = self.callback(module=module, key=self.path, direction=self.direction, **{name: (gradient,)})
        batch = record.batch
        layout = module._hooked_layout
        if value is gradient and layout is not None and layout.time_first:  # type: ignore[union-attr]
            value = value.transpose(0, 1) if time_comes_first(value, batch, self.path, exact=True) else value
        value = escaped(value.detach().clone())
        if batch is not None and value.shape[: len(batch)] != batch and value.shape[:1] == (batch.numel(),):
            # Convolutional nets flatten the leading dimensions before their layers.
            value = value.reshape((*batch, *value.shape[1:]))
        if self.run == "all":
            arrived = record.arrived.setdefault(self.key, {})
            arrived[index] = value
            if len(arrived) < times:
                return
            value = stacked(tuple(arrived[one] for one in range(times)), batch or torch.Size(()), self.path)
            arrived.clear()
        self.staging.store.put(self.key, value)


def watched(value: Tensor, arrive: Callable[[Tensor], None], own: bool) -> Tensor:
    """Let ``arrive`` be called with the gradient of a tensor, or of one in its place with the same numbers.

    Args:
        value: a tensor with or without a graph; without one, nothing before it is learnt, but what comes after may
            still depend on it.
        arrive: called by backward passes.
        own: nobody else holds the memory. Then the tensor is watched itself, and a change in place behind it is fine.
    """
    if is_batchedtensor(value):
        # Gradients are of what a vmap batches; its dimension goes where captures of outputs have it.
        level, dim = maybe_get_level(value), maybe_get_bdim(value)
        inner = get_unwrapped(value)
        place = -2 if inner.ndim > 1 else 0
        point = watched(inner.movedim(dim, place), arrive, own=False).movedim(place, dim)
        return add_batch_dim(point, dim, level)
    if not value.requires_grad:
        value = _leaf(value)
        point = value.clone() if own else _piece(value)
        point.register_hook(arrive)
        return point
    base = _base(value)
    if own and base.grad_fn is not None and (base is value or _reshaped(base, value)):
        # A linear layer returns a view of the matrix that it computed. If the view is changed in place, the gradient
        # of what it was arrives at the matrix alone.
        shape = value.shape
        base.register_hook(lambda gradient: arrive(gradient.reshape(shape)))
        return value
    point = _piece(value)
    point.register_hook(arrive)
    return point


def _leaf(value: Tensor) -> Tensor:
    """A tensor with the same numbers that gradients arrive at."""
    if in_transform() is None:
        return (value.clone() if value.is_inference() else value).detach().requires_grad_()
    leaf = torch.empty_like(value, requires_grad=True)  # inside vmap it can only be made so
    with torch.no_grad():
        leaf.copy_(value)
    return leaf


def _base(value: Tensor) -> Tensor:
    base = value._base
    return value if base is None else base


def _reshaped(base: Tensor, view: Tensor) -> bool:
    return base.is_contiguous() and view.is_contiguous() and base.numel() == view.numel()


def _piece(value: Tensor) -> Tensor:
    # Not a plain view: changed in place, it would silently leave the graph. With pieces of a tensor PyTorch refuses.
    return value.unsqueeze(0).unbind()[0]


def escaped(value: Tensor) -> Tensor:
    """A tensor that may outlive the functorch transforms that it was computed in, their dimensions explicit."""
    if torch.compiler.is_compiling():
        return value
    while is_wrapped(value):
        if is_batchedtensor(value):
            value = unbatched(value, maybe_get_level(value) - 1)
        else:
            value = get_unwrapped(value)
    return value
