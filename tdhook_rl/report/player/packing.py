"""Arrays as few bytes that a browser unpacks by itself: few bits for each number, then zlib.

One row of an array is one step. What has few different values is kept exactly, as indices into a list of them; other
numbers become whole multiples of a step (the scale of the array); the code 0 of these, and ``null`` in a list, is NaN.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from tdhook_rl.errors import ArtifactError

#: With more different values than this, numbers are rounded.
LIST = 256


@dataclass(frozen=True, eq=False)
class Packed:
    """An array in its packed form.

    Args:
        spec: how it is read: ``shape`` (rows first), ``code`` (``"list"``, ``"steps"``, ``"colours"`` or ``"bytes"``),
            ``bits`` of one entry, and what the code needs. ``delta`` says that each row is the XOR with the row before.
        data: the rows, each beginning with a byte, compressed by zlib.
    """

    spec: dict[str, Any]
    data: bytes

    @property
    def step(self) -> float:
        """The largest distance between neighbouring values that can be told apart; 0 where values are exact."""
        return max(self.spec["step"]) if self.spec["code"] == "steps" else 0.0


def pack_values(values: np.ndarray, *, levels: int = 65_534, by_column: bool = False, exact: bool = True) -> Packed:
    """Numbers, of which NaN and infinite ones are kept as NaN.

    Args:
        values: ``(rows, ...)``.
        levels: how many steps are told apart where there are too many different values: up to 254, or up to 65534.
        by_column: whether each feature has a scale of its own; else all share one, in which 0 is exactly 0.
        exact: whether few different values are kept as they are.

    Example:
        >>> packed = pack_values(np.array([[0.5], [0.25], [np.nan]]))
        >>> packed.spec["bits"], unpack(packed).ravel().tolist()
        (2, [0.5, 0.25, nan])
        >>> noise = np.random.default_rng(0).normal(size=(100, 5))
        >>> packed = pack_values(noise, levels=254)
        >>> bool((np.abs(unpack(packed) - noise) <= packed.step / 2).all())
        True
    """
    numbers = values.astype(np.float64, copy=False).reshape(len(values), -1)
    known = np.isfinite(numbers)
    found = _different(numbers[known]) if exact else None
    shape = list(values.shape)
    if found is not None:
        codes = np.where(known, np.searchsorted(found, np.where(known, numbers, found[0] if len(found) else 0)), -1)
        whole = [*found.tolist(), *([None] if not known.all() else [])]
        codes = np.where(codes < 0, len(found), codes)
        bits = _bits(len(whole))
        spec = {"shape": shape, "code": "list", "bits": bits, "values": whole or [None]}
        return Packed(spec, zlib.compress(_pack_bits(codes, bits), 9))
    wide = levels > 254
    if by_column:
        filled = np.where(known, numbers, np.nan)
        low, high = (_columns(pick, filled) for pick in (np.nanmin, np.nanmax))
        step = np.where(high > low, (high - low) / (levels - 1), 1.0)
        step[(step <= 1) & (np.where(known, numbers, 0) % 1 == 0).all(0)] = 1.0  # whole numbers stay what they are
    else:  # zero is a multiple of the step
        size = float(np.abs(numbers[known]).max(initial=0.0)) or 1.0
        signed = bool((numbers[known] < 0).any())
        step = np.array([size / ((levels - 1) // 2 if signed else levels - 1)])
        if step[0] <= 1 and (numbers[known] % 1 == 0).all():
            step[0] = 1.0
        low = np.array([-step[0] * ((levels - 1) // 2) if signed else 0.0])
    codes = np.where(known, np.rint((np.where(known, numbers, 0) - low) / step).clip(0, levels - 1) + 1, 0)
    rows = codes.astype("<u2" if wide else "u1")
    spec = {
        "shape": shape, "code": "steps", "bits": 16 if wide else 8, "low": low.tolist(), "step": step.tolist(),
    }  # fmt: skip
    # High and low bytes apart: the high ones hardly change.
    data = rows.view("u1").reshape(len(rows), -1, 2).swapaxes(1, 2) if wide else rows
    return Packed(spec, zlib.compress(np.ascontiguousarray(data).tobytes(), 9))


def pack_frames(frames: np.ndarray) -> Packed:
    """Pictures, ``(pictures, rows, columns, 3)`` bytes: indices into a list of colours where there are up to 256.

    Example:
        >>> frames = np.zeros((3, 4, 4, 3), np.uint8)
        >>> frames[1] = 255
        >>> packed = pack_frames(frames)
        >>> packed.spec["bits"], bool((unpack(packed) == frames).all())
        (1, True)
    """
    shape = list(frames.shape)
    whole = frames[..., 0].astype(np.uint32) << 16 | frames[..., 1].astype(np.uint32) << 8 | frames[..., 2]
    seen = np.zeros(1 << 24, bool)
    seen[whole.ravel()] = True
    colours = seen.nonzero()[0]
    if len(colours) <= LIST:
        place = np.zeros(1 << 24, np.uint8)
        place[colours] = np.arange(len(colours))
        bits = _bits(len(colours))
        packed = _pack_bits(place[whole].reshape(len(frames), -1), bits, joined=False)
        spec = {"shape": shape, "code": "colours", "bits": bits, "values": colours.tolist()}
    else:
        packed = frames.reshape(len(frames), -1)
        spec = {"shape": shape, "code": "bytes", "bits": 8}
    changes = packed.copy()
    changes[1:] ^= packed[:-1]
    plain, delta = (zlib.compress(one.tobytes(), 9) for one in (packed, changes))
    best = min(plain, delta, key=len)
    return Packed(spec | {"delta": best is delta}, best)


def unpack(packed: Packed) -> np.ndarray:
    """The array: float64, or bytes of pictures.

    Raises:
        ArtifactError: if the data is not what the spec says.
    """
    spec = packed.spec
    try:
        rows, *features = (int(size) for size in spec["shape"])
        count, bits, code = math.prod(features), int(spec["bits"]), spec["code"]
        entries = count // 3 if code == "colours" else count
        line = -(-entries * bits // 8)
        # No more than is expected: a small file may claim to hold a very large one.
        reader = zlib.decompressobj()
        raw = reader.decompress(packed.data, rows * line + 1)
        data = np.frombuffer(raw, np.uint8).reshape(rows, line)
        if spec.get("delta"):
            data = np.bitwise_xor.accumulate(data, 0) if rows else data
        if code == "bytes":
            return data.reshape(rows, *features)
        if code == "steps":
            wide = data.reshape(rows, 2, -1).astype(np.uint16) if bits == 16 else None
            codes = data if wide is None else wide[:, 0] | wide[:, 1] << 8
            low, step = np.asarray(spec["low"], float), np.asarray(spec["step"], float)
            return np.where(codes > 0, low + (codes - 1.0) * step, np.nan).reshape(rows, *features)
        codes = _unpack_bits(data, bits, entries)
        if code == "colours":
            colours = np.asarray(spec["values"], np.uint32)[codes]
            return (
                np.stack([colours >> 16 & 255, colours >> 8 & 255, colours & 255], -1)
                .astype(np.uint8)
                .reshape(rows, *features)
            )
        values = np.array([np.nan if one is None else one for one in spec["values"]], float)
        return values[codes].reshape(rows, *features)
    except (KeyError, IndexError, TypeError, ValueError, zlib.error) as error:
        raise ArtifactError(f"a packed array is not what it says to be: {error}") from error


def _different(numbers: np.ndarray) -> np.ndarray | None:
    """The different values, sorted; ``None`` if there are too many, which a few rows tell for most."""
    if numbers.size > 4096 and len(np.unique(numbers[:: numbers.size // 4096])) > LIST - 1:
        return None
    found = np.unique(numbers)
    return found if len(found) < LIST else None


def _columns(pick: Any, filled: np.ndarray) -> np.ndarray:
    empty = np.isnan(filled).all(0)
    found = np.zeros(filled.shape[1])
    found[~empty] = pick(filled[:, ~empty], 0) if (~empty).any() else 0
    return found


def _bits(count: int) -> int:
    return next(bits for bits in (1, 2, 4, 8) if count <= 1 << bits)


def _pack_bits(codes: np.ndarray, bits: int, joined: bool = True) -> Any:
    """Rows of codes, as many in a byte as fit, the first in the highest bits."""
    each = 8 // bits
    codes = codes.reshape(len(codes), -1).astype(np.uint8)
    short = -codes.shape[1] % each
    codes = np.pad(codes, ((0, 0), (0, short))) if short else codes
    parts = codes.reshape(len(codes), codes.shape[1] // each, each) << np.arange(8 - bits, -1, -bits, dtype=np.uint8)
    rows = np.bitwise_or.reduce(parts, -1).astype(np.uint8)
    return rows.tobytes() if joined else rows


def _unpack_bits(rows: np.ndarray, bits: int, entries: int) -> np.ndarray:
    parts = rows[..., None] >> np.arange(8 - bits, -1, -bits, dtype=np.uint8) & ((1 << bits) - 1)
    return parts.reshape(len(rows), -1)[:, :entries]
