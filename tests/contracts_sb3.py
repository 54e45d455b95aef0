"""As :mod:`tests.contracts`, for what is expected of Stable-Baselines3, where it is installed."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tdhook_rl.internals import sb3_names as names
from tests.contracts import contract

contract = partial(contract, "sb3_names")
MISSING = "Stable-Baselines3 is not installed"


@contract("OWN_WAY")
def methods_that_numbers_come_from() -> None:
    pytest.importorskip("stable_baselines3", reason=MISSING)
    from stable_baselines3.common import distributions as drawn
    from stable_baselines3.common.policies import ActorCriticPolicy, ContinuousCritic
    from stable_baselines3.dqn.policies import DQNPolicy, QNetwork
    from stable_baselines3.sac.policies import Actor, SACPolicy
    from stable_baselines3.td3.policies import Actor as DeterministicActor
    from stable_baselines3.td3.policies import TD3Policy

    kinds = [ActorCriticPolicy, ContinuousCritic, DQNPolicy, QNetwork, Actor, SACPolicy, TD3Policy]
    kinds += [kind for kind in vars(drawn).values() if isinstance(kind, type) and issubclass(kind, drawn.Distribution)]
    kinds.remove(drawn.Distribution)
    contrib = {"RecurrentActorCriticPolicy", "MaskableActorCriticPolicy", "MaskableCategoricalDistribution"}
    assert {kind.__name__ for kind in kinds} == set(names.OWN_WAY) - contrib
    if find_spec("sb3_contrib") is not None:
        from sb3_contrib.common.maskable.distributions import MaskableCategoricalDistribution
        from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
        from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy

        kinds += [MaskableActorCriticPolicy, RecurrentActorCriticPolicy, MaskableCategoricalDistribution]
    for kind in kinds:
        assert all(callable(getattr(kind, name)) for name in names.OWN_WAY[kind.__name__])
    assert not hasattr(DeterministicActor, "get_action_dist_params")


@contract("ended_last")
def episodes_that_ended_with_the_rollout() -> None:
    pytest.importorskip("stable_baselines3", reason=MISSING)
    from tests.sb3_agents import make_agent

    agent = make_agent("PPO", n_steps=7)  # an episode is as long
    agent.learn(7)
    assert names.ended_last(agent).tolist() == [True]


@contract("kept_as_given")
def observations_before_they_were_normalised() -> None:
    pytest.importorskip("stable_baselines3", reason=MISSING)
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import VecNormalize

    from tests.sb3_agents import make_agent

    for normalised in (False, True):
        agent = make_agent("PPO")
        agent.set_env(VecNormalize(agent.get_env()) if normalised else agent.get_env())
        agent.learn(8)
        with TemporaryDirectory() as folder:
            agent.save(Path(folder) / "agent")
            loaded = PPO.load(Path(folder) / "agent", device="cpu")
        assert (names.kept_as_given(loaded) is not None) == normalised
