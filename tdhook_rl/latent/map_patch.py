"""A square of a convolution's maps set to a value: what the network is told is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from tdhook_rl.errors import InputError
from tdhook_rl.latent.strength import BoundSteered, Source, Strength, is_key, place_strength, require_conditions
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.numbers import in_dtype, is_whole
from tdhook_rl.sites.row_values import spread
from tdhook_rl.sites.rows import rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.sites.vectors import unit_axis


@dataclass(frozen=True, eq=False)
class MapPatch(Method):
    """Set a square of the maps of some channels: retarget a policy to a place (Mini et al. 2023).

    Args:
        path: a module whose output has maps, rows and columns after the channels.
        square: the row and column of the map, counted from 0, which become the control ``"<name>.square"``; or the
            TensorDict key of a pair for each row (batch + 2, integers).
        value: a number, which becomes the control ``"<name>.value"``; or the channel's own ``"mean"`` or ``"max"``
            over its map, in each row.
        channels: which, counted from 0; all by default.
        name: the prefix of the controls.
        when: in which rows it acts, as of :class:`SteeringVectors`.
        steered_key: the root of the result key.

    With ``when=`` it writes ``(steered_key, name)``: in which rows it acted (batch, bool).

    Raises:
        SiteError: if the path matches nothing.
        InputError: if the output of the module has no maps, or no such square or channel.
        MissingKeyError: if a per-row key is absent.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3))
        >>> with MapPatch("0", square=(0, 2), value=5.5, channels=[1]).prepare(net) as hooked:
        ...     maps = hooked(TensorDict({"input": torch.zeros(3, 1, 6, 6)}, batch_size=3))["output"]
        >>> maps[:, 1, 0, 2].tolist()
        [5.5, 5.5, 5.5]
    """

    observes = False

    path: str
    square: tuple[int, int] | NestedKey
    value: float | Literal["mean", "max"]
    channels: Sequence[int] | None = None
    name: str = "map_patch"
    when: Any = None
    steered_key: str = "steered"

    def __post_init__(self) -> None:
        require_conditions(self.when)
        if not is_key(self.square) and (len(self.square) != 2 or min(self.square) < 0):  # type: ignore[type-var]
            raise InputError(f"square= is a row and a column, counted from 0, or a key, got {self.square!r}")
        if self.channels is not None and (len(self.channels) == 0 or min(self.channels) < 0):
            raise InputError(f"channels= are numbers from 0, got {self.channels!r:.80}")

    def bind(self, binder: Binder) -> BoundSteered | None:
        strength, bound = place_strength(binder, self.name, self.when, self.steered_key)
        if is_key(self.square):
            key = binder.read_row(self.square)  # type: ignore[arg-type]
            square = Source(binder.runtime, f"the per-row square {key!r}", row=key)
        else:
            control = binder.control(f"{self.name}.square", torch.tensor(self.square))
            square = Source(binder.runtime, f"square= of {self.name!r}", control=control)
        value: str = self.value  # type: ignore[assignment]
        if not isinstance(self.value, str):
            value = binder.control(f"{self.name}.value", torch.tensor(float(self.value), dtype=torch.float64))
        channels = None if self.channels is None else list(self.channels)
        for site in binder.intervention_sites(self.path):
            binder.on_output(site, MapHook(binder.runtime, site.name, square, value, channels, strength))
        return bound


class MapHook:
    """Forward hook that sets a square of maps."""

    def __init__(
        self,
        runtime: Runtime,
        site: str,
        square: Source,
        value: str,
        channels: list[int] | None,
        strength: Strength,
    ) -> None:
        self.runtime = runtime
        self.site = site
        self.square = square
        self.value = value  # the name of a control, or which of the channel's numbers
        self.channels = channels
        self.strength = strength

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        exact = self.strength.by_row or self.square.by_row
        maps, disguise = rows_of(output, module, self.site, self.runtime, exact)
        axis = unit_axis(maps, module._hooked_features, self.runtime, self.site, "square of maps")  # type: ignore[arg-type]
        if axis != -3:
            raise InputError(
                f"{self.site!r} gives {tuple(maps.shape)}, which are no maps of rows and columns after channels: "
                "name a convolution, or an activation behind one"
            )
        here = self._at_square(maps)
        if self.channels is not None:
            count = maps.shape[-3]
            if max(self.channels) >= count:
                raise InputError(f"channel {max(self.channels)} of {self.site!r} is set, which has {count}, from 0")
            places = torch.tensor(self.channels, device=maps.device)
            chosen = torch.zeros(count, dtype=torch.bool, device=maps.device).index_fill(0, places, True)
            here = here & chosen[:, None, None]
        changed = self.strength.changed(maps, torch.where(here, self._value(maps), maps), self.site)
        return with_rows(output, changed, module, disguise)

    def _value(self, maps: Tensor) -> Tensor:
        if self.value == "mean":
            mean = (maps.double() if is_whole(maps) else maps).mean((-2, -1), keepdim=True)
            return in_dtype(mean, maps, "the mean of a map", self.site)
        if self.value == "max":
            return maps.amax((-2, -1), keepdim=True)
        return in_dtype(self.runtime.held[self.value], maps, "the value of a square", self.site)

    def _at_square(self, maps: Tensor) -> Tensor:
        """Where the square is: rows and columns, after the batch and channels where it differs by row."""
        square = self.square.read(self.site).to(maps.device)
        height, width = maps.shape[-2:]
        if square.shape[-1:] != (2,) or square.is_floating_point() or square.dtype == torch.bool:
            raise InputError(
                f"{self.square.what} is {square.dtype} of shape {tuple(square.shape)}: give a row and a column for "
                "each row of the batch, as integers"
            )
        row, column = square.unbind(-1)
        if self.square.by_row:
            row, column = (spread(one, maps, self.square.what, self.site) for one in (row, column))
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
        if not torch.compiler.is_compiling() and self.runtime.level < 0 and not bool(inside.all()):
            raise InputError(
                f"{self.square.what} names a square that {self.site!r} does not have, whose maps have {height} rows "
                f"and {width} columns, counted from 0"
            )
        rows, columns = (torch.arange(size, device=maps.device) for size in (height, width))
        return (rows[:, None] == row) & (columns == column)
