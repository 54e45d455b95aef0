"""Attributions that have rows and columns: as maps, and over the frames that they are about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.report.figures.style import (
    WIDTH,
    beside,
    canvas,
    colour_bar,
    colour_map,
    digits,
    framed,
    in_house_style,
    label,
    labels,
    number,
)
from tdhook_rl.report.frames import as_array, as_frames, fitted
from tdhook_rl.report.pictures import heat_of, robust_scale

#: Numbers that are kept beside a figure; of larger pictures only what was largest, and where.
_KEPT = 50_000


@in_house_style
def attribution_maps(
    maps: Any,
    titles: Sequence[str] = (),
    *,
    unit: str = "attribution",
    scale: float | None = None,
    most: int = 12,
    title: str = "Where it looks",
    caption: str = "",
) -> Drawing:
    """Maps side by side, on one colour scale: blue below 0, the page's colour at 0, orange above.

    Args:
        maps: ``(maps, rows, columns)``, or with channels before or after, of which the largest in absolute value is
            shown. NaN is what was not computed.
        titles: of each.
        unit: of the numbers.
        scale: the number of full colour; :func:`~tdhook_rl.report.pictures.robust_scale` of all maps unless given, so
            that one outlier does not leave the rest white.
        most: how many maps are shown, the first.
        title: of the drawing.
        caption: what to see; what was left out is added.

    Raises:
        InputError: for no map, or another number of titles.

    Example:
        >>> attribution_maps([[[0.0, 0.003], [0.001, 0.001]]], ["agent"], unit="mean |gradient|").alt
        'mean |gradient|, full colour at 0.00296. agent: largest 0.003 at row 1, column 2.'
    """
    heat = _heat(maps)
    names = _names(titles, len(heat))
    shown = heat[:most]
    scale = robust_scale(shown) if scale is None else scale
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    panel = min(1.3, (WIDTH - 0.95) / columns)
    tall = min(2.0, max(0.5, heat.shape[1] / heat.shape[2]))
    figure, axes = canvas(rows, columns, width=0.9 + panel * columns, height=rows * (panel * tall + 0.3) + 0.1)
    signed = bool((shown < 0).any())
    # Of one row or column a map would be a line.
    aspect: Any = "equal" if 1 / 8 <= heat.shape[1] / heat.shape[2] <= 8 else "auto"
    called = labels(names[:most], int(panel * 13))  # 13 letters to the inch
    for axis, one, name in zip(axes.flat, shown, called, strict=False):
        image = axis.imshow(
            one, cmap=colour_map(signed), vmin=-scale * signed, vmax=scale, interpolation="nearest", aspect=aspect
        )
        axis.set_title(name, fontsize=9, pad=3)
    _finish(figure, axes, len(shown), image, shown, scale, unit)
    return _drawing(figure, shown, heat, names, unit, scale, title, caption, "maps")


@in_house_style
def overlays(
    frames: Any,
    attribution: Any,
    titles: Sequence[str] = (),
    *,
    unit: str = "attribution",
    scale: float | None = None,
    most: int = 6,
    title: str = "What it looks at",
    caption: str = "",
) -> Drawing:
    """Each frame, and beside it the same in grey with the attribution over it; one colour scale for all.

    Args:
        frames: ``(frames, ...)`` as of :func:`tdhook_rl.report.frames.as_frames`: channels first or last, stacks, bytes
            or floats.
        attribution: of the shape of the frames, or without channels, or of fewer rows and columns.
        titles: of each frame.
        unit: of the attribution.
        scale: as of :func:`attribution_maps`.
        most: how many frames are shown, the first.
        title: of the drawing.
        caption: what to see.

    Raises:
        InputError: if the two do not belong together.

    Example:
        >>> frames = np.zeros((1, 3, 8, 8), np.uint8)
        >>> overlays(frames, np.eye(8)[None], ["step 0"]).alt
        'attribution, full colour at 1. step 0: largest 1 at row 1, column 1.'
    """
    pictures, heat = as_frames(frames), _heat(attribution)
    if len(pictures) != len(heat):
        raise InputError(f"there are {len(pictures)} frames and {len(heat)} attributions")
    names = _names(titles, len(heat))
    shown = heat[:most]
    scale = robust_scale(shown) if scale is None else scale
    pairs = min(2, len(shown))
    rows = -(-len(shown) // pairs)
    panel = (WIDTH - 0.95) / 4
    tall = min(2.0, max(0.5, pictures.shape[1] / pictures.shape[2]))
    figure, axes = canvas(
        rows, 2 * pairs, width=0.9 + panel * 2 * pairs, height=max(rows * (panel * tall + 0.3) + 0.1, 1.4)
    )
    signed = bool((shown < 0).any())
    called = labels(names[:most], int(2 * panel * 13))
    for place, (picture, one) in enumerate(zip(fitted(pictures[:most], least=64), shown, strict=True)):
        left, right = axes[place // pairs, 2 * (place % pairs) :][:2]
        left.imshow(picture, interpolation="nearest")
        left.set_title(called[place], fontsize=9, pad=3, loc="left")
        area = (-0.5, picture.shape[1] - 0.5, picture.shape[0] - 0.5, -0.5)
        right.imshow(picture.mean(-1) * 0.6 + 60, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        strength = np.clip(np.abs(np.nan_to_num(one)) / scale, 0, 1) * 0.9
        image = right.imshow(
            one, cmap=colour_map(signed), vmin=-scale * signed, vmax=scale, alpha=strength, extent=area,
            interpolation="nearest",
        )  # fmt: skip
        right.set(xlim=area[:2], ylim=area[2:])
    _finish(figure, axes, 2 * len(shown), image, shown, scale, unit)
    return _drawing(figure, shown, heat, names, unit, scale, title, caption, "frames")


def _heat(values: Any) -> np.ndarray:
    array = as_array(values)
    if array.ndim not in (3, 4) or 0 in array.shape:
        raise InputError(f"maps have rows and columns, (maps, rows, columns); got shape {array.shape}")
    heat = heat_of(array).astype(float)
    return np.where(np.isfinite(heat), heat, np.nan)


def _names(titles: Sequence[str], count: int) -> list[str]:
    if titles and len(titles) != count:
        raise InputError(f"there are {count} pictures and {len(titles)} titles")
    return [str(one) for one in titles] or [str(one) for one in range(count)]


def _finish(figure: Any, axes: Any, used: int, image: Any, heat: np.ndarray, scale: float, unit: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for place, axis in enumerate(axes.flat):
        axis.set(xticks=[], yticks=[])
        framed(axis)
        axis.set_visible(place < used)
    known = heat[np.isfinite(heat)]
    above, below = bool((known > scale * 1.0001).any()), bool((known < -scale * 1.0001).any())
    ends = {(True, True): "both", (True, False): "max", (False, True): "min", (False, False): "neither"}
    room = int(11 * figure.get_figheight())
    colour_bar(
        figure, image, axes.ravel().tolist(), beside(unit, room), extend=ends[above, below], shrink=0.9, aspect=18,
        ticks=MaxNLocator(4), format=FuncFormatter(lambda value, _: number(value)),
    )  # fmt: skip


def _drawing(
    figure: Any, shown: np.ndarray, heat: np.ndarray, names: list[str], unit: str, scale: float, title: str,
    caption: str, what: str,
) -> Drawing:  # fmt: skip
    peaks: list[dict[str, Any]] = []
    told: list[str] = []
    for name, one in zip(names, shown, strict=False):
        row, column = np.unravel_index(np.nan_to_num(np.abs(one)).argmax(), one.shape)
        found = one[row, column]
        peaks.append({"name": name, "largest": found, "row": int(row), "column": int(column)})
        where = f"largest {number(found)} at row {row + 1}, column {column + 1}"
        told.append(f"{label(name, 60)}: {where if np.isfinite(found) else 'not computed'}")
    words = [caption]
    if np.isnan(shown).any():
        words.append("Grey is what was not computed.")
    if len(heat) > len(shown):
        words.append(f"Shown are the first {len(shown)} of {len(heat):,} {what}.")
    data = {"unit": unit, "scale": scale, "peaks": peaks, "left_out": len(heat) - len(shown)}
    if shown.size <= _KEPT:
        data["values"] = digits(shown)
    return Drawing(
        figure=figure,
        title=title,
        alt=f"{label(unit, 80)}, full colour at {number(scale)}. {'; '.join(told)}.",
        data=data,
        caption=" ".join(word for word in words if word),
    )
