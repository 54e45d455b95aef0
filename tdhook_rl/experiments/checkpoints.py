"""The weights that come with the package: for seeds 0 to 2 every agent of the experiments.

``python -m benchmarks.experiment_agents`` trains and writes them again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from tdhook_rl.artifacts import load_artifact, save_artifact
from tdhook_rl.errors import ArtifactError
from tdhook_rl.experiments.agents import recipe
from tdhook_rl.experiments.findings import Trained
from tdhook_rl.experiments.training import Progress, train, untrained

#: The seeds whose agents come with the package.
SEEDS = (0, 1, 2)
FOLDER = Path(__file__).parent / "weights"
KIND = "experiment_agent"


def load(name: str, seed: int, folder: Path = FOLDER) -> Trained:
    """An agent that was trained before.

    Raises:
        InputError: for an unknown name.
        ArtifactError: if there is no such checkpoint, or it does not fit the agent.
    """
    how = recipe(name)
    tensors, facts = load_artifact(folder / f"{name}_{seed}", KIND)
    known = facts.get("snapshots")
    if not isinstance(known, list) or not all(type(frames) is int and frames >= 0 for frames in known):
        raise ArtifactError(f"the checkpoint of {name} with seed {seed} names its snapshots {str(known)[:80]!r}")
    agent = untrained(how, seed)
    snapshots = {frames: untrained(how, seed) for frames in known}
    holders = {f"{part}.": getattr(agent, part) for part in how.saved}
    holders |= {f"{frames}.": one.actor for frames, one in snapshots.items()}
    for prefix, module in holders.items():
        own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        try:
            module.load_state_dict(own)
        except RuntimeError as error:
            raise ArtifactError(f"the checkpoint of {name} with seed {seed} does not fit the agent: {error}") from None
    return Trained(recipe=how, seed=seed, agent=agent, untrained=untrained(how, seed), snapshots=snapshots)


def make(name: str, seed: int, folder: Path | None = None, progress: Progress = lambda *_: None) -> Trained:
    """Train an agent, and save it if there is a folder."""
    how = recipe(name)
    agent, states = train(how, seed, progress)
    snapshots = {frames: untrained(how, seed) for frames in states}
    for frames, state in states.items():
        snapshots[frames].actor.load_state_dict(state)
    if folder is not None:
        tensors = _prefixed({part: getattr(agent, part).state_dict() for part in how.saved})
        tensors |= _prefixed({str(frames): state for frames, state in states.items()})
        facts = {"frames": how.frames, "seed": seed, "torch": torch.__version__, "snapshots": list(states)}
        save_artifact(folder / f"{name}_{seed}", KIND, tensors, facts)
    return Trained(recipe=how, seed=seed, agent=agent, untrained=untrained(how, seed), snapshots=snapshots)


def _prefixed(states: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for prefix, state in states.items() for key, value in state.items()}
