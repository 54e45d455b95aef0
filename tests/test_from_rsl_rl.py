"""Agents of RSL-RL as TorchRL policies, against the package, where it is installed (``pip install rsl-rl-lib``)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

pytest.importorskip("rsl_rl.models", reason="rsl-rl-lib is not installed")

from rsl_rl import models

from tdhook_rl import ActivationCaching, Compose, Saliency, SteeringVectors, targets
from tdhook_rl.adapters import from_rsl_rl
from tdhook_rl.errors import InputError, PreparationError

pytestmark = pytest.mark.slow

GROUPS = {"actor": ["proprio", "command"], "critic": ["proprio", "command", "terrain"]}
NORMAL = "rsl_rl.modules.distribution:GaussianDistribution"
OTHER = "rsl_rl.modules.distribution:HeteroscedasticGaussianDistribution"
CNN = {"output_channels": [4], "kernel_size": 3, "stride": 2, "flatten": True}
CASES: dict[str, dict[str, Any]] = {
    "scalar": {"distribution_cfg": {"class_name": NORMAL, "init_std": 0.7}},
    "log": {"distribution_cfg": {"class_name": NORMAL, "init_std": 0.7, "std_type": "log"}},
    "beside": {"distribution_cfg": {"class_name": OTHER, "init_std": 0.7}},
    "beside, log": {"distribution_cfg": {"class_name": OTHER, "init_std": 0.7, "std_type": "log"}},
    "camera": {"distribution_cfg": {"class_name": NORMAL}, "camera": True},
    "without": {},
}


def observed(rows: int = 6) -> TensorDict:
    sizes = {"proprio": (5,), "command": (2,), "terrain": (4,), "camera": (1, 8, 8)}
    return TensorDict({name: torch.randn(rows, *size) for name, size in sizes.items()}, [rows])


def made(case: str) -> Any:
    options = dict(CASES[case])
    groups, data = {**GROUPS}, observed()
    kind, more = models.MLPModel, {}
    if options.pop("camera", False):
        groups["actor"] = ["proprio", "camera"]
        kind, more = models.CNNModel, {"cnn_cfg": dict(CNN)}
    actor = kind(data, groups, "actor", 3, (16, 16), obs_normalization=True, **options, **more)
    critic = models.MLPModel(data, groups, "critic", 1, (16,), obs_normalization=True)
    agent = SimpleNamespace(alg=SimpleNamespace(actor=actor, critic=critic))
    for one in (actor, critic):
        one.update_normalization(observed(40) * 3 + 1)
        for parameter in one.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return agent


@pytest.mark.parametrize("case", CASES)
def test_it_computes_what_the_agent_computes(case: str) -> None:
    agent = made(case)
    actor, critic = agent.alg.actor, agent.alg.critic
    policy, both = from_rsl_rl(agent), from_rsl_rl(agent, "actor_value")
    methods = Compose(ActivationCaching("module.0.module.mlp.0" if case != "without" else "module.mlp.0"), Saliency())
    with methods.prepare(policy) as hooked:
        for _ in range(2):
            data = observed()
            with torch.no_grad():
                assert torch.equal(policy(data.clone())["action"], actor(data))
                assert torch.equal(both(data.clone())["state_value"], critic(data))
                assert torch.equal(from_rsl_rl(critic, "value")(data.clone())["state_value"], critic(data))
                assert torch.equal(hooked(data.clone().reshape(2, 3))["action"].reshape(6, 3), actor(data))
                with set_exploration_type(ExplorationType.RANDOM):
                    found = hooked(data.clone())
            found = hooked.annotate(found)
            leaf = data.clone()
            leaf["proprio"].requires_grad_()
            if case == "without":
                score = actor(leaf).sum(-1)
            else:
                actor(leaf, stochastic_output=True)
                score = actor.get_output_log_prob(found["action"])
                torch.testing.assert_close(found["action_log_prob"], score, rtol=0, atol=0)
            [expected] = torch.autograd.grad(score.sum(), leaf["proprio"])
            torch.testing.assert_close(found["attr", "proprio"], expected, rtol=1e-4, atol=1e-6)
            for one in (actor, critic):  # which replaces buffers
                one.update_normalization(observed(40) - 2)


def test_values_and_steering() -> None:
    agent = made("scalar")
    with Saliency(target=targets.state_value()).prepare(from_rsl_rl(agent, "actor_value")) as hooked:
        data = hooked.annotate(hooked(observed()).detach())
    leaf = data.select("proprio", "command", "terrain").clone()
    leaf["terrain"].requires_grad_()
    [expected] = torch.autograd.grad(agent.alg.critic(leaf).sum(), leaf["terrain"])
    torch.testing.assert_close(data["attr", "terrain"], expected, rtol=1e-4, atol=1e-6)
    vector = torch.randn(16)
    handle = agent.alg.actor.mlp[1].register_forward_hook(lambda module, args, output: output + vector)
    steered = agent.alg.actor(data)
    handle.remove()
    with SteeringVectors({"module.0.module.mlp.1": vector}, alpha=1.0).prepare(from_rsl_rl(agent)) as hooked:
        torch.testing.assert_close(hooked(data.clone())["action"], steered)


def test_what_is_refused() -> None:
    with pytest.raises(InputError, match="not a Linear"):
        from_rsl_rl(torch.nn.Linear(2, 2))
    beta = models.MLPModel(
        observed(), GROUPS, "actor", 3, (8,), distribution_cfg={"class_name": NORMAL.replace("Gaussian", "Beta")}
    )
    with pytest.raises(PreparationError, match="BetaDistribution"):
        from_rsl_rl(beta)
    recurrent = models.RNNModel(observed(), GROUPS, "actor", 3, (8,), distribution_cfg={"class_name": NORMAL})
    with pytest.raises(PreparationError, match="has a memory"):
        from_rsl_rl(recurrent)
    with pytest.raises(InputError, match="needs the algorithm"):
        from_rsl_rl(beta, "actor_value")
