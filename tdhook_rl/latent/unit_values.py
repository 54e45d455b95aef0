"""Units of modules set to values: ablated, held at a mean, or switched on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError
from tdhook_rl.latent.strength import BoundSteered, Strength, place_strength, require_conditions
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.numbers import in_dtype
from tdhook_rl.sites.rows import rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.sites.vectors import unit_axis


@dataclass(frozen=True, eq=False)
class UnitValues(Method):
    """Set units of modules, or channels of their maps, to values (Morcos et al. 2018).

    Args:
        units: for each module path the units, counted from 0, or a value for each, ``{path: {3: 0.0, 7: 1.5}}``.
            A channel is set all over its map, a feature in all tokens, a unit in all agents.
        value: what units without a value of their own are set to: 0 ablates them; ``{path: activation}`` gives each
            its entry of an activation (units), such as the mean over states (mean ablation):
            ``hooked.annotate(states)["cache", path].mean(0)`` of an ``ActivationCaching``.
        name: the prefix of the controls ``"<name>.<path>"`` (the values, in the order of the units).
        when: in which rows it acts, as of :class:`SteeringVectors`.
        steered_key: the root of the result key.

    With ``when=`` it writes ``(steered_key, name)``: in which rows it acted (batch, bool).

    Raises:
        SiteError: if a path matches nothing.
        InputError: if a module has no such unit, or nothing says in which dimension its units are.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
        >>> with UnitValues({"0": {1: 2.5}}).prepare(net) as hooked:
        ...     hooked(TensorDict({"input": torch.randn(2, 4)}, batch_size=2))["output"][:, 1].tolist()
        [2.5, 2.5]
    """

    observes = False

    units: Mapping[str, Sequence[int] | Mapping[int, float]]
    value: float | Mapping[str, Tensor] = 0.0
    name: str = "units"
    when: Any = None
    steered_key: str = "steered"

    def __post_init__(self) -> None:
        require_conditions(self.when)
        if len(self.units) == 0:
            raise InputError("UnitValues takes units={path: [units]}: there are none")
        for path, units in self.units.items():
            numbers = list(units)
            if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
                raise InputError(f"the units of {path!r} are numbers from 0, each once, got {numbers!r:.80}")
            self._values(path)

    def _values(self, path: str) -> Tensor:
        """What the units of a path are set to, in their order."""
        units = self.units[path]
        if isinstance(units, Mapping):
            found = torch.tensor([float(one) for one in units.values()], dtype=torch.float64)
        elif isinstance(self.value, Mapping):
            if path not in self.value:
                raise InputError(f"value= has no activation for {path!r}, of which units={list(units)!r:.80} are set")
            whole = numbers(self.value[path], f"value= for {path!r}")
            if whole.ndim != 1 or max(units) >= len(whole):
                raise InputError(
                    f"value= gives {path!r} an activation of shape {tuple(whole.shape)}: it has one number for each "
                    f"unit, at least {max(units) + 1} of them"
                )
            found = whole.detach()[list(units)].double()
        else:
            found = torch.full((len(units),), float(self.value), dtype=torch.float64)
        if not bool(torch.isfinite(found).all()):
            raise InputError(f"the values of the units of {path!r} are not finite")
        return found

    def bind(self, binder: Binder) -> BoundSteered | None:
        strength, bound = place_strength(binder, self.name, self.when, self.steered_key)
        for path, units in self.units.items():
            for site in binder.intervention_sites(path):
                control = binder.control(f"{self.name}.{site.name}", self._values(path))
                hook = UnitHook(binder.runtime, site.name, [int(unit) for unit in units], control, strength)
                binder.on_output(site, hook)
        return bound


class UnitHook:
    """Forward hook that sets units to the values of a control."""

    def __init__(self, runtime: Runtime, site: str, units: list[int], control: str, strength: Strength) -> None:
        self.runtime = runtime
        self.site = site
        self.units = units
        self.control = control
        self.strength = strength

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        value, disguise = rows_of(output, module, self.site, self.runtime, exact=self.strength.by_row)
        axis = unit_axis(value, module._hooked_features, self.runtime, self.site, "set of units")  # type: ignore[arg-type]
        count, after = value.shape[axis], (1,) * (-axis - 1)
        if max(self.units) >= count:
            raise InputError(
                f"unit {max(self.units)} of {self.site!r} is set, but its output of shape {tuple(value.shape)} has "
                f"{count} units, counted from 0"
            )
        places = torch.tensor(self.units, device=value.device)
        wanted = in_dtype(self.runtime.held[self.control], value, "the value of a unit", self.site)
        chosen = torch.zeros(count, dtype=torch.bool, device=value.device).index_fill(0, places, True)
        values = torch.zeros(count, dtype=value.dtype, device=value.device).index_copy(0, places, wanted)
        new = torch.where(chosen.reshape(-1, *after), values.reshape(-1, *after), value)
        return with_rows(output, self.strength.changed(value, new, self.site), module, disguise)
