"""What Stable-Baselines3 stores, read as TensorDicts, and explained while it trains."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

import stable_baselines3 as sb3
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecNormalize
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching, Compose, LinearProbe, ProbeReadout, Saliency, SteeringVectors, targets
from tdhook_rl.adapters import ExplainCallback, from_sb3, sb3_data, vec_env_rollout
from tdhook_rl.errors import InputError
from tests.sb3_agents import make_agent, observations

HIDDEN = {
    "PPO": "module.0.module.mlp_extractor.policy_net.1",
    "A2C": "module.0.module.mlp_extractor.policy_net.1",
    "DQN": "module.0.module.q_net.1",
    "SAC": "module.0.module.0.module.latent_pi.1",
    "TD3": "module.0.module.mu.1",
}


def state_of(agent: Any) -> list[torch.Tensor]:
    """Everything that training has made: weights, and where the generators are."""
    weights = [value.clone() for value in agent.policy.state_dict().values()]
    moments = [
        value for state in agent.policy.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
    ] if hasattr(agent.policy, "optimizer") else []  # fmt: skip
    generators = [torch.get_rng_state(), torch.as_tensor(np.random.get_state()[1].astype(np.int64))]
    return [*weights, *moments, *generators, torch.tensor(random.getstate()[1])]


@pytest.mark.parametrize("name", ["PPO", "A2C", "DQN", "SAC", "TD3"])
def test_training_with_explanations_is_training_without_them(name: str, tmp_path: Path) -> None:
    found = []
    for explained in (False, True):
        agent = make_agent(name, envs=2)
        agent.set_logger(configure(str(tmp_path / str(explained)), ["csv"]))
        method = Compose(Saliency(), ActivationCaching(HIDDEN[name]))
        explain = ExplainCallback(method, every=16, rows=20)
        for more in (False, True):
            agent.learn(48, callback=explain if explained else None, reset_num_timesteps=not more, log_interval=1)
        found.append(state_of(agent))
        agent.logger.close()
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))
    log = (tmp_path / "True" / "interp" / "log.csv").read_text().splitlines()
    steps = sorted({int(line.split(",")[0]) for line in log[1:]})
    assert steps == sorted(set(steps))
    assert len(steps) >= 4
    assert max(steps) <= 96
    own = (tmp_path / "True" / "progress.csv").read_text().splitlines()[0]
    assert "interp/attr.observation" in own
    assert explain.last["attr.observation"] > 0


def test_what_is_logged_is_of_the_network_that_collected() -> None:
    """The attributions are those of the weights before the update, at the stored actions."""
    seen = []

    class Look(ExplainCallback):
        def _on_rollout_end(self) -> None:
            data = sb3_data(self.model)
            policy = self.model.policy
            leaf = data["observation"].reshape(-1, 5).requires_grad_()
            score = policy.evaluate_actions(leaf, data["action"].reshape(-1))[1]
            seen.append(torch.autograd.grad(score.sum(), leaf)[0].abs().mean().item())
            super()._on_rollout_end()

    with pytest.raises(InputError, match="at least 1"):
        Look(Saliency(), every=0)
    agent = make_agent("PPO")
    explain = Look(Saliency(), every=1)
    logged = []
    agent.set_logger(configure(None, []))
    agent.logger.record = lambda name, value, *_, **__: logged.append(value) if name.endswith("attr.observation") else 0
    agent.learn(32, callback=explain)
    assert logged == pytest.approx(seen, rel=1e-4)
    assert len(seen) == 4


@pytest.mark.parametrize("name", ["PPO", "DQN", "SAC"])
@pytest.mark.parametrize("seen", ["vector", "dict", "index"])
def test_buffers_are_read_as_they_were_filled(name: str, seen: str) -> None:
    agent = make_agent(name, seen, envs=2)
    steps: list[tuple] = []

    class Note(sb3.common.callbacks.BaseCallback):
        def _on_step(self) -> bool:
            steps.append((self.locals["new_obs"], self.locals["rewards"].copy(), self.locals["dones"].copy()))
            return True

    agent.learn(16, callback=Note())
    data = sb3_data(agent)
    assert data.batch_size == (2, 8)
    rewards = torch.as_tensor(np.stack([step[1] for step in steps], 1))
    dones = torch.as_tensor(np.stack([step[2] for step in steps], 1))
    assert torch.equal(data["next", "done"][..., 0], dones)
    if name != "PPO":  # the rewards of PPO have the value of the state in them in which an episode was cut off
        assert torch.equal(data["next", "reward"][..., 0], rewards)
        assert torch.equal(data["next", "truncated"], data["next", "done"])
    key = "speed" if seen == "dict" else "observation"
    after = [step[0]["speed"] if seen == "dict" else step[0] for step in steps]
    observed = torch.as_tensor(np.stack(after, 1))
    assert torch.equal(data[key][:, 1:], observed[:, :-1])
    if name != "PPO":
        going = ~data["next", "done"][..., 0]
        assert torch.equal(data["next", key][going], observed[going])
    newest = sb3_data(agent, newest=3)
    assert torch.equal(newest[key], data[key][:, -3:])
    with torch.no_grad():
        again = from_sb3(agent)(data.select(*from_sb3(agent).in_keys))
    assert again["action"].shape == data["action"].shape


def test_a_full_replay_buffer_is_read_from_its_oldest_row() -> None:
    agent = make_agent("DQN")
    agent.replay_buffer = ReplayBuffer(10, agent.observation_space, agent.action_space, "cpu")
    agent.learn(23)
    buffer, data = agent.replay_buffer, sb3_data(agent)
    assert data.batch_size == (1, 10)
    assert torch.equal(data["observation"][0, 1:], data["next", "observation"][0, :-1]) or data["next", "done"].any()
    newest = torch.as_tensor(buffer.observations[(buffer.pos - 1) % 10, 0])
    assert torch.equal(data["observation"][0, -1], newest)


@pytest.mark.parametrize("optimised", [False, True])
@pytest.mark.parametrize("learnt", [6, 10, 11, 23])
@pytest.mark.parametrize("envs", [1, 2])
def test_each_row_of_a_replay_buffer_is_of_one_step(envs: int, learnt: int, optimised: bool) -> None:
    """Where memory is saved, the newest observation stands in the place of the oldest."""
    agent = make_agent("DQN", envs=envs)
    agent.replay_buffer = ReplayBuffer(
        10 * envs, agent.observation_space, agent.action_space, "cpu", envs, optimised, not optimised
    )
    seen, rewards = [], []

    class Note(sb3.common.callbacks.BaseCallback):
        def _on_step(self) -> bool:
            seen.append(self.model._last_obs.copy())
            rewards.append(self.locals["rewards"].copy())
            return True

    agent.learn(learnt * envs, callback=Note())
    data = sb3_data(agent)
    assert data.batch_size == (envs, min(len(seen), 10) - (optimised and len(seen) >= 10))
    before, gained = (torch.as_tensor(np.stack(one, 1))[:, -data.shape[1] :] for one in (seen, rewards))
    assert torch.equal(data["observation"], before)
    assert torch.equal(data["next", "reward"][..., 0], gained)
    newest = sb3_data(agent, newest=3)
    assert torch.equal(newest["observation"], before[:, -3:])
    ends = data["next", "done"]
    assert ("truncated" in data["next"].keys()) == ("terminated" in data["next"].keys()) == (not optimised)
    assert ends.any() == (data.shape[1] > 6)
    if not optimised:
        assert torch.equal(data["next", "truncated"], ends)  # nothing else ends them
    begins = torch.arange(len(seen)).expand(envs, -1)[:, -data.shape[1] :] % 7 == 0  # an episode is seven steps
    begins[:, 0] &= len(seen) < 10
    assert torch.equal(data["is_init"][..., 0], begins)
    assert torch.equal(newest["is_init"][..., 0], begins[:, -3:])


def test_stored_scores_are_those_of_the_policy() -> None:
    agent = make_agent("PPO", action="torque", envs=2)
    data = None

    class Keep(sb3.common.callbacks.BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            nonlocal data
            data = sb3_data(self.model)
            policy = from_sb3(self.model, part="actor_value")
            dist = from_sb3(self.model)[0].get_dist(data.select("observation"))
            torch.testing.assert_close(dist.log_prob(data["raw_action"]), data["action_log_prob"])
            value = policy(data.select("observation"))["state_value"]
            torch.testing.assert_close(value, data["state_value"])

    agent.learn(16, callback=Keep())
    assert data is not None
    assert (data["action"] >= torch.as_tensor(agent.action_space.low)).all()
    assert data["is_init"][:, 0].all()
    assert not torch.equal(data["action"], data["raw_action"])
    again = sb3_data(agent)  # as training has left it
    for key in ("observation", "action", "action_log_prob", "advantage"):
        assert torch.equal(again[key], data[key])


@pytest.mark.parametrize("name", ["PPO", "SAC"])
def test_a_forgotten_vec_normalize_is_told_of(name: str, tmp_path: Path) -> None:
    agent = make_agent(name)
    agent.set_env(wrapped := VecNormalize(agent.get_env(), clip_obs=1.5))
    with pytest.warns(UserWarning, match="VecNormalize had normalised"):
        from_sb3(agent)
    actor = from_sb3(agent, normalize=wrapped)
    for _ in range(2):  # its statistics move on
        agent.learn(24)
        given, data = observations(agent)
        expected = agent.predict(wrapped.normalize_obs(given), deterministic=True)[0]
        with Saliency().prepare(actor) as policy, torch.no_grad():
            np.testing.assert_array_equal(policy(data)["action"].numpy(), expected)
        as_they_are = from_sb3(agent, normalize=False)(data.clone())["action"]
        np.testing.assert_array_equal(as_they_are.detach().numpy(), agent.predict(given, deterministic=True)[0])
    agent.save(tmp_path / "agent")
    if name == "PPO":  # a saved off-policy agent does not tell
        with pytest.warns(UserWarning, match="in a VecNormalize, .*unless norm_obs=False"):
            from_sb3(sb3.PPO.load(tmp_path / "agent"))
    with pytest.raises(InputError, match="statistics of"):
        from_sb3(make_agent("PPO", "matrix"), normalize=wrapped)


@pytest.mark.parametrize("name", ["PPO", "SAC"])
def test_callbacks_see_observations_as_the_network_does(name: str) -> None:
    agent = make_agent(name)
    agent.set_env(VecNormalize(agent.get_env()))
    explain = ExplainCallback(Saliency(), every=8)
    explain.folder = None
    agent.set_logger(configure(None, []))
    with pytest.MonkeyPatch.context() as patch:
        kept = []
        patch.setattr("tdhook_rl.report.Monitor.step", lambda self, data: kept.append(self.policy.annotate(data)))
        agent.learn(24, callback=explain)
    data = kept[-1]
    assert data["observation"].abs().max() > 0
    own = agent.get_vec_normalize_env()
    assert (name == "SAC") == any(hasattr(one, "follow_source") for one in explain.policy.modules())
    assert own.norm_obs


def test_playing_in_a_vec_env() -> None:
    agent = make_agent("PPO", "dict", "torque", envs=3)
    with ActivationCaching(r".*policy_net\.1$").prepare(from_sb3(agent)) as policy:
        data = vec_env_rollout(policy, agent.get_env(), 9)
        with set_exploration_type(ExplorationType.RANDOM):
            drawn = vec_env_rollout(policy, agent.get_env(), 2)
    assert data.batch_size == (3, 9)
    assert data["next", "truncated"][:, 6].all()
    assert data["is_init"][:, 7].all()
    assert data["cache", f"module.0.{HIDDEN['PPO']}"].shape == (3, 9, 16)
    given = {key: data[key][:, 4].numpy() for key in ("camera", "speed", "gear")}
    np.testing.assert_array_equal(data["action"][:, 4].numpy(), agent.predict(given, deterministic=True)[0])
    assert torch.equal(data["next", "speed"][:, 3], data["speed"][:, 4])
    assert not torch.equal(
        data["next", "speed"][:, 6], data["speed"][:, 7]
    )  # the last one of the episode, and the first
    assert not torch.equal(drawn["raw_action"], drawn["loc"])


def test_everything_else_works_live() -> None:
    """Probes, steering, values, in one callback; the steered policy does not collect, so training stays as it was."""
    agent = make_agent("PPO")
    path = "module.1.module.0.module.mlp_extractor.policy_net.1"
    probe = LinearProbe(weight=torch.zeros(2, 16), bias=torch.zeros(2), path=path)
    method = Compose(
        Saliency(target={"move": targets.taken_action_log_prob(), "worth": targets.state_value()}),
        ProbeReadout({"high": probe}),
        SteeringVectors({probe.path: torch.ones(16)}, alpha=0.0),
    )
    explain = ExplainCallback(method, every=8, part="actor_value", folder=None)
    agent.set_logger(configure(None, []))
    agent.learn(16, callback=explain)
    assert any("worth" in name for name in explain.last)
