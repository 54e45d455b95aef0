"""Agents of sb3-contrib as TorchRL policies, against the package, where it is (``pip install sb3-contrib``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")

import sb3_contrib
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors
from tdhook_rl.adapters import ExplainCallback, from_sb3, sb3_data
from tdhook_rl.errors import InputError, PreparationError
from tests.sb3_agents import Endless, observations, tensors

pytestmark = pytest.mark.slow
LAYERS = {"net_arch": [16], "lstm_hidden_size": 12, "n_lstm_layers": 2}


def agent_of(name: str, seen: str = "vector", action: str = "one", envs: int = 2, **kwargs: Any) -> Any:
    kind = getattr(sb3_contrib, name)
    policy = "MultiInput" if seen == "dict" else "Mlp"
    policy = f"{policy}LstmPolicy" if name == "RecurrentPPO" else f"{policy}Policy"
    env = DummyVecEnv([lambda: Masked(seen, action) if name == "MaskablePPO" else Endless(seen, action)] * envs)
    return kind(policy, env, n_steps=10, batch_size=10, seed=0, device="cpu", **kwargs)


class Masked(Endless):
    def action_masks(self) -> np.ndarray:
        return np.arange(3) != self.steps % 3


@pytest.mark.parametrize("seen", ["vector", "dict"])
@pytest.mark.parametrize("action", ["one", "torque"])
@pytest.mark.parametrize("more", [{}, {"shared_lstm": True, "enable_critic_lstm": False}])
def test_a_memory_is_carried_as_torchrl_does(seen: str, action: str, more: dict[str, Any]) -> None:
    agent = agent_of("RecurrentPPO", seen, action, policy_kwargs={**LAYERS, **more}).learn(20)
    actor = from_sb3(agent)
    state = None
    memory = {key: torch.zeros(3, 2, 12) for key in ("recurrent_state_h", "recurrent_state_c")}
    inputs: list[TensorDict] = []
    for step in range(5):
        given, data = observations(agent, 3)
        starts = np.array([step == 0, step in (0, 2), step == 0])
        expected, state = agent.predict(given, state, starts, deterministic=True)
        data["is_init"] = torch.as_tensor(starts)[:, None]
        with torch.no_grad():
            found = actor(data.update(memory).clone())
        np.testing.assert_array_equal(found["action"].numpy(), expected)
        np.testing.assert_array_equal(found["next", "recurrent_state_h"].transpose(0, 1).numpy(), state[0])
        memory = {key: found["next", key] for key in ("recurrent_state_h", "recurrent_state_c")}
        inputs.append(found)
    site = next(path for path, _ in actor.named_modules() if path.endswith("policy_net.0"))
    whole = torch.stack(inputs, 1)
    with Compose(ActivationCaching(site), Saliency(inputs=["speed"] if seen == "dict" else None)).prepare(
        actor
    ) as policy:
        rows = policy.annotate(whole.clone())
    assert rows["cache", site].shape[:2] == (3, 5)
    assert torch.equal(rows["action"], whole["action"])
    with pytest.raises(InputError, match="memory of its own"):
        from_sb3(agent, part="value")


def test_stored_steps_of_a_memory_are_explained_at_their_states() -> None:
    agent = agent_of("RecurrentPPO", policy_kwargs=LAYERS)
    explain = ExplainCallback(Saliency(), every=20)
    seen = []

    class Look(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            data = sb3_data(self.model)
            with Saliency().prepare(from_sb3(self.model)) as hooked:
                found = hooked.annotate(data)["attr", "observation"]
            rows = data.reshape(-1)
            leaf = rows["observation"].clone().requires_grad_()
            states = tuple(rows[key].transpose(0, 1) for key in ("recurrent_state_h", "recurrent_state_c"))
            own, _ = self.model.policy.get_distribution(leaf, states, rows["is_init"].float().squeeze(-1))
            log_prob = own.log_prob(rows["action"])
            torch.testing.assert_close(log_prob, rows["action_log_prob"])
            [expected] = torch.autograd.grad(log_prob.sum(), leaf)
            torch.testing.assert_close(found.reshape(expected.shape), expected, rtol=1e-4, atol=1e-7)
            seen.append(found.abs().mean().item())

    agent.learn(40, callback=[Look(), explain])
    assert len(seen) == 2
    assert explain.last["attr.observation"] == pytest.approx(seen[-1], rel=1e-4)
    assert sb3_data(agent)["recurrent_state_h"].shape == (2, 10, 2, 12)


def test_masks_of_actions() -> None:
    agent = agent_of("MaskablePPO", policy_kwargs={"net_arch": [16]}).learn(20)
    for hot in (False, True):
        actor = from_sb3(agent, categorical_action_encoding=not hot)
        assert actor.in_keys == ["observation", "action_mask"]
        given, data = observations(agent)
        mask = torch.rand(6, 3) > 0.4
        mask[:, 1] |= ~mask.any(-1)
        data["action_mask"] = mask
        with torch.no_grad(), set_exploration_type(ExplorationType.RANDOM):
            drawn = actor(data.clone())
        index = drawn["action"].argmax(-1) if hot else drawn["action"]
        assert mask.gather(-1, index[:, None]).all()
        log_prob = agent.policy.evaluate_actions(tensors(agent, given), index, action_masks=mask.numpy())[1]
        torch.testing.assert_close(drawn["action_log_prob"], log_prob)
        expected = agent.predict(given, action_masks=mask.numpy(), deterministic=True)[0]
        chosen = actor(data.clone())["action"]
        np.testing.assert_array_equal((chosen.long().argmax(-1) if hot else chosen).numpy(), expected)
        with Saliency(inputs=["observation"]).prepare(actor) as policy:
            found = policy.annotate(drawn)
        leaf = tensors(agent, given).requires_grad_()
        own = agent.policy.evaluate_actions(leaf, index, action_masks=mask.numpy())[1]
        torch.testing.assert_close(found["attr", "observation"], torch.autograd.grad(own.sum(), leaf)[0])
    value = from_sb3(agent, part="value")(data.clone())["state_value"]
    assert torch.equal(value, agent.policy.predict_values(tensors(agent, given)))


def test_others_of_the_package() -> None:
    agent = agent_of("TRPO", action="torque").learn(10)
    given, data = observations(agent)
    vector = torch.randn(64)
    with SteeringVectors({r".*policy_net\.1$": vector}, alpha=0.0).prepare(from_sb3(agent)) as policy:
        found = policy(data)["action"]
    np.testing.assert_array_equal(found.detach().numpy(), agent.predict(given, deterministic=True)[0])
    with pytest.raises(PreparationError, match="QRDQNPolicy is none of them"):
        from_sb3(sb3_contrib.QRDQN("MlpPolicy", Endless("vector", "one"), device="cpu"))
