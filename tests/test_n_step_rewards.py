"""``MultiStep`` puts sums of several rewards in the place of each: what is told of rewards is of those of the steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from torchrl.collectors import Collector
from torchrl.data import MultiStep
from torchrl.envs import RewardSum, TransformedEnv

from tdhook_rl.envs import CueCorners
from tdhook_rl.probes.quantities import Return, read_label, read_of_row
from tdhook_rl.replay import episodes as stored_episodes
from tdhook_rl.replay import returns
from tdhook_rl.report.episodes import episodes, odd_rewards
from tdhook_rl.report.player.tracks import Options, Rows, number_tracks

#: What reads rewards of a batch, as numbers.
READERS: dict[str, Callable[[TensorDictBase], list[float]]] = {
    "a monitor": lambda data: [one.total for one in episodes(data)],
    "rewards that are none": lambda data: list(odd_rewards(data.copy()).values()),
    "returns of a buffer": lambda data: returns(data.reshape(-1), gamma=0.9).rows.tolist(),
    "the worst episodes": lambda data: [one.total for one in stored_episodes(data.reshape(-1), k=3)],
    "labels of a probe": lambda data: read_label(read_of_row(Return(), data), data).flatten().tolist(),
    "a player": lambda data: number_tracks(Rows(data[0], np.arange(data.shape[1]), Options()))[0].values.tolist(),
}


@pytest.fixture(scope="module")
def batch() -> TensorDictBase:
    torch.manual_seed(0)
    env = TransformedEnv(CueCorners(batch_size=[4], max_steps=7, seed=0), RewardSum())
    (data,) = Collector(env, frames_per_batch=120, total_frames=120, auto_register_policy_transforms=False)
    data["next", "reward"] += torch.rand_like(data["next", "reward"])
    return data.exclude("episode_reward", ("next", "episode_reward"))


@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("reader", READERS)
def test_rewards_are_those_of_the_steps(reader: str, steps: int, batch: TensorDictBase) -> None:
    given = batch.clone()
    given["next", "reward"][0, 3] = float("nan") if reader == "rewards that are none" else 0.5
    found, expected = (READERS[reader](one) for one in (MultiStep(gamma=0.9, n_steps=steps)(given.clone()), given))
    assert len(expected)
    assert found == pytest.approx(expected, nan_ok=True)
