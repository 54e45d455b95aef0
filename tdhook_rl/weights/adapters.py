"""Adapters: modules of the user's between, or in place of, what the policy computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.hooks import Portable
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.row_values import require_whole_rows
from tdhook_rl.sites.rows import rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime


@dataclass(frozen=True, eq=False)
class Adapters(Method):
    """Replace the output of one module by an adapter of the output of another (Houlsby et al. 2019).

    Args:
        adapters: ``{name: (adapter, source, target)}``. The adapter, an ``nn.Module`` or any callable, is given
            the output of the module at the path ``source`` (batch + features), and what it returns replaces the
            output of the module at ``target``, whose shape it must have. The same path twice puts the adapter
            inline, behind that module. Names only serve messages; dotted ones are fine.

    The adapters stay the user's own modules: they take part in the policy's graph (``forward``, ``get_dist``,
    ``log_prob``) and are trained by an optimiser over their parameters, but are no part of the hooked policy's
    ``parameters()``, ``state_dict()`` or ``TensorDict.from_module``, and are neither moved nor set to train or
    eval with it. Copies of the hooked policy go on using the same adapter; worker processes share its
    parameters where memory can be shared, and weight sync does not carry them.

    Raises:
        SiteError: if a path matches nothing, the source has not run when the target runs, or the target does not
            run in a forward in which the source does.
        InputError: if an adapter returns anything but a tensor of the shape of the target's output.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> bottleneck = nn.Sequential(nn.Linear(8, 3), nn.ReLU(), nn.Linear(3, 8))
        >>> with Adapters({"after.tanh": (bottleneck, "1", "1")}).prepare(net) as hooked:
        ...     hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))["output"].sum().backward()
        >>> bottleneck[2].bias.grad.shape, len(list(hooked.parameters()))
        (torch.Size([8]), 4)
    """

    observes = False

    adapters: Mapping[str, tuple[Callable[[Tensor], Tensor], str, str]]

    def __post_init__(self) -> None:
        if not isinstance(self.adapters, Mapping) or not self.adapters:
            raise InputError(f"Adapters takes {{name: (adapter, source, target)}}, got {self.adapters!r}")
        for name, value in self.adapters.items():
            if not isinstance(value, (tuple, list)) or len(value) != 3 or not callable(value[0]):
                raise InputError(
                    f"adapters[{name!r}] must be (adapter, source path, target path) with a module or another "
                    f"callable first, got {value!r}"
                )

    def bind(self, binder: Binder) -> None:
        for name, (adapter, source_path, target_path) in self.adapters.items():
            source, target = binder.site(source_path, runs=True), binder.site(target_path, runs=True)
            for site in (source, target):
                if site.run == "all" or (site.run is not None and site.run < 0):
                    raise SiteError(
                        f"adapter {name!r} joins one run to one run, and {site.name!r} does not say which: count from "
                        "the first, as in 'act@0'"
                    )
            carried = _Module(adapter) if isinstance(adapter, nn.Module) else Portable(adapter)
            route = None
            if source.module is not target.module or source.run != target.run:
                route = _Route(name, source.name, target.name)
                binder.routes.append(route)
                binder.on_output(source, SourceHook(binder.runtime, route))
            binder.on_output(target, AdapterHook(binder.runtime, name, carried, target.name, route))


class _Module(Portable):
    """An adapter that is a module: pickled as such, so that worker processes can share its parameters."""

    def __reduce__(self) -> tuple:
        return _Module, (self.function,)


class _Route:
    """What the source hands to the target in one call."""

    def __init__(self, name: str, source: str, target: str) -> None:
        self.name = name
        self.source = source
        self.target = target
        self.value: Tensor | None = None

    def take(self) -> Tensor:
        value, self.value = self.value, None
        if value is None:
            raise SiteError(
                f"adapter {self.name!r}: the source {self.source!r} did not run before the target {self.target!r}; "
                "name a source that the policy executes earlier, once for each run of the target"
            )
        return value

    def close(self, complete: bool) -> None:
        """End a call; in a complete one the target must have taken what the source gave."""
        value, self.value = self.value, None
        if complete and value is not None:
            raise SiteError(
                f"adapter {self.name!r} had no effect: the source {self.source!r} ran, but the target "
                f"{self.target!r} did not run after it; name a target that the policy's forward executes"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"value": None}


class SourceHook:
    """Forward hook that hands the output of its module on, with its graph."""

    acts_on_states = True  # it changes nothing

    def __init__(self, runtime: Runtime, route: _Route) -> None:
        self.runtime = runtime
        self.route = route

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.runtime.require_open()
        # A copy: an in-place activation behind the module would change what the adapter is given.
        value = rows_of(output, module, self.route.source, self.runtime)[0]
        require_whole_rows(value, self.runtime, self.route.source)
        self.route.value = value.clone()


class AdapterHook:
    """Forward hook that puts the adapter's result in place of the output of its module."""

    def __init__(self, runtime: Runtime, name: str, adapter: Portable, target: str, route: _Route | None) -> None:
        self.runtime = runtime
        self.name = name
        self.adapter = adapter
        self.target = target
        self.route = route

    @property
    def user_code(self) -> Any:
        return self.adapter.function

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.require_open()
        value, disguise = rows_of(output, module, self.target, self.runtime)
        if self.route is not None:
            require_whole_rows(value, self.runtime, self.target)
        adapted = self.adapter(value if self.route is None else self.route.take())
        if not isinstance(adapted, Tensor) or adapted.shape != value.shape:
            got = f"shape {tuple(adapted.shape)}" if isinstance(adapted, Tensor) else f"a {type(adapted).__name__}"
            raise InputError(
                f"adapter {self.name!r} must return a tensor of shape {tuple(value.shape)}, that of the output of "
                f"{self.target!r}, got {got}"
            )
        adapted = in_dtype(adapted, value, f"what the adapter {self.name!r} returns", self.target)
        return with_rows(output, adapted, module, disguise)
