"""Which rows of a source follow each other in one trajectory, and in which order they were written."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import InputError
from tdhook_rl.reading.going_on import GoingOn, breaks_of
from tdhook_rl.reading.transforms import Window

#: Where the number of a row's trajectory may be, where its steps are counted, and where its first step is marked.
NUMBERS: tuple[NestedKey, ...] = (("collector", "traj_ids"), "traj_ids", "trajectory", "episode")
COUNTS: tuple[NestedKey, ...] = ("step_count",)
STARTS: tuple[NestedKey, ...] = ("is_init",)
#: Below ``next``, any of which says that a trajectory has ended: data sets of others may lack the first.
ENDS: tuple[str, ...] = ("done", "terminated", "truncated")


@dataclass(frozen=True)
class Written:
    """In which order entries were written.

    Args:
        cursor: the entry that was written first.
        over: whether others were there that have been written over.
        number_key: where the number of a row's trajectory is, if that is known.
        begins: which rows are the first of a trajectory where nothing in them says more.
        turn: where entries have several rows, time last: the place in time of the rows that were written first.
    """

    cursor: int = 0
    over: bool = False
    number_key: NestedKey | None = None
    begins: Tensor | None = None
    turn: int = 0

    def in_time(self, entries: int, rows: int, steps: int) -> Tensor:
        """The numbers of all rows, one line of time after the other.

        Args:
            entries: how many there are.
            rows: of each.
            steps: of each line of time in an entry.

        Example:
            >>> Written(turn=1).in_time(2, 3, 3).tolist()
            [1, 2, 0, 4, 5, 3]
        """
        numbers = torch.arange(entries * rows).reshape(entries, -1, steps)
        return numbers.roll((-self.cursor, -self.turn), (0, 2)).reshape(-1)


@dataclass(frozen=True)
class Courses:
    """Rows trajectory by trajectory, each in the order of time.

    Attributes:
        rows: ``(rows,)``, their numbers in the source.
        stretch: ``(rows,)``, of which trajectory each of these is, ascending from 0.
        ended, begun: ``(trajectories,)``, whether its end, and its beginning, is there.
    """

    rows: Tensor
    stretch: Tensor
    ended: Tensor
    begun: Tensor


class Trajectories:
    """The trajectories of rows that are stored one by one, by the facts of every row that :meth:`keys` names.

    Raises:
        InputError: if nothing says where a trajectory ends.
    """

    def __init__(self, written: Written, facts: TensorDictBase, looking: str, going_on: GoingOn) -> None:
        rows = len(facts)
        self._over = written.over
        # In the order of writing.
        order = torch.arange(rows).roll(-written.cursor)
        number = _flat(facts, (written.number_key, *NUMBERS), order)
        ends = [key for key in facts.keys(True, True) if isinstance(key, tuple) and key[0] == "next"]
        done = _flat(facts, ends, order, merge=True)
        begins = _flat(facts, STARTS, order)
        count = _flat(facts, COUNTS, order)
        if number is None and done is None and begins is None and written.begins is None:
            raise InputError(
                f"{looking} reads rows of one trajectory, and no entry of the buffer says where one ends: store "
                "('next', 'done') or ('collector', 'traj_ids')"
            )
        if number is None:
            lines = torch.zeros(rows, dtype=torch.long)
        else:
            lines = number.unique(return_inverse=True)[1]
        # Trajectory by trajectory, each in the order of writing.
        by_line = lines.sort(stable=True).indices
        line, begun = lines[by_line], torch.zeros(rows, dtype=torch.bool)
        begun[0] = True
        begun[1:] = line[1:] != line[:-1]
        if done is not None:
            begun[1:] |= done[by_line][:-1].bool()
        # Several collectors may number theirs alike, and of rows without numbers several environments may follow.
        stops = torch.cat([begun[1:], begun.new_ones(1)])
        broken, resumed = going_on.breaks(order[by_line], stops)
        begun |= broken
        if number is None and written.begins is not None:
            begun |= written.begins
        if count is not None:
            follow = count[by_line][1:] == count[by_line][:-1] + 1
            begun[1:] |= ~follow if number is None else breaks_of(follow, stops[:-1])  # some steps may not be stored
        if begins is not None:  # what goes on from an earlier batch does not begin
            known = begins[by_line].bool()
            begun |= known
        elif count is not None:
            closed = torch.zeros(rows, dtype=torch.bool) if done is None else done[by_line].bool()
            known = begun & (count[by_line] == first_count(count[by_line], closed, self._over))
        else:
            ended = torch.zeros(rows, dtype=torch.bool)
            if done is not None:  # what was written just before it was an end
                ended[1:] = done[:-1].bool()
            known = begun & (ended[by_line] if self._over else True) & ~resumed
        self._entries = order[by_line]
        self._place = self._entries.argsort()
        self._first = _last_true(begun)
        self._end = rows - 1 - _last_true(torch.cat([begun[1:], begun.new_ones(1)]).flip(0)).flip(0)
        self._headless = begun & ~known
        self._looking = looking
        # Where no ends are told, one has come where something was written after it.
        self._ended = None if done is None else done[by_line].bool()

    @staticmethod
    def keys(written: Written, transforms: Sequence[nn.Module]) -> list[NestedKey]:
        """What is read of every row."""
        own = {getattr(one, "done_key", None) for one in transforms if hasattr(one, "done_key")}
        done = [key for key in {*ENDS, *own} if key is not None]
        keys = [written.number_key, *NUMBERS, *COUNTS, *STARTS, *(("next", *key_parts(key)) for key in done)]
        return [key for key in keys if key is not None]

    @staticmethod
    def told(written: Written, facts: TensorDictBase) -> bool:
        """Whether rows say which trajectory they are of, or which step; else what they hold may tell."""
        return any(
            facts.get(key, None) is not None for key in (written.number_key, *NUMBERS, *COUNTS) if key is not None
        )

    def stretches(self, index: Tensor, window: Window) -> Iterator[tuple[Tensor, Tensor, slice]]:
        """Consecutive rows of one trajectory among these entries.

        Yields:
            where they are in ``index``, the entries to read for them, and where they are among those.
        """
        places = self._place[index].sort()
        spots = places.values
        cuts = (spots.diff() != 1) | (self._first[spots[1:]] != self._first[spots[:-1]])
        edges = [0, *(cuts.nonzero().flatten() + 1).tolist(), len(spots)]
        for low, high in itertools.pairwise(edges):
            first, last = int(spots[low]), int(spots[high - 1])
            start = max(int(self._first[first]), first - window.before)
            stop = min(int(self._end[last]), last + window.after) + 1
            inside = slice(first - start, first - start + high - low)
            yield places.indices[low:high], self._entries[start:stop], inside

    def end(self, entry: int) -> int:
        """The entry after the last of the trajectory of this one; as of :meth:`begin`."""
        return self._span(entry)[1]

    def begin(self, entry: int) -> int:
        """The first entry of the trajectory of this one.

        Raises:
            InputError: if its rows are not one after the other.
        """
        return self._span(entry)[0]

    def _span(self, entry: int) -> tuple[int, int]:
        place = int(self._place[entry])
        low, high = int(self._first[place]), int(self._end[place]) + 1
        if not bool((self._entries[low:high].diff() == 1).all()):
            raise InputError(
                f"{self._looking} reads whole trajectories, and the rows of that of entry {entry} are not one "
                "after the other in the buffer: store trajectories, one an entry"
            )
        return int(self._entries[low]), int(self._entries[high - 1]) + 1

    def courses(self) -> Courses:
        """All rows, trajectory by trajectory."""
        begun = self._first == torch.arange(len(self._first))
        stretch = begun.long().cumsum(0) - 1
        last = self._end[begun]
        ended = self._entries[last] != len(self._entries) - 1 if self._ended is None else self._ended[last]
        return Courses(self._entries, stretch, ended, ~self._headless[begun])

    def incomplete(self, index: Tensor, window: Window) -> Tensor:
        """Which of these entries read rows of their trajectory that are no longer there."""
        places = self._place[index]
        first = self._first[places]
        return self._headless[first] & (places - first < window.before)


def begins_told(rows: TensorDictBase) -> Tensor | None:
    """Which rows say that they are the first of their trajectory; ``None`` where nothing in them does."""
    begins = _flat(rows, STARTS, torch.arange(len(rows)))
    return None if begins is None else begins.bool()


def first_count(count: Tensor, done: Tensor, over: bool = False) -> int:
    """What the first step of a trajectory counts: 0, or 1 in data sets of others, where all do behind an end.

    Args:
        count: of rows in the order of time.
        done: behind which of them a trajectory has ended.
        over: whether others were written over, among which may be those that begin.

    Example:
        >>> done = torch.tensor([0, 1, 0]).bool()
        >>> [first_count(torch.tensor(count), done) for count in ([3, 4, 0], [1, 2, 1], [1, 2, 3])]
        [0, 1, 1]
        >>> first_count(torch.tensor([1, 2, 3]), done.roll(1))  # which may as well lack its first
        0
    """
    behind = count[1:][done[:-1]]
    return 0 if over or not len(behind) else min(int(behind.min()), 1)


def counts_told(rows: TensorDictBase) -> Tensor | None:
    """Which step of its trajectory each row is, where it is counted."""
    return _flat(rows, COUNTS, torch.arange(len(rows)))


def numbers_told(rows: TensorDictBase) -> Tensor | None:
    """The number of each row's trajectory, where there is one."""
    return _flat(rows, NUMBERS, torch.arange(len(rows)))


def goes_on(numbers: Tensor, first: Tensor, cut: Tensor, sides: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Which first rows go on with a trajectory whose last row so far was cut off.

    Args:
        numbers: of the trajectory of each row, which several collectors may give alike.
        first, cut: which rows are first, and which were cut off.
        sides: numbers of the states that each row begins from and comes to, as of :meth:`GoingOn.sides`.

    Example:
        >>> first, cut = torch.tensor([1, 0, 1, 0]).bool(), torch.tensor([0, 1, 0, 1]).bool()
        >>> goes_on(torch.tensor([7, 7, 7, 8]), first, cut).tolist()
        [False, False, True, False]
    """
    open_ones: dict[int, int] = {}
    found = torch.zeros_like(first)
    begins, comes_to = (torch.zeros_like(numbers),) * 2 if sides is None else sides
    for place in (first | cut).nonzero().flatten().tolist():
        number = int(numbers[place])
        if bool(first[place]):
            found[place] = open_ones.pop(number, None) == int(begins[place])
        if bool(cut[place]):
            open_ones[number] = int(comes_to[place])
    return found


def _flat(facts: TensorDictBase, keys: Sequence[NestedKey | None], order: Tensor, merge: bool = False) -> Tensor | None:
    """The first of these entries that is there, or any of them, one value a row."""
    found = [facts.get(key, None) for key in keys if key is not None]
    flat = [one.reshape(len(facts), -1)[order].cpu() for one in found if isinstance(one, Tensor)]
    if not flat:
        return None
    if merge:
        return torch.stack([one.bool().any(-1) for one in flat]).any(0)
    return flat[0].any(-1) if flat[0].dtype == torch.bool else flat[0][:, 0]


def _last_true(mask: Tensor) -> Tensor:
    """For each place the last place up to it at which the mask is true."""
    places = torch.arange(len(mask))
    return torch.where(mask, places, torch.zeros_like(places)).cummax(0).values
