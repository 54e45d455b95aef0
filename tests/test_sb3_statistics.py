"""Statistics that go on running while a policy reads them: followed where the weights are, and kept where these are."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

pytest.importorskip("stable_baselines3", reason="the adapters are tested against the real package")

from stable_baselines3.common.vec_env import VecNormalize, sync_envs_normalization
from torchrl.weight_update import WeightStrategy

from tdhook_rl import ActivationCaching, Saliency
from tdhook_rl.adapters import from_sb3
from tdhook_rl.metrics import untrained_copy
from tests.sb3_agents import make_agent, observations


def normalised(seen: str = "vector") -> tuple[Any, VecNormalize]:
    agent = make_agent("PPO", seen)
    keys = {"norm_obs_keys": ["speed"]} if seen == "dict" else {}
    agent.set_env(wrapped := VecNormalize(agent.get_env(), clip_obs=2.0, **keys))
    with torch.no_grad():
        for one in agent.policy.parameters():
            one.mul_(2)
    return agent, wrapped


def rms(one: VecNormalize) -> Any:
    return one.obs_rms["speed"] if isinstance(one.obs_rms, dict) else one.obs_rms


def play(agent: Any, wrapped: VecNormalize) -> None:
    wrapped.reset()
    for _ in range(5):
        wrapped.step([wrapped.action_space.sample()])


def in_place(agent: Any, wrapped: VecNormalize) -> None:
    rms(wrapped).mean[:] = 0.7
    rms(wrapped).var *= 0.1


def synchronised(agent: Any, wrapped: VecNormalize) -> None:
    """As ``EvalCallback`` does, with the environment in which it plays."""
    other = VecNormalize(wrapped.venv, **({"norm_obs_keys": ["speed"]} if isinstance(wrapped.obs_rms, dict) else {}))
    in_place(agent, other)
    sync_envs_normalization(other, wrapped)


def narrower(agent: Any, wrapped: VecNormalize) -> None:
    in_place(agent, wrapped)
    wrapped.clip_obs, wrapped.epsilon = 0.5, 0.1


#: How statistics move.
MOVES: dict[str, Callable[[Any, VecNormalize], None]] = {
    "play": play, "in place": in_place, "synchronised": synchronised, "narrower": narrower,
}  # fmt: skip


def logits_of(agent: Any, wrapped: VecNormalize, given: Any) -> torch.Tensor:
    observed = agent.policy.obs_to_tensor(wrapped.normalize_obs(given))[0]
    return agent.policy.get_distribution(observed).distribution.logits


@pytest.mark.parametrize("seen", ["vector", "dict"])
@pytest.mark.parametrize("move", MOVES)
def test_they_are_followed_where_the_weights_are_and_kept_in_copies(move: str, seen: str) -> None:
    agent, wrapped = normalised(seen)
    actor = from_sb3(agent, normalize=wrapped)
    given, data = observations(agent)
    found: list[Any] = []
    with torch.no_grad(), ActivationCaching(r".*policy_net\.0$").prepare(actor) as policy:
        play(agent, wrapped)
        before = logits_of(agent, wrapped, given)
        kept = [copy.deepcopy(actor), pickle.loads(pickle.dumps(actor)), copy.deepcopy(policy)]
        MOVES[move](agent, wrapped)
        now = logits_of(agent, wrapped, given)
        assert not torch.allclose(before, now, atol=1e-3)
        for one, expected in ((actor, now), (policy, now), *((one, before) for one in kept)):
            found = one(data.clone())["logits"].log_softmax(-1)
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("move", MOVES)
def test_results_are_computed_again_where_they_have_moved(move: str) -> None:
    agent, wrapped = normalised()
    _, data = observations(agent)
    with Saliency().prepare(from_sb3(agent, normalize=wrapped)) as policy, torch.no_grad():
        play(agent, wrapped)
        batch = policy(data.clone())
        first = policy.annotate(batch.clone())
        again = policy.annotate(first.clone())
        assert torch.equal(again["attr", "observation"], first["attr", "observation"])
        MOVES[move](agent, wrapped)
        found = policy.annotate(first.clone(), on_mismatch="ignore")
        fresh = policy.annotate(batch.clone(), on_mismatch="ignore")
    assert torch.equal(found["attr", "observation"], fresh["attr", "observation"])
    assert not torch.allclose(found["attr", "observation"], first["attr", "observation"])


def test_weights_that_are_sent_to_a_worker_come_with_them() -> None:
    agent, wrapped = normalised()
    _, data = observations(agent)
    with torch.no_grad(), Saliency().prepare(from_sb3(agent, normalize=wrapped)) as policy:
        worker = pickle.loads(pickle.dumps(policy))
        play(agent, wrapped)
        expected = policy(data.clone())["logits"]
        strategy = WeightStrategy(extract_as="tensordict")
        strategy.apply_weights(worker, strategy.extract_weights(policy))
        assert torch.equal(worker(data.clone())["logits"], expected)


def test_an_untrained_network_keeps_those_that_it_was_made_with() -> None:
    agent, wrapped = normalised()
    _, data = observations(agent)
    with torch.no_grad():
        untrained = untrained_copy(from_sb3(agent, normalize=wrapped))
        before = untrained(data.clone())["logits"]
        play(agent, wrapped)
        assert torch.equal(untrained(data.clone())["logits"], before)
        assert isinstance(data, TensorDict)
        assert np.isfinite(rms(wrapped).mean).all()
