"""A callback in several trainings: one after the other, of several agents, interrupted, or below another callback."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecMonitor

from tdhook_rl import Saliency
from tdhook_rl.adapters import ExplainCallback
from tdhook_rl.errors import ArtifactError, InputError
from tests.sb3_agents import make_agent


def agent_in(folder: Path, name: str = "PPO") -> Any:
    agent = make_agent(name)
    agent.set_logger(configure(str(folder), []))
    return agent


def logged(folder: Path) -> list[int]:
    """The steps of the environment at which something was logged."""
    with (folder / "log.csv").open() as file:
        return sorted({int(row["step"]) for row in csv.DictReader(file)})


class Stop(BaseCallback):
    """Ends a training as a user does, or an environment that fails."""

    def __init__(self, after: int, error: type[BaseException]) -> None:
        super().__init__()
        self.after, self.error = after, error

    def _on_step(self) -> bool:
        if self.n_calls == self.after:
            raise self.error
        return True


@pytest.mark.parametrize(
    ("name", "after", "error"),
    [("PPO", 3, KeyboardInterrupt), ("PPO", 20, ValueError), ("DQN", 3, ValueError), ("DQN", 20, KeyboardInterrupt)],
)
def test_training_goes_on_after_it_was_interrupted(name: str, after: int, error: Any, tmp_path: Path) -> None:
    agent, explain = agent_in(tmp_path, name), ExplainCallback(Saliency(), every=8)
    with pytest.raises(error):
        agent.learn(40, callback=[explain, Stop(after, error)])
    at = agent.num_timesteps
    agent.learn(24, callback=explain, reset_num_timesteps=False)
    steps = logged(tmp_path / "interp")
    assert explain.last
    assert steps[-1] > at
    assert (after == 20) == (steps[0] < at)


def test_another_agent_has_a_log_of_its_own(tmp_path: Path) -> None:
    explain = ExplainCallback(Saliency(), every=8)
    for place in ("a", "b"):
        agent_in(tmp_path / place).learn(24, callback=explain)
        assert explain.folder == tmp_path / place / "interp"
        assert logged(tmp_path / place / "interp") == [8, 16, 24]
    explain = ExplainCallback(Saliency(), every=8, folder=tmp_path / "one")
    agent_in(tmp_path / "c").learn(24, callback=explain)
    with pytest.raises(ArtifactError, match="log"):
        agent_in(tmp_path / "d").learn(24, callback=explain)
    assert logged(tmp_path / "one") == [8, 16, 24]


def test_a_loaded_agent_that_counts_on_goes_on(tmp_path: Path) -> None:
    agent, explain = agent_in(tmp_path / "a"), ExplainCallback(Saliency(), every=8)
    agent.learn(16, callback=explain)
    agent.save(tmp_path / "agent")
    again = PPO.load(tmp_path / "agent", env=agent.get_env(), device="cpu")
    again.set_logger(configure(str(tmp_path / "b"), []))
    again.learn(16, callback=explain, reset_num_timesteps=False)
    assert logged(tmp_path / "a" / "interp") == [8, 16, 24, 32]


@pytest.mark.filterwarnings("ignore:Training and eval env")
@pytest.mark.parametrize(
    "below",
    [
        lambda one, env: EveryNTimesteps(8, one),
        lambda one, env: EveryNTimesteps(8, CallbackList([one])),
        lambda one, env: EvalCallback(env, callback_after_eval=one, eval_freq=8, n_eval_episodes=1, verbose=0),
        lambda one, env: EvalCallback(env, callback_on_new_best=one, eval_freq=8, n_eval_episodes=1, verbose=0),
        lambda one, env: EvalCallback(env, CallbackList([one]), eval_freq=8, n_eval_episodes=1, verbose=0),
    ],
)
def test_below_a_callback_that_tells_it_of_no_rollouts_it_is_refused(below: Any, tmp_path: Path) -> None:
    agent, explain = agent_in(tmp_path), ExplainCallback(Saliency(), every=8)
    with pytest.raises(InputError, match=r"beside it.*every="):
        agent.learn(24, callback=below(explain, VecMonitor(agent.get_env())))
    agent.learn(24, callback=[explain])
    assert explain.last
