"""The episodes in a batch, and a table of the worst and the best of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.keys import reward_key
from tdhook_rl.calls.real_rows import real_rows
from tdhook_rl.errors import warn
from tdhook_rl.probes.splits import EPISODE
from tdhook_rl.report.media import DataTable

__all__ = ["Episode", "Followed", "Running", "episode_table", "episodes", "odd_rewards", "running_of"]

#: Return and steps so far of episodes, by the collector's numbers; NaN where they are not known.
Running = Mapping[int, tuple[float, float]]
#: How many episodes may go on at once.
MANY = 65_536
#: What an environment says of each step, and that is no state which it goes on from.
_SIGNALS = frozenset(("reward", "done", "terminated", "truncated", "episode_reward"))


@dataclass(frozen=True)
class Episode:
    """Rows of a batch that belong to one episode.

    Attributes:
        number: as the collector counts them, or in the order in which they are found.
        places: its rows in order of time, counted through all dimensions of the batch.
        ended: whether its end is in the batch.
        total: its return: ``("next", "episode_reward")`` at its last row, or else the sum of its rewards;
            of several agents the mean. NaN where it is of a part alone: ``step_count`` or ``is_init`` says that the
            episode had begun before.
        steps: how many it has had: ``("next", "step_count")`` at its last row, or else its rows; NaN likewise.
    """

    number: int
    places: np.ndarray
    ended: bool
    total: float
    steps: float


def running_of(data: TensorDictBase, running: Running) -> Running:
    """What is known of the episodes that the next batches may go on with, by the collector's numbers.

    Workers take turns: an episode that a batch has nothing of may go on in one of the next.
    """
    if not isinstance(data.get(EPISODE, None), Tensor):
        return {}
    found = episodes(data, running)
    here = {one.number for one in found}
    known = {number: one for number, one in running.items() if number not in here}
    known |= {one.number: (one.total, one.steps) for one in found if not one.ended}
    return dict(list(known.items())[-MANY:])  # those that are left without an end are the oldest


def episodes(data: TensorDictBase, running: Running = MappingProxyType({})) -> list[Episode]:
    """The episodes of a batch whose last dimension is time; padding is left out.

    Args:
        data: the batch.
        running: returns and steps so far of episodes that began in batches before, by number.

    Example:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False, True, False]])[..., None]
        >>> batch = TensorDict({"next": {"reward": torch.ones(1, 3, 1), "done": done}}, batch_size=[1, 3])
        >>> [(one.places.tolist(), one.ended, one.total) for one in episodes(batch)]
        [([0, 1], True, 2.0), ([2], False, 1.0)]
    """
    count = data.batch_size.numel()
    if not count:
        return []
    after = data.get("next", TensorDict({}, data.batch_size))
    done = _column(after, "done", count)
    ended = np.zeros(count, dtype=bool) if done is None else done.astype(bool)
    reward, total = _column(after, _reward_of(after), count), _column(after, "episode_reward", count)
    ids = data.get(EPISODE, None)
    steps = data.batch_size[-1] if data.ndim else 1
    if isinstance(ids, Tensor) and ids.numel() == count:
        numbers = ids.reshape(-1).cpu().numpy()
    else:  # where an episode ends, or a row of the batch does, another begins
        begins = np.concatenate([[True], ended[:-1]])
        begins[::steps] = True
        numbers = begins.cumsum() - 1
    real = real_rows(data)
    usable = np.arange(count) if real is None else real.reshape(-1).cpu().numpy().nonzero()[0]
    order = usable[numbers[usable].argsort(kind="stable")]
    if not len(order):
        return []
    starts = np.concatenate([[0], np.diff(numbers[order]).nonzero()[0] + 1])
    stops = np.append(starts[1:], len(order))
    lasts = order[stops - 1]
    earlier = _earlier(data, order[starts], numbers[lasts], running, count)
    returns = np.full(len(starts), np.nan)
    if total is not None:
        returns = total[lasts]
    elif reward is not None:
        returns = earlier[:, 0] + np.add.reduceat(reward[order], starts)
    lengths = earlier[:, 1] + stops - starts
    counted = _column(after, "step_count", count)
    if counted is not None:
        lengths = counted[lasts]
    columns = (numbers[lasts], starts, stops, ended[lasts], returns, lengths)
    rows = zip(*(one.tolist() for one in columns), strict=True)
    return [Episode(one, order[i:j], end, value, length) for one, i, j, end, value, length in rows]


class Followed:
    """Follows episodes from batch to batch by their numbers; where there are none, by the rows of a batch.

    One collector gives a number once; several that are not workers of one give the same ones. That shows where one
    begins anew, or does not go on from what it saw last. From then on, of an episode whose number another may have that
    was cut off by the end of a batch, nothing before it is known. Without numbers a row of a batch goes on where that
    of the batch before ended, if its first state says so.
    """

    def __init__(self) -> None:
        self._running: Running = {}
        self._seen_last: dict[int, int] = {}
        self._ended: dict[int, None] = {}
        self._alike = self._said = self._lost = False
        self._newest = -1  # the largest number so far
        self._lines: dict[int, tuple[int | None, tuple[float, float]]] = {}  # by row: its last state, and what it had

    def before(self, data: TensorDictBase) -> Running:
        """What is known of episodes before a batch."""
        numbers = _real_numbers(data)
        if numbers is None:
            return self._before_lines(data)
        here = set(numbers.tolist())
        if not self._alike and (not here.isdisjoint(self._ended) or self._is_cut(data)):
            self._alike, self._running = True, _unknown(self._running)
        if self._alike and not self._said and not here.isdisjoint(self._running):
            self._said = True
            _say_alike(data)
        ids = data.get(EPISODE)
        if self._alike and data.ndim > 1 and ids.numel() == data.batch_size.numel():
            # Those that begin within a row of the batch, behind the end of another, are whole.
            first = set(ids.reshape(data.batch_size)[..., 0].reshape(-1).tolist())
            return {one: (np.nan, np.nan) for one in first if one in self._ended or one in self._running}
        if self._lost:
            return dict.fromkeys(here - {one for one in _begun(data) if one > self._newest}, (np.nan, np.nan))
        return self._running

    def lose(self) -> None:
        """Take notice that rows were missed: what goes on from them is known of no episode."""
        self._lost, self._seen_last = True, {}

    def _is_cut(self, data: TensorDictBase) -> bool:
        """Whether an episode begins in a batch with another state than it had come to in those before."""
        if not self._seen_last:
            return False
        firsts, _ = _states(data, episodes(data))
        return any(self._seen_last.get(number, state) != state for number, state in firsts.items())

    def follow(self, data: TensorDictBase) -> None:
        """Take notice of a batch, of every one in order."""
        before, known = self.before(data), self._running
        self._running = {}  # unless what follows can be read
        numbers, done = _real_numbers(data), data.get(("next", "done"), None)
        if numbers is None:
            self._follow_lines(data, before)
            return
        found = running_of(data, before)
        self._running = {**known, **_unknown(found)} if self._alike else found
        self._lost, self._newest = False, max(self._newest, int(numbers.max())) if len(numbers) else self._newest
        if not self._alike:
            self._seen_last = {number: one for number, one in self._seen_last.items() if number in found}
            self._seen_last |= _states(data, episodes(data))[1]
            if isinstance(done, Tensor) and done.numel() == data.batch_size.numel():
                real = real_rows(data)
                ends = done.reshape(data.batch_size).bool()
                ends = ends if real is None else ends[real.to(ends.device)]
                self._ended |= dict.fromkeys(numbers[ends.reshape(-1).to(numbers.device)].tolist())
            self._ended = self._ended if len(self._ended) < 2 * MANY else dict.fromkeys(list(self._ended)[-MANY:])

    # ------------------------------------------------------------------ without numbers

    def _before_lines(self, data: TensorDictBase) -> Running:
        found, steps = episodes(data), _steps(data)
        if not self._lines and not self._lost:
            return {}
        firsts, _ = _states(data, found)
        running = {}
        for one in found:
            line, step = divmod(int(one.places[0]), steps)
            last, so_far = self._lines.get(line, (None, (0.0, 0.0)))
            if step == 0 and (self._lost or (line in self._lines and (last is None or one.number not in firsts))):
                running[one.number] = (np.nan, np.nan)
            elif step == 0 and line in self._lines and firsts[one.number] == last:
                running[one.number] = so_far
        return running

    def _follow_lines(self, data: TensorDictBase, before: Running) -> None:
        found, steps, self._lost = episodes(data, before), _steps(data), False
        _, lasts = _states(data, found)
        self._lines = {
            int(one.places[-1]) // steps: (lasts.get(one.number), (one.total, one.steps))
            for one in found if not one.ended and (int(one.places[-1]) + 1) % steps == 0
        }  # fmt: skip


def _steps(data: TensorDictBase) -> int:
    return data.batch_size[-1] if data.ndim else 1


def _real_numbers(data: TensorDictBase) -> Tensor | None:
    """The collector's numbers of the rows that are real, ``(rows,)``: padding has that of some episode, too."""
    ids = data.get(EPISODE, None)
    if not isinstance(ids, Tensor):
        return None
    real = real_rows(data)
    if real is None or ids.numel() != data.batch_size.numel():
        return ids.reshape(-1)
    return ids.reshape(data.batch_size)[real.to(ids.device)]


def _begun(data: TensorDictBase) -> set[int]:
    """The numbers of episodes that begin within a row of a batch, behind the end of another: later ones are larger."""
    ids, done = data.get(EPISODE), data.get(("next", "done"), None)
    if not data.ndim or not isinstance(done, Tensor) or not done.numel() == ids.numel() == data.batch_size.numel():
        return set()
    ids, done = ids.reshape(data.batch_size).cpu(), done.reshape(data.batch_size).bool().cpu()
    return set(ids[..., 1:][done[..., :-1] & (ids[..., 1:] > ids[..., :-1])].tolist())


def _states(data: TensorDictBase, found: list[Episode]) -> tuple[dict[int, int], dict[int, int]]:
    """What stands for the first state of each episode in a batch, and for that to which those that go on have come.

    Nothing where counts or beginnings tell more, or where rows do not go on from each other as they are stored, as
    behind a transform that looks several steps ahead.
    """
    after, count = data.get("next", None), data.batch_size.numel()
    if not isinstance(after, TensorDictBase) or any(key in data.keys() for key in ("step_count", "is_init")):
        return {}, {}
    pairs = [
        (then.reshape(count, -1), now.reshape(count, -1))
        for key, now in after.items(True, True)
        if isinstance(now, Tensor) and isinstance(then := data.get(key, None), Tensor) and then.shape == now.shape
        and (key if isinstance(key, str) else key[-1]) not in _SIGNALS
    ]  # fmt: skip

    def state(place: int, side: int) -> int:
        rows = [one[side][place].detach().cpu().contiguous() for one in pairs]
        return hash(b"".join(row.view(torch.uint8).numpy().tobytes() for row in rows))

    two = next((one.places[:2].tolist() for one in found if len(one.places) > 1), None)
    if not pairs or two is None or state(two[0], 1) != state(two[1], 0):
        return {}, {}
    firsts = {one.number: state(int(one.places[0]), 0) for one in found}
    return firsts, {one.number: state(int(one.places[-1]), 1) for one in found if not one.ended}


def _unknown(running: Running) -> Running:
    return dict.fromkeys(running, (np.nan, np.nan))


def _say_alike(data: TensorDictBase) -> None:
    after, count = data.get("next", TensorDict({}, data.batch_size)), data.batch_size.numel()
    if _column(after, "step_count", count) is None or _column(after, "episode_reward", count) is None:
        warn(
            "an episode has the number of another, as where several collectors number theirs alike: returns "
            "and lengths of episodes that may go on from a batch before are left out where nothing else tells them. "
            "Add StepCounter() and RewardSum() to the environments, which do"
        )


def odd_rewards(data: TensorDictBase) -> dict[str, float]:
    """The share of rows whose reward is not finite, where there are any: their episodes have no return."""
    after = data.get("next", TensorDict({}, data.batch_size))
    reward = _column(after, _reward_of(after), data.batch_size.numel())
    if reward is None:
        return {}
    real = real_rows(data)
    odd = ~np.isfinite(reward if real is None else reward[real.reshape(-1).cpu().numpy()])
    return {"nonfinite.reward": float(odd.mean())} if odd.any() else {}


def episode_table(found: list[Episode], readings: Mapping[str, Tensor], step: int, most: int = 5) -> DataTable | None:
    """The episodes with the smallest and the largest returns, and what their steps showed on average.

    Episodes whose end is in the batch come first; only where there are none, others are taken for what they are so far.

    Args:
        found: the episodes.
        readings: one number for each row of the batch, NaN where there is none.
        step: environment frames so far.
        most: how many of each.

    Returns:
        ``None`` where no episode has a return.
    """
    known = [one for one in found if one.total == one.total]
    known = [one for one in known if one.ended] or known
    if not known:
        return None
    ranked = sorted(known, key=lambda one: one.total)
    few = min(most, max(1, len(ranked) // 2))
    chosen = [("worst", one) for one in ranked[:few]]
    chosen += [("best", one) for one in ranked[::-1][:few] if len(ranked) > 1]
    rows = [
        [step, rank, one.number, one.total, one.steps, "yes" if one.ended else "no"]
        + [float(values[torch.from_numpy(one.places)].nanmean()) for values in readings.values()]
        for rank, one in chosen
    ]
    return DataTable(["frames", "rank", "episode", "return", "steps", "ended", *readings], rows)


def _earlier(data: TensorDictBase, firsts: np.ndarray, numbers: np.ndarray, running: Running, count: int) -> np.ndarray:
    """Return and steps of each episode before its first row: 0 where it begins there, NaN where they are not known.

    What the data says of that row goes before the numbers, which several collectors give alike.
    """
    found = np.array([running.get(one, (0.0, 0.0)) for one in numbers.tolist()])
    root = data.exclude("next")
    counted, begins = _column(root, "step_count", count), _column(root, "is_init", count)
    if counted is not None:
        found[counted[firsts] != found[:, 1]] = np.nan
        found[counted[firsts] == 0] = 0.0
    elif begins is not None:
        found[~begins[firsts].astype(bool) & ~np.isin(numbers, list(running))] = np.nan
        found[begins[firsts].astype(bool)] = 0.0
    return found


def _reward_of(after: TensorDictBase) -> str:
    found = reward_key(after, "reward")
    return found if isinstance(found, str) else found[-1]


def _column(data: TensorDictBase, name: str, count: int) -> np.ndarray | None:
    """One number for each row, of this name or of the groups of agents that have it: the mean, or any."""
    keys: list[Any] = [name]
    if data.get(name, None) is None:
        keys = [key for key in data.keys(True, True) if isinstance(key, tuple) and key[-1] == name]
    values = [data.get(key, None) for key in keys]
    known = [one for one in values if isinstance(one, Tensor) and one.numel() and one.numel() % count == 0]
    if not known or any(one.is_complex() for one in known):
        return None
    rows = torch.cat([one.detach().cpu().reshape(count, -1) for one in known], -1)
    return (rows.any(-1) if rows.dtype == torch.bool else rows.double().mean(-1)).numpy()
