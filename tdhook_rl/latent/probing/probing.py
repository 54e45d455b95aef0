"""Probing: hand the activations of named modules to probes, after each forward of the policy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

from tensordict import NestedKey, NonTensorData, NonTensorStack, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import unravel_key
from torch import Tensor, nn

from tdhook_rl.arguments.keys import required
from tdhook_rl.calls.bound import BoundMethod
from tdhook_rl.calls.passes import Call
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import InputError, SiteError
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.paths import Site, find_sites

_DIRECTIONS = ("fwd", "fwd_pre")
_CONTAINERS = (nn.Sequential, TensorDictModuleBase)


class Probe(Protocol):
    """What a ``probe_factory`` returns."""

    def step(self, activation: Tensor, **additional: Any) -> Any:
        """Take the activation of one forward (batch + features, detached) and the additional entries."""


@dataclass(frozen=True)
class Probing(Method):
    """Give the activations of modules to probes at every forward of the hooked policy.

    A probe sees the activation after the forward has ended, once per call of the hooked policy with a
    TensorDict; ``annotate``, ``get_dist`` and vmapped calls (of losses and value estimators) feed no probe.
    The outputs of the policy are unchanged and no result key is written: the probes keep what they find.

    Args:
        key_pattern: a module path or pattern (see :mod:`tdhook_rl.sites.paths`), or several of them.
        probe_factory: ``probe_factory(key, direction)`` returns the probe of one site, an object with
            ``step(activation, **additional)``; called once for each site when the policy is prepared. ``key`` is
            the module path. :meth:`ProbeManager.probe_factory` is one.
        additional_keys: keys that are read from each TensorDict and passed to ``step`` by name (a nested key
            by its last part). Strings in the TensorDict arrive as strings.
        relative: ``True``: paths start at the module that is prepared; ``False``: at the TensorDict module around
            it, which differs for a plain ``nn.Module`` only (``"module.0"`` in place of ``"0"``).
        directions: ``"fwd"`` for what a module returns (the default), ``"fwd_pre"`` for what it receives.
        classes_to_skip: classes that a regular expression does not mean; a literal path is never skipped. Unless
            given: containers (``nn.Sequential``, TensorDict modules) that are matched along with a module in them.

    Raises:
        SiteError: if a pattern matches nothing or only skipped classes, or a named module does not run.
        MissingKeyError: if a TensorDict lacks one of the additional keys.
        InputError: for an unknown direction, or a factory whose probes have no ``step``.

    Reference: Alain & Bengio 2017, "Understanding intermediate layers using linear classifier probes".

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> class Shapes:
        ...     def __init__(self, key, direction):
        ...         self.key = key
        ...     def step(self, activation, labels):
        ...         print(self.key, tuple(activation.shape), tuple(labels.shape))
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> with Probing("(0|1)$", Shapes, additional_keys=["labels"]).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(3, 4), "labels": torch.zeros(3)}, batch_size=3))
        0 (3, 8) (3,)
        1 (3, 8) (3,)
    """

    key_pattern: str | Sequence[str]
    probe_factory: Callable[[str, str], Probe]
    _: KW_ONLY
    additional_keys: Sequence[NestedKey] | None = None
    relative: bool = True
    directions: Sequence[str] | None = None
    classes_to_skip: Sequence[type[nn.Module]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.directions, str) or not set(self.directions or ()) <= set(_DIRECTIONS):
            raise InputError(
                f"Probing(directions={self.directions!r}) is not a list of 'fwd' (outputs) and 'fwd_pre' (inputs): "
                "for gradients use an attribution with input_modules="
            )
        if isinstance(self.additional_keys, str):
            raise InputError(f"additional_keys is a list of keys: write additional_keys=[{self.additional_keys!r}]")
        if isinstance(self.probe_factory, type) and not hasattr(self.probe_factory, "step"):
            raise InputError(f"probe_factory= makes probes, which have step(); {self.probe_factory.__name__} has none")

    def bind(self, binder: Binder) -> _BoundProbing:
        readings = []
        for site in self._sites(binder.root if self.relative else binder.policy):
            for direction in dict.fromkeys(self.directions or ("fwd",)):
                probe = self.probe_factory(site.name, direction)
                if not callable(getattr(probe, "step", None)):
                    raise InputError(
                        f"probe_factory({site.name!r}, {direction!r}) returned a {type(probe).__name__}, which has no "
                        "method step(activation, **additional)"
                    )
                slot = binder.capture(site) if direction == "fwd" else binder.capture_input(site)
                readings.append(_Reading(site.name, slot, site.explicit, probe))
        return _BoundProbing(readings, _by_name(self.additional_keys or ()))

    def _sites(self, root: nn.Module) -> list[Site]:
        found = find_sites(root, self.key_pattern, runs=True)
        kept = [site for site in found if site.explicit or not self._skips(site, found)]
        if not kept:
            names = ", ".join(f"{site.name!r} ({type(site.module).__name__})" for site in found[:4])
            raise SiteError(
                f"{self.key_pattern!r} matches only modules of classes that Probing skips: {names}; "
                "name one by its path, or change classes_to_skip"
            )
        return kept

    def _skips(self, site: Site, found: Sequence[Site]) -> bool:
        if self.classes_to_skip is not None:
            return isinstance(site.module, tuple(self.classes_to_skip))
        inner = any(other.path.startswith(f"{site.path}.") for other in found)
        return inner and isinstance(site.module, _CONTAINERS)


@dataclass(frozen=True)
class _Reading:
    name: str
    slot: str
    explicit: bool
    probe: Probe


class _BoundProbing(BoundMethod):
    result_keys = ()
    reads_forward = True
    consumes = True

    def __init__(self, readings: list[_Reading], keys: dict[str, NestedKey]) -> None:
        self._readings = readings
        self._keys = keys

    def __deepcopy__(self, memo: dict) -> _BoundProbing:
        # A copy of the policy feeds the same probes: copied ones would learn where nobody looks.
        return self

    def compute(self, call: Call) -> dict[tuple[str, ...], Tensor]:
        if call.policy._hooked.runtime.level >= 0:
            return {}
        ran = [one for one in self._readings if one.explicit or one.slot in call.slots]
        if not ran:
            names = ", ".join(repr(one.name) for one in self._readings)
            raise SiteError(f"none of the modules that the pattern matched ran in this call: {names}")
        additional = {name: _entry(call.source, key) for name, key in self._keys.items()}
        real = real_rows(call.source)
        # All are read before the first probe learns, so that an error leaves no probe ahead of the others.
        activations = [call.captured(one.slot, one.name) for one in ran]
        for one, activation in zip(ran, activations, strict=True):
            if real is not None and getattr(one.probe, "takes_rows", False):
                one.probe.step(activation, **additional, rows=real)
            else:
                one.probe.step(activation, **additional)
        return {}


def _by_name(keys: Sequence[NestedKey]) -> dict[str, NestedKey]:
    named: dict[str, NestedKey] = {}
    for key in map(unravel_key, keys):
        name = key if isinstance(key, str) else key[-1]
        if named.setdefault(name, key) != key:
            raise InputError(f"additional_keys {named[name]!r} and {key!r} would both be passed to step() as {name!r}")
    return named


def _entry(data: TensorDictBase, key: NestedKey) -> Any:
    remedy = ". Put it in the TensorDict of every call, and list it in additional_keys"
    value = required(data, key, "a probe reads", remedy)
    if isinstance(value, NonTensorData):
        return value.data
    if not isinstance(value, NonTensorStack):
        return value
    # What a stack of steps holds: one value if all rows agree.
    values = value.tolist()
    flat = list(_leaves(values))
    return flat[0] if all(one == flat[0] for one in flat) else values


def _leaves(values: Any) -> Iterator[Any]:
    if isinstance(values, list):
        for one in values:
            yield from _leaves(one)
    else:
        yield values
