"""Walks whose future is known, a small network, and probes of it: what the tests of probe suites share."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.probes.board import CLASSES, Source
from tdhook_rl.rollout import EPISODE, Future, GroupSplit, ProbeSuite


class Walks:
    """Environments whose observation is a counter of each, with noise: what comes later is known."""

    def __init__(self, envs: int, seed: int = 0, length: int = 17) -> None:
        self.draw = torch.Generator().manual_seed(seed)
        self.envs, self.length = envs, length
        self.step, self.trajectory = torch.arange(envs) * 3 % length, torch.arange(envs)
        self.next = envs
        self.value = torch.randint(0, 3, (envs,), generator=self.draw)

    def batch(self, steps: int, counted: bool = False) -> TensorDict:
        found = []
        for _ in range(steps):
            done = self.step == self.length - 1
            reward = torch.rand(self.envs, generator=self.draw)
            observation = torch.cat([
                nn.functional.one_hot(self.value, 3).float(), self.step[:, None] / self.length,
                torch.randn(self.envs, 2, generator=self.draw),
            ], 1)  # fmt: skip
            row = {
                "observation": observation, "value": self.value.clone(),
                "collector": {"traj_ids": self.trajectory.clone()},
                "next": {"reward": reward[:, None], "done": done[:, None]},
            }  # fmt: skip
            found.append(TensorDict(row | ({"step_count": self.step[:, None].clone()} if counted else {}), [self.envs]))
            self.step = torch.where(done, 0, self.step + 1)
            self.trajectory = torch.where(done, self.next + torch.arange(self.envs), self.trajectory)
            self.next += self.envs
            self.value = (self.value + (torch.rand(self.envs, generator=self.draw) < 0.2)) % 3
        return torch.stack(found, 1)


def net(width: int = 6, seed: int = 0) -> TensorDictModule:
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(width, 16), nn.Tanh(), nn.Linear(16, 2))
    return TensorDictModule(layers, ["observation"], ["action"])


def suite(policy: nn.Module, concepts: dict[str, Any], **options: Any) -> ProbeSuite:
    return ProbeSuite(policy, **{"sites": ["module.1"], "concepts": concepts, "split": GroupSplit(EPISODE)} | options)


def sums(one: ProbeSuite, group: str, network: str = "trained", site: Any = "module.1") -> dict[str, Tensor]:
    scored, place = one._board._groups[group].find(Source(network, site))  # type: ignore[misc]
    moved = type(scored.bank).__add__(scored.bank, scored.bank)
    found = moved.solve()
    weight, bias = found.weight[place], found.bias[place]
    own = len(bias) // (2 if network == "trained" else 1)  # the labels themselves; then the shuffled ones
    return {"weight": weight[:own], "bias": bias[:own]}


def fitted(weights: dict[str, Tensor], shard: TensorDict) -> ProbeSuite:
    """What a process makes of what one worker collected."""
    policy = make_actor()
    policy.load_state_dict(weights)
    concepts = {"xor": ("concept", "xor"), "next": Future(("concept", "xor"), 1)}
    one = ProbeSuite(policy, sites=[FC2], concepts=concepts, split=GroupSplit(EPISODE), seed=3)
    for part in shard.split(4):
        one.update(part)
    return one


def require_one_pass(first: ProbeSuite, second: ProbeSuite, whole: ProbeSuite) -> None:
    """Two suites of :func:`fitted` add up to that of all rows: the sums, and what was scored."""
    together = first + second
    for group in (CLASSES, "next"):
        for network in ("trained", "untrained"):
            one, other = (sums(suite, group, network, FC2) for suite in (together, whole))
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    for concept in ("xor", "next"):
        cells = [suite.table()[FC2, concept].trained for suite in (first, second, together, whole)]
        rows, groups = [round(cell.rows) for cell in cells], [cell.groups for cell in cells]
        assert rows[0] + rows[1] == rows[2] == rows[3] > 100
        assert groups[0] + groups[1] == groups[2] == groups[3]
