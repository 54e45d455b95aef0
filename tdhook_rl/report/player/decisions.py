"""What the policy could have done at each step, and what it did."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tdhook_rl.arguments.keys import key_parts
from tdhook_rl.errors import InputError
from tdhook_rl.report.player.tracks import Key, Rows, Track, named

#: What actions are decided from, in the order in which they are looked for.
DECIDING = ("logits", "probs", "action_value", "loc")


def action_keys(rows: Rows) -> list[Key]:
    """Where actions are."""
    return [key for key in rows.plain if key[-1] == "action"]


def decision_tracks(rows: Rows) -> list[Track]:
    """For each decision what it was drawn from and what was taken: bars of a choice, or a range for each dimension.

    A choice is ``("choice", (rows, actions))`` beside ``("chosen", (rows,))``; a continuous action is
    ``(rows, dimensions, 4)``: the action, the mean, and one standard deviation below and above it.
    """
    found: list[Track] = []
    for action in action_keys(rows):
        prefix = action[:-1]
        keys = [key for name in DECIDING for key in rows.plain if key == (*prefix, name)]
        found += _decision(rows, action, keys[0] if keys else None)
    return found


def _decision(rows: Rows, action: Key, key: Key | None) -> Iterator[Track]:
    name = rows.name(action)
    several = dict(rows.agents(action, rows.of(action)))
    source = {} if key is None else dict(rows.agents(key, rows.of(key).astype(np.float64)))
    bands = _bands(rows, key) if key is not None and key[-1] == "loc" else {}
    for agent, taken in several.items():
        if taken.dtype.kind == "f":
            given = {"loc": source.get(agent)} if key is not None and key[-1] == "loc" else {}
            yield _continuous(rows, action, taken, agent, given.get("loc"), bands.get(agent))
            continue
        weights = source.get(agent)
        index = _index(taken, None if weights is None else weights.shape[1:])
        if index is None:
            parts = tuple(taken.shape[1:])
            rows.options.note(f"{name!r} of shape {parts} is no single choice: its actions are not shown as bars")
            continue
        if weights is None or weights.ndim != 2:
            if weights is not None:
                rows.options.note(f"{'.'.join(key or ())!r} of shape {weights.shape[1:]} is not shown as bars")
            count = taken.shape[1] if taken.ndim == 2 and taken.shape[1] > 1 else int(index.max(initial=0)) + 1
            weights, form = np.full((len(index), count), np.nan), "unknown"
        else:
            form = {"logits": "probability", "probs": "probability"}.get(key[-1], "value") if key else "unknown"
            if key is not None and key[-1] == "logits":
                weights = _softmax(np.where(_open(rows, key[:-1], agent, weights.shape), weights, -np.inf))
        names = _names(rows, action, weights.shape[1])
        yield Track("choice", name, weights.astype(np.float32), agent, {"form": form, "names": names})
        yield Track("chosen", name, index.astype(np.float32), agent)


def _index(taken: np.ndarray, shape: Any) -> np.ndarray | None:
    """The number of the action, from an index or one-hot."""
    if taken.ndim == 1 or (taken.ndim == 2 and taken.shape[1] == 1):
        return taken.reshape(-1).astype(np.int64)
    flat = taken.astype(np.int64)
    if taken.ndim == 2 and (shape is None or tuple(shape) == taken.shape[1:]) and (flat.sum(1) == 1).all():
        return flat.argmax(1)
    return None


def _open(rows: Rows, prefix: Key, agent: int | None, shape: tuple[int, ...]) -> np.ndarray:
    """Which actions were open, where a mask lies beside what was decided from."""
    for key in ((*prefix, "action_mask"), ("action_mask",)):
        mask = dict(rows.agents(key, rows.of(key))).get(agent) if key in rows.plain else None
        if mask is not None and mask.dtype == np.bool_ and mask.shape == shape:
            return mask
    return np.ones(shape, dtype=bool)


def _softmax(logits: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)


def _names(rows: Rows, action: Key, count: int) -> list[str]:
    """As given, or as the environment calls its actions; their numbers else.

    Raises:
        InputError: for another number of names than actions.
    """
    given = rows.options.action_names
    names = named(given, action, count)
    if given is not None and names is None and not isinstance(given, dict):
        raise InputError(f"action_names= has {len(given)} names, and {'.'.join(action)!r} has {count} actions")
    known = list(rows.options.known.actions)
    return names or (known if len(known) == count else [f"action {number}" for number in range(count)])


def _continuous(
    rows: Rows, action: Key, taken: np.ndarray, agent: int | None, loc: np.ndarray | None, band: np.ndarray | None
) -> Track:
    taken = taken.reshape(len(taken), -1).astype(np.float32)
    shown = np.full((*taken.shape, 4), np.nan, np.float32)
    shown[..., 0] = taken
    fits = loc is not None and loc.reshape(len(loc), -1).shape == taken.shape
    if fits and loc is not None:
        shown[..., 1] = loc.reshape(taken.shape)
    if fits and band is not None and band.shape == (*taken.shape, 3):
        shown[..., 1:] = band
    names = named(rows.options.action_names, action, taken.shape[1])
    if names is None:
        names = ["action"] if taken.shape[1] == 1 else [f"action {number}" for number in range(taken.shape[1])]
    return Track("continuous", rows.name(action), shown, agent, {"names": names})


def _bands(rows: Rows, loc: Key) -> dict[int | None, np.ndarray]:
    """The mean, and one standard deviation below and above it: ``(rows, dimensions, 3)``.

    Distributions that squash (TanhNormal) are asked of the policy, and the three are mapped as actions are.
    """
    scale = (*loc[:-1], "scale")
    if scale not in rows.plain:
        return {}
    found = {}
    widths = dict(rows.agents(scale, rows.of(scale).astype(np.float64)))
    for agent, centre in rows.agents(loc, rows.of(loc).astype(np.float64)):
        if agent in widths and widths[agent].shape == centre.shape:
            mean, width = (one.reshape(len(one), -1) for one in (centre, widths[agent]))
            known = (np.isfinite(mean) & np.isfinite(width) & (width > 0)).all(1)  # others are no distribution
            found[agent] = np.full((*mean.shape, 3), np.nan)
            found[agent][known] = _as_actions(rows, loc, mean[known], width[known])
    return found


def _as_actions(rows: Rows, loc: Key, centre: np.ndarray, width: np.ndarray) -> np.ndarray:
    import torch

    policy = rows.options.policy
    modules: list[Any] = [] if policy is None else list(policy.modules())
    drawing = [one for one in modules if hasattr(one, "distribution_class")]
    found: Any = next((one for one in drawing if loc in map(key_parts, one.in_keys)), None)
    if found is None:
        rows.options.note(
            "mean and range of actions are loc and scale as the network gives them: a distribution that squashes them, "
            "such as TanhNormal, is known where policy= is given"
        )
        return np.stack([centre, centre - width, centre + width], -1)
    options = {
        name: one.cpu() if isinstance(one, torch.Tensor) else one
        for name, one in (found.distribution_kwargs or {}).items()
    }
    drawn = found.distribution_class(loc=torch.from_numpy(centre), scale=torch.from_numpy(width), **options)
    base = drawn.base_dist if hasattr(drawn, "transforms") else drawn
    ends = torch.stack([base.mean, base.mean - base.stddev, base.mean + base.stddev])
    for transform in getattr(drawn, "transforms", []):
        ends = transform(ends)
    return ends.movedim(0, -1).numpy(force=True)
