"""From a recording to packed arrays that fit a number of bytes; what does not is left out, and said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.pictures import robust_scale
from tdhook_rl.report.player.packing import Packed, pack_frames, pack_values
from tdhook_rl.report.player.reading import Part, Recording
from tdhook_rl.report.player.tracks import Track
from tdhook_rl.report.player.views import View

#: Of recorded players; one of another number is not read.
FORMAT = 1
#: How many steps attributions and activations are rounded to, one after the other until all fits.
LEVELS = (254, 62, 30, 14)
FINE = 65_534


@dataclass(eq=False)
class Contents:
    """What a page is given.

    Args:
        head: JSON-able: what there is, and the specs of the arrays.
        arrays: packed.
    """

    head: dict[str, Any]
    arrays: list[Packed]

    @property
    def size(self) -> int:
        """Bytes of the page without its code: base64 takes four for three."""
        return len(json.dumps(self.head)) + sum(len(one.data) * 4 // 3 + 8 for one in self.arrays)


def packed_within(recording: Recording, head: dict[str, Any], most: int) -> Contents:
    """Pack a recording.

    Args:
        recording: what is shown.
        head: what the page is told beside it.
        most: bytes.

    Raises:
        InputError: if not even one step fits.
    """
    known: dict[tuple[int, int], Packed] = {}
    contents = None
    for plan, notes in _plans(recording, most):
        contents = _contents(plan, head | {"notes": [*recording.notes, *notes]}, known)
        if contents.size <= most:
            return contents
    raise InputError(
        f"one step alone takes {contents.size if contents else 0} bytes, and most_bytes= leaves {most} beside the "
        "player's code: give more"
    )


@dataclass(frozen=True, eq=False)
class _Plan:
    recording: Recording
    levels: int = LEVELS[0]


def _plans(recording: Recording, most: int) -> Iterator[tuple[_Plan, list[str]]]:
    """Ways to pack, each smaller than the one before, with what they leave out."""
    notes: list[str] = []
    rounded = [one for one in recording.tracks if one.kind in ("attribution", "activation")]
    for levels in LEVELS if rounded else LEVELS[:1]:
        notes = [] if levels == LEVELS[0] else [f"attributions and activations are rounded to {levels} steps"]
        yield _Plan(recording, levels), notes
    coarse = LEVELS[-1] if rounded else LEVELS[0]
    while (smaller := _smaller_pictures(recording)) is not recording:
        recording = smaller
        said = f"frames are shown with every {recording.views[0].every}th row and column"
        notes = [*[one for one in notes if "th row and column" not in one], said]
        yield _Plan(recording, coarse), notes
    for kind in ("activation", "attribution"):
        while len(some := [one for one in recording.tracks if one.kind == kind]) > (kind == "attribution"):
            largest = some[-1] if kind == "attribution" else max(some, key=lambda one: one.values[0].size)
            recording = replace(recording, tracks=[one for one in recording.tracks if one is not largest])
            notes = [*notes, f"the {kind} {largest.name!r} is left out: give more most_bytes="]
            yield _Plan(recording, coarse), notes
    whole, count = recording, len(recording.episodes)
    while count > 1:
        size = _contents(_Plan(recording, coarse), {"notes": notes}, {}).size
        count = max(1, min(count - 1, int(count * most / size)))
        recording = _first(whole, count)
        yield _Plan(recording, coarse), [*notes, f"of {len(whole.episodes)} episodes the first {count} are shown"]
    length = max(part.length for part in whole.episodes[0].parts if part is not None)
    while length > 1:
        length //= 2
        said = f"only the first {length} steps of the first episode of {len(whole.episodes)} are shown"
        yield _Plan(_first(whole, 1, length), coarse), [*notes, said]


def _contents(plan: _Plan, head: dict[str, Any], known: dict[tuple[int, int], Packed]) -> Contents:
    recording, arrays = plan.recording, []

    def add(owner: Any, number: int, packed: Any) -> int:
        key = (id(owner), number)
        if key not in known:
            known[key] = packed()
        arrays.append(known[key])
        return len(arrays) - 1

    tracks, shown = [], []
    for track in recording.tracks:
        levels = _levels(track, plan.levels)
        facts = {"kind": track.kind, "name": track.name, "agent": track.agent, **track.facts}
        facts["array"] = add(track, levels, lambda track=track, levels=levels: _packed(track, levels))
        if track.kind in ("attribution", "activation"):
            scale = robust_scale(track.values)
            facts["scale"] = _digits(scale) if np.isfinite(scale) else 1.0
        if track.kind == "attribution":
            facts["signed"] = bool((track.values < 0).any())
            facts["size"] = add(track, -1, lambda track=track: pack_values(_sizes(track.values)))
        tracks.append(facts)
    for view in recording.views:
        shown.append({
            "name": view.name, "agent": view.agent, "every": view.every,
            "pictures": add(view, 0, lambda view=view: pack_frames(view.pictures)),
            "places": add(view, 1, lambda view=view: pack_values(view.places[:, None].astype(float), by_column=True)),
        })  # fmt: skip
    listed = [
        {"name": one.name, "parts": [None if part is None else _part(part) for part in one.parts],
         "differs": dict(one.differs)}
        for one in recording.episodes
    ]  # fmt: skip
    head = {
        "format": FORMAT, **head, "sets": recording.sets, "agents": recording.agents, "steps": recording.steps,
        "episodes": listed, "views": shown, "tracks": tracks, "arrays": [one.spec for one in arrays],
    }  # fmt: skip
    return Contents(head, arrays)


def _levels(track: Track, levels: int) -> int:
    if track.kind == "activation":
        return levels
    if track.kind == "attribution":
        return levels if track.values[0].size > 64 else FINE
    return FINE


def _packed(track: Track, levels: int) -> Packed:
    by_column = track.kind in ("features", "continuous", "number", "label")
    return pack_values(track.values, levels=levels, by_column=by_column)


def _sizes(values: np.ndarray) -> np.ndarray:
    """Of each step the sum of absolute values; NaN where nothing was computed."""
    flat = np.abs(values.reshape(len(values), -1).astype(np.float64))
    return np.where(np.isnan(flat).all(1), np.nan, np.nansum(flat, 1))[:, None]


def _part(part: Part) -> dict[str, Any]:
    total = None if part.total is None else _digits(part.total)
    return {"start": part.start, "length": part.length, "end": part.end, "total": total}


def _digits(number: float) -> float:
    return float(f"{number:.6g}")


def _smaller_pictures(recording: Recording) -> Recording:
    """Half as many rows and columns of pictures of more than 96; the same recording where there are none."""
    if not any(min(view.pictures.shape[1:3]) > 96 for view in recording.views):
        return recording
    views = [
        replace_view(view, view.pictures[:, ::2, ::2], view.every * 2) if min(view.pictures.shape[1:3]) > 96 else view
        for view in recording.views
    ]
    return replace(recording, views=views)


def replace_view(view: View, pictures: np.ndarray, every: int) -> View:
    """A view with other pictures in the same places."""
    return View(view.name, pictures, view.places, view.source, view.agent, every)


def _first(recording: Recording, count: int, length: int | None = None) -> Recording:
    """The first episodes, or the first steps of them."""
    rows: list[np.ndarray] = []
    listed, total = [], 0
    for episode in recording.episodes[:count]:
        parts: list[Part | None] = []
        for part in episode.parts:
            if part is None:
                parts.append(None)
                continue
            kept = part.length if length is None else min(length, part.length)
            rows.append(np.arange(part.start, part.start + kept))
            parts.append(Part(total, kept, part.end if kept == part.length else "goes on", part.total))
            total += kept
        listed.append(replace(episode, parts=tuple(parts)))
    chosen = np.concatenate(rows)
    tracks = [Track(one.kind, one.name, one.values[chosen], one.agent, one.facts) for one in recording.tracks]
    shown = []
    for view in recording.views:
        used, places = np.unique(view.places[chosen], return_inverse=True)
        pictures = view.pictures[used[used >= 0]]
        if len(pictures):
            places = places.reshape(-1) - (1 if (used < 0).any() else 0)
            shown.append(View(view.name, pictures, places, view.source, view.agent, view.every))
    return replace(recording, episodes=listed, steps=total, tracks=tracks, views=shown)
