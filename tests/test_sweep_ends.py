"""Where only agents end, and no environment, each agent's first episode is its own, whatever comes after it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, SerialEnv

from tdhook_rl import SteeringVectors
from tdhook_rl.rollout import alike_episodes
from tdhook_rl.sweeps import SteeringVector, first_episode, steering_sweep
from tdhook_rl.sweeps.causal.returns import returns_of

GROUPS = {"walkers": 2, "birds": 1}
STEPS = 12


class Apart(EnvBase):
    """Two groups of agents, each of which is pushed until it is too far away; those begin again, or rest there."""

    def __init__(self, afterwards: str, batch: tuple[int, ...] = ()) -> None:
        super().__init__(batch_size=batch)
        self.afterwards, self.at = afterwards, dict[str, Tensor]()
        shape = torch.Size(batch)
        specs = [Composite(shape=shape) for _ in range(4)]
        for group, agents in GROUPS.items():
            each = (*shape, agents)
            entries: list[dict[str, Any]] = [
                {"observation": Unbounded((*each, 1))}, {"action": Unbounded((*each, 1))},
                {"reward": Unbounded((*each, 1))},
                {name: Categorical(2, shape=(*each, 1), dtype=torch.bool) for name in ("done", "terminated")},
            ]  # fmt: skip
            for spec, entry in zip(specs, entries, strict=True):
                spec[group] = Composite(entry, shape=each)
        self.observation_spec, self.action_spec, self.reward_spec, self.done_spec = specs
        self.set_seed(0)

    def _set_seed(self, seed: int | None) -> None:
        self.numbers = torch.Generator().manual_seed(seed or 0)

    def _reset(self, tensordict: TensorDictBase | None = None, **_: Any) -> TensorDict:
        batch = self.batch_size
        found = TensorDict({}, batch_size=batch)
        for group, agents in GROUPS.items():
            at = 0.2 + 0.4 * torch.rand(*batch, agents, 1, generator=self.numbers)
            which = None if tensordict is None else tensordict.get((group, "_reset"), None)
            if which is not None:
                at = torch.where(which.reshape(at.shape), at, self.at[group])
            self.at[group] = at
            over = torch.zeros(*batch, agents, 1, dtype=torch.bool)
            entries = {"observation": at, "done": over, "terminated": over.clone()}
            found[group] = TensorDict(entries, batch_size=(*batch, agents))
        return found

    def _step(self, tensordict: TensorDictBase) -> TensorDict:
        batch = tensordict.batch_size
        found = TensorDict({}, batch_size=batch)
        for group, agents in GROUPS.items():
            before = tensordict[group, "observation"]
            at = 1.2 * before + tensordict[group, "action"]
            if self.afterwards == "rests":
                at = torch.where(before.abs() > 1, before, at)
            over, self.at[group] = at.abs() > 1, at
            entries = {"observation": at, "reward": at.clone(), "done": over, "terminated": over.clone()}
            found[group] = TensorDict(entries, batch_size=(*batch, agents))
        return found


def policy() -> TensorDictSequential:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in GROUPS]
    parts = zip(nets, GROUPS, strict=True)
    return TensorDictSequential(
        *(TensorDictModule(net, [(group, "observation")], [(group, "action")]) for net, group in parts)
    )


@torch.no_grad()
def alone(net: nn.Sequential, at: Tensor, push: Tensor | float) -> tuple[float, int]:
    """What an agent gets until it is too far away, and when."""
    total = 0.0
    for step in range(1, STEPS + 1):
        at = 1.2 * at + net[2](net[1](net[0](at) + push))
        total += float(at)
        if abs(float(at)) > 1:
            return total, step
    return total, STEPS


def by_hand(env: EnvBase, alpha: float, seeds: list[int]) -> dict[str, Tensor]:
    """Of each episode the mean of a group's agents, and the step by which all of them were over."""
    nets = [part.module for part in policy()]
    found: dict[str, list[float]] = {"return/walkers": [], "return/birds": [], "length": []}
    for seed in seeds:
        env.set_seed(seed)
        start = env.reset().reshape(-1)
        for row in start:
            last = 0
            for number, (group, net) in enumerate(zip(GROUPS, nets, strict=True)):
                push = alpha if number == 0 else 0.0
                ends = [alone(net, at, push) for at in row[group, "observation"]]
                found[f"return/{group}"].append(sum(total for total, _ in ends) / len(ends))
                last = max(last, *(step for _, step in ends))
            found["length"].append(float(last))
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("place", ["of one", "of a batch", "in workers"])
@pytest.mark.parametrize("afterwards", ["begins again", "rests"])
def test_every_agent_ends_for_itself(afterwards: str, place: str) -> None:
    make = {
        "of one": partial(Apart, afterwards),
        "of a batch": partial(Apart, afterwards, batch=(4,)),
        "in workers": lambda: SerialEnv(4, partial(Apart, afterwards)),
    }[place]
    vector = SteeringVector(vector=torch.ones(8), path="module.0.module.0")
    found = steering_sweep(
        policy(), make(), vector, alphas=[0.5], controls=0, episodes=4, max_steps=STEPS, progress=False
    )
    assert found.paired
    seeds = [0] if place in ("of a batch", "in workers") else [0, 1, 2, 3]
    for alpha in (0.0, 0.5):
        for name, right in by_hand(make(), alpha, seeds).items():
            torch.testing.assert_close(found.of(name, alpha=alpha), right, rtol=1e-5, atol=1e-5)
    right = by_hand(make(), 0.0, seeds)
    summed = right["return/walkers"] + right["return/birds"]
    options = {"episodes": 4, "max_steps": STEPS, "seed": 0}
    torch.testing.assert_close(returns_of(policy(), make(), **options), summed, rtol=1e-5, atol=1e-5)
    with SteeringVectors(vector, alpha=0.5).prepare(policy()) as hooked:
        played = alike_episodes(hooked, make(), episodes=4, max_steps=STEPS)
    assert [len(one) for one in played] == by_hand(make(), 0.5, seeds)["length"].tolist()
    assert min(map(len, played)) < STEPS


@pytest.mark.parametrize("agents", [(), (1,), (3, 1), (2, 2)])
@pytest.mark.parametrize("batch", [(5,), (4, 6), (4, 1), (1, 1), (2, 3, 4)])
def test_first_episodes_of_rollouts_of_every_shape(batch: tuple[int, ...], agents: tuple[int, ...]) -> None:
    """By a loop over steps; an end is anywhere behind the batch."""
    torch.manual_seed(0)
    done = torch.rand(*batch, *agents) < 0.4
    found = first_episode(TensorDict({"next": {"done": done}}, batch_size=batch))
    expected = torch.zeros(batch, dtype=torch.bool)
    rows, each = expected.reshape(-1, batch[-1]), done.reshape(-1, batch[-1], *agents)
    for row, ends in zip(rows, each, strict=True):
        ended = torch.zeros(agents, dtype=torch.bool)
        for time, now in enumerate(ends):
            row[time] = True
            ended |= now
            if bool(ended.all()):
                break
    assert torch.equal(found, expected)
