"""What people ask first of a buffer and the results of its analysis, in one line each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.checked import checked, require_counts
from tdhook_rl.arguments.keys import reward_key
from tdhook_rl.errors import InputError, MissingKeyError, nearest, warn
from tdhook_rl.internals.torchrl_names import closed_values
from tdhook_rl.probes.quantities import Trajectory
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.joined import Found, Joined, StoredEpisode
from tdhook_rl.replay.selection import Where, truth_of
from tdhook_rl.statistics import Interval, grouped_mean

#: Where the preferences of a policy for its actions may be, the first that is there.
PREFERENCES: tuple[NestedKey, ...] = ("action_value", "logits", "probs")


@dataclass(frozen=True, kw_only=True)
class Returns:
    """Returns of the rows and episodes of a buffer.

    Attributes:
        rows: ``(rows,)``, float64: the discounted sum of the rewards from here to the end of the episode; NaN where
            that end is not in the buffer, and for padding.
        episode: ``(rows,)``, the number of each row's episode, -1 for padding.
        episodes: in the order in which they are found.
    """

    rows: Tensor
    episode: Tensor
    episodes: list[StoredEpisode]

    def mean(self, confidence: float = 0.95) -> Interval:
        """The mean over the episodes that are whole, each a group.

        Raises:
            InputError: if none is.
        """
        whole = [one.total for one in self.episodes if one.whole]
        if not whole:
            raise InputError(f"none of {len(self.episodes)} episodes is in the buffer from its beginning to its end")
        return grouped_mean(whole, confidence=confidence)


@checked
def returns(
    buffer: Rows, *, gamma: float = 1.0, reward: NestedKey = ("next", "reward"), batch_size: int = 16384
) -> Returns:
    """The return of each episode of a buffer, and from each of its rows on.

    Args:
        buffer: what :func:`tdhook_rl.replay.analyze` reads.
        gamma: the discount.
        reward: its key; of several columns the mean. Where ``MultiStep`` has put sums in its place, the rewards beside.
        batch_size: rows read at once.

    Raises:
        InputError: if nothing says where episodes end, or the discount is none.
        MissingKeyError: if there are no rewards.

    Example:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([0, 0, 1, 0, 1]).bool()[:, None]
        >>> rows = TensorDict({"next": {"reward": torch.ones(5, 1), "done": done}}, batch_size=5)
        >>> found = returns(rows, gamma=0.5)
        >>> found.rows.tolist(), [one.total for one in found.episodes]
        ([1.75, 1.5, 1.0, 1.5, 1.0], [1.75, 1.5])
    """
    return _returns(Joined(buffer), gamma, reward, batch_size)


@checked
def episodes(
    buffer: Rows,
    results: Found | None = None,
    *,
    order: Literal["worst", "best"] = "worst",
    k: int = 5,
    gamma: float = 1.0,
    reward: NestedKey = ("next", "reward"),
) -> list[StoredEpisode]:
    """The episodes with the smallest or the largest returns, each with its rows and their results.

    Episodes that are whole in the buffer are ranked; only where none is, all of them, by what is there, with a warning.
    One with a reward that is NaN is left out, with a warning.

    Args:
        buffer: what was analysed.
        results: of its analysis, or their folder; rows that were not analysed have NaN and false masks.
        order: which are wanted.
        k: how many, the worst or the best first.
        gamma, reward: as of :func:`returns`.

    Raises:
        InputError, MissingKeyError: as of :func:`returns`; if the results are of another buffer, or no return is a
            number.

    Example:
        >>> from tdhook_rl.envs import CueCorners
        >>> data = CueCorners(batch_size=[4], seed=0).rollout(40, break_when_any_done=False)
        >>> [found] = episodes(data, order="best", k=1)
        >>> found.whole, len(found.rows) == len(found.data)
        (True, True)
    """
    require_counts(k=k)
    joined = Joined(buffer, results)
    found = _returns(joined, gamma, reward, 16384).episodes
    ranked = [one for one in found if one.whole]
    if not ranked:
        warn(f"none of {len(found)} episodes is whole in the buffer: they are ranked by the rewards that are there")
        ranked = found
    known = [one for one in ranked if not math.isnan(one.total)]
    if len(known) < len(ranked):
        if not known:
            raise InputError(f"no return of {len(ranked)} episodes is a number: {reward!r} holds NaN in all of them")
        warn(f"{len(ranked) - len(known)} of {len(ranked)} episodes have a reward that is NaN: they are not ranked")
        ranked = known
    ranked = sorted(ranked, key=lambda one: one.total, reverse=order == "best")[:k]
    return [replace(one, data=joined.rows(one.rows)) for one in ranked]


@checked
def rows_where(
    buffer: Rows, where: Where, results: Found | None = None, *, most: int = 1000, batch_size: int = 16384
) -> TensorDictBase:
    """The rows of which something is true, with their results; ``"index"`` says which they are.

    Args:
        buffer: what was analysed.
        where: a function of a batch of rows that gives a truth value for each, whichever are read with it.
        results: of the analysis, or their folder; they are seen by ``where`` too.
        most: the first so many are given.
        batch_size: rows read at once.

    Returns:
        ``(rows,)``, in the order in which they lie; none where nothing is true.

    Example:
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({"observation": torch.arange(6.0)[:, None]}, batch_size=6)
        >>> rows_where(rows, lambda batch: batch["observation"] > 3)["index"].tolist()
        [4, 5]
    """
    require_counts(most=most)
    joined, found, parts = Joined(buffer, results), 0, []
    for numbers, _ in joined.chunks(batch_size):
        rows = joined.rows(numbers)
        several = joined.count if len(numbers) < joined.count else 0
        parts.append(rows[truth_of(where, rows, several)][: most - found])
        found += len(parts[-1])
        if found >= most:
            break
    return torch.cat(parts)


@checked
def smallest_margins(
    buffer: Rows,
    results: Found | None = None,
    *,
    k: int = 10,
    key: NestedKey | None = None,
    allowed: NestedKey | None = None,
    batch_size: int = 16384,
) -> TensorDictBase:
    """The states in which the policy prefers its best action to the second by least: where it is undecided.

    Args:
        buffer: what was analysed.
        results: of the analysis, or their folder.
        k: how many.
        key: what the policy thinks of its actions, ``(..., actions)``, in the buffer or the results: ``action_value``,
            ``logits`` or ``probs``, the first of these that is there, unless given.
        allowed: a mask of the same shape, true for actions that were open; ``action_mask``, where the rows have one of
            that shape, unless given. A state with one open action has no margin.
        batch_size: rows read at once.

    Returns:
        ``(rows,)``, the smallest margin first, with ``"margin"`` and ``"index"`` and the results; of several decisions
        in a row, the smallest.

    Raises:
        MissingKeyError: if nothing says what the policy thinks of its actions.
        InputError: if what is found is not a number for each choice that the stored action is of: atoms of a
            distributional Q-network, several choices one after the other, parts of a continuous distribution.

    Example:
        >>> from tensordict import TensorDict
        >>> rows = TensorDict({"logits": torch.tensor([[0.0, 3.0], [1.0, 0.5], [2.0, 2.1]])}, batch_size=3)
        >>> smallest_margins(rows, k=2)["index"].tolist()
        [2, 1]
    """
    require_counts(k=k)
    joined = Joined(buffer, results)
    margins, places = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    for numbers, rows in joined.chunks(batch_size):
        wanted = (key,) if key is not None else PREFERENCES
        value = _first(rows, wanted)
        if value is None and results is not None:
            value = _first(joined.rows(numbers), wanted)
        if value is None:
            known = map(str, rows.keys(True, True))
            raise MissingKeyError(
                f"a margin is read of {' or '.join(map(repr, wanted))}, which the rows lack; "
                f"{nearest(str(wanted[0]), known)}: store it, or name it by key="
            )
        if value.ndim < 2 or value.shape[-1] < 2:
            raise InputError(
                f"a margin is between two actions; {' or '.join(map(repr, wanted))} is {tuple(value.shape)}"
            )
        if key is None:
            _require_preferences(rows, value)
        closed = closed_values(value)
        value = value.detach() if value.dtype == torch.float64 else value.detach().float()
        value = value.masked_fill(closed | ~_open(rows, allowed, value), -torch.inf)
        two = value.topk(2, -1).values
        margin = (two[..., 0] - two[..., 1]).flatten(1).amin(1) if two.ndim > 2 else two[:, 0] - two[:, 1]
        able = margin.isfinite()
        margins, places = torch.cat([margins, margin[able].cpu()]), torch.cat([places, numbers[able.cpu()]])
        few = margins.argsort(stable=True)[:k]
        margins, places = margins[few], places[few]
    return joined.rows(places).set("margin", margins)


# ---------------------------------------------------------------------- inner


def _returns(joined: Joined, gamma: float, reward: NestedKey, batch_size: int) -> Returns:
    if not 0 <= gamma <= 1:
        raise InputError(f"a discount lies between 0 and 1, got gamma={gamma!r}")
    rewards = torch.zeros(joined.count, dtype=torch.float64)
    for numbers, rows in joined.chunks(batch_size):
        value = rows.get(reward_key(rows, reward), None)
        if not isinstance(value, Tensor):
            raise MissingKeyError(
                f"returns are of {reward!r}, which the rows lack; "
                f"{nearest(str(reward), map(str, rows.keys(True, True)))}: name it by reward="
            )
        rewards[numbers] = value.detach().reshape(len(numbers), -1).double().mean(1).cpu()
    courses = joined.courses("returns")
    closed = courses.ended[courses.stretch]
    to_go = Trajectory(courses.stretch, closed, closed).returns(rewards[courses.rows], gamma)
    found = torch.full((joined.count,), float("nan"), dtype=torch.float64)
    found[courses.rows] = torch.where(closed, to_go, torch.nan)
    episode = torch.full((joined.count,), -1)
    episode[courses.rows] = courses.stretch
    lengths = courses.stretch.bincount().tolist()
    parts, at, listed = courses.rows.split(lengths), 0, []
    for number, part in enumerate(parts):
        listed.append(
            StoredEpisode(
                number=number, rows=part, total=float(to_go[at]), ended=bool(courses.ended[number]),
                begun=bool(courses.begun[number]),
            )
        )  # fmt: skip
        at += len(part)
    return Returns(rows=found, episode=episode, episodes=listed)


def _require_preferences(rows: TensorDictBase, value: Tensor) -> None:
    """Raise if what was found is no number for each of the choices that the action beside it is of."""
    action = rows.get("action", None)
    if not isinstance(action, Tensor):
        return
    shape, choices = action.shape, value.shape[:-1]
    # One of them is set where it is one-hot; in padding none may be.
    one_hot = shape == value.shape and bool((action.isnan() | (action == 0) | (action == 1)).all())
    one_hot = one_hot and bool(((action == 1).sum(-1) <= 1).all())
    if not one_hot and (action.is_floating_point() or shape not in (choices, (*choices, 1))):
        raise InputError(
            f"what the policy put out is {tuple(value.shape)}, and its actions {tuple(shape)} ({action.dtype}): that "
            "is no number for each choice, but such as atoms of a distribution over returns, several choices one after "
            "the other, or parts that a continuous action is drawn from. Store a number for each choice, such as the "
            "expectation over atoms, and name it by key="
        )


def _open(rows: TensorDictBase, allowed: NestedKey | None, value: Tensor) -> Tensor:
    """Which actions were open; environments of Gymnasium say it in integers."""
    mask = rows.get("action_mask" if allowed is None else allowed, None)
    fits = isinstance(mask, Tensor) and mask.shape == value.shape and not mask.is_floating_point()
    if fits and bool(((mask == 0) | (mask == 1)).all()):
        return mask.bool()
    if allowed is None:
        return torch.ones_like(value, dtype=torch.bool)
    if not isinstance(mask, Tensor):
        raise MissingKeyError(f"allowed={allowed!r} is no entry of the rows; {nearest(str(allowed), rows.keys(True))}")
    raise InputError(
        f"allowed={allowed!r} is {mask.dtype} of shape {tuple(mask.shape)}: it is a boolean (or 0 and 1) for each "
        f"action, {tuple(value.shape)}"
    )


def _first(rows: TensorDictBase, keys: Sequence[NestedKey]) -> Tensor | None:
    return next((one for key in keys if isinstance(one := rows.get(key, None), Tensor)), None)
