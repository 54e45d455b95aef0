"""Frames for people: a canvas of square tiles with shapes and letters."""

from __future__ import annotations

import numpy as np

#: Told apart by colour-blind readers (Okabe and Ito 2008), on a light ground.
COLOURS = {
    "ground": (245, 245, 240), "line": (210, 210, 205), "wall": (70, 75, 85), "ink": (20, 20, 25),
    "white": (255, 255, 255), "grey": (160, 160, 160), "blue": (0, 114, 178), "orange": (230, 159, 0),
    "green": (0, 158, 115), "red": (213, 94, 0), "yellow": (240, 228, 66), "sky": (86, 180, 233),
    "pink": (204, 121, 167),
}  # fmt: skip

# Each glyph is 5 rows of 3 pixels, one octal digit a row.
_GLYPHS = {
    "0": "75557", "1": "26227", "2": "71747", "3": "71717", "4": "55711", "5": "74717", "6": "74757", "7": "71122",
    "8": "75757", "9": "75717", "A": "25755", "B": "65656", "C": "34443", "D": "65556", "E": "74647", "F": "74644",
    "G": "34553", "H": "55755", "I": "72227", "K": "55655", "L": "44447", "M": "57755", "N": "65555", "O": "25552",
    "P": "65644", "R": "65655", "S": "34216", "T": "72222", "U": "55557", "V": "55552", "W": "55775", "X": "55255",
    "Y": "55222", "+": "02720", "-": "00700", "=": "07070", ".": "00002", ":": "02020", "?": "71202", " ": "00000",
    ">": "42124", "<": "12421", "*": "05250",
}  # fmt: skip


class Canvas:
    """Tiles to draw on, row by row from the top left.

    Args:
        rows: of tiles.
        columns: of tiles.
        tile: pixels along the side of a tile.

    Example:
        >>> canvas = Canvas(2, 3, tile=16)
        >>> canvas.disc(0, 1, "blue")
        >>> canvas.pixels.shape, bool((canvas.pixels[8, 24] == COLOURS["blue"]).all())
        ((32, 48, 3), True)
    """

    def __init__(self, rows: int, columns: int, *, tile: int = 36, colour: str = "ground") -> None:
        self.tile = tile
        self.pixels = np.empty((rows * tile, columns * tile, 3), dtype=np.uint8)
        self.pixels[:] = COLOURS[colour]
        half = (np.arange(tile) - (tile - 1) / 2) / tile
        self._y, self._x = np.meshgrid(half, half, indexing="ij")

    def fill(self, row: int, column: int, colour: str, *, inset: float = 0.0) -> None:
        """Colour a tile, or the square inside a margin given as a share of its side."""
        self._paint(row, column, np.maximum(abs(self._x), abs(self._y)) <= 0.5 - inset, colour)

    def outline(self, row: int, column: int, colour: str = "line", *, width: float = 0.03) -> None:
        """Draw the border of a tile."""
        self._paint(row, column, np.maximum(abs(self._x), abs(self._y)) > 0.5 - width, colour)

    def disc(self, row: int, column: int, colour: str, *, radius: float = 0.36) -> None:
        """Draw a disc; the radius is a share of the tile's side."""
        self._paint(row, column, self._x**2 + self._y**2 <= radius**2, colour)

    def ring(self, row: int, column: int, colour: str, *, radius: float = 0.4, width: float = 0.08) -> None:
        """Draw a ring."""
        distance = np.sqrt(self._x**2 + self._y**2)
        self._paint(row, column, (distance <= radius) & (distance > radius - width), colour)

    def wedge(self, row: int, column: int, colour: str) -> None:
        """Draw a triangle that points left, as a piece of cheese."""
        self._paint(row, column, (abs(self._y) <= (self._x + 0.4) * 0.4) & (self._x <= 0.36), colour)

    def text(self, row: float, column: float, text: str, colour: str = "ink", *, scale: int = 4) -> None:
        """Write text centred on a tile; letters are 3 by 5 pixels, times a scale."""
        width = (4 * len(text) - 1) * scale
        top = round((row + 0.5) * self.tile - 2.5 * scale)
        left = round((column + 0.5) * self.tile - width / 2)
        for position, letter in enumerate(text.upper()):
            bits = [[int(digit) >> (2 - x) & 1 for x in range(3)] for digit in _GLYPHS[letter]]
            mask = np.kron(np.array(bits, dtype=bool), np.ones((scale, scale), dtype=bool))
            x = left + 4 * scale * position
            self.pixels[top : top + 5 * scale, x : x + 3 * scale][mask] = COLOURS[colour]

    def bar(self, top: int, bottom: int, left: int, right: int, colour: str) -> None:
        """Fill a rectangle given in pixels."""
        self.pixels[min(top, bottom) : max(top, bottom), left:right] = COLOURS[colour]

    def _paint(self, row: int, column: int, mask: np.ndarray, colour: str) -> None:
        tile = self.pixels[row * self.tile : (row + 1) * self.tile, column * self.tile : (column + 1) * self.tile]
        tile[mask] = COLOURS[colour]
