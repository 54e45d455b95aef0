"""Directions of activations as interventions: taken out, or held at a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError
from tdhook_rl.latent.placed_vectors import PlacedVectors, as_vectors
from tdhook_rl.latent.steering_vector import SteeringVector
from tdhook_rl.latent.strength import BoundSteered, Strength, place_strength, require_conditions
from tdhook_rl.method import Binder, Method
from tdhook_rl.sites.numbers import in_dtype, is_whole
from tdhook_rl.sites.rows import rows_of, with_rows
from tdhook_rl.sites.runtime import Runtime
from tdhook_rl.sites.vectors import placed_shape


@dataclass(frozen=True, eq=False)
class DirectionalAblation(Method):
    """Take the component along a direction out of the output of modules (Arditi et al. 2024).

    Args:
        directions: for each module path a vector of the shape of the module's features, or of the channels of maps,
            which have a component in each place; its length does not matter. Or one :class:`SteeringVector` or more,
            which know their paths.
        name: the prefix of the controls ``"<name>.<path>"`` (the unit vectors).
        when: in which rows it acts, as of :class:`SteeringVectors`.
        steered_key: the root of the result key.

    Entries that are infinite, such as the logits of closed actions, take no part and stay as they are. With ``when=``
    it writes ``(steered_key, name)``: in which rows it acted (batch, bool).

    Raises:
        InputError: if a direction is zero, not finite, or does not fit the module's features.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> with DirectionalAblation({"0": torch.tensor([0.0, 2.0, 0.0])}).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))
        >>> data["output"][:, 1].abs().max() < 1e-6
        tensor(True)
    """

    observes = False

    directions: Mapping[str, Tensor | SteeringVector] | SteeringVector | Sequence[SteeringVector]
    name: str = "ablation"
    when: Any = None
    steered_key: str = "steered"

    def __post_init__(self) -> None:
        require_conditions(self.when)
        object.__setattr__(self, "directions", as_vectors(self.directions, "directions"))

    def bind(self, binder: Binder) -> BoundSteered | None:
        return _place(binder, self, binder.control(f"{self.name}.value", 0.0))


@dataclass(frozen=True, eq=False)
class DirectionClamping(Method):
    """Hold the component along a direction at a value, whatever the input.

    Args:
        directions: as of :class:`DirectionalAblation`.
        value: the component, in units of the unit vector; the control ``"<name>.value"`` changes it while running.
        name: the prefix of the controls.
        when: in which rows it acts, as of :class:`SteeringVectors`.
        steered_key: the root of the result key.

    With ``when=`` it writes ``(steered_key, name)``: in which rows it acted (batch, bool).

    Raises:
        InputError: if a direction is zero, not finite, or does not fit the module's features.

    Example:
        >>> from tensordict import TensorDict
        >>> net = nn.Sequential(nn.Linear(4, 3))
        >>> with DirectionClamping({"0": torch.tensor([0.0, 2.0, 0.0])}, value=1.5).prepare(net) as hooked:
        ...     data = hooked(TensorDict({"input": torch.randn(5, 4)}, batch_size=5))
        >>> torch.allclose(data["output"][:, 1], torch.tensor(1.5))
        True
    """

    observes = False

    directions: Mapping[str, Tensor | SteeringVector] | SteeringVector | Sequence[SteeringVector]
    value: float
    name: str = "clamping"
    when: Any = None
    steered_key: str = "steered"

    def __post_init__(self) -> None:
        require_conditions(self.when)
        object.__setattr__(self, "directions", as_vectors(self.directions, "directions"))

    def bind(self, binder: Binder) -> BoundSteered | None:
        return _place(binder, self, binder.control(f"{self.name}.value", float(self.value)))


def _place(binder: Binder, method: DirectionalAblation | DirectionClamping, value: str) -> BoundSteered | None:
    strength, bound = place_strength(binder, method.name, method.when, method.steered_key)
    directions: PlacedVectors = method.directions  # type: ignore[assignment]
    for path in directions:
        if not isinstance(path, str):
            raise InputError(
                f"directions= names {path!r}: a direction is taken out or held in what a module returns, so give its "
                "path alone"
            )
    directions.require_fit(binder.root)
    for path, direction in directions.items():
        direction = numbers(direction, f"the direction for {path!r}")
        if not direction.ndim:
            raise InputError(f"the direction for {path!r} has the shape of the module's features, got one number")
        if not direction.is_floating_point():
            direction = direction.to(torch.get_default_dtype())  # the unit vector has fractions
        norm = direction.double().norm()
        if not bool(torch.isfinite(norm)) or float(norm) == 0:
            raise InputError(f"the direction for {path!r} must be finite and not zero; its norm is {float(norm)}")
        for site in binder.intervention_sites(path):
            unit = (direction.double() / norm).to(direction.dtype)
            control = binder.control(f"{method.name}.{site.name}", unit)
            binder.on_output(site, _ComponentHook(binder.runtime, site.name, control, value, strength))
    return bound


class _ComponentHook:
    """Forward hook that sets the component of an output along a unit vector."""

    def __init__(self, runtime: Runtime, site: str, direction: str, value: str, strength: Strength) -> None:
        self.runtime = runtime
        self.site = site
        self.direction = direction
        self.value = value
        self.strength = strength

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> Any:
        self.runtime.intervene_at(self.site)
        value, disguise = rows_of(output, module, self.site, self.runtime, exact=self.strength.by_row)
        # Of whole numbers what comes out may be whole; components of them are not.
        tensor = value.double() if is_whole(value) else value
        unit = in_dtype(self.runtime.held[self.direction], tensor, "the direction", self.site, factor=True)
        wanted = in_dtype(self.runtime.held[self.value], tensor, "the component", self.site)
        features: int | None = module._hooked_features  # type: ignore[assignment]
        unit = unit.reshape(placed_shape(unit.shape, tensor, features, self.runtime, self.site, "direction"))
        # What it does not tell apart, such as the places of a map, has a component each.
        dims = [dim for dim in range(-unit.ndim, 0) if unit.shape[dim] == tensor.shape[dim]]
        component = (tensor.masked_fill(tensor.isinf(), 0) * unit).sum(dims, keepdim=True)
        changed = self.strength.changed(tensor, tensor + (wanted - component) * unit, self.site)
        changed = in_dtype(changed, value, "what is left of the output", self.site)
        return with_rows(output, changed, module, disguise)
