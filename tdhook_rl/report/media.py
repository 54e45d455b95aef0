"""What can be logged beside numbers: histograms, images, animations, tables and files."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from tdhook_rl.errors import InputError
from tdhook_rl.report.frames import as_array, as_frames, png
from tdhook_rl.statistics.interval import real_numbers

__all__ = ["Animation", "Artifact", "DataTable", "Histogram", "Image", "Media"]


@dataclass(eq=False, kw_only=True)
class Media:
    """Base of what is no number.

    Attributes:
        path: the local file, once there is one; backends that take files are given it.
    """

    path: Path | None = field(default=None, init=False, repr=False)

    ending = ""
    #: What one is called in a message.
    called = ""

    def content(self) -> bytes:
        """What the local file holds."""
        raise NotImplementedError


@dataclass(eq=False)
class Histogram(Media):
    """How often values fall into bins.

    Args:
        counts: ``(bins,)``, from 0 on.
        edges: ``(bins + 1,)``, from the lowest to the highest.

    Raises:
        InputError: for counts and edges that are no histogram.

    Example:
        >>> found = Histogram.of([0.0, 0.5, 0.6, float("nan")], bins=2)
        >>> found.counts.tolist(), found.edges.tolist()
        ([1, 2], [0.0, 0.3, 0.6])
    """

    counts: np.ndarray
    edges: np.ndarray

    ending = ".json"
    called = "histogram"

    def __post_init__(self) -> None:
        self.counts, self.edges = np.asarray(self.counts), real_numbers(self.edges, "the edges of a histogram")
        counts = real_numbers(self.counts, "the counts of a histogram")
        whole = np.isfinite(counts).all() and np.isfinite(self.edges).all()
        if counts.ndim != 1 or not len(counts) or self.edges.shape != (len(counts) + 1,) or not whole:
            raise InputError(
                f"a histogram has finite counts and one edge more: got {counts.shape} and {self.edges.shape}"
            )
        if (counts < 0).any() or (np.diff(self.edges) <= 0).any():
            raise InputError(
                "a histogram has counts from 0 on and edges that rise: np.histogram(values, bins) has them"
            )

    @classmethod
    def of(cls, values: Any, bins: int = 64) -> Histogram:
        """Of numbers of any shape; those that are not finite are left out.

        Raises:
            InputError: if none is finite, or for bins beyond 1 to 512 (what W&B shows).
        """
        if not 1 <= bins <= 512:
            raise InputError(f"a histogram has 1 to 512 bins, got {bins}")
        numbers = real_numbers(values, "the values of a histogram")
        numbers = numbers[np.isfinite(numbers)]
        if not numbers.size:
            raise InputError("a histogram needs a finite value")
        low, high = float(numbers.min()), float(numbers.max())
        # Bins that are narrower than the numbers are exact would be no bins.
        if not math.isfinite(high - low) or (high - low) < 1e-9 * max(abs(low), abs(high), 1e-300) * bins:
            margin = max(abs(low), abs(high), 1.0) * 0.5
            low, high = max(low - margin, -1e300), min(high + margin, 1e300)
        counts, edges = np.histogram(numbers.clip(low, high), bins=bins, range=(low, high))
        return cls(counts, edges)

    def content(self) -> bytes:
        return json.dumps({"counts": self.counts.tolist(), "edges": self.edges.tolist()}).encode()


@dataclass(eq=False)
class Image(Media):
    """A picture: rows, columns and perhaps channels (first or last), integers or floats.

    Args:
        pixels: as of :func:`tdhook_rl.report.frames.as_frames`.
        caption: shown beside it.

    Example:
        >>> Image(np.zeros((4, 6))).pixels.shape
        (4, 6, 3)
    """

    pixels: Any
    caption: str = ""

    ending = ".png"
    called = "picture"

    def __post_init__(self) -> None:
        self.pixels = as_frames(as_array(self.pixels)[None])[0]

    def content(self) -> bytes:
        return png(self.pixels)


@dataclass(eq=False)
class Animation(Media):
    """Pictures one after the other; kept as a GIF, which every browser shows.

    Args:
        frames: of one size, each as of :class:`Image`.
        fps: how many are shown in a second.
        caption: shown beside it.
    """

    frames: Any
    fps: float = 8.0
    caption: str = ""

    ending = ".gif"
    called = "animation"

    def __post_init__(self) -> None:
        if not 0 < self.fps <= 50:
            raise InputError(f"a GIF shows up to 50 frames a second, got fps={self.fps}")
        self.frames = as_frames(self.frames)

    def content(self) -> bytes:
        from PIL import Image as Pillow

        file = io.BytesIO()
        first, *rest = [Pillow.fromarray(frame) for frame in self.frames]
        # disposal 1: each frame stays below the next. Frames that are the same would be joined, and steps lost.
        first.save(file, "GIF", save_all=True, append_images=rest, duration=round(1000 / self.fps), loop=0, disposal=1)
        return file.getvalue()


@dataclass(eq=False)
class DataTable(Media):
    """Rows of numbers and texts.

    Raises:
        InputError: for a row of another length than the columns.

    Example:
        >>> print(DataTable(["action", "reward"], [["left", 0.5], ["right", None]]).content().decode(), end="")
        action,reward
        left,0.5
        right,
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]

    ending = ".csv"
    called = "table"

    def __post_init__(self) -> None:
        self.columns = list(self.columns)
        self.rows = [[_cell(cell) for cell in row] for row in self.rows]
        odd = next((row for row in self.rows if len(row) != len(self.columns)), None)
        if odd is not None:
            raise InputError(f"a row has {len(odd)} cells, and the table {len(self.columns)} columns: {odd}")

    def content(self) -> bytes:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.columns, *self.rows])
        return text.getvalue().encode(errors="backslashreplace")  # a name of a file may be no text


@dataclass(eq=False)
class Artifact(Media):
    """Files that are kept: a probe, a vector, statistics.

    Args:
        files: files that exist.
        kind: what they are, ``"probe"``.
        facts: JSON-able facts about them.
        aliases: further names of this version; ``"latest"`` always is one.
    """

    called = "artifact"

    files: Sequence[str | Path]
    kind: str = "artifact"
    facts: Mapping[str, Any] = field(default_factory=dict)
    aliases: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.files = [Path(file) for file in self.files]
        absent = next((file for file in self.files if not file.is_file()), None)
        if absent is not None or not self.files:
            raise InputError(f"an artifact consists of files, and {absent or 'none'} is there")
        self.aliases = list(dict.fromkeys(["latest", *self.aliases]))


def _cell(value: Any) -> Any:
    """A number, a text or nothing."""
    if value is None or isinstance(value, str | bool):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    if isinstance(value, Real):
        return value if not isinstance(value, float) or math.isfinite(value) else None
    return str(value)
