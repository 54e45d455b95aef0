"""What all figures share: colours, the canvas, names as they are written, estimates as points with limits."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor

from tdhook_rl.errors import InputError
from tdhook_rl.report.drawing import INK, LINES, house_style
from tdhook_rl.statistics import Interval

Number = float | Interval
#: Pairs of a step and a number or interval, or rows of a step, a value and its limits.
Curve = Sequence[Sequence[Any]] | np.ndarray

#: After Okabe and Ito (2008), moved apart for readers without red or green cones, and to where each can be told from
#: a white page and a dark one. Never more than these five in one figure, and each with a marker and a line of its own.
COLOURS = BLUE, ORANGE, GREEN, PURPLE, GREY = "#0067c5", "#d55e00", "#03a564", "#bf7abf", "#68696c"
#: What was not computed, in images.
BAD = "#b4b9c1"
#: Inches. A phone shows so much with its text still readable; a page at a desk shows it a quarter larger.
WIDTH = 4.4
MARKERS = ("o", "s", "^", "D", "v")
STYLES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.6)), (0, (6, 2, 1, 2)), (0, (3, 1.5)))

P = ParamSpec("P")
T = TypeVar("T")


def in_house_style(function: Callable[P, T]) -> Callable[P, T]:
    """Draws in :func:`house_style`; where nothing that was to be drawn is known, the panel says so."""

    @wraps(function)
    def styled(*args: P.args, **kwargs: P.kwargs) -> T:
        with house_style():
            made = function(*args, **kwargs)
            for axis in getattr(getattr(made, "figure", None), "axes", ()):
                if axis.get_visible() and not np.isfinite(axis.dataLim.intervalx).all():
                    axis.text(0.5, 0.5, "nothing is known", transform=axis.transAxes, ha="center", va="center",
                              color=GREY, fontsize=9)  # fmt: skip
            return made

    return styled


def canvas(rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = 2.6, **options: Any) -> Any:
    """A figure and its axes, ``(rows, columns)``, in inches."""
    # The object interface keeps pyplot's global state, and a display, out of a training process.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def label(name: object, most: int = 24) -> str:
    """A name as it is written: in one line, without what cannot be printed, its middle left out where it is long.

    Example:
        >>> label("probe of\\nthe door"), label("module.0.module.3.sub.module.7.weight_hidden", 20)
        ('probe of the door', 'module.0…ight_hidden')
    """
    text = "".join(one if one.isprintable() else " " for one in str(name))
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    end = (most - 1) * 3 // 5
    return f"{text[: most - 1 - end]}…{text[-end:]}"


def labels(names: Iterable[object], most: int = 24, taken: Collection[str] = ()) -> list[str]:
    """Names as they are written together: no two that differ are written alike, nor as what is taken.

    Where their middles are left out, and differ there, what they begin and end with is left out instead.

    Example:
        >>> labels([f"module.layers.{at}.attention.projection" for at in (0, 1)], 20)
        ['….layers.0.attenti…', '….layers.1.attenti…']
        >>> labels(["truth", "found"], taken=["truth"])
        ['truth (2)', 'found']
    """
    whole = list(names)
    found = {str(name): label(name, most) for name in whole}
    by_label: dict[str, list[str]] = {}
    for name, short in found.items():
        by_label.setdefault(short, []).append(name)
    for alike in by_label.values():
        if len(alike) > 1:
            found.update(zip(alike, _apart(alike, most), strict=True))
    used = set(taken)
    for name, short in found.items():
        count, one = 1, short
        while one in used:
            count += 1
            one = f"{label(name, most - len(f' ({count})'))} ({count})"
        used.add(one)
        found[name] = one
    return [found[str(name)] for name in whole]


def _apart(names: Sequence[str], most: int) -> list[str]:
    """Names around where they differ, as far as there is room for that."""
    texts = [label(name, len(name) + 1) for name in names]
    start = _shared(texts)
    end = _shared([text[start:][::-1] for text in texts])
    found = []
    for text in texts:
        room = max(0, most - 2 - (len(text) - end - start)) // 2
        first, last = max(0, start - room), min(len(text), len(text) - end + room)
        part = f"{'…' * (first > 0)}{text[first:last]}{'…' * (last < len(text))}"
        found.append(part if len(part) <= most else label(text, most))
    return found


def _shared(texts: Sequence[str]) -> int:
    """With how many letters all of them begin."""
    ends = (at for at, letters in enumerate(zip(*texts, strict=False)) if len(set(letters)) > 1)
    return next(ends, min(map(len, texts)))


def beside(name: object, letters: int = 25) -> str:
    """A name along an axis: two lines of so many letters at most, 12 for each inch that there is room for.

    Example:
        >>> beside("mean |gradient| of the chosen logit")
        'mean |gradient| of the\\nchosen logit'
    """
    return textwrap.fill(label(name, 2 * letters), letters, max_lines=2, placeholder="…")


def number(value: float, digits: int = 3) -> str:
    """A number as people write it: three digits, and k, M for thousands and millions.

    Example:
        >>> number(81920), number(0.98765), number(0.0031), number(1.5e6), number(float("nan")), number(999.9)
        ('81.9k', '0.988', '0.0031', '1.5M', 'not known', '1k')
    """
    if not np.isfinite(value):
        return "not known"
    value = float(f"{value:.{digits}g}")
    for unit, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit:
            return f"{value / unit:.{digits}g}{sign}" if abs(value) < 1e12 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"


def numbers(values: Iterable[float]) -> list[str]:
    """Numbers beside each other, such as ticks: with as many digits as tell them apart, three at least.

    Example:
        >>> numbers([0, 20_000, 40_000]), numbers([100_000, 100_500, 101_000])
        (['0', '20k', '40k'], ['100k', '100.5k', '101k'])
    """
    given = [float(one) for one in values]
    steps = np.diff(np.unique(np.array([one for one in given if np.isfinite(one)])))
    least = 0.01 * float(steps.min()) if len(steps) else float("inf")
    for digits in range(3, 15):
        if all(abs(float(f"{one:.{digits}g}") - one) <= least for one in given if np.isfinite(one)):
            break
    return [number(one, digits) for one in given]


def said(value: Number) -> str:
    """An estimate with its limits, for sentences.

    Example:
        >>> said(0.5)
        '0.5'
    """
    if isinstance(value, Interval) and value.known:
        return f"{number(value.estimate)} ({number(value.low)} to {number(value.high)})"
    return number(float(value))


@dataclass(frozen=True, eq=False)
class Points:
    """Estimates over an axis, in order of it; NaN where there is none, or no interval.

    Attributes:
        x, y, low, high: arrays of one length.
        groups: of how many groups each is, where that is known.
    """

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray
    groups: tuple[int, ...] = ()

    @property
    def last(self) -> tuple[float, str]:
        """Where the last known value is, and the value in words."""
        known = np.flatnonzero(np.isfinite(self.y))
        if not len(known):
            return float("nan"), number(float("nan"))
        at = known[-1]
        text = number(self.y[at])
        if np.isfinite(self.low[at]) and np.isfinite(self.high[at]):
            text += f" ({number(self.low[at])} to {number(self.high[at])})"
        return float(self.x[at]), text

    @property
    def data(self) -> dict[str, Any]:
        """For the data of a drawing; limits only where there are some."""
        found = {"x": self.x, "y": self.y}
        return found | ({"low": self.low, "high": self.high} if np.isfinite(self.low).any() else {})


def points(curve: Curve) -> Points:
    """A curve as points.

    Raises:
        InputError: for rows that are neither a step and a value nor a step, a value and its limits.

    Example:
        >>> points([(20, 0.5), (10, 0.25)]).y.tolist(), points([(0, 0.5, 0.4, 0.6)]).high.tolist()
        ([0.25, 0.5], [0.6])
    """
    curve = array(curve) if isinstance(curve, Tensor) else curve
    rows: list[tuple[float, ...]] = []
    groups: list[int] = []
    for row in curve:
        if len(row) == 2:
            rows.append((float(row[0]), *limits(row[1])))
            groups += [row[1].groups] if isinstance(row[1], Interval) else []
        elif len(row) == 4:
            rows.append(tuple(float(one) for one in row))
        else:
            raise InputError(f"a point of a curve is (step, value) or (step, value, low, high), got {row!r:.80}")
    table = np.array(rows, dtype=float).reshape(-1, 4)
    table = table[np.isfinite(table[:, 0])]
    x, y, low, high = table[np.argsort(table[:, 0], kind="stable")].T
    y, low, high = (np.where(np.isfinite(one), one, np.nan) for one in (y, low, high))
    return Points(x, y, low, high, tuple(groups))


def array(values: Any) -> np.ndarray:
    """Numbers of any kind as float64."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=float)


def limits(value: Number | None) -> tuple[float, float, float]:
    """An estimate and its limits; NaN for what is not known."""
    nan = float("nan")
    found = (value.estimate, value.low, value.high) if isinstance(value, Interval) else (value, nan, nan)
    first, low, high = (nan if one is None or not np.isfinite(one) else float(one) for one in found)
    return first, low, high


def drawn(axis: Any, found: Points, *, colour: str, style: Any = "-", marker: str = "o", width: float = 1.8) -> Any:
    """A line with its band and a few markers; a point without neighbours has one too, or it would not be seen."""
    known, sure = np.isfinite(found.y), np.isfinite(found.low) & np.isfinite(found.high)
    alone = _alone(known)
    spread = np.linspace(0, len(known) - 1, min(8, len(known))).round().astype(int)
    if sure.any():
        axis.fill_between(found.x, found.low, found.high, color=colour, alpha=0.22, linewidth=0)
        lone = _alone(sure)
        axis.vlines(found.x[lone], found.low[lone], found.high[lone], color=colour, linewidth=1)
    (line,) = axis.plot(
        found.x, found.y, color=colour, linestyle=style, linewidth=width, marker=marker,
        markevery=sorted({*alone.tolist(), *spread.tolist()}),
    )  # fmt: skip
    return line


def _alone(known: np.ndarray) -> np.ndarray:
    """Where there is something, and nothing on either side."""
    sides = np.concatenate([[False], known, [False]])
    return np.flatnonzero(known & ~sides[:-2] & ~sides[2:])


def digits(values: np.ndarray) -> np.ndarray:
    """Four digits of each number, for the data of pictures."""
    return np.array([float(f"{value:.4g}") for value in values.ravel()]).reshape(values.shape)


def legend(figure: Any, entries: Mapping[str, Any]) -> None:
    """Below the axes: what each artist is, in as many columns as there is room for."""
    if entries:
        room = figure.get_figure(root=True).get_figwidth() * 72 * figure.bbox.width / figure.get_figure().bbox.width
        rows = -(-sum(len(name) * 5.3 + 40 for name in entries) // room)
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=int(-(-len(entries) // rows)),
            handlelength=2.4, columnspacing=1.2,
        )  # fmt: skip


def colour_map(signed: bool) -> Any:
    """The page at 0; blue below and orange above, as everywhere in the package. What is NaN is grey.

    Args:
        signed: whether there are values below 0.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_rgba

    ramp = [to_rgba(ORANGE, 0), to_rgba(ORANGE, 1)]
    below = [to_rgba(BLUE, 1), to_rgba(BLUE, 0)] if signed else []
    places = [0.0, 0.5, 0.5, 1.0] if signed else [0.0, 1.0]
    found = LinearSegmentedColormap.from_list("attribution", list(zip(places, [*below, *ramp], strict=True)), N=255)
    return found.with_extremes(bad=BAD)


def colour_bar(figure: Any, image: Any, axes: Any, unit: str, **options: Any) -> Any:
    """What the colours of an image stand for."""
    from matplotlib.cm import ScalarMappable

    bar = figure.colorbar(ScalarMappable(image.norm, image.cmap), ax=axes, **options)
    bar.set_label(unit)
    bar.solids.set(rasterized=True, edgecolor="none", antialiased=False)
    bar.outline.set(color=LINES, linewidth=0.6)
    bar.ax.grid(False)
    return bar


def framed(axis: Any) -> None:
    """The edges of an image, whose colours may be the page's."""
    axis.grid(False)
    axis.spines[:].set(visible=True, color=LINES, linewidth=0.8)


def tick_numbers(axis: Any, which: str = "x") -> None:
    """Ticks as 20k, 1.5M."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    class Numbers(FuncFormatter):
        def format_ticks(self, values: Any) -> list[str]:
            return numbers(values)

    of = axis.xaxis if which == "x" else axis.yaxis
    of.set_major_formatter(Numbers(lambda value, _: number(value)))
    longest = max(map(len, numbers(of.get_majorticklocs())), default=0)
    if which == "x" and longest > 5 and isinstance(of.get_major_locator(), MaxNLocator):
        of.get_major_locator().set_params(nbins=4)  # or they would lie on each other


def whole_ticks(axis: Any) -> None:
    """Ticks at whole numbers only, for an axis that counts; left as they are where what is drawn lies between."""
    from matplotlib.ticker import MaxNLocator

    drawn_at = np.concatenate([np.ravel(line.get_xdata()) for line in axis.lines] or [np.zeros(0)]).astype(float)
    if (drawn_at == drawn_at.round()).all():
        axis.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))


def resting(groups: Iterable[int], of: str, confidence: str = "95%") -> str:
    """What intervals rest on, in words; nothing where there is no interval.

    Example:
        >>> resting([32, 40], "episodes"), resting([], "episodes")
        ('95% intervals, of 32 to 40 episodes.', '')
    """
    counts = sorted(set(groups))
    if not counts:
        return ""
    many = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    return f"{confidence} intervals, of {many} {of}."


def hollow(marker: str) -> Any:
    """An entry of a legend: a marker in ink."""
    from matplotlib.lines import Line2D

    return Line2D([], [], color=INK, marker=marker, linestyle="none", markersize=5)
