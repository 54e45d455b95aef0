"""How alike directions are: a table of cosines, beside what chance gives in so many dimensions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.errors import InputError, nearest
from tdhook_rl.latent.steering_vector import SteeringVector


class Cosines:
    """A table of cosines; ``str()`` prints it.

    Attributes:
        names: of the directions.
        places: where each of them lives, with its number of features.
        values: ``(names, names)``, float64; NaN for two at different places, whose numbers mean different things, and
            for a vector of zeros.
        chance: for each place the size of the cosine that 95 of 100 pairs of random directions stay below.
    """

    def __init__(self, names: list[str], places: list[str], values: Tensor, chance: dict[str, float]) -> None:
        self.names, self.places, self.values, self.chance = names, places, values, chance

    def __getitem__(self, pair: tuple[str, str]) -> float:
        """The cosine of two directions.

        Raises:
            InputError: for a name that is not in the table.
        """
        for name in pair:
            if name not in self.names:
                raise InputError(f"the table has no direction {name!r}; {nearest(name, self.names)}")
        one, other = map(self.names.index, pair)
        return float(self.values[one, other])

    def frame(self) -> Any:
        """A pandas DataFrame, a row and a column for each direction.

        Raises:
            InputError: without pandas.
        """
        try:
            import pandas
        except ModuleNotFoundError:
            raise InputError("a DataFrame needs pandas: pip install pandas; .values are the same numbers") from None
        return pandas.DataFrame(self.values.numpy(), index=self.names, columns=self.names)

    def rows(self) -> list[list[str]]:
        """The heads and the rows as they are shown."""
        shown = [["-" if value != value else f"{value:.2f}" for value in row] for row in self.values.tolist()]
        named = zip(self.names, self.places, shown, strict=True)
        return [["", "place", *self.names], *([name, place, *row] for name, place, row in named)]

    def words(self) -> list[str]:
        """What the cosines are to be compared with."""
        return [
            f"{place}: 95 of 100 pairs of random directions have a cosine between -{bound:.2f} and {bound:.2f}"
            for place, bound in self.chance.items()
        ]

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.words()])

    def _repr_html_(self) -> str:
        from html import escape

        head, *rows = self.rows()
        body = "".join("<tr>" + "".join(f"<td>{escape(one)}</td>" for one in row) + "</tr>" for row in rows)
        heads = "".join(f"<th>{escape(one)}</th>" for one in head)
        words = "".join(f"<p>{escape(one)}</p>" for one in self.words())
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{words}"


@checked
def cosines(vectors: Mapping[str, SteeringVector]) -> Cosines:
    """The cosine of each pair of directions.

    Args:
        vectors: directions by name; those at different places, or of different features, have no cosine.

    Raises:
        InputError: if there are none.

    Example:
        >>> one, other = (SteeringVector(vector=torch.tensor(v), path="fc2") for v in ([3.0, 4.0], [4.0, 3.0]))
        >>> print(cosines({"door": one, "key": other}))
              place         door   key
        door  fc2 (2)       1.00  0.96
        key   fc2 (2)       0.96  1.00
        fc2 (2): 95 of 100 pairs of random directions have a cosine between -1.00 and 1.00
    """
    if not vectors:
        raise InputError("cosines({name: vector}) takes directions by name: there is none")
    places = [_place(one) for one in vectors.values()]
    units = []
    for one in vectors.values():
        flat = one.vector.double().cpu().flatten()
        scaled = flat / flat.abs().max().clamp_min(torch.finfo(torch.float64).tiny)  # squares of large numbers
        norm = scaled.norm()
        units.append(scaled / norm if float(norm) > 0 else torch.full_like(flat, torch.nan))
    values = torch.full((len(units), len(units)), torch.nan, dtype=torch.float64)
    for row, unit in enumerate(units):
        for column, other in enumerate(units):
            if places[row] == places[column]:
                values[row, column] = (unit @ other).clamp(-1, 1)
    chance = {place: _by_chance(len(unit)) for place, unit in zip(places, units, strict=True)}
    return Cosines(list(vectors), places, values, chance)


def _place(vector: SteeringVector) -> str:
    shape = " x ".join(map(str, vector.vector.shape))
    return f"{vector.site} ({shape})"


def _by_chance(features: int) -> float:
    """The quantile of the size of the cosine of two random directions, whose square has a beta distribution."""
    from scipy.stats import beta

    return 1.0 if features == 1 else float(beta.ppf(0.95, 0.5, (features - 1) / 2)) ** 0.5
