"""Six experiments on agents whose environment says what is right (``tdhook-rl experiment NAME``).

Knows the environments, and the agents of the examples; uses the library as its users do.
"""

from __future__ import annotations

from tdhook_rl.errors import InputError, nearest
from tdhook_rl.experiments import known_value, memory, misgeneralisation, patching, probing, steering
from tdhook_rl.experiments.agents import RECIPES, Agent, Recipe
from tdhook_rl.experiments.checkpoints import SEEDS, load, make
from tdhook_rl.experiments.findings import COLUMNS, Check, Experiment, Findings, Trained

__all__ = [
    "COLUMNS",
    "EXPERIMENTS",
    "RECIPES",
    "SEEDS",
    "Agent",
    "Check",
    "Experiment",
    "Findings",
    "Recipe",
    "Trained",
    "experiment",
    "load",
    "make",
]

EXPERIMENTS: dict[str, Experiment] = {
    "known_value": known_value.EXPERIMENT,
    "steering": steering.EXPERIMENT,
    "probing": probing.EXPERIMENT,
    "memory": memory.EXPERIMENT,
    "patching": patching.EXPERIMENT,
    "misgeneralisation": misgeneralisation.EXPERIMENT,
}


def experiment(name: str) -> Experiment:
    """One of the six.

    Raises:
        InputError: for an unknown name.
    """
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}; {nearest(name, EXPERIMENTS)}")
    return EXPERIMENTS[name]
