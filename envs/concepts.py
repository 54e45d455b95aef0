"""What a label means, whether the task needs it, and what an intervention on it changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Binary, Bounded, Categorical, TensorSpec, Unbounded

from tdhook_rl.errors import InputError

#: Needed by the task; present but not needed; not a property that a network has a reason to represent.
Role = Literal["needed", "unneeded", "control"]


@dataclass(frozen=True)
class Concept:
    """The declaration of one label.

    Args:
        role: ``"needed"``, ``"unneeded"`` or ``"control"``; one for each element where they differ.
        meaning: in words.
        classes: how many values it has, from 0; ``None`` for a real number.
        size: the elements of a vector of labels; ``None`` for a single label.
        moves: the state variables that an intervention on it sets; empty if it cannot be changed alone.
        follows: other concepts that may change with it.

    Example:
        >>> Concept("needed", "which corner pays", classes=2).spec(torch.Size([3])).shape
        torch.Size([3])
    """

    role: Role | Sequence[Role]
    meaning: str
    _: KW_ONLY
    classes: int | None = None
    size: int | None = None
    moves: tuple[str, ...] = ()
    follows: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for role in self.roles:
            if role not in get_args(Role):
                raise InputError(f"a concept is {', '.join(get_args(Role))}; got role {role!r}")
        if len(self.roles) != (self.size or 1):
            raise InputError(f"{len(self.roles)} roles for {self.size or 1} elements")

    @property
    def roles(self) -> tuple[Role, ...]:
        """The role of each element."""
        return (self.role,) * (self.size or 1) if isinstance(self.role, str) else tuple(self.role)  # type: ignore[return-value]

    def spec(self, shape: Sequence[int]) -> TensorSpec:
        """The spec of the label for a batch shape."""
        full = (*shape, *(() if self.size is None else (self.size,)))
        if self.classes is None:
            return Unbounded(shape=full)
        if self.size is None:
            return Categorical(self.classes, shape=full)
        if self.classes == 2:
            return Binary(n=self.size, shape=full, dtype=torch.long)
        return Bounded(0, self.classes - 1, shape=full, dtype=torch.long)

    def check(self, name: str, value: Tensor) -> None:
        """Refuse values outside the classes.

        Raises:
            InputError: naming the range.
        """
        if self.classes is not None and bool(((value < 0) | (value >= self.classes)).any()):
            found = f"got {int(value.min())} to {int(value.max())}"
            if self.classes == 2:
                raise InputError(f"{name}: 0 or 1, {found}")
            raise InputError(f"{name}s go from 0 to {self.classes - 1}, {found}")


#: Seen nowhere: what a probe finds of it is leakage between the states of one episode.
EPISODE_COIN = Concept("control", "a coin thrown at the start of the episode", classes=2, moves=("episode_coin",))


def state_variables(*concepts: str, free: Sequence[str] = ()) -> dict[str, NestedKey]:
    """Where the variables of a state lie: those that are concepts, those that are not, and the steps so far.

    Example:
        >>> state_variables("cell", free=["maze"])
        {'cell': ('concept', 'cell'), 'maze': 'maze', 'elapsed': 'elapsed'}
    """
    return {name: ("concept", name) for name in concepts} | {name: name for name in (*free, "elapsed")}
