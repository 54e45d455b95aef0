"""The mean attribution of each feature over the rows of a buffer, with an interval by episode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from tdhook_rl.arguments.callbacks import asked
from tdhook_rl.arguments.checked import checked
from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.reading.sources import Rows
from tdhook_rl.replay.joined import Found, Joined, results_of
from tdhook_rl.replay.results import INDEX
from tdhook_rl.replay.selection import Where, truth_of
from tdhook_rl.statistics import Interval, grouped_mean

#: Numbers of a column that are held at once, and groups from which a t interval is as good as a bootstrap.
BLOCK, MANY_GROUPS = 8_000_000, 200
#: Rows that are read at once.
READ = 1 << 14


@checked
def by_feature(
    results: Found,
    buffer: Rows,
    *,
    key: NestedKey | None = None,
    names: Sequence[str] | None = None,
    where: Where | None = None,
    statistic: Callable[[Tensor], Tensor] | None = None,
    confidence: float = 0.95,
) -> dict[str, dict[str, Interval]]:
    """The mean absolute attribution of each feature over rows, with an interval by episode.

    Args:
        results: of an analysis, or their folder.
        buffer: what was analysed; it says which rows are of one episode.
        key: of the attribution; the first below ``"attr"`` unless given.
        names: of the features; their numbers unless given.
        where: over those rows only of which this is true: a function of a batch with its results,
            which says of a row the same whichever are read with it.
        statistic: a function of the attributions ``(rows, features)`` of all these rows that gives a number for each of
            them, or a truth value; the absolute value unless given.
        confidence: of the intervals.

    Returns:
        by feature, and the name of the attribution, an interval: what ``report.figures.grouped_bars`` draws.

    Raises:
        MissingKeyError: if there is no such result.
        InputError: for another number of names, if no row is left, nothing says where episodes end, or the statistic
            gives something else.

    Example:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([0, 1] * 6).bool()[:, None]
        >>> rows = TensorDict({"next": {"done": done}}, batch_size=12)
        >>> found = TensorDict({"attr": {"observation": torch.arange(24.0).reshape(12, 2)}}, batch_size=12)
        >>> by_feature(found, rows, names=["left", "right"])["left"]["attr.observation"].groups
        6
    """
    found = results_of(results)
    parts = _attribution(found, key)
    value = found.get(parts)
    joined = Joined(buffer, results)
    courses = joined.courses("by_feature")
    episode = torch.full((joined.count,), -1)
    episode[courses.rows] = courses.stretch
    places, groups = _usable(joined, found, parts, episode, where)
    features = value.shape[found.ndim :].numel()
    flat = value.reshape(-1, features) if value.is_contiguous() else value.contiguous().reshape(-1, features)
    named = [str(one) for one in (names if names is not None else range(features))]
    if len(named) != features or len(set(named)) != features:
        raise InputError(
            f"names= has {len(named)} names, and {'.'.join(parts)} {features} features: one each, different"
        )
    able = _finite(flat, places)
    if not bool(able.any()):
        raise InputError(f"no row is left of which {'.'.join(parts)} is known: {len(places)} are chosen")
    places, groups = places[able], groups[able]
    method: Any = "t" if len(np.unique(groups)) > MANY_GROUPS else "auto"
    means: dict[str, dict[str, Interval]] = {}
    # A statistic may look at all features of a row: its share of them, its rank.
    step = features if statistic is not None else max(1, BLOCK // max(1, len(places)))
    for start in range(0, features, step):
        columns = torch.cat([flat[part, start : start + step].double() for part in places.split(1 << 16)])
        columns = columns.abs() if statistic is None else _of_each(statistic, columns)
        for number, name in enumerate(named[start : start + step]):
            one = grouped_mean(columns[:, number], groups, confidence=confidence, method=method)
            means[name] = {".".join(parts): one}
    return means


# ---------------------------------------------------------------------- inner


def _of_each(statistic: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """What a function of the user's makes of each number of a table."""
    found = asked(statistic, values, what="statistic=")
    if not isinstance(found, Tensor) or found.shape != values.shape or found.is_complex():
        told = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else f"{found!r:.60}"
        raise InputError(
            f"statistic= is a function of attributions {tuple(values.shape)} (rows, features) that gives a real number "
            f"for each; it gave {told}"
        )
    return found.double()


def _attribution(found: TensorDictBase, key: NestedKey | None) -> tuple[str, ...]:
    known = [key_parts(one) for one in found.keys(True, True)]
    if key is not None:
        parts = key_parts(key)
        if parts not in known:
            raise MissingKeyError(f"the results have no {key!r}; {nearest(str(key), map(str, known))}")
        return parts
    parts = next((one for one in known if one[0] == "attr"), ())
    if not parts:
        raise MissingKeyError(f"the results hold no attribution, only {', '.join(map(str, known))}: name one by key=")
    return parts


def _usable(
    joined: Joined, found: TensorDictBase, parts: tuple[str, ...], episode: Tensor, where: Where | None
) -> tuple[Tensor, np.ndarray]:
    """The places of results that were computed and are wanted, and the episode of each."""
    rows = joined.reader.rows
    entries = found.get(INDEX, None)
    entries = torch.arange(len(found)) if entries is None else entries.reshape(len(found), -1)[:, 0].cpu()
    numbers = (entries[:, None] * rows + torch.arange(rows)).reshape(-1)
    able = episode[numbers] >= 0
    mask = found.get(("computed", parts[0]), None)
    if mask is not None:
        able &= mask.reshape(-1).cpu()
    if where is not None:
        pieces = able.nonzero().flatten().split(READ)
        several = sum(map(len, pieces)) if len(pieces) > 1 else 0
        for places in pieces:
            able[places] = truth_of(where, joined.rows(numbers[places]), several)
    places = able.nonzero().flatten()
    return places, episode[numbers[places]].numpy()


def _finite(flat: Tensor, places: Tensor) -> Tensor:
    parts = [flat[part].isfinite().all(1) for part in places.split(1 << 16)]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.bool)
