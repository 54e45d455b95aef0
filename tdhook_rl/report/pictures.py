"""Pictures that are quick to make while an agent trains: attribution over frames, and bars where there are none.

Blue pulls the explained number down and red pushes it up; the two are told apart by colour-blind readers. All pictures
of one call share one scale, whose end is the 99th percentile of what is shown, so that one outlier does not darken the
rest, and which is written below each.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.frames import as_array, as_frames, channel_axis, fitted

__all__ = ["bars", "beside", "heat_of", "is_picture", "overlays", "robust_scale"]

UP, DOWN = np.array([213, 94, 0], np.float32), np.array([0, 114, 178], np.float32)  # of Okabe and Ito (2008)
INK, FAINT, GROUND = (29, 35, 43), (150, 157, 166), (255, 255, 255)
SIZE, LINE = 13, 18


def robust_scale(values: np.ndarray) -> float:
    """The 99th percentile of what is not zero, in absolute value; 1 where nothing is.

    Example:
        >>> robust_scale(np.array([0.0, 0.003, 0.003, -0.003]))
        0.003
    """
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    return float(np.percentile(sizes, 99)) if sizes.size else 1.0


def is_picture(shape: Sequence[int]) -> bool:
    """Whether features of a shape can be looked at as rows and columns, perhaps with channels.

    Example:
        >>> is_picture((3, 36, 36)), is_picture((84, 84)), is_picture((90,)), is_picture((3, 18))
        (True, True, False, False)
    """
    if len(shape) == 3:
        channels = channel_axis(tuple(shape))
        return min(shape[1:] if channels == 0 else shape[:2]) >= 5
    return len(shape) == 2 and min(shape) >= 8


def overlays(frames: Any, attribution: Any, captions: Sequence[str] = (), *, scale: float | None = None) -> np.ndarray:
    """Each frame, and beside it the same in grey with the attribution over it.

    Args:
        frames: ``(pictures, ...)`` as of :func:`tdhook_rl.report.frames.as_frames`.
        attribution: of the shape of the frames, or without channels, or of fewer rows and columns (windows). Of
            channels the largest in absolute value is shown.
        captions: a line above each.
        scale: the value of full colour; :func:`robust_scale` unless given.

    Returns:
        bytes, ``(pictures, rows, columns, 3)``.

    Raises:
        InputError: if the two do not belong together.

    Example:
        >>> overlays(np.zeros((2, 3, 8, 8)), np.ones((2, 3, 8, 8))).shape
        (2, 182, 328, 3)
    """
    shown, heat = as_frames(frames), heat_of(as_array(attribution))
    if len(shown) != len(heat):
        raise InputError(f"there are {len(shown)} frames and {len(heat)} attributions")
    scale = robust_scale(heat) if scale is None else scale
    heat = _stretched(np.nan_to_num(heat), shown.shape[1:3])[..., None]
    grey = shown.mean(-1, keepdims=True, dtype=np.float32) * 0.6 + 60
    weight = (np.abs(heat) / scale).clip(0, 1) * 0.9
    over = grey * (1 - weight) + np.where(heat >= 0, UP, DOWN) * weight
    large = fitted(shown)
    gap = np.full((*large.shape[:2], 8, 3), 255, np.uint8)
    pair = np.concatenate([large, gap, fitted(over.round().astype(np.uint8))], 2)
    signed = bool((heat < 0).any())
    words = list(captions) + [""] * (len(pair) - len(captions))
    above = LINE if any(words) else 0
    return np.stack([_framed(one, words[number], above, scale, signed) for number, one in enumerate(pair)])


def bars(
    values: Any,
    names: Sequence[str] | None = None,
    caption: str = "",
    *,
    scale: float | None = None,
    most: int = 10,
    order: Sequence[int] | None = None,
    width: int = 420,
) -> np.ndarray:
    """One bar for each of the features with the largest values, in absolute terms.

    Args:
        values: one for each feature; what is not finite counts as 0.
        names: of the features; their numbers unless given.
        caption: a line above.
        scale: the value of a full bar; the largest unless given. A bar beyond it ends in an arrow.
        most: how many are shown; the share of the others is written below.
        order: which, in this order; those with the largest values unless given.
        width: of the picture.

    Returns:
        bytes, ``(rows, columns, 3)``.

    Example:
        >>> bars([0.1, -0.4, 0.0], ["x0", "x1", "x2"]).shape
        (72, 420, 3)
    """
    numbers = np.nan_to_num(as_array(values).astype(float).reshape(-1), posinf=0, neginf=0)
    labels = [str(number) for number in range(len(numbers))] if names is None else [str(one) for one in names]
    if len(labels) != len(numbers):
        raise InputError(f"there are {len(numbers)} values and {len(labels)} names")
    listed = np.argsort(-np.abs(numbers), kind="stable")[:most] if order is None else np.asarray(order)
    scale = scale or float(np.abs(numbers).max(initial=0)) or 1.0
    total = float(np.abs(numbers).sum())
    rest = len(numbers) - len(listed)
    top = LINE if caption else 0
    image, draw = _canvas(width, top + LINE * (len(listed) + (1 if rest else 0)) + LINE)
    if caption:
        draw.text((4, 2), caption, INK, _font(text=caption))
    left = min(190, max([40, *(int(_length(labels[one], draw)) + 18 for one in listed)]))
    signed, right = bool((numbers < 0).any()), width - 70
    zero = (left + right) // 2 if signed else left
    reach = right - zero
    for row, one in enumerate(listed):
        y, value = top + row * LINE, numbers[one]
        _right_text(draw, left - 12, y + 2, _short(labels[one], left - 16, draw), INK)
        end = zero + round(reach * max(-1.0, min(1.0, value / scale)))
        colour = tuple((UP if value >= 0 else DOWN).astype(int).tolist())
        draw.rectangle((min(zero, end), y + 3, max(zero, end), y + LINE - 4), colour)
        if abs(value) > scale * 1.0001:
            tip = end + (7 if value > 0 else -7)
            draw.polygon([(end, y + 2), (end, y + LINE - 3), (tip, y + LINE // 2)], colour)
        _right_text(draw, width - 4, y + 2, f"{value:.3g}", INK)
    y = top + LINE * len(listed)
    draw.line((zero, top, zero, y), FAINT)
    if rest:
        others = total - float(np.abs(numbers[listed]).sum())
        draw.text((4, y + 1), f"{rest} more: {others / total if total else 0:.0%} of the total", FAINT, _font(11))
        y += LINE
    _right_text(draw, right, y + 1, f"full bar: {scale:.3g}", FAINT, 11)
    return np.asarray(image)


def beside(frame: Any, picture: np.ndarray) -> np.ndarray:
    """A frame to the left of a picture, on white.

    Example:
        >>> beside(np.zeros((40, 30, 3), np.uint8), bars([1.0])).shape
        (168, 562, 3)
    """
    left = fitted(as_frames(as_array(frame)[None]), least=120, most=420)[0]
    height = max(len(left), len(picture)) + 8
    page = np.full((height, left.shape[1] + 16 + picture.shape[1] + 6, 3), 255, np.uint8)
    page[4 : 4 + len(left), 4 : 4 + left.shape[1]] = left
    page[4 : 4 + len(picture), left.shape[1] + 16 : left.shape[1] + 16 + picture.shape[1]] = picture
    return page


def heat_of(attribution: np.ndarray) -> np.ndarray:
    """One number for each row and column: of channels the largest in absolute value."""
    heat = attribution.astype(np.float32)
    if heat.ndim == 4:
        heat = np.moveaxis(heat, 1 + channel_axis(heat.shape[1:]), -1)
        at = np.abs(np.nan_to_num(heat)).argmax(-1)[..., None]
        heat = np.take_along_axis(heat, at, -1)[..., 0]
    if heat.ndim != 3:
        raise InputError(f"an attribution over frames has rows and columns, got shape {attribution.shape[1:]}")
    return heat


def _stretched(heat: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    if heat.shape[1:] == shape:
        return heat
    rows, columns = (np.arange(size) * had // size for size, had in zip(shape, heat.shape[1:], strict=True))
    return heat[:, rows][:, :, columns]


def _framed(pair: np.ndarray, caption: str, above: int, scale: float, signed: bool) -> np.ndarray:
    """The caption above, the scale below."""
    height, width = pair.shape[:2]
    image, draw = _canvas(width, above + height + 22)
    if caption:
        draw.text((4, 2), _short(caption, width - 8, draw), INK, _font(text=caption))
    from PIL import Image as Pillow

    image.paste(Pillow.fromarray(pair), (0, above))
    low, high = (f"-{scale:.3g}" if signed else "0"), f"{scale:.3g}"
    y = above + height + 4
    start, end = width - 160, width - 60
    ramp = np.linspace(-1 if signed else 0, 1, end - start)[:, None]
    colours = np.array([128, 128, 128]) * (1 - np.abs(ramp)) + np.where(ramp >= 0, UP, DOWN) * np.abs(ramp)
    strip = np.broadcast_to(colours.round().astype(np.uint8)[None], (10, end - start, 3))
    image.paste(Pillow.fromarray(np.ascontiguousarray(strip)), (start, y + 2))
    _right_text(draw, start - 5, y, low, INK, 11)
    draw.text((end + 5, y), high, INK, _font(11))
    if width > 260:
        draw.text((4, y), "attribution", FAINT, _font(11))
    return np.asarray(image)


def _canvas(width: int, height: int) -> tuple[Any, Any]:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    image = Pillow.new("RGB", (width, height), GROUND)
    return image, ImageDraw.Draw(image)


def _font(size: int = SIZE, text: str = "") -> Any:
    """Pillow's own; for letters that it lacks that of matplotlib, where that is installed."""
    return _loaded(size, all(one.isascii() or one == "·" for one in text))


@lru_cache(maxsize=8)
def _loaded(size: int, plain: bool) -> Any:
    from PIL import ImageFont

    found = None if plain else importlib.util.find_spec("matplotlib")
    for place in () if found is None else found.submodule_search_locations or ():
        file = Path(place) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.is_file():
            return ImageFont.truetype(str(file), size - 1)  # its letters are larger
    return ImageFont.load_default(size)


def _length(text: str, draw: Any, size: int = SIZE) -> float:
    return draw.textlength(text, _font(size, text))


def _right_text(draw: Any, right: int, y: int, text: str, colour: tuple[int, int, int], size: int = SIZE) -> None:
    draw.text((right - math.ceil(_length(text, draw, size)), y), text, colour, _font(size, text))


def _short(text: str, width: int, draw: Any) -> str:
    """The end of a name tells more than its beginning."""
    if _length(text, draw) <= width:
        return text
    while len(text) > 1 and _length("..." + text, draw) > width:
        text = text[1:]
    return "..." + text
