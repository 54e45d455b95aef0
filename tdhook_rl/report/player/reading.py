"""From rollouts to a recording: the episodes of each set, side by side, and one table of steps for each thing shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tensordict import TensorDictBase

from tdhook_rl.errors import InputError
from tdhook_rl.report.episodes import episodes
from tdhook_rl.report.player.decisions import action_keys, decision_tracks
from tdhook_rl.report.player.tracks import Options, Rows, Track, number_tracks, result_tracks
from tdhook_rl.report.player.views import View, attribution_tracks, feature_tracks, observed_keys, views

#: More sets than this are not seen beside each other.
SETS = 4


@dataclass(frozen=True)
class Part:
    """An episode of one set: which of its rows, how it ended, and its return."""

    start: int
    length: int
    end: str
    total: float | None


@dataclass(frozen=True)
class Episode:
    """What is looked at together: one episode of each set, ``None`` where a set has none.

    Attributes:
        name: what it is called.
        parts: by set.
        differs: the first step at which something differs between the sets, for each thing that does.
    """

    name: str
    parts: tuple[Part | None, ...]
    differs: Mapping[str, int] = field(default_factory=dict)


@dataclass(eq=False)
class Recording:
    """What a player shows, before it is packed.

    Attributes:
        sets: the names of the sets.
        episodes: the episodes.
        steps: how many rows each track has.
        tracks, views: their rows are those of all sets, one set after the other.
        agents: the names of agents, where there are several.
        notes: what is not shown.
    """

    sets: list[str]
    episodes: list[Episode]
    steps: int
    tracks: list[Track]
    views: list[View]
    agents: list[str]
    notes: list[str]


@dataclass(eq=False)
class _Set:
    """One rollout or several under one name."""

    rows: list[Rows]
    parts: dict[tuple[int, int, int], Part]
    tracks: list[Track]
    views: list[View]
    steps: int


def read(rollouts: Any, names: Sequence[str] | None, options: Options) -> Recording:
    """Read rollouts.

    Args:
        rollouts: as of :func:`tdhook_rl.report.player`.
        names: of the episodes.
        options: what is asked for.

    Raises:
        InputError: for what holds no rollout, no step, or does not belong together.
    """
    several = isinstance(rollouts, Mapping) and not isinstance(rollouts, TensorDictBase)  # which is a mapping too
    given = {str(name): one for name, one in rollouts.items()} if several else {"": rollouts}
    if not given or len(given) > SETS:
        raise InputError(f"one to {SETS} sets of rollouts are played beside each other, got {len(given)}")
    sets = [_read_set(name, one, options) for name, one in given.items()]
    places = list(dict.fromkeys(place for one in sets for place in sorted(one.parts)))
    if names is not None and len(names) != len(places):
        raise InputError(f"names= has {len(names)} names, and there are {len(places)} episodes")
    starts = np.cumsum([0, *(one.steps for one in sets)]).tolist()
    listed = []
    for number, place in enumerate(places):
        parts = [one.parts.get(place) for one in sets]
        moved = tuple(
            None if part is None else Part(part.start + start, part.length, part.end, part.total)
            for part, start in zip(parts, starts, strict=False)
        )
        differs = _differences(sets, parts) if len(sets) > 1 else {}
        listed.append(Episode(str(names[number]) if names is not None else f"episode {number}", moved, differs))
    tracks = _merged([one.tracks for one in sets], [one.steps for one in sets], _same_track, _joined)
    shown = _merged([one.views for one in sets], [one.steps for one in sets], _same_view, _joined_views)
    count = max((one.agent + 1 for one in [*tracks, *shown] if one.agent is not None), default=0)
    agents = [f"agent {number}" for number in range(count)]
    return Recording(list(given), listed, starts[-1], tracks, shown, agents, options.notes)


def _read_set(name: str, rollouts: Any, options: Options) -> _Set:
    called = f"the rollouts {name!r}" if name else "rollouts"
    listed = [rollouts] if isinstance(rollouts, TensorDictBase) else rollouts
    if not isinstance(listed, list | tuple) or not all(isinstance(one, TensorDictBase) for one in listed):
        kinds = {type(one).__name__ for one in listed} if isinstance(listed, list | tuple) else {type(listed).__name__}
        raise InputError(
            f"{called} are a TensorDict of shape (time,) or (episodes, time), a list of these, or a mapping of names "
            f"to them; got {', '.join(sorted(kinds))}"
        )
    rows: list[Rows] = []
    parts: dict[tuple[int, int, int], Part] = {}
    tracks: list[list[Track]] = []
    shown: list[list[View]] = []
    steps: list[int] = []
    for number, data in enumerate(listed):
        if not data.ndim or not data.numel():
            raise InputError(
                f"there is nothing to play in {called}: a TensorDict of shape {tuple(data.batch_size)} has no steps; "
                "its last dimension is time"
            )
        found = episodes(data)
        if not found:
            raise InputError(f"there is nothing to play in {called}: every row is padding")
        wide, seen = data.batch_size[-1], dict[int, int]()
        start = sum(steps)
        for one in found:
            row = int(one.places[0]) // wide
            nth = seen[row] = seen.get(row, -1) + 1
            total = float(one.total) if np.isfinite(one.total) else None
            parts[number, row, nth] = Part(start, len(one.places), _end(data, int(one.places[-1])), total)
            start += len(one.places)
        these = Rows(data.detach(), np.concatenate([one.places for one in found]), options)
        pictures = views(these)
        rows.append(these)
        shown.append(pictures)
        tracks.append([
            *attribution_tracks(these, pictures), *feature_tracks(these), *decision_tracks(these),
            *number_tracks(these), *result_tracks(these),
        ])  # fmt: skip
        steps.append(len(these.places))
    merged = _merged(tracks, steps, _same_track, _joined)
    return _Set(rows, parts, merged, _merged(shown, steps, _same_view, _joined_views), sum(steps))


def _end(data: TensorDictBase, last: int) -> str:
    """How an episode ended; ``"goes on"`` where its end is not in the data."""
    for name in ("terminated", "truncated", "done"):
        value = data.get(("next", name), None)
        if value is not None and bool(value.reshape(data.numel(), -1)[last].any()):
            return name
    return "goes on"


def _differences(sets: Sequence[_Set], parts: Sequence[Part | None]) -> dict[str, int]:
    """Where the episodes of two or more sets first differ, in what the agents see and in what they do."""
    there = [(one, part) for one, part in zip(sets, parts, strict=True) if part is not None]
    found: dict[str, int] = {}
    if len(there) < 2:
        return found
    shortest = min(part.length for _, part in there)
    for what, keys_of in (("observation", observed_keys), ("action", action_keys)):
        common = set.intersection(*[set(keys_of(one.rows[0])) for one, _ in there])
        steps = []
        for key in common:
            first, *others = [_of_part(one, part, key)[:shortest] for one, part in there]
            for other in others:
                if other.shape != first.shape:
                    steps.append(0)
                    continue
                same = (first == other) | ((first != first) & (other != other))
                apart = (~same.reshape(shortest, -1).all(1)).nonzero()[0]
                steps += apart[:1].tolist()
        if steps:
            found[what] = min(steps)
    if not found and len({part.length for _, part in there}) > 1:
        found["end"] = shortest
    return found


def _of_part(one: _Set, part: Part, key: tuple[str, ...]) -> np.ndarray:
    start = part.start
    for rows in one.rows:
        if start < len(rows.places):
            short = Rows.__new__(Rows)
            short.data, short.places = rows.data, rows.places[start : start + part.length]
            return short.of(key)
        start -= len(rows.places)
    raise AssertionError("a part lies in one of the rollouts")


def _same_track(one: Track) -> tuple[Any, ...]:
    return one.kind, one.name, one.agent, one.values.shape[1:], one.facts.get("key"), one.facts.get("role")


def _same_view(one: View) -> tuple[Any, ...]:
    return one.name, one.agent, one.pictures.shape[1:]


def _merged(
    groups: Sequence[Sequence[Any]], steps: Sequence[int], same: Callable[[Any], Any], join: Callable[..., Any]
) -> list[Any]:
    """What is the same of several sets or rollouts as one, with nothing in the rows of those that lack it."""
    found: dict[Any, list[Any]] = {}
    for number, group in enumerate(groups):
        for one in group:
            found.setdefault(same(one), [None] * len(groups))[number] = one
    return [join(several, steps) for several in found.values()]


def _joined(several: Sequence[Track | None], steps: Sequence[int]) -> Track:
    if len(several) == 1 and several[0] is not None:
        return several[0]
    first = next(one for one in several if one is not None)
    blank = [np.full((count, *first.values.shape[1:]), np.nan, np.float32) for count in steps]
    values = [none if one is None else one.values for one, none in zip(several, blank, strict=True)]
    return Track(first.kind, first.name, np.concatenate(values), first.agent, first.facts)


def _joined_views(several: Sequence[View | None], steps: Sequence[int]) -> View:
    if len(several) == 1 and several[0] is not None:
        return several[0]
    first = next(one for one in several if one is not None)
    pictures: list[np.ndarray] = []
    places = []
    for one, count in zip(several, steps, strict=True):
        if one is None:
            places.append(np.full(count, -1))
            continue
        places.append(np.where(one.places >= 0, one.places + sum(map(len, pictures)), -1))
        pictures.append(one.pictures)
    return View(first.name, np.concatenate(pictures), np.concatenate(places), first.source, first.agent)
