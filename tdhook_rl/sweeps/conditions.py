"""What a sweep compares: vectors, strengths, and controls."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import shown
from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.arguments.tensors import numbers
from tdhook_rl.errors import InputError
from tdhook_rl.latent.steering_vector import SteeringVector

#: Where something is added: a module path, or a pair of a path and the key of an entry that it writes.
Place = Any

RANDOM, SHUFFLED = "random", "shuffled"


@dataclass(frozen=True)
class Condition:
    """One way in which all episodes are played.

    Args:
        vector: the name of the vector; empty where nothing is steered.
        alpha: the strength, in units of the vector.
        control: what stands in for the vector: ``"random"`` for a direction of its norm, ``"shuffled"`` for what labels
            dealt out by chance give; empty for the vector itself.
        draw: the number of the control; of what is not steered, 1 for its repetition.
    """

    vector: str = ""
    alpha: float = 0.0
    control: str = ""
    draw: int = 0


#: Not steered, and the same again: what differs between these two is not steering.
BASELINE, REPEATED = Condition(), Condition(draw=1)


@dataclass(frozen=True, kw_only=True)
class Direction:
    """What is added where, in units of 1, and what stands in for it.

    Args:
        name: of the vector.
        parts: the tensor of each place; all are added together.
        controls: of each kind, for each place ``(draws, *features)``.
        given: the steering vectors that it consists of, where it does.
    """

    name: str
    parts: Mapping[Place, Tensor]
    controls: Mapping[str, Mapping[Place, Tensor]]
    given: Sequence[SteeringVector] = ()

    @property
    def places(self) -> tuple[Place, ...]:
        """Where something is added."""
        return tuple(self.parts)

    @property
    def norm(self) -> float:
        """Of all parts together."""
        return math.sqrt(sum(float(part.double().square().sum()) for part in self.parts.values()))

    def part(self, condition: Condition, place: Place) -> Tensor:
        """What a condition adds at a place, before its strength."""
        if not condition.control:
            return self.parts[place]
        return self.controls[condition.control][place][condition.draw]


def place_of(asked: Condition, conditions: Sequence[Condition]) -> int | None:
    """Where a condition is; unless it is there, the one whose strength is the same but for rounding.

    0.3 is what 0.1 + 0.2 gives, and what float32 makes of it.
    """
    near = [
        (abs(one.alpha - asked.alpha), place)
        for place, one in enumerate(conditions)
        if math.isclose(one.alpha, asked.alpha, rel_tol=1e-6) and replace(one, alpha=asked.alpha) == asked
    ]
    return min(near)[1] if near else None


def directions_of(vectors: Any, controls: int, seed: int) -> dict[str, Direction]:
    """Named directions with their controls.

    Args:
        vectors: a :class:`SteeringVector`, several, or by name a vector, several that act together, or ``{place:
            tensor}``.
        controls: how many of each kind.
        seed: of the random ones.

    Raises:
        InputError: for anything else, no vector at all, or one that is zero.
    """
    named = {name: _parts(name, given) for name, given in _named(vectors).items()}
    found = {}
    for number, (name, (parts, given)) in enumerate(named.items()):
        norms = {place: float(part.double().norm()) for place, part in parts.items()}
        broken = next((place for place, norm in norms.items() if not math.isfinite(norm)), None)
        if broken is not None:
            raise InputError(f"the vector {name!r} has NaN or infinite entries at {broken!r}")
        if not any(norms.values()):
            raise InputError(f"the vector {name!r} is zero: there is nothing to add")
        generator = torch.Generator().manual_seed(stream_of(seed, "random vectors", number))
        kinds = {RANDOM: _random(parts, controls, generator)} if controls else {}
        shuffled = _shuffled(parts, given, controls)
        kinds |= {SHUFFLED: shuffled} if shuffled else {}
        found[name] = Direction(name=name, parts=parts, controls=kinds, given=given)
    return found


def conditions_of(directions: Mapping[str, Direction], alphas: Sequence[float]) -> list[Condition]:
    """Not steered, again not steered, and every vector and control at every strength but 0."""
    strengths = [float(alpha) for alpha in alphas]
    wrong = next((alpha for alpha in strengths if not math.isfinite(alpha)), None)
    if wrong is not None:
        raise InputError(f"alphas= has {wrong}: strengths are finite numbers, in units of the vector")
    strengths = sorted({alpha for alpha in strengths if alpha != 0})
    if not strengths:
        raise InputError(f"alphas={list(alphas)!r} has no strength but 0, which is always played: give at least one")
    found = [BASELINE, REPEATED]
    for direction in directions.values():
        found += [Condition(direction.name, alpha) for alpha in strengths]
        for kind, parts in direction.controls.items():
            draws = len(next(iter(parts.values())))
            found += [Condition(direction.name, alpha, kind, draw) for draw in range(draws) for alpha in strengths]
    return found


def _named(vectors: Any) -> dict[str, Any]:
    if isinstance(vectors, SteeringVector):
        vectors = [vectors]
    if isinstance(vectors, Mapping) and vectors and all(isinstance(name, str) and name for name in vectors):
        return dict(vectors)
    if isinstance(vectors, Sequence) and vectors and all(isinstance(one, SteeringVector) for one in vectors):
        names = [str(one.path) for one in vectors]
        again = next((name for name in names if names.count(name) > 1), None)
        if again is not None:
            raise InputError(
                f"two of the vectors act at {again!r}: name them, as in {{'first': vector, 'second': other}}"
            )
        return dict(zip(names, vectors, strict=True))
    raise InputError(
        f"vectors= is a SteeringVector, several, or {{name: vector}} with at least one, got {vectors!r:.80}"
    )


def _parts(name: str, given: Any) -> tuple[dict[Place, Tensor], list[SteeringVector]]:
    """The tensors by place, and the steering vectors that they come from."""
    if isinstance(given, SteeringVector):
        given = [given]
    if isinstance(given, Mapping) and given:
        parts = {place: one.vector if isinstance(one, SteeringVector) else one for place, one in given.items()}
        found = [one for one in given.values() if isinstance(one, SteeringVector)]
        placed = {place: _fractional(part, f"the vector {name!r} at {place!r}") for place, part in parts.items()}
        return placed, found if len(found) == len(parts) else []
    if isinstance(given, Sequence) and given and all(isinstance(one, SteeringVector) for one in given):
        if len({one.path for one in given}) == len(given):
            return {one.path: one.vector.detach() for one in given}, list(given)
        raise InputError(f"two of the vectors of {name!r} act at one place: add them up")
    # A first try is {path: tensor}, which is one vector without a name.
    named = f": {{'a name': {{{name!r}: tensor}}}} acts at {name!r}" if isinstance(given, Tensor) else ""
    raise InputError(
        f"the vector {name!r} is a SteeringVector, several at different places, or {{path: tensor}}, got "
        f"{shown(given)}{named}"
    )


def _fractional(part: Any, what: str) -> Tensor:
    """A vector in a dtype in which those that it is compared with have their fractions."""
    part = numbers(part, what)
    return part if part.is_floating_point() else part.to(torch.get_default_dtype())


def _random(parts: Mapping[Place, Tensor], count: int, generator: torch.Generator) -> dict[Place, Tensor]:
    """Of the norm of each part; what is one vector at several places is one random vector there too."""
    found: dict[Place, Tensor] = {}
    for place, part in parts.items():
        same = next((one for one in found if torch.equal(parts[one].flatten(), part.flatten())), None)
        if same is not None:
            found[place] = found[same].reshape(count, *part.shape)
            continue
        noise = torch.randn(count, *part.shape, generator=generator, dtype=torch.float64)
        norms = noise.reshape(count, -1).norm(dim=1).reshape(count, *(1,) * part.ndim)
        found[place] = (noise / norms * float(part.double().norm())).to(part.dtype).to(part.device)
    return found


def _shuffled(parts: Mapping[Place, Tensor], given: Sequence[SteeringVector], count: int) -> dict[Place, Tensor]:
    """What the same extraction gives for labels dealt out by chance, as long as it comes out.

    At the length of the vector it could be the vector itself: where all pairs differ in one direction, so do their
    means with any signs.
    """
    made = [one.shuffled for one in given]
    draws = min([count, *(0 if one is None else len(one) for one in made)]) if made else 0
    if not draws:
        return {}
    return {
        place: one[:draws].to(parts[place].dtype) for place, one in zip(parts, made, strict=True) if one is not None
    }
