"""Agents of Stable-Baselines3 whose classes compute otherwise than the library's are refused by what they override."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.envs import GymWrapper
from torchrl.envs.utils import ExplorationType, set_exploration_type

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

from gymnasium import spaces
from stable_baselines3 import PPO
from stable_baselines3.common.distributions import DiagGaussianDistribution, SquashedDiagGaussianDistribution
from stable_baselines3.common.vec_env import DummyVecEnv

from tdhook_rl import Saliency
from tdhook_rl.adapters import from_sb3
from tdhook_rl.errors import PreparationError
from tdhook_rl.internals.sb3_names import OWN_WAY
from tests.sb3_agents import Endless, make_agent, observations, own_score, tensors

#: Agents, and where what their numbers come from is.
PARTS: dict[str, tuple[dict[str, Any], Any]] = {
    "PPO": ({}, lambda agent: agent.policy),
    "DQN": ({}, lambda agent: agent.policy),
    "DQN's network": ({}, lambda agent: agent.policy.q_net),
    "SAC": ({}, lambda agent: agent.policy),
    "SAC's actor": ({}, lambda agent: agent.policy.actor),
    "SAC's critic": ({}, lambda agent: agent.policy.critic),
    "TD3": ({}, lambda agent: agent.policy),
    "TD3's actor": ({}, lambda agent: agent.policy.actor),
    "PPO's choice": ({}, lambda agent: agent.policy.action_dist),
    "PPO's choices": ({"action": "several"}, lambda agent: agent.policy.action_dist),
    "PPO's bits": ({"action": "bits"}, lambda agent: agent.policy.action_dist),
    "PPO's normal distribution": ({"action": "torque"}, lambda agent: agent.policy.action_dist),
    "PPO's noise": ({"action": "torque", "use_sde": True}, lambda agent: agent.policy.action_dist),
    "SAC's normal distribution": ({}, lambda agent: agent.policy.actor.action_dist),
    "SAC's noise": ({"use_sde": True}, lambda agent: agent.policy.actor.action_dist),
}


def agent_of(part: str) -> Any:
    return make_agent(part.split("'")[0], **PARTS[part][0])


@pytest.mark.parametrize("how", ["class", "object"])
@pytest.mark.parametrize("part", PARTS)
def test_they_are_refused_by_what_they_override(part: str, how: str) -> None:
    agent = agent_of(part)
    one = PARTS[part][1](agent)
    kind = type(one)
    whole = "actor" if part.startswith("DQN") else "actor_value"
    from_sb3(agent, whole)

    def own(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("what from_sb3 would leave out")

    tried = 0
    known = next((base.__name__ for base in kind.__mro__ if base.__name__ in OWN_WAY), "")
    asked = OWN_WAY.get(known, ("log_prob",))
    for name in {*asked, *(() if isinstance(one, nn.Module) else ("mode", "sample"))}:
        if not hasattr(kind, name):
            continue
        if how == "object":
            vars(one)[name] = own
        else:
            one.__class__ = type("Own", (kind,), {name: own})
        with pytest.raises(PreparationError, match=rf"computes in a way of its own \({name}\)"):
            from_sb3(agent, whole)
        vars(one).pop(name, None)
        one.__class__ = kind
        tried += 1
    assert tried


@pytest.mark.parametrize(("part", "kind"), [("PPO", object), ("SAC", DiagGaussianDistribution)])
def test_a_distribution_of_another_kind_is_refused(part: str, kind: type) -> None:
    agent = make_agent(part)
    (agent.policy if part == "PPO" else agent.policy.actor).action_dist = kind(2) if part == "SAC" else kind()
    with pytest.raises(PreparationError, match="is none of what from_sb3 knows"):
        from_sb3(agent)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
@pytest.mark.parametrize("name", ["PPO", "PPO's noise", "SAC", "SAC's noise"])
def test_squashed_distributions_are_those_of_the_agent(name: str, epsilon: float) -> None:
    """That of SAC in PPO too, which a policy of one's own may take; with what keeps its density finite."""
    noise = name.endswith("noise")
    squash = {"policy_kwargs": {"squash_output": True}} if name == "PPO's noise" else {}
    agent = make_agent(name[:3], action="torque", use_sde=noise, **squash)
    if name == "PPO":
        agent.policy.action_dist = SquashedDiagGaussianDistribution(2)
    drawn = agent.policy.action_dist if name.startswith("PPO") else agent.policy.actor.action_dist
    drawn.epsilon = epsilon
    if noise:
        drawn.bijector.epsilon = epsilon
    with torch.no_grad():
        for one in (agent.policy.action_net if name.startswith("PPO") else agent.policy.actor.mu).parameters():
            one.mul_(30)
    given, data = observations(agent)
    actor = from_sb3(agent)
    np.testing.assert_array_equal(
        actor(data.clone())["action"].detach().numpy(), agent.predict(given, deterministic=True)[0]
    )
    with set_exploration_type(ExplorationType.RANDOM), Saliency().prepare(actor) as policy, torch.no_grad():
        found = policy.annotate(policy(data.clone()))
    leaf = tensors(agent, given).float().requires_grad_()
    score = own_score(agent, given, found)(leaf)
    torch.testing.assert_close(found["action_log_prob"], score.detach(), rtol=1e-3, atol=1e-3)
    [expected] = torch.autograd.grad(score.sum(), leaf)
    torch.testing.assert_close(found["attr", "observation"], expected, rtol=1e-3, atol=1e-3)


#: Observations of three dimensions, and whether they are bytes to Stable-Baselines3.
BOXES = {
    "colours": (spaces.Box(0, 255, (36, 40, 3), np.uint8), True),
    "grey": (spaces.Box(0, 255, (36, 40, 1), np.uint8), True),
    "floats": (spaces.Box(0, 255, (36, 40, 3), np.float32), False),
    "maps": (spaces.Box(0, 1, (36, 40, 3), np.float32), False),
}


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("box", BOXES)
def test_observations_are_where_gymenv_writes_them(box: str, normalised: bool) -> None:
    space, bytes_ = BOXES[box]

    class Env(Endless):
        def __init__(self) -> None:
            super().__init__("vector", "one")
            self.observation_space = space

    sizes = {"normalize_images": normalised, "net_arch": [8]}
    agent = PPO("CnnPolicy" if bytes_ else "MlpPolicy", DummyVecEnv([Env]), device="cpu", policy_kwargs=sizes)
    data = GymWrapper(Env(), categorical_action_encoding=True).rollout(2, actor := from_sb3(agent))
    given = data[actor.in_keys[0]].numpy()
    np.testing.assert_array_equal(data["action"].numpy(), agent.predict(given, deterministic=True)[0])
