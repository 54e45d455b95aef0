"""Which axis of an activation holds the units: told by the module that made it, never by the number of its axes.

``(rows, 8, 20)`` are 8 channels of a sequence behind a ``Conv1d`` and 20 units of 8 agents behind a ``Linear``. In one
forward each module notes which axis of its output holds the units; modules that act on each entry by itself take over
the axis of what they were given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from tdhook_rl.arguments.tensors import plain_number
from tdhook_rl.errors import InputError, SiteError, nearest
from tdhook_rl.internals.functorch_names import is_batchedtensor
from tdhook_rl.sites.paths import find_sites

_LAST = (
    nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
    nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder, nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)  # fmt: skip
#: Modules of so many spatial axes, which follow the channels: Conv2d, MaxPool3d, AdaptiveAvgPool1d...
_SPATIAL = re.compile(r"(?:Conv|ConvTranspose|MaxPool|AvgPool|LPPool|MaxUnpool|FractionalMaxPool)(\d)d")
#: Modules whose channels are axis 1 of what they are given.
_SECOND = re.compile(r"(?:BatchNorm|SyncBatchNorm|InstanceNorm|GroupNorm|LocalResponseNorm|Dropout\dd)")


class UnitAxes:
    """Follows one forward of a network and says which axis of the output of a module holds its units.

    Hooks are on the network only while :meth:`following`.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._kept: list[Tensor] = []  # so that no address is used twice
        self._by_object: dict[int, int] = {}
        self._by_address: dict[int, list[tuple[int, tuple, tuple]]] = {}
        self._by_shape: dict[tuple[int, ...], set[int]] = {}
        self._runs: dict[nn.Module, list[int | None]] = {}
        self._handed: list[Tensor | None] = []  # what modules under way were handed, before hooks gave them something

    @contextmanager
    def following(self) -> Iterator[None]:
        """While this is open, a forward of the network is followed."""
        handles = []
        for child in self._network.modules():
            handles.append(child.register_forward_pre_hook(self._hand, prepend=True))
            handles.append(child.register_forward_pre_hook(self._take))
            handles.append(child.register_forward_hook(self._note))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for notes in (self._kept, self._by_object, self._by_address, self._handed):
                notes.clear()

    def of(self, site: str, activation: Tensor, rows: int) -> int:
        """The axis of the units of an activation that was cached in the forward, counted from its end.

        Args:
            site: its path.
            activation: ``(rows, ...)``.
            rows: how many of its axes are rows.

        Raises:
            InputError: if nothing tells which it is.
        """
        if activation.ndim <= rows + 1:
            return -1
        (found,) = find_sites(self._network, site, runs=True)
        runs = self._runs.get(found.module, [])
        if runs and found.run != "all":
            runs = [runs[-1 if found.run is None else found.run]]
        noted = set(runs) or {None}
        if noted == {None} and _all_differ(activation.shape[rows:]):
            # Such as a sum of x and block(x): it holds its units where outputs of this very shape hold them.
            noted = set(self._by_shape.get(tuple(activation.shape), ()))
        axis = noted.pop() if len(noted) == 1 else None
        if axis is not None and -axis <= activation.ndim - rows:
            return axis
        raise InputError(
            f"which axis of the activation of {site!r}, {tuple(activation.shape)}, holds its units? A "
            f"{type(found.module).__name__} does not tell: give units={{{site!r}: axis}}, such as -1 for the last or 1 "
            "for channels"
        )

    def _hand(self, module: nn.Module, args: Sequence[Any]) -> None:
        self._handed.append(next(_tensors(args), None))

    def _take(self, module: nn.Module, args: Sequence[Any]) -> None:
        """A module that works in place is given a copy where a hook acts on it: its units are where those were."""
        handed, given = self._handed.pop() if self._handed else None, next(_tensors(args), None)
        if handed is None or given is None or handed is given or not _is_copy(given, handed):
            return
        axis = self._found(handed)
        if axis is not None:
            self._kept.append(given)
            self._by_object[id(given)] = axis

    def _note(self, module: nn.Module, args: Sequence[Any], output: Any) -> None:
        made = output if isinstance(output, Tensor) else next(_tensors(output), None)
        if made is None:
            return
        given = next(_tensors(args), None)
        # What a container hands on is what was made last inside; it declares nothing by itself.
        axis = self._found(made) if any(True for _ in module.children()) else None
        axis = _declared(module, made) if axis is None else axis
        if axis is None and given is not None:
            axis = self._taken_over(module, given, made)
        self._runs.setdefault(module, []).append(axis)
        if axis is None or -axis > made.ndim:
            return
        self._kept.append(made)
        self._by_object[id(made)] = axis
        self._by_shape.setdefault(tuple(made.shape), set()).add(axis)
        address = _address(made)
        if address is not None:
            self._by_address.setdefault(address, []).append((axis, tuple(made.shape[axis:]), made.stride()[axis:]))

    def _found(self, value: Tensor) -> int | None:
        """The axis of a tensor that was noted, or of a view that leaves the axes from the units on as they are."""
        if id(value) in self._by_object:
            return self._by_object[id(value)]
        for axis, shape, stride in reversed(self._by_address.get(_address(value) or -1, [])):
            if tuple(value.shape[axis:]) == shape and value.stride()[axis:] == stride:
                return axis
        return None

    def _taken_over(self, module: nn.Module, given: Tensor, made: Tensor) -> int | None:
        """The axis of a module that declares none: that of its input, where shapes say that it is still there."""
        axis = self._found(given)
        if axis is None:
            return None
        if _address(given) is not None and _address(given) == _address(made) and given.shape != made.shape:
            front = given.ndim + axis + 1  # a view: flattened places, say
            if given.stride()[:front] == made.stride()[:front] and given.shape[:front] == made.shape[:front]:
                return front - 1 - made.ndim
            return self._found(made)
        if given.ndim != made.ndim or given.shape[axis] != made.shape[axis]:
            return None
        # A module of the user's own may swap axes of one size.
        trusted = type(module).__module__.startswith("torch.") or _all_differ(given.shape[1:])
        return axis if trusted else None


def _all_differ(sizes: Sequence[int]) -> bool:
    return len(set(sizes)) == len(sizes)


def _declared(module: nn.Module, made: Tensor) -> int | None:
    """What the class of a module says of its output."""
    if isinstance(module, _LAST):
        return -1
    for base in type(module).__mro__:
        if not base.__module__.startswith("torch."):
            continue
        spatial = _SPATIAL.search(base.__name__)
        if spatial:
            return -1 - int(spatial[1])
        if _SECOND.match(base.__name__):
            return 1 - made.ndim if made.ndim > 1 else None
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and len(module.normalized_shape) == 1:
        return -1
    return -1 if made.ndim <= 2 else None


def _is_copy(one: Tensor, other: Tensor) -> bool:
    if is_batchedtensor(one) or is_batchedtensor(other) or one.shape != other.shape:
        return False
    return bool(((one == other) | (one != one)).all())


def _address(value: Tensor) -> int | None:
    try:
        return value.data_ptr() or None
    except RuntimeError:  # in vmap: only the object itself is known again
        return None


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list)):
        for one in values:
            yield from _tensors(one)


def require_looked_at(sites: Sequence[str], **given: Any) -> None:
    """Refuse an argument that is by site and names one that is not looked at."""
    for name, by_site in given.items():
        for site in by_site if isinstance(by_site, Mapping) else ():
            if site not in sites:
                raise SiteError(f"{name}= names {site!r}, which is not looked at; {nearest(site, sites)}")


def given_axis(units: Any, site: str, activation: Tensor) -> int | None:
    """The axis that the user named for a site.

    Raises:
        InputError: if the activation has no such axis, or it is that of the rows.
    """
    axis = plain_number(units.get(site) if isinstance(units, dict) else units)
    if axis is None:
        return None
    if isinstance(axis, bool) or not isinstance(axis, int) or not -activation.ndim < axis < activation.ndim or not axis:
        raise InputError(
            f"units= says that axis {axis!r} of {site!r} holds the units, and its activation is "
            f"{tuple(activation.shape)}, of which axis 0 are the rows"
        )
    return axis if axis < 0 else axis - activation.ndim
