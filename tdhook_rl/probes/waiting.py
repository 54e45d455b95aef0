"""Rows that wait until their future has been collected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.probes.quantities import Future, Return, Trajectory


class Waiting:
    """Keeps the rows of trajectories that go on, and hands each out when what is asked of it is known.

    Args:
        asked: by name what is asked.
        most: so many rows wait at most; of more the oldest are left out.

    Attributes:
        left_out: by name how many rows were: their trajectory ended before, or too many were waiting.

    Example:
        >>> waiting = Waiting({"next": Future("x", 1)}, most=10)
        >>> rows = {"trajectory": torch.tensor([0, 0, 0]), "done": torch.tensor([False, False, False]),
        ...         ("asked", "next"): torch.tensor([[5], [6], [7]]), "row": torch.arange(3)}
        >>> found, labels = waiting.push(rows)["next"]
        >>> found["row"].tolist(), labels.tolist(), len(waiting)
        ([0, 1], [[6], [7]], 1)
    """

    def __init__(self, asked: Mapping[str, Future | Return], most: int) -> None:
        self._asked = dict(asked)
        self._most = most
        self._rows: dict[Any, Tensor] = {}
        self._arrived = 0
        self.left_out = dict.fromkeys(asked, 0)

    def __len__(self) -> int:
        return len(self._rows["done"]) if self._rows else 0

    def emptied(self, other: Waiting) -> Waiting:
        """One without rows, in which those that wait in this one and in another are left out."""
        found = Waiting(self._asked, self._most)
        for column, name in enumerate(self._asked):
            waiting = sum(int(one._rows["open"][:, column].sum()) for one in (self, other) if len(one))
            found.left_out[name] = self.left_out[name] + other.left_out[name] + waiting
        return found

    def push(self, rows: Mapping[Any, Tensor]) -> dict[str, tuple[dict[Any, Tensor], Tensor]]:
        """Add rows, and take out those that are known now.

        Args:
            rows: ``(rows, ...)`` each, those of one trajectory in the order of time: ``"trajectory"``, ``"done"``,
                perhaps ``"step"``, ``("asked", name)`` for each that is asked, and whatever belongs to them.

        Returns:
            by name the rows that are known now, and what was asked of them.
        """
        new = dict(rows)
        new["arrived"] = torch.arange(len(new["done"])) + self._arrived
        self._arrived += len(new["done"])
        new["open"] = torch.ones(len(new["done"]), len(self._asked), dtype=torch.bool)
        if self._rows:
            new = {key: torch.cat([self._rows[key], value]) for key, value in new.items()}
        order = new["trajectory"].argsort(stable=True)
        new = {key: value[order] for key, value in new.items()}
        path = Trajectory.of(new["trajectory"], new.get("step"), new["done"])
        found = {}
        for column, (name, asked) in enumerate(self._asked.items()):
            value, known = self._labels(asked, new["asked", name], path)
            waiting = new["open"][:, column]
            ready = waiting & known
            found[name] = ({key: one[ready] for key, one in new.items()}, value[ready])
            lost = waiting & ~known & path.closed
            self.left_out[name] += int(lost.sum())
            new["open"][:, column] = waiting & ~known & ~path.closed
        kept = new["open"].any(1)
        if int(kept.sum()) > self._most:
            oldest = new["arrived"][kept].sort().values[int(kept.sum()) - self._most]
            dropped = kept & (new["arrived"] < oldest)
            for column, name in enumerate(self._asked):
                self.left_out[name] += int(new["open"][dropped, column].sum())
            kept &= ~dropped
        self._rows = {key: value[kept] for key, value in new.items()}
        return found

    def _labels(self, asked: Future | Return, value: Tensor, path: Trajectory) -> tuple[Tensor, Tensor]:
        if isinstance(asked, Return):
            return path.returns(value, asked.gamma), path.ended
        place, known = path.ahead(asked.steps)
        return value[place], known
