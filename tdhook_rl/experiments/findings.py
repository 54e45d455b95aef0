"""What an experiment found: figures held against what is expected, and pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from tdhook_rl.experiments.agents import Agent, Recipe
from tdhook_rl.report.drawing import Drawing
from tdhook_rl.rollout import GroupSplit, OnlineProbe
from tdhook_rl.statistics import Interval, grouped_mean

COLUMNS = ("measured", "found", "expected", "beside it", "met")


@dataclass(frozen=True)
class Check:
    """One figure and what it has to be.

    Args:
        measured: in words.
        value: the figure; with its :class:`~tdhook_rl.statistics.Interval`, where it is an estimate.
        low: it has to be at least this.
        high: it has to be at most this.
        beside: what it is compared with: the untrained network, random directions, chance.
    """

    measured: str
    value: float | Interval
    low: float | None = None
    high: float | None = None
    beside: str = ""

    @property
    def figure(self) -> float:
        """The value alone."""
        return self.value.estimate if isinstance(self.value, Interval) else self.value

    @property
    def met(self) -> bool:
        """Whether it is as expected; NaN never is."""
        low, high = -float("inf") if self.low is None else self.low, float("inf") if self.high is None else self.high
        return low <= self.figure <= high

    @property
    def expected(self) -> str:
        """What it has to be, in words."""
        if self.low is not None and self.high is not None:
            return f"{self.low:g} to {self.high:g}"
        return f"at most {self.high:g}" if self.low is None else f"at least {self.low:g}"

    @property
    def row(self) -> tuple[str, ...]:
        """The cells of its row in a table, in the order of ``COLUMNS``."""
        figure = self.figure
        shown = f"{figure:.3f}" if abs(figure) >= 5e-4 or figure == 0 else f"{figure:.1e}"
        if isinstance(self.value, Interval) and self.value.known:
            shown += f" ({self.value.low:.3f} to {self.value.high:.3f})"
        return self.measured, shown, self.expected, self.beside, "yes" if self.met else "no"


def accuracy(rows: TensorDictBase, features: NestedKey, concept: str, grouping: str = "episode") -> Interval:
    """Of a probe of a concept, on groups that it was not fitted on."""
    probe = OnlineProbe(features=features, label=("concept", concept), split=GroupSplit(grouping, held_out=0.3))
    probe.update(rows)
    return probe.scores["accuracy"]


def logits(actor: nn.Module, states: TensorDictBase) -> Tensor:
    """What an actor gives in states, which stay as they are."""
    with torch.no_grad():
        return actor(states.clone())["logits"]


def share(rate: float, episodes: int) -> Interval:
    """A rate of independent episodes, with its interval."""
    hits = round(rate * episodes)
    return grouped_mean([1.0] * hits + [0.0] * (episodes - hits), bounds=(0.0, 1.0), method="t")


@dataclass(frozen=True)
class Findings:
    """All figures of an experiment on one agent, and what its pictures are drawn from."""

    checks: list[Check]
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every figure is as expected."""
        return all(check.met for check in self.checks)


@dataclass(frozen=True, eq=False, kw_only=True)
class Trained:
    """An agent after training, and what it is compared with.

    Args:
        recipe: how it was trained.
        seed: of its training.
        agent: after training.
        untrained: the same agent before.
        snapshots: agents on the way, by the frames that they had been trained on.
    """

    recipe: Recipe
    seed: int
    agent: Agent
    untrained: Agent
    snapshots: Mapping[int, Agent]

    @property
    def networks(self) -> dict[str, Agent]:
        """The two networks that tables put side by side."""
        return {"trained": self.agent, "untrained": self.untrained}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """An experiment: which agent it examines, and how.

    Args:
        agent: the name of the recipe.
        title: the question.
        measure: from an agent the figures.
        plot: from the figures the pictures.
    """

    agent: str
    title: str
    measure: Callable[[Trained], Findings]
    plot: Callable[[Findings], list[Drawing]]
