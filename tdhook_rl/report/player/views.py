"""What is looked at: frames, pictures that the policy sees, vectors of features, and the attributions over them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from tensordict.utils import unravel_key

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import InputError, MissingKeyError, nearest
from tdhook_rl.report.frames import as_frames, channel_axis
from tdhook_rl.report.pictures import is_picture
from tdhook_rl.report.player.tracks import MOST, Key, Rows, Track

OBSERVED = ("observation", "pixels", "image", "obs", "state", "observation_vector")


@dataclass(eq=False)
class View:
    """Pictures that steps are shown by.

    Args:
        name: what it is called.
        pictures: the different ones, ``(pictures, rows, columns, 3)`` bytes.
        places: which of them each step shows; -1 for none.
        source: the entry that it is; attributions of that entry lie over it.
        agent: whose it is.
        every: how many rows and columns of it stand for one that is kept.
    """

    name: str
    pictures: np.ndarray
    places: np.ndarray
    source: Key | None
    agent: int | None = None
    every: int = 1


@dataclass(eq=False)
class Layout:
    """How the entries of an input lie in a picture.

    Args:
        shape: planes, rows, columns.
        planes: what the planes are called; empty where they are colours or frames of a stack.
        channels: which axis of the entry holds the planes; ``None`` where it has none.
        turned: whether its first axis goes from left to right (MiniGrid's).
    """

    shape: tuple[int, int, int]
    planes: Sequence[str] = field(default_factory=list)
    channels: int | None = 0
    turned: bool = False

    def planes_of(self, values: np.ndarray) -> np.ndarray:
        """An attribution as ``(rows, planes, height, width)``; of colours the largest in absolute value is kept."""
        if values.ndim == 2:
            values = values.reshape(len(values), *self.shape)
        elif values.ndim == 3:
            values = values[:, None]
        elif self.channels:
            values = np.moveaxis(values, 1 + self.channels, 1)
        values = values.swapaxes(-1, -2) if self.turned else values
        if self.planes or values.shape[1] == 1:
            return values
        at = np.abs(np.nan_to_num(values)).argmax(1)[:, None]
        return np.take_along_axis(values, at, 1)


def layout_of(rows: Rows, key: Key) -> Layout | None:
    """How an input is looked at; ``None`` where it is a vector, or has too many dimensions."""
    value = rows.data.get(key)
    shape = tuple(value.shape[rows.data.ndim + (1 if key[0] in rows.groups else 0) :])
    env = rows.options.known.base
    grid = getattr(env, "grid", None)
    if grid and key == ("observation",) and math.prod(shape) == len(env.planes) * grid[0] * grid[1]:
        return Layout((len(env.planes), *grid), env.planes)
    if not is_picture(shape):
        return None
    if len(shape) == 2:
        return Layout((1, *shape), channels=None)
    if _is_minigrid(value, shape):
        return Layout((3, shape[1], shape[0]), channels=2, turned=True)
    axis = channel_axis(shape, value.is_floating_point())
    height, width = (shape[1:]) if axis == 0 else shape[:2]
    return Layout((shape[axis], height, width), channels=axis)


def views(rows: Rows) -> list[View]:
    """Frames that were asked for or rendered first, then what the policy sees.

    Raises:
        MissingKeyError: if the rollout has no entry of the name of ``frames_key=``.
        InputError: if that entry is no picture.
    """
    options = rows.options
    wanted = [] if options.frames_key is None else [key_parts(unravel_key(options.frames_key))]
    for key in wanted:
        if key not in rows.keys:
            known = [".".join(one) for one in rows.keys]
            raise MissingKeyError(
                f"frames_key= names {'.'.join(key)!r}, which the rollout lacks; {nearest('.'.join(key), known)}"
            )
        if not is_picture(tuple(rows.data.get(key).shape[rows.data.ndim :])):
            shape = tuple(rows.data.get(key).shape[rows.data.ndim :])
            raise InputError(f"frames_key= names {'.'.join(key)!r} of shape {shape}, which is no picture")
    rendered = _rendered(rows)
    found = [] if rendered is None else [rendered]
    for key in dict.fromkeys([*wanted, *observed_keys(rows)]):
        layout = layout_of(rows, key)
        if layout is None or (rendered is not None and key == rendered.source and key not in wanted):
            continue
        for agent, values in rows.agents(key, rows.of(key)):
            if values.ndim == 2:  # a vector whose places are known, without an environment that draws it
                values = values.reshape(len(values), *layout.shape)
            frames = _minigrid(values) if layout.turned else as_frames(values)
            found.append(View(rows.name(key), *_different(frames), key, agent))
    found.sort(key=lambda view: view.source not in wanted)
    return found


def observed_keys(rows: Rows) -> list[Key]:
    """The policy's inputs; without a policy, entries that are called so or that something explains."""
    policy = rows.options.policy
    given = getattr(policy, "policy_in_keys", None) or getattr(policy, "in_keys", None)
    if given is not None:
        known = [key_parts(unravel_key(key)) for key in given]
    else:
        explained = {source for key in rows.attributions if (source := rows.source(key))}
        known = [key for key in rows.plain if key[-1] in OBSERVED or key in explained]
    known += [key for key in rows.plain if key[-1] == "pixels"]
    return [key for key in dict.fromkeys(known) if key in rows.plain and not _is_state(rows, key)]


def feature_tracks(rows: Rows) -> Iterator[Track]:
    """Inputs that are vectors: a number for each feature."""
    for key in observed_keys(rows):
        if layout_of(rows, key) is not None:
            continue
        for agent, values in rows.agents(key, rows.of(key)):
            flat = values.reshape(len(values), -1).astype(np.float32)
            if not 0 < flat.shape[1] <= MOST:
                rows.options.note(f"{'.'.join(key)!r} has {flat.shape[1]} entries: they are not listed")
                continue
            facts = {"names": feature_names(rows, key, values.shape[1:])}
            yield Track("features", rows.name(key), flat, agent, facts)


def feature_names(rows: Rows, key: Key, shape: tuple[int, ...]) -> list[str]:
    """As given, or as the environment calls its features; their places else."""
    size = torch.Size(shape)
    given = rows.options.features.names
    names = rows.options.features.of(key if len(key) > 1 else key[0], size) if given is not None else None
    own = next((list(one) for name, one in rows.options.known.names.items() if key_parts(name) == key), [])
    if names is None and len(own) == size.numel():
        return own
    if names is None and size.numel() == 1:
        return [key[-1]]
    long = [size for size in shape if size > 1]
    return names or [", ".join(map(str, place)) for place in np.ndindex(*long)]


def attribution_tracks(rows: Rows, found: Sequence[View]) -> Iterator[Track]:
    """Attributions of inputs, over pictures or beside features, and of modules whose output has rows and columns."""
    targets, known = _targets(rows.options.policy), set[str]()
    for key in rows.attributions:
        source = rows.source(key)
        name = ".".join(key[1 : -len(source)] if source else key[1:-1])
        site = "" if source else key[-1]
        label = " of ".join(one for one in (name or targets.get(key, ""), site) if one)
        label = label or ("default target" if key[0] == "attr" else key[0])
        several = sum(rows.source(other) != source for other in rows.attributions)
        facts: dict[str, Any] = {"source": rows.name(source) if source else site, "key": ".".join(key)}
        label = f"{label} ({facts['source']})" if several and source else label
        label = f"{label} [{key[0]}]" if label in known else label  # of another method
        known.add(label)
        for agent, values in rows.agents(source or key, rows.result(key)):
            layout = layout_of(rows, source) if source else _of_site(values)
            features = values.shape[1:]
            if layout is not None and _fits(values, layout):
                over = [view.name for view in found if _overlays(view, source, agent)]
                facts = facts | {"layout": "map", "over": over, "planes": list(layout.planes)}
                yield Track("attribution", label, layout.planes_of(values), agent, facts)
            elif 0 < math.prod(features) <= MOST:
                numbers = [str(number) for number in range(math.prod(features))]
                names = feature_names(rows, source, features) if source else numbers
                facts = facts | {"layout": "features", "names": names}
                yield Track("attribution", label, values.reshape(len(values), -1), agent, facts)
            else:
                rows.options.note(f"the attribution {'.'.join(key)!r} of shape {features} is not shown")


# ---------------------------------------------------------------------- inner


def _fits(values: np.ndarray, layout: Layout) -> bool:
    if values.ndim == 2:
        return values.shape[1] == math.prod(layout.shape)
    return values.ndim in (3, 4)


def _of_site(values: np.ndarray) -> Layout | None:
    """A map over the picture that a convolution has seen: its channels are summed up by the largest."""
    if values.ndim == 3 and min(values.shape[1:]) > 1:
        return Layout((1, *values.shape[1:]), channels=None)
    if values.ndim == 4 and min(values.shape[2:]) > 1:
        return Layout(values.shape[1:])
    return None


def _overlays(view: View, source: Key | None, agent: int | None) -> bool:
    """Over the entry itself; what a module computed from a picture lies over every picture."""
    return (source is None or view.source == source) and (view.agent is None or view.agent == agent)


def _targets(policy: Any) -> dict[Key, str]:
    """What each attribution explains, where its method says so."""
    from tdhook_rl.calls.bound import observers

    found: dict[Key, str] = {}
    for one in observers(policy._hooked.bound) if hasattr(policy, "_hooked") else []:
        chosen = getattr(one.bound or one, "_chosen", None) or []
        if len(chosen) == 1 and chosen[0] is not None:
            found |= dict.fromkeys(one.result_keys, chosen[0].name)
    return found


def _is_state(rows: Rows, key: Key) -> bool:
    """Whether an entry is no tensor of numbers that can be looked at: marks of first steps."""
    value = rows.data.get(key)
    return value.dtype == torch.bool or key[-1] == "is_init"


def _rendered(rows: Rows) -> View | None:
    """The states drawn by their environment, each only once."""
    env = rows.options.known.base
    if env is None:
        if rows.options.env is not None and not any(key[-1] == "pixels" for key in rows.plain):
            rows.options.note(
                f"{type(rows.options.env).__name__} cannot draw states of the past: make it with pixels "
                "(GymEnv(..., from_pixels=True, pixels_only=False)) for frames"
            )
        return None
    keys = {name: key_parts(key) for name, key in env.variables.items()}
    absent = [name for name, key in keys.items() if key not in rows.keys]
    if absent:
        rows.options.note(f"the states cannot be drawn: the rollout lacks {', '.join(absent)}")
        return None
    shown = [key for name, key in keys.items() if name != "elapsed" or getattr(env, "drawn_with_time", True)]
    columns = [rows.of(key).reshape(len(rows.places), -1).astype(np.float64) for key in shown]
    _, first, places = np.unique(np.concatenate(columns, 1), axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)  # as they come
    flat = rows.data.reshape(-1) if rows.data.ndim != 1 else rows.data
    states = flat.select(*keys.values())[rows.places[torch.from_numpy(first[order])]]
    try:
        pictures = env.render(states).numpy(force=True)
    except NotImplementedError:
        return None
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    different, which = _different(pictures)
    return View("state", different, which[rank[places.reshape(-1)]], ("observation",) if _aligned(rows, env) else None)


def _aligned(rows: Rows, env: Any) -> bool:
    """Whether what the agent sees has the rows and columns of what is drawn."""
    if ("observation",) not in rows.keys:
        return False
    return bool(getattr(env, "grid", None)) or is_picture(tuple(rows.data.get("observation").shape[rows.data.ndim :]))


def _different(frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different pictures, and which each step shows."""
    known: dict[bytes, int] = {}
    places = np.array([known.setdefault(one.tobytes(), len(known)) for one in frames], dtype=np.int64)
    _, first = np.unique(places, return_index=True)
    return frames[first], places


def _is_minigrid(value: torch.Tensor, shape: tuple[int, ...]) -> bool:
    """Codes of objects, colours and states, of a square of cells, perhaps as floats."""
    if shape[2:] != (3,) or max(shape) > 32 or value.dtype == torch.bool:
        return False
    low, most = float(value.min()), value.reshape(-1, 3).amax(0).tolist()
    whole = not value.is_floating_point() or bool((value == value.round()).all())  # NaN is not
    return whole and low >= 0 and 1 < most[0] <= 10 and most[1] <= 5 and most[2] <= 3


def _minigrid(codes: np.ndarray, tile: int = 16) -> np.ndarray:
    """What MiniGrid draws of its codes; without it, the codes as colours."""
    try:
        from minigrid.core.grid import Grid
    except ImportError:
        return as_frames((codes.swapaxes(1, 2) * 25).astype(np.uint8))
    known: dict[bytes, np.ndarray] = {}
    drawn = []
    for one in codes.astype(np.uint8):
        if one.tobytes() not in known:
            grid, seen = Grid.decode(one)
            agent = np.argwhere(one[..., 0] == 10)
            if len(agent):
                (column, row), facing = agent[0].tolist(), int(one[tuple(agent[0])][2])
            else:  # what an agent sees is drawn around it, and it looks up
                (column, row), facing = (grid.width // 2, grid.height - 1), 3
            known[one.tobytes()] = grid.render(tile, (column, row), facing, highlight_mask=seen)
        drawn.append(known[one.tobytes()])
    return np.stack(drawn).astype(np.uint8)
