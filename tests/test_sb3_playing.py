"""Policies of TorchRL in environments of Stable-Baselines3: what is shown and remembered reaches them at every step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper
from torchrl.modules import GRUModule, LSTMModule

from tdhook_rl import ActivationCaching
from tdhook_rl.adapters import from_sb3, vec_env_rollout
from tdhook_rl.errors import InputError
from tests.sb3_agents import ACTIONS, Endless, make_agent


class Three(Endless):
    """Shows three vectors of one shape."""

    def __init__(self) -> None:
        super().__init__("vector", "one")
        self.observation_space = spaces.Dict({name: spaces.Box(-1.0, 1.0, (2,), np.float32) for name in "abc"})


class Noted(VecEnvWrapper):
    """Keeps what it shows, and what it is told to do."""

    def reset(self) -> Any:
        self.seen, self.told = [self.venv.reset()], []
        return self.seen[0]

    def step_async(self, actions: np.ndarray) -> None:
        self.told.append(actions.copy())
        self.venv.step_async(actions)

    def step_wait(self) -> Any:
        found = self.venv.step_wait()
        self.seen.append(found[0])
        return found


def noted(seen: str = "vector", action: str = "one", envs: int = 2) -> Noted:
    make = Three if seen == "three" else lambda: Endless(seen, action)
    return Noted(DummyVecEnv([make] * envs))


def head(*keys: str, width: int) -> list[TensorDictModule]:
    """Decides by a layer over what is read."""
    layer = nn.Linear(width, 3)
    logits = TensorDictModule(lambda *x: layer(torch.cat(x, -1)), list(keys), ["logits"])
    return [logits, TensorDictModule(lambda x: x.argmax(-1), ["logits"], ["action"])]


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("kind", [GRUModule, LSTMModule])
def test_a_memory_goes_from_step_to_step_and_begins_anew_with_each_episode(kind: Any, envs: int, hooked: bool) -> None:
    core = kind(input_size=5, hidden_size=4, in_key="observation", out_key="hidden")
    policy = TensorDictSequential(core, *head("hidden", width=4))
    given = ActivationCaching("module.0").prepare(policy, return_context=False) if hooked else policy
    env = noted(envs=envs)
    data = vec_env_rollout(given, env, 9)  # an episode is seven steps
    own = core.gru if kind is GRUModule else core.lstm
    seen = torch.as_tensor(np.stack(env.seen[:9], 1))
    with torch.no_grad():
        expected = torch.cat([own(seen[:, part])[0] for part in (slice(0, 7), slice(7, 9))], 1)
    torch.testing.assert_close(data["hidden"], expected)
    for key in core.in_keys[1:-1]:
        assert torch.equal(data[key][:, 1:7], data["next", key][:, :6])
        assert not data[key][:, [0, 7]].any()
    if hooked:
        assert data["cache", "module.0"].shape == data["hidden"].shape
        given.restore()


@pytest.mark.parametrize("read", ["abc", "cba", "bca", "b", "ca"])
def test_entries_are_found_by_their_names(read: str) -> None:
    policy = TensorDictSequential(*head(*read, width=2 * len(read)))
    env = noted("three")
    data = vec_env_rollout(policy, env, 4)
    for name in "abc":
        seen = torch.as_tensor(np.stack([one[name] for one in env.seen], 1))
        assert torch.equal(data[name], seen[:, :4])
    np.testing.assert_array_equal(data["action"].numpy(), np.stack(env.told, 1))


def test_an_agent_reads_its_entries_under_the_keys_that_it_was_given() -> None:
    agent = PPO("MultiInputPolicy", noted("three"), n_steps=8, batch_size=8, device="cpu")
    keys = {"a": ("sense", "c"), "b": "a", "c": "b"}
    env = noted("three")
    data = vec_env_rollout(from_sb3(agent, in_keys=keys), env, 4)
    again = vec_env_rollout(from_sb3(agent, in_keys=keys), env, 2, in_keys=keys)
    for name, key in keys.items():
        assert torch.equal(again[key], torch.as_tensor(np.stack([one[name] for one in env.seen], 1))[:, :2])
    given = {name: data[key].reshape(-1, 2).numpy() for name, key in keys.items()}
    expected = agent.predict(given, deterministic=True)[0].reshape(2, 4)
    np.testing.assert_array_equal(data["action"].numpy(), expected)


def acting(action: Any, *keys: str) -> TensorDictModule:
    return TensorDictModule(
        lambda *x: action.expand(len(x[0]), *action.shape), list(keys or ["observation"]), ["action"]
    )


@pytest.mark.parametrize(
    ("play", "said"),
    [
        (lambda: vec_env_rollout(acting(torch.tensor([0, 1, 0])), noted(), 2), r"categorical_action_encoding=True"),
        (lambda: vec_env_rollout(acting(torch.tensor([1])), noted(), 2), r"actions of \(2, 1\).*takes \(2,\)"),
        (lambda: vec_env_rollout(acting(torch.zeros(4)), noted(action="matrix"), 2), r"takes \(2, 2, 2\)"),
        (lambda: vec_env_rollout(acting(torch.tensor(1)), noted(), 0), "steps= is at least 1, got 0"),
        (lambda: vec_env_rollout(acting(torch.tensor(1), "a", "d"), noted("three"), 2), r"\['a', 'd'\].*say in_keys="),
        (lambda: vec_env_rollout(acting(torch.tensor(1), "x", "y", "z"), noted("three"), 2), "say in_keys="),
        (lambda: vec_env_rollout(acting(torch.tensor(1), "a"), noted("three"), 2, in_keys={"a": "a"}), "'b', 'c'"),
        (lambda: vec_env_rollout(TensorDictModule(nn.Linear(5, 3), ["observation"], ["logits"]), noted(), 2),
         "no 'action'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(play: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        play()


@pytest.mark.parametrize("action", ACTIONS)
def test_every_kind_of_action_arrives_as_it_is(action: str) -> None:
    agent = make_agent("PPO", action=action)
    env = noted(action=action)
    data = vec_env_rollout(from_sb3(agent), env, 3)
    np.testing.assert_array_equal(data["action"].numpy(), np.stack(env.told, 1))
