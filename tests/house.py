"""The picture of the house, docs/house.svg: ``make house`` draws the rooms of the package, by layer, and their arrows.

The layers are those of the contract in pyproject.toml, the arrows are the imports, those for type checking included,
and what a room is for is the first sentence that it says of itself.
"""

from __future__ import annotations

import ast
import re
import textwrap
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "house.svg"
PACKAGE = "tdhook_rl"
#: From the roof to the ground.
PALETTE = ("#c0562b", "#b1852a", "#3f9465", "#26798a", "#38577c", "#493850")
WALL, TEXT, PALE = "#8a7f70", "#333333", "#6b6b6b"
#: Where texts, numbers and arrows begin.
PURPOSE, FILES, BARS, STAIRS = 1.6, 6.9, 6.98, 9.0


class Room(NamedTuple):
    """A folder, or a module at the package's root."""

    name: str
    purpose: str
    files: int
    lines: int


def layers() -> list[list[str]]:
    """The names of the rooms from the roof to the ground, those of one layer together."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    contract = next(one for one in contracts if one["type"] == "layers")
    return [re.split(r"\s*\|\s*", layer) for layer in contract["layers"]]


def room(name: str) -> Room:
    """What stands in a room."""
    # The environments lie beside the package in a checkout.
    folder = ROOT / name if name == "envs" else ROOT / PACKAGE / name
    files = sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    said = (folder / "__init__.py" if folder.is_dir() else files[0]).read_text()
    purpose = (ast.get_docstring(ast.parse(said)) or "").split("\n\n")[0].replace("`", "").replace("\n", " ")
    return Room(name, purpose, len(files), sum(len(file.read_text().splitlines()) for file in files))


def arrows() -> Counter[tuple[str, str]]:
    """How many imports lead from one room to another."""
    import grimp  # comes with import-linter, which holds the contract

    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    found: Counter[tuple[str, str]] = Counter()
    for module in graph.modules - {PACKAGE}:
        for other in graph.find_modules_directly_imported_by(module) - {PACKAGE}:
            pair = module.split(".")[1], other.split(".")[1]
            if pair[0] != pair[1]:
                found[pair] += 1
    return found


def essential(down: set[tuple[str, str]], names: list[str]) -> set[tuple[str, str]]:
    """The arrows that do not follow from others: where no longer way leads from the one room to the other."""
    below: dict[str, set[str]] = {name: set() for name in names}
    for name in reversed(names):
        below[name] = {to for source, target in down if source == name for to in (target, *below[target])}
    return {
        (source, target)
        for source, target in down
        if not any(target in below[other] for one, other in down if one == source)
    }


def draw() -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("svg")
    # Texts stay texts, so that they can be found and copied.
    matplotlib.rcParams |= {"svg.hashsalt": PACKAGE, "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
    import matplotlib.pyplot as plt
    from matplotlib.colors import LinearSegmentedColormap

    house, names = layers(), [name for layer in layers() for name in layer]
    shades = LinearSegmentedColormap.from_list("house", PALETTE)
    colours = {name: shades(at / (len(house) - 1)) for at, layer in enumerate(house) for name in layer}
    figure, axes = plt.subplots(figsize=(10, 0.4 * len(names) + 1.3))
    axes.set(xlim=(-0.15, 11.6), ylim=(len(names) + 0.4, -2.3))
    axes.set_position((0, 0, 1, 1))
    axes.axis("off")
    _draw_rooms(axes, house, colours)
    _draw_arrows(axes, names, colours)
    figure.savefig(PICTURE, metadata={"Date": None})
    plt.close(figure)


def _draw_rooms(axes: Any, house: list[list[str]], colours: dict[str, Any]) -> None:
    from matplotlib.patches import Polygon, Rectangle

    rooms = [[room(name) for name in layer] for layer in house]
    listed = [one for layer in rooms for one in layer]
    most = max(one.lines for one in listed)
    axes.add_patch(Polygon([(0, -0.5), (STAIRS / 2, -2.2), (STAIRS, -0.5)], fc="#f3efe7", ec=WALL, lw=0.9))
    total = f"{sum(one.files for one in listed)} files, {sum(one.lines for one in listed):,} lines"
    axes.text(STAIRS / 2, -1.36, PACKAGE, ha="center", size=12, weight="bold", color=TEXT)
    axes.text(STAIRS / 2, -0.92, f"{len(listed)} rooms, {total}", ha="center", size=7.5, color=PALE)
    axes.text(FILES, -0.6, "files", ha="right", size=7.2, color=PALE)
    axes.text(BARS, -0.6, "lines", size=7.2, color=PALE)
    at = 0
    for layer in rooms:
        shade = (*colours[layer[0].name][:3], 0.09)
        axes.add_patch(Rectangle((0, at - 0.5), STAIRS, len(layer), fc=shade, ec=WALL, lw=0.7))
        for one in layer:
            colour, width = colours[one.name], 1.3 * one.lines / most
            axes.text(0.1, at, one.name, va="center", size=9.5, weight="bold", color=colour)
            axes.text(
                PURPOSE,
                at,
                textwrap.fill(one.purpose, 66, break_on_hyphens=False),
                va="center",
                size=7.6,
                color=TEXT,
                linespacing=1.15,
            )
            axes.add_patch(Rectangle((BARS, at - 0.13), width, 0.26, fc=colour, alpha=0.75))
            axes.text(FILES, at, one.files, va="center", ha="right", size=7.2, color=PALE)
            axes.text(BARS + 0.07 + width, at, f"{one.lines:,}", va="center", size=7.2, color=TEXT)
            at += 1


def _draw_arrows(axes: Any, names: list[str], colours: dict[str, Any]) -> None:
    from matplotlib.patches import Arc

    place = {name: at for at, name in enumerate(names)}
    drawn = arrows()
    down = {pair for pair in drawn if place[pair[0]] < place[pair[1]]}
    bold = essential(down, names)
    for pair in sorted(drawn, key=lambda pair: (pair in bold, pair)):
        start, end = (place[name] for name in pair)
        reach = 0.3 + 2.2 * (abs(end - start) / len(names)) ** 0.7
        look = {"alpha": 0.9, "lw": 0.6 + 0.25 * drawn[pair] ** 0.5} if pair in bold else {"alpha": 0.22, "lw": 0.5}
        look = {"alpha": 0.9, "lw": 0.9, "ls": (0, (3, 2))} if pair not in down else look
        middle, height = (STAIRS, (start + end) / 2), abs(end - start)
        axes.add_patch(Arc(middle, 2 * reach, height, theta1=-90, theta2=90, color=colours[pair[0]], **look))
        if pair in bold or pair not in down:
            axes.plot(STAIRS + 0.15, end, marker="<", ms=5.5, color=colours[pair[0]], mew=0)
    for name in names:
        axes.plot(STAIRS, place[name], "o", ms=4.5, color=colours[name], mec="white", mew=0.6)
    legend = (
        "An arrow leads from a room to what it imports; pale ones follow from others. Rooms of one layer share a "
        "floor, and do not know each other.\nDashed: handed on, lazily, where an import path is promised."
    )
    axes.text(0, len(names) - 0.3, legend, va="top", size=7.4, color=PALE, linespacing=1.4)


if __name__ == "__main__":
    draw()
    print(PICTURE)
