"""An attribution through an episode, over what the agent did and was paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, Drawing
from tdhook_rl.report.figures.style import (
    BLUE,
    GREEN,
    MARKERS,
    array,
    canvas,
    colour_bar,
    colour_map,
    drawn,
    framed,
    in_house_style,
    label,
    labels,
    number,
    points,
    tick_numbers,
    whole_ticks,
)
from tdhook_rl.report.pictures import robust_scale


@in_house_style
def attribution_through_episode(
    attribution: Any,
    features: Sequence[str] | None = None,
    *,
    actions: Any = None,
    action_names: Sequence[str] | None = None,
    rewards: Any = None,
    others: Mapping[str, Any] | None = None,
    unit: str = "attribution",
    most: int = 16,
    title: str = "What it looks at, step by step",
    caption: str = "",
) -> Drawing:
    """Features by steps, and below them actions, rewards and other numbers of each step.

    Args:
        attribution: ``(steps, features)``; more dimensions of features are flattened. NaN is what was not computed.
        features: their names; their numbers unless given.
        actions: ``(steps,)`` whole numbers, or ``(steps, n)`` of an action with ``n`` numbers.
        action_names: of the whole numbers.
        rewards: ``(steps,)``.
        others: ``(steps,)`` numbers by name: values, probes, strengths.
        unit: of the attribution.
        most: how many features are shown: of more, those with the largest mean absolute attribution.
        title: of the drawing.
        caption: what to see; what was left out is added.

    Raises:
        InputError: for no step, or other numbers of names, actions or rewards.

    Example:
        >>> attribution_through_episode([[0.1, 0.0], [0.0, -0.4]], ["light", "wall"], rewards=[0.0, 1.0]).alt
        '2 steps. Largest mean |attribution|: wall 0.2, light 0.05. Rewards add up to 1.'
    """
    values = array(attribution)
    if values.ndim < 2 or 0 in values.shape:
        raise InputError(f"an attribution through an episode is (steps, features), got shape {values.shape}")
    values = values.reshape(len(values), -1)
    values = np.where(np.isfinite(values), values, np.nan)
    steps, count = values.shape
    names = [str(one) for one in (features if features is not None else range(count))]
    below = {**({} if rewards is None else {"reward": rewards}), **(others or {})}
    rows = {name: array(one).reshape(-1) for name, one in below.items()}
    acts = None if actions is None else array(actions).reshape(len(array(actions)), -1)
    lengths = {name: len(one) for name, one in [*rows.items(), *([] if acts is None else [("actions", acts)])]}
    if len(names) != count:
        raise InputError(f"there are {count} features and {len(names)} names")
    odd = next((name for name, length in lengths.items() if length != steps), None)
    if odd is not None:
        raise InputError(f"the attribution has {steps} steps, and {odd} {lengths[odd]}")
    sizes = np.nan_to_num(np.abs(values)).sum(0) / np.maximum(np.isfinite(values).sum(0), 1)
    chosen = sorted(np.argsort(-sizes, kind="stable")[:most].tolist())
    heights = [max(0.8, 0.19 * len(chosen))] + [0.55] * (acts is not None) + [0.5] * len(rows)
    figure, axes = canvas(
        len(heights), 1, height=sum(heights) + 0.25 * len(heights) + 0.5, sharex=True, height_ratios=heights
    )
    shown = values[:, chosen]
    scale, signed = robust_scale(shown), bool((shown < 0).any())
    top, *lower = axes[:, 0]
    image = top.imshow(
        shown.T, aspect="auto", cmap=colour_map(signed), vmin=-scale * signed, vmax=scale, interpolation="nearest"
    )
    top.set_yticks(range(len(chosen)), labels([names[one] for one in chosen], 20))
    framed(top)
    top.tick_params(length=0)
    bar = colour_bar(figure, image, top, label(unit, 20), aspect=12, pad=0.02)
    tick_numbers(bar.ax, "y")
    if acts is not None:
        _actions(lower.pop(0), acts, action_names)
    for axis, (name, numbers) in zip(lower, rows.items(), strict=True):
        if name == "reward":
            axis.bar(range(steps), np.nan_to_num(numbers), color=GREEN, width=0.7)
            axis.axhline(0, color=INK, linewidth=0.8)
        else:
            drawn(axis, points(list(enumerate(numbers))), colour=BLUE)
            known = numbers[np.isfinite(numbers)]
            if len(known) and known.min() >= 0 and known.max() <= 1:
                axis.set_ylim(-0.08, 1.08)
        axis.set_title(label(name, 40), loc="left", fontsize=9, pad=2)
        tick_numbers(axis, "y")
    axes[-1, 0].set(xlabel="step", xlim=(-0.5, steps - 0.5))
    whole_ticks(axes[-1, 0])
    words = [caption, "Grey is what was not computed." if np.isnan(shown).any() else ""]
    if count > len(chosen):
        words.append(f"Shown are {len(chosen)} of {count:,} features, those with the largest mean |{unit}|.")
    return Drawing(
        figure=figure,
        title=title,
        alt=_in_words(names, sizes, steps, unit, rows.get("reward")),
        data={
            "unit": unit,
            "scale": scale,
            "features": [names[one] for one in chosen],
            "attribution": shown,
            "actions": None if acts is None else acts.squeeze(-1) if acts.shape[1] == 1 else acts,
            **rows,
            "left_out": count - len(chosen),
        },
        caption=" ".join(word for word in words if word),
    )


def _actions(axis: Any, actions: np.ndarray, names: Sequence[str] | None) -> None:
    axis.set_title("action", loc="left", fontsize=9, pad=2)
    whole = actions.shape[1] == 1 and bool((actions == actions.round()).all())
    if not whole:
        for place, column in enumerate(actions.T[:5]):
            drawn(axis, points(list(enumerate(column))), colour=BLUE, marker=MARKERS[place % 5], width=1.2)
        return
    taken = actions[:, 0].astype(int)
    kinds = sorted(set(taken.tolist()))
    axis.scatter(range(len(taken)), [kinds.index(one) for one in taken], color=BLUE, s=14)
    words = [names[one] if names is not None and 0 <= one < len(names) else str(one) for one in kinds]
    shown = range(len(kinds)) if len(kinds) <= 5 else [0, len(kinds) - 1]
    axis.set_yticks(list(shown), labels([words[one] for one in shown], 14))
    axis.set_ylim(-0.6, len(kinds) - 0.4)


def _in_words(
    names: Sequence[str], sizes: np.ndarray, steps: int, unit: str, rewards: np.ndarray | None, most: int = 5
) -> str:
    order = np.argsort(-sizes, kind="stable")[:most]
    told = ", ".join(f"{label(names[one], 60)} {number(float(sizes[one]))}" for one in order)
    paid = "" if rewards is None else f" Rewards add up to {number(float(np.nansum(rewards)))}."
    return f"{steps} step{'s' if steps != 1 else ''}. Largest mean |{label(unit, 60)}|: {told}.{paid}"
