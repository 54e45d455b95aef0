"""Where rows that lie one after the other do not go on from each other, though nothing says that an episode ended.

A batch of episodes that were cut off, laid out row by row, has such places: behind the last step of one environment
comes the first of the next.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

#: What an environment says of each step, and that is no state which it goes on from.
SIGNALS = frozenset(("reward", "done", "terminated", "truncated", "episode_reward"))


class GoingOn:
    """Compares what rows have come to, below ``"next"``, with what others begin from.

    Args:
        rows: how many there are.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._states: dict[NestedKey, tuple[Tensor, Tensor]] = {}

    def add(self, here: slice | Tensor, data: TensorDictBase) -> None:
        """Some more rows, of these numbers."""
        after = data.get("next", None)
        for key, now in after.items(True, True) if isinstance(after, TensorDictBase) else ():
            then = data.get(key, None)
            if _may_go_on(key, then, now):
                none = torch.zeros(self._rows, dtype=torch.long)
                sides = self._states.setdefault(key, (none, none.clone()))
                sides[0][here], sides[1][here] = row_numbers(then), row_numbers(now)

    def other_way(self, rows: Tensor, inside: Tensor, across: Tensor) -> bool:
        """Whether most rows go on with others than those that they should, by a state that tells it.

        Args:
            rows: the numbers of rows.
            inside, across: those that should follow each, and those that may.
        """
        for then, now in self._states.values():
            told, other = (int((now[rows] == then[next_one]).sum()) for next_one in (inside, across))
            if told * 2 < len(rows) < other * 2:
                return True
        return False

    def sides(self, order: Tensor, done: Tensor) -> tuple[Tensor, Tensor] | None:
        """A number of the state that each row begins from, and of that which it has come to; none where nothing tells.

        Args:
            order, done: as of :meth:`breaks`.
        """
        told = [
            (then[order], now[order]) for then, now in self._states.values()
            if int((now[order][:-1] == then[order][1:])[~done[:-1]].sum()) * 2 >= int((~done[:-1]).sum())
        ]  # fmt: skip
        return (sum(then for then, _ in told), sum(now for _, now in told)) if told else None  # type: ignore[return-value]

    def breaks(self, order: Tensor, done: Tensor) -> tuple[Tensor, Tensor]:
        """In some order, which rows do not go on from those before them; and which begin where others broke off.

        Args:
            order: the numbers of the rows.
            done: in this order, behind which of them nothing is to go on.
        """
        broken = torch.zeros(len(order), dtype=torch.bool)
        ends, starts = torch.zeros_like(order), torch.zeros_like(order)
        for then, now in self._states.values():
            then, now = then[order], now[order]
            apart = breaks_of(now[:-1] == then[1:], done[:-1])
            if bool(apart.any()):
                broken[1:] |= apart
                ends, starts = ends + now, starts + then
        if not bool(broken.any()):
            return broken, torch.zeros_like(broken)
        cut = torch.cat([broken[1:], broken.new_ones(1)]) & ~done
        after = torch.cat([done.new_ones(1), done[:-1]])
        begun, times = starts[after].unique(return_counts=True)
        # Where episodes begin in few states, one may have been cut off in such a state: what begins there begins.
        usual = torch.where(after, torch.isin(starts, begun[times > 1]), torch.isin(starts, begun))
        return broken, torch.isin(starts, ends[cut]) & ~usual


def breaks_of(follow: Tensor, done: Tensor) -> Tensor:
    """Where rows do not follow each other though nothing ended, told by what most of them do follow each other in.

    Behind a transform that looks several steps ahead, or where rows lie in no order, nothing tells it.
    """
    most = int((follow & ~done).sum()) * 2 >= int((~done).sum())
    return ~follow & ~done if most else torch.zeros_like(follow)


def _may_go_on(key: NestedKey, then: object, now: object) -> bool:
    if (key if isinstance(key, str) else key[-1]) in SIGNALS or not isinstance(then, Tensor):
        return False
    return isinstance(now, Tensor) and then.shape == now.shape and then.dtype == now.dtype


def row_numbers(value: Tensor) -> Tensor:
    """A number for each row that is the same for the same bits alone, ``(rows,)``, int64.

    Example:
        >>> one, other = row_numbers(torch.tensor([[0.0, 1.0], [0.0, 2.0]])).tolist()
        >>> one == other, one == row_numbers(torch.tensor([[0.0, 1.0]])).item()
        (False, True)
    """
    if not value.numel():
        return torch.zeros(len(value), dtype=torch.long)
    bits = value.detach().cpu().reshape(len(value), -1).contiguous().view(torch.uint8)
    words = torch.nn.functional.pad(bits, (0, -bits.shape[1] % 8)).view(torch.long)
    factors = torch.randint(-(1 << 62), 1 << 62, (words.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    return (words * factors).sum(1)
