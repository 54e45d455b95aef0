"""Pictures as networks and environments have them, as pictures for people: bytes, rows by columns by RGB."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
from torch import Tensor

from tdhook_rl.errors import InputError

__all__ = ["as_array", "as_frames", "channel_axis", "fitted", "png"]


def as_array(values: Any) -> np.ndarray:
    """Tensors of any kind and device, and whatever numpy takes."""
    if isinstance(values, Tensor) and not values.is_meta:
        values = values.detach().cpu()
        values = (values.float() if values.is_floating_point() else values).numpy()
    if np.ma.is_masked(values):
        values = np.ma.filled(values.astype(float), np.nan)
    try:
        return np.asarray(values)
    except (ValueError, NotImplementedError, TypeError) as error:  # rows of different lengths, a tensor without data
        raise InputError(f"this is no array of numbers: {error}") from None


def as_frames(values: Any) -> np.ndarray:
    """Pictures of one size as bytes, ``(pictures, rows, columns, 3)``, all on one scale.

    Args:
        values: ``(pictures, rows, columns)``, with channels before or after these. One channel is grey, three are
            RGB; four are a stack of grey frames, of which the last is shown; of other numbers the mean is shown.
            Bytes and whole numbers up to 255 stay what they are, floats between 0 and 1 are spread to 255, and other
            ranges from their smallest to their largest value. What is not finite is black.

    Raises:
        InputError: for what has no rows and columns, or complex numbers.

    Example:
        >>> import torch
        >>> as_frames(torch.rand(5, 3, 8, 6)).shape, as_frames(torch.zeros(5, 8, 6, 1, dtype=torch.uint8)).shape
        ((5, 8, 6, 3), (5, 8, 6, 3))
    """
    array = as_array(values)
    if array.ndim not in (3, 4) or 0 in array.shape or array.dtype.kind not in "buif":
        raise InputError(
            f"a picture has rows, columns and perhaps channels, of real numbers; got shape {array.shape[1:]} "
            f"({array.dtype})"
        )
    if array.ndim == 4:
        array = np.moveaxis(array, 1 + channel_axis(array.shape[1:], array.dtype.kind == "f"), -1)
        if array.shape[-1] == 4:
            array = array[..., -1:]
        elif array.shape[-1] not in (1, 3):
            array = array.mean(-1, keepdims=True)
    else:
        array = array[..., None]
    return np.ascontiguousarray(np.broadcast_to(_bytes(array), (*array.shape[:-1], 3)))


def channel_axis(shape: tuple[int, ...], floats: bool = True) -> int:
    """Which axis of a picture holds its channels: 0 or 2. Where both may, networks have them first.

    Example:
        >>> channel_axis((4, 84, 84)), channel_axis((210, 160, 3)), channel_axis((6, 7, 7)), channel_axis((3, 64, 3))
        (0, 2, 0, 0)
    """
    first, last = shape[0] in (1, 3, 4), shape[2] in (1, 3, 4)
    if first != last:
        return 0 if first else 2
    if first:
        return 0 if floats or shape[0] <= shape[2] else 2
    return 0 if shape[0] <= shape[2] else 2


def _bytes(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    numbers = np.where(np.isfinite(array), array, np.nan).astype(np.float32)
    known = numbers[~np.isnan(numbers)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    if array.dtype.kind == "b" or (array.dtype.kind == "f" and low >= 0 and high <= 1):
        low, high = 0.0, 1.0
    elif low >= 0 and 1 < high <= 255:
        low, high = 0.0, 255.0
    if max(-low, high) > 1e30:  # beyond what differences of float32 reach
        numbers = numbers.astype(np.float64)
    scaled = (numbers - low) * (255.0 / ((high - low) or 1.0))
    return np.nan_to_num(scaled).round().clip(0, 255).astype(np.uint8)


def fitted(frames: np.ndarray, least: int = 160, most: int = 640) -> np.ndarray:
    """Frames large enough to see: each pixel becomes a square, or every so many are left out of large ones.

    Example:
        >>> fitted(np.zeros((2, 7, 7, 3), np.uint8)).shape, fitted(np.zeros((1, 1000, 10, 3), np.uint8)).shape
        ((2, 161, 161, 3), (1, 500, 5, 3))
    """
    rows, columns = frames.shape[1:3]
    shrink = -(-max(rows, columns) // most)
    if shrink > 1:
        return frames[:, ::shrink, ::shrink]
    grow = max(1, min(-(-least // min(rows, columns)), most // max(rows, columns)))
    return frames.repeat(grow, 1).repeat(grow, 2)


def png(pixels: np.ndarray) -> bytes:
    """A picture as PNG, in a third of Pillow's time: flat colours need none of the filters that it tries on each line.

    Example:
        >>> import io
        >>> from PIL import Image
        >>> pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
        >>> bool((np.asarray(Image.open(io.BytesIO(png(pixels)))) == pixels).all())
        True
    """
    rows, columns, _ = pixels.shape
    lines = np.zeros((rows, 1 + 3 * columns), np.uint8)  # each begins with the number of its filter
    lines[:, 1:] = pixels.reshape(rows, -1)
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), 2)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(one)) + kind + one + struct.pack(">I", zlib.crc32(kind + one)) for kind, one in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
