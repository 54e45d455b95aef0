"""The record of one replay: the stored data that it is given, and the distributions that it meets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

__all__ = ["Drawn", "Replay"]


class Drawn(NamedTuple):
    """A distribution that a replay met, and what was drawn from it in the call that is explained."""

    module: nn.Module
    distribution: torch.distributions.Distribution
    samples: Mapping[NestedKey, Tensor | None]

    def again(self, outputs: TensorDictBase) -> Drawn:
        """The same of other outputs."""
        return Drawn(self.module, self.module.get_dist(outputs), self.samples)  # type: ignore[operator]


@dataclass
class Replay:
    """What a replay takes from the stored data, and the distributions that it met."""

    stored: TensorDictBase
    in_step: bool = False  # of the forward that has just run, in the mode in which it ran
    learning: bool = False  # whether it is to find what the data does not hold as it was drawn
    distributions: list[Drawn] = field(default_factory=list)
    watched: dict[str, Tensor] = field(default_factory=dict)
    runs: dict[str, int] = field(default_factory=dict)  # how often the hooks that count ran
    # What a deterministic policy decided before exploration noise was added.
    decided: dict[NestedKey, Tensor] = field(default_factory=dict)
    # What was found, by slot.
    learned: dict[str, Tensor] = field(default_factory=dict)
