"""What a probe is asked for beyond a key: what will be the case some steps ahead, or what will be returned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import Checked, require_counts
from tdhook_rl.arguments.keys import reward_key
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.probes.splits import EPISODE

_DONE: tuple[NestedKey, ...] = (("next", "done"), ("next", "terminated"), ("next", "truncated"))


@dataclass(frozen=True)
class Future(metaclass=Checked):
    """The value of something some steps ahead in the same trajectory.

    Rows whose trajectory ends before are left out; those whose future has not been collected yet wait for it.

    Args:
        what: a key, such as ``"action"`` or ``("next", "reward")``, or a function of the batch.
        steps: how many steps ahead, 1 or more.

    Example:
        >>> Future("action", 3)
        Future(what='action', steps=3)
    """

    what: Any
    steps: int

    def __post_init__(self) -> None:
        require_counts(steps=self.steps)


@dataclass(frozen=True, kw_only=True)
class Return(metaclass=Checked):
    """The discounted sum of the rewards from here to the end of the trajectory, as it was collected.

    An end by a time limit counts as an end. Rows of trajectories that have not ended yet wait.

    Args:
        gamma: the discount.
        reward: the key of the reward, or a function of the batch. Where ``MultiStep`` has put sums of several steps in
            the place of rewards, those that it keeps beside them are read.
    """

    gamma: float = 1.0
    reward: Any = ("next", "reward")

    def __post_init__(self) -> None:
        if not 0 <= self.gamma <= 1:
            raise InputError(f"a discount lies between 0 and 1, got gamma={self.gamma!r}")


def require_concepts(concepts: Mapping[str, Any]) -> None:
    """Refuse concepts of which there are none, without a name, or of what is no key and no function.

    Raises:
        InputError: that names it.
    """
    if not concepts:
        raise InputError("concepts= names what is to be read: there is none")
    for name, one in concepts.items():
        what = one.what if isinstance(one, Future) else one.reward if isinstance(one, Return) else one
        if not name or not (callable(what) or (isinstance(what, NestedKey) and len(what))):
            raise InputError(
                "concepts= has a key, a function of the batch, a Future or a Return under each name, and "
                f"{what!r:.80} under {name!r}"
            )


def read_of_row(concept: Any, data: TensorDictBase) -> Any:
    """The key, or the function, that a concept is made of in a batch."""
    if isinstance(concept, Return):
        return concept.reward if callable(concept.reward) else reward_key(data, concept.reward)
    return concept.what if isinstance(concept, Future) else concept


def read_label(what: Any, data: TensorDictBase) -> Tensor:
    """The entry or the function's value, ``(*batch, ...)``, detached.

    Raises:
        MissingKeyError: if the batch has no such entry.
        InputError: for anything but a tensor with the batch shape first.
    """
    name = getattr(what, "__name__", type(what).__name__) if callable(what) else repr(what)
    value = asked(what, data, what=f"the concept {name}", reads_only=True) if callable(what) else data.get(what, None)
    if value is None:
        raise MissingKeyError(
            f"a concept reads {name}, which the batch lacks; {nearest(str(what), map(str, data.keys(True, True)))}"
        )
    batch = data.batch_size
    if not isinstance(value, Tensor) or value.shape[: len(batch)] != batch or value.is_complex():
        found = f"{tuple(value.shape)} ({value.dtype})" if isinstance(value, Tensor) else type(value).__name__
        raise InputError(f"a concept reads {name}: {found}, expected real numbers for the batch {tuple(batch)}")
    if not value.shape[len(batch) :].numel():
        raise InputError(f"a concept reads {name}: {tuple(value.shape)}, which holds no label of a row")
    return value.detach()


def label_columns(value: Tensor, data: TensorDictBase) -> Tensor:
    """``(rows, places or 1, columns)``, of ``(*batch)``, ``(*batch, columns)`` or ``(*batch, *places, columns)``."""
    own = value.shape[len(data.batch_size) :]
    flat = value.reshape(data.batch_size.numel(), -1).cpu()
    return flat[:, None] if len(own) <= 1 else flat.reshape(data.batch_size.numel(), own[:-1].numel(), own[-1])


def course_of(data: TensorDictBase) -> dict[str, Tensor]:
    """Which trajectory each row is of, where it ends, and the step in it where that is counted: ``(rows,)`` each.

    Raises:
        MissingKeyError: if nothing says which rows follow each other, or where trajectories end.
    """
    number = data.get(EPISODE, data.get("traj_ids", None))
    if number is None:
        raise MissingKeyError(
            f"a future is asked for, and nothing says which rows follow each other: the batch lacks {EPISODE!r}, which "
            "collectors write"
        )
    ends = [
        one.reshape(data.batch_size.numel(), -1).bool().any(1)
        for key in _DONE
        if (one := data.get(key, None)) is not None
    ]
    if not ends:
        raise MissingKeyError(f"a future is asked for, and nothing says where trajectories end: {_DONE[0]!r}")
    found = {
        "trajectory": number.reshape(data.batch_size.numel(), -1)[:, 0].cpu(),
        "done": torch.stack(ends).any(0).cpu(),
    }
    count = data.get("step_count", None)
    return found if count is None else found | {"step": count.reshape(data.batch_size.numel(), -1)[:, 0].cpu()}


@dataclass(frozen=True)
class Trajectory:
    """Rows that lie one after the other: which trajectory each is of, and where these end.

    Attributes:
        stretch: ``(rows,)``, the number of the stretch of consecutive rows, ascending.
        ended: ``(rows,)``, whether it goes on to the end of its trajectory.
        closed: ``(rows,)``, whether nothing more of it will come: so it is too where rows after it are missing.
    """

    stretch: Tensor
    ended: Tensor
    closed: Tensor

    @classmethod
    def of(cls, number: Tensor, count: Tensor | None, done: Tensor, apart: Tensor | None = None) -> Trajectory:
        """From rows that are sorted by trajectory and time.

        Args:
            number: ``(rows,)``, of the trajectory.
            count: ``(rows,)``, the step in it, where it is known: rows that are missing cut it.
            done: ``(rows,)``, whether the trajectory ends with this row.
            apart: ``(rows,)``, which rows do not go on from those before them, where something else tells.
        """
        new = torch.ones_like(done)
        new[1:] = (number[1:] != number[:-1]) | done[:-1]
        if count is not None:
            new[1:] |= count[1:] != count[:-1] + 1
        new = new if apart is None else new | apart
        stretch = new.long().cumsum(0) - 1
        ended = torch.zeros(int(stretch[-1]) + 1 if len(stretch) else 0, dtype=torch.bool)
        ended[stretch[done]] = True
        closed = ended.clone()
        # Later rows of the same number mean that what is missing between will not come any more.
        closed[stretch[:-1][new[1:] & (number[1:] == number[:-1])]] = True
        return cls(stretch, ended[stretch], closed[stretch])

    def ahead(self, steps: int) -> tuple[Tensor, Tensor]:
        """Where the row so many steps ahead is, and which rows have one: ``(rows,)`` both."""
        place = torch.arange(len(self.stretch)) + steps
        inside = place < len(self.stretch)
        place = place.clamp_max(max(len(self.stretch) - 1, 0))
        return place, inside & (self.stretch[place] == self.stretch)

    def returns(self, rewards: Tensor, gamma: float) -> Tensor:
        """The discounted sums to the end of each stretch: ``(rows, ...)``, float64."""
        found = rewards.double().clone()
        if not len(found):
            return found
        # A stretch a row of a table: one step of time is one operation.
        _, lengths = self.stretch.unique_consecutive(return_counts=True)
        start = lengths.cumsum(0) - lengths
        for step in range(int(lengths.max()) - 2, -1, -1):
            here = start[lengths > step + 1] + step
            found[here] += gamma * found[here + 1]
        return found
