"""Agents as CleanRL writes them, as TorchRL policies: the same numbers, over the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Categorical, Normal
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.adapters import from_module
from tdhook_rl.errors import InputError

# ---------------------------------------------------------------------- the agents of CleanRL's scripts, cut down


class Ppo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3))

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(x)

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple:
        probs = Categorical(logits=self.actor(x))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.critic(x)


class PpoContinuous(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.critic = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1))
        self.actor_mean = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
        self.actor_logstd = nn.Parameter(torch.tensor([[0.3, -0.2]]))

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple:
        mean = self.actor_mean(x)
        probs = Normal(mean, torch.exp(self.actor_logstd.expand_as(mean)))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action).sum(1), probs.entropy().sum(1), self.critic(x)


class PpoAtari(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 4 * 4, 16), nn.ReLU()
        )
        self.actor, self.critic = nn.Linear(16, 3), nn.Linear(16, 1)

    def get_value(self, x: Tensor) -> Tensor:
        return self.critic(self.network(x / 255.0))

    def get_action_and_value(self, x: Tensor, action: Tensor | None = None) -> tuple:
        hidden = self.network(x / 255.0)
        probs = Categorical(logits=self.actor(hidden))
        action = probs.sample() if action is None else action
        return action, probs.log_prob(action), probs.entropy(), self.critic(hidden)


class Q(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(5, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class SacActor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc_mean, self.fc_logstd = nn.Linear(5, 16), nn.Linear(16, 2), nn.Linear(16, 2)
        self.register_buffer("action_scale", torch.tensor([2.0, 0.5]))
        self.register_buffer("action_bias", torch.tensor([0.1, -1.0]))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc1(x))
        log_std = torch.tanh(self.fc_logstd(x))
        return self.fc_mean(x), -5 + 0.5 * (2 - -5) * (log_std + 1)

    def score(self, x: Tensor, drawn: Tensor) -> Tensor:
        """As in ``get_action``, of an action between -1 and 1."""
        mean, log_std = self(x)
        log_prob = Normal(mean, log_std.exp()).log_prob(drawn.atanh())
        return (log_prob - torch.log(self.action_scale * (1 - drawn.pow(2)) + 1e-6)).sum(1)


class DdpgActor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc_mu = nn.Linear(5, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc_mu(F.relu(self.fc1(x)))) * 2.0 + 0.5


class SoftQ(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(7, 16), nn.Linear(16, 1)

    def forward(self, x: Tensor, a: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(torch.cat([x, a], 1))))


Scorer = Callable[[Any, Tensor, TensorDict], Tensor]

#: How each is handed in, and the score of what is stored, by its own code.
AGENTS: dict[str, tuple[type, dict[str, Any], Scorer]] = {
    "ppo": (
        Ppo,
        {"actor": "actor", "value": "critic"},
        lambda net, x, data: net.get_action_and_value(x, data["action"])[1],
    ),
    "ppo_continuous_action": (
        PpoContinuous,
        {"actor": "actor_mean", "kind": "normal", "log_std": "actor_logstd", "value": "critic"},
        lambda net, x, data: net.get_action_and_value(x, data["action"])[1],
    ),
    "ppo_atari": (
        PpoAtari,
        {"actor": "actor", "value": "critic", "trunk": "network", "divide": 255.0, "observation_dims": 3},
        lambda net, x, data: net.get_action_and_value(x, data["action"])[1],
    ),
    "ppo, by its methods": (
        PpoAtari,
        {"actor": "actor", "value": "get_value", "trunk": None, "divide": None, "observation_dims": 3, "part": "value"},
        lambda net, x, data: net.get_value(x).squeeze(-1),
    ),
    "dqn": (
        Q, {"actor": "forward", "kind": "values"},
        lambda net, x, data: net(x).gather(1, data["action"][:, None]).squeeze(1),
    ),
    "dqn, by a path": (
        Q, {"actor": "network", "kind": "values"},
        lambda net, x, data: net(x).gather(1, data["action"][:, None]).squeeze(1),
    ),
    "sac_continuous_action": (
        SacActor,
        {"actor": "forward", "kind": "squashed", "action_scale": "action_scale", "action_bias": "action_bias"},
        lambda net, x, data: net.score(x, data["raw_action"]),
    ),
    "ddpg_continuous_action": (
        DdpgActor, {"actor": "forward", "kind": "deterministic"}, lambda net, x, data: net(x).sum(1),
    ),
}  # fmt: skip


def made(name: str) -> tuple[nn.Module, Any, TensorDict]:
    kind, options, _ = AGENTS[name]
    net = kind()
    shape = (6, 2, 9, 9) if options.get("observation_dims") == 3 else (6, 5)
    data = TensorDict(
        {"observation": torch.randint(256, shape).float() if len(shape) == 4 else torch.randn(shape)}, [6]
    )
    return net, from_module(net, **options), data


@pytest.mark.parametrize("name", AGENTS)
def test_it_computes_what_the_agent_computes(name: str) -> None:
    net, policy, data = made(name)
    for _ in range(2):
        with set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
            found = policy(data.clone())
        score = AGENTS[name][2](net, data["observation"], found)
        if "action_log_prob" in found.keys():
            close = {"rtol": 1e-4, "atol": 1e-4} if name.startswith("sac") else {"rtol": 0, "atol": 0}
            torch.testing.assert_close(found["action_log_prob"], score, **close)
        folded = policy(data.clone().reshape(3, 2))
        for key in policy.out_keys:
            if "action" not in key:
                assert torch.equal(folded[key].reshape(found[key].shape), found[key]), key
        with torch.no_grad():
            for one in net.parameters():
                one.mul_(1.1)  # the agent trains on
    found = policy(data.clone())  # not drawn
    if name.startswith("dqn"):
        assert torch.equal(found["action"], net(data["observation"]).argmax(1))
    if name.startswith("ddpg"):
        assert torch.equal(found["action"], net(data["observation"]))
    if name.startswith("sac"):
        assert torch.equal(found["action"], found["raw_action"] * net.action_scale + net.action_bias)


@pytest.mark.parametrize("name", AGENTS)
def test_explanations_are_gradients_of_the_agents_own_code(name: str) -> None:
    net, policy, data = made(name)
    with Saliency().prepare(policy) as hooked, set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        found = hooked.annotate(hooked(data.clone()))
    leaf = data["observation"].clone().requires_grad_()
    [expected] = torch.autograd.grad(AGENTS[name][2](net, leaf, found).sum(), leaf)
    torch.testing.assert_close(found["attr", "observation"], expected, rtol=1e-4, atol=1e-6)
    assert expected.abs().sum() > 0


@pytest.mark.parametrize("name", ["ppo", "ppo_continuous_action", "ppo_atari"])
def test_values_are_those_of_the_agent(name: str) -> None:
    net, _, data = made(name)
    options = AGENTS[name][1]
    expected = net.get_action_and_value(data["observation"])[3]
    for part in ("value", "actor_value"):
        policy = from_module(net, **options, part=part)
        assert torch.equal(policy(data.clone())["state_value"], expected)
        with Saliency(target=targets.state_value()).prepare(policy) as hooked:
            found = hooked.annotate(policy(data.clone()).detach())
        leaf = data["observation"].clone().requires_grad_()
        [gradient] = torch.autograd.grad(net.get_action_and_value(leaf)[3].sum(), leaf)
        torch.testing.assert_close(found["attr", "observation"], gradient, rtol=1e-4, atol=1e-6)
    assert {id(one) for one in policy.parameters()} == {id(one) for one in net.parameters()}


def test_a_critic_of_actions() -> None:
    net = SoftQ()
    policy = from_module(net, value="forward", part="value", reads_action=True)
    data = TensorDict({"observation": torch.randn(3, 2, 5), "action": torch.randn(3, 2, 2)}, [3, 2])
    expected = net(data["observation"].flatten(0, 1), data["action"].flatten(0, 1)).reshape(3, 2, 1)
    assert torch.equal(policy(data.clone())["state_action_value"], expected)
    with IntegratedGradients(baseline=0.0, n_steps=8).prepare(policy) as hooked:
        found = hooked.annotate(data)
    assert found["attr", "action"].shape == (3, 2, 2)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_sites_have_the_shape_of_the_batch(batch: tuple[int, ...]) -> None:
    """Inside, rows have one dimension; a vector, and what is cached, do not show it."""
    net = PpoAtari()
    policy = from_module(net, "actor", trunk="network", divide=255.0, observation_dims=3)
    data = TensorDict({"observation": torch.randint(256, (*batch, 2, 9, 9)).float()}, batch)
    data["strength"] = torch.rand(batch)
    vector, path = torch.randn(16), "module.0.module.network.3"
    caching = ActivationCaching(r"module\.0\.module\.network\.[03]$")
    method = Compose(SteeringVectors({path: vector}, alpha="strength"), caching)
    with method.prepare(policy) as hooked:
        found = hooked(data.clone())
    rows = data["observation"].reshape(-1, 2, 9, 9) / 255.0
    hidden = net.network[:4](rows) + data["strength"].reshape(-1, 1) * vector
    maps = net.network[0](rows)
    assert torch.equal(found["cache", "module.0.module.network.0"], maps.reshape(*batch, *maps.shape[1:]))
    torch.testing.assert_close(found["cache", path], hidden.reshape(*batch, 16))
    torch.testing.assert_close(found["logits"], net.actor(hidden.relu()).reshape(*batch, 3))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_module(Ppo(), "acto"), "nearest: 'actor'"),
        (lambda: from_module(Ppo()), "part='actor' needs actor="),
        (lambda: from_module(Ppo(), "actor", part="actor_value"), "needs actor= and value="),
        (lambda: from_module(PpoContinuous(), "actor_mean", kind="normal"), "log_std= or std="),
        (lambda: from_module(PpoContinuous(), "actor_mean", kind="normal", std="actor_std"), "'actor_logstd'"),
        (lambda: from_module(SacActor(), "forward", action_scale="action_scale"), "go together"),
        (lambda: from_module(PpoAtari(), "actor", trunk="network", observation_dims=3)(
            TensorDict({"observation": torch.zeros(9, 9)}, [])), "has 3 dimensions"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_words(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        make()


class Odd(nn.Module):
    """What else agents give: distributions, actions with scores, lists of logits, values without a dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.memory, self.head = nn.Linear(5, 4), nn.LSTM(5, 4), nn.Linear(5, 1)
        self.log_std = nn.Parameter(torch.zeros(4))

    def distribution(self, x: Tensor) -> Categorical:
        return Categorical(logits=self.body(x))

    def act(self, x: Tensor) -> tuple:
        drawn = self.distribution(x).sample()
        return drawn, drawn

    def several(self, x: Tensor) -> list[Tensor]:
        return list(self.body(x).chunk(2, -1))

    def with_state(self, x: Tensor, state: Tensor) -> Tensor:
        return self.body(x + state)

    def remembers(self, x: Tensor) -> Tensor:
        return self.memory(x)[0]

    def flat(self, x: Tensor) -> Tensor:
        return self.head(x).squeeze(-1)

    def of_action(self, x: Tensor, action: Tensor) -> Tensor:
        return (self.head(x) * action).flatten()


@pytest.mark.filterwarnings("ignore:.*may run a LSTM")
@pytest.mark.parametrize("rows", [(), (1,), (2,), (2, 3)])
@pytest.mark.parametrize(
    ("actor", "kind", "gave"),
    [
        ("distribution", "categorical", "one tensor.*gave Categorical"),
        ("distribution", "deterministic", "one tensor.*gave Categorical"),
        ("act", "categorical", r"gave a tuple of 2 \(Tensor, Tensor\)"),
        ("act", "values", r"gave a tuple of 2 \(Tensor, Tensor\)"),
        ("act", "normal", r"gave a tuple of 2 \(Tensor, Tensor\)"),
        ("several", "categorical", r"gave a list of 2 \(Tensor, Tensor\)"),
        ("body", "squashed", "2 tensors, as a tuple.*gave Tensor"),
    ],
)
def test_what_a_piece_gives_is_looked_at(actor: str, kind: str, gave: str, rows: tuple[int, ...]) -> None:
    policy = from_module(Odd(), actor, kind=kind, log_std="log_std" if kind == "normal" else None)
    with pytest.raises(InputError, match=gave):
        policy(TensorDict({"observation": torch.randn(*rows, 5)}, rows))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"actor": "with_state"}, r"actor='with_state' is called with \(the observations\)"),
        ({"value": "of_action", "part": "value"}, r"value='of_action' is called with \(the observations\)"),
        ({"actor": "memory"}, "is a LSTM, whose memory"),
        ({"actor": "body", "trunk": "memory"}, "trunk='memory' is a LSTM"),
        ({"actor": "body", "log_std": "log_std"}, "for kind='normal', and kind is 'categorical'"),
        ({"actor": "body", "reads_action": True}, "reads_action= is of value="),
        ({"actor": "body", "divide": 0.0}, "a number other than 0"),
        ({"actor": "body", "observation_dims": -1}, "observation_dims= is"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        from_module(Odd(), **options)


@pytest.mark.filterwarnings("ignore:.*may run a LSTM")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_values_have_a_dimension_and_observations_the_dtype_of_the_weights(
    dtype: torch.dtype, weights: torch.dtype
) -> None:
    net = Odd().to(weights)
    x, action = torch.randint(9, (3, 2, 5)).to(dtype), torch.randn(3, 2, 1, dtype=weights)
    data = TensorDict({"observation": x, "action": action}, [3, 2])
    flat = from_module(net, value="flat", part="value")(data.clone())["state_value"]
    both = from_module(net, value="of_action", part="value", reads_action=True)(data.clone())["state_action_value"]
    assert torch.equal(flat, net.head(x.to(weights).flatten(0, 1)).reshape(3, 2, 1))
    torch.testing.assert_close(both, flat * action)
    policy = from_module(net, "body")
    with Saliency(target=targets.logit(0)).prepare(policy) as hooked:
        found = hooked.annotate(hooked(data.exclude("action")))
    torch.testing.assert_close(found["attr", "observation"].to(weights), net.body.weight[0].expand(3, 2, 5))


def test_a_memory_that_may_mix_rows_is_said() -> None:
    with pytest.warns(UserWarning, match="actor='remembers' may run a LSTM"):
        from_module(Odd(), "remembers")
