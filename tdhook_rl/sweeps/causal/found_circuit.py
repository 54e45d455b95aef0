"""What a search for a circuit has found: the components, what they keep, and the curve beside random sets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tdhook_rl.arguments.checked import checked
from tdhook_rl.statistics import Interval
from tdhook_rl.statistics.cells import Cells, shown
from tdhook_rl.sweeps.causal.circuit_file import read_circuit, write_circuit


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """So many of the most important components.

    Args:
        size: how many.
        faithfulness: what they keep of the difference between the two runs, all others as in the corrupt run.
        random: of random sets with as many components of each site, the mean over sets; ``None`` of all or none.
    """

    size: int
    faithfulness: Interval
    random: Interval | None

    def numbers(self) -> dict[str, Any]:
        """All of it as numbers."""
        row: dict[str, Any] = {"size": self.size}
        for name, one in (("faithfulness", self.faithfulness), ("random", self.random)):
            values = (math.nan,) * 3 if one is None else (one.estimate, one.low, one.high)
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        return row


@dataclass(frozen=True, kw_only=True)
class Circuit:
    """A set of components that keeps what a policy does.

    Args:
        units: by site the numbers of its components; sites without any are left out.
        faithfulness: what it keeps: 1 all, 0 nothing, of the difference between the clean and the corrupt run.
        random: of random sets with as many components of each site, the mean over sets.
        beyond: the share of random sets that keep as much.
        without: what all other components keep without it.
        nothing: what is kept where all components are as in the corrupt run: what passes beside the sites.
        size, of: how many components it has, of how many.
        curve: the most important components, by size, with random sets beside.
        importance: by site what each component was estimated to keep.
        widths: by site how many units it had.
        metric: what is kept, in words.
        words: what one has to know.
        facts: what computed it: ``weights``, a digest of the policy's parameters, ``versions``, ``states``, how many,
            and ``keep``, ``controls`` and ``seed`` of the search.
    """

    units: Mapping[str, list[int]]
    faithfulness: Interval
    random: Interval | None
    beyond: float
    without: Interval
    nothing: Interval
    size: int
    of: int
    curve: Sequence[CurvePoint]
    importance: Mapping[str, Tensor] = field(repr=False)
    widths: Mapping[str, int] = field(repr=False)
    metric: str
    words: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def records(self) -> list[dict[str, Any]]:
        """The faithfulness curve, a row for each size."""
        return Cells(self.curve).records()

    def frame(self) -> Any:
        """The same as a pandas DataFrame.

        Raises:
            InputError: without pandas.
        """
        return Cells(self.curve).frame()

    def json(self) -> str:
        """The same as JSON; what is not known is ``null``."""
        return Cells(self.curve).json()

    @checked
    def save(self, path: str | Path) -> Path:
        """Write safetensors and JSON (see :func:`tdhook_rl.artifacts.save_artifact`)."""
        return write_circuit(path, vars(self), [(one.size, one.faithfulness, one.random) for one in self.curve])

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Circuit:
        """Read a saved circuit, for :func:`faithfulness` in other states or of other weights; nothing is unpickled.

        Raises:
            ArtifactError: if the file is absent, damaged, or holds no circuit.
        """
        found, curve = read_circuit(path)
        points = [CurvePoint(size=size, faithfulness=one, random=other) for size, one, other in curve]
        return cls(**found, curve=points)

    def __str__(self) -> str:
        beside = (
            f"random sets of as many at each site keep {shown(self.random)}; as much: {100 * self.beyond:.0f}% of them"
        )
        lines = [
            f"{self.size} of {self.of} components keep {shown(self.faithfulness)} of: {self.metric}",
            "there are no random sets beside it" if self.random is None else beside,
            f"all others without it keep {shown(self.without)}; with none of them {shown(self.nothing)} is kept",
        ]
        lines += [f"  {site}: {', '.join(map(str, numbers))}" for site, numbers in self.units.items()]
        return "\n".join([*lines, *([self.words] if self.words else [])])
