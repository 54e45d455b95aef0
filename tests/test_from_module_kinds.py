"""What agents read and decide in other ways: indices, several choices at once, weights that actor and value share."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from torchrl.envs.utils import ExplorationType, set_exploration_type

from tdhook_rl import Saliency
from tdhook_rl.adapters import from_module
from tdhook_rl.attribution import Occlusion
from tdhook_rl.errors import InputError

SIZES = (2, 4, 3)


class Tables(nn.Module):
    """Looks up integers in all ways that torch has."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(12, 3))
        self.single = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 3))
        self.bag = nn.EmbeddingBag(6, 3)
        self.table, self.dense = nn.Parameter(torch.randn(6, 3)), nn.Linear(3, 3)

    def by_index(self, x: Tensor) -> Tensor:
        return self.table[x].sum(1)

    def one_hot(self, x: Tensor) -> Tensor:
        return F.one_hot(x, 6).to(self.table.dtype).sum(1) @ self.table

    def function(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.table).sum(1)


@pytest.mark.parametrize(
    ("batch", "dtype"), [((), torch.int64), ((4,), torch.uint8), ((2, 3), torch.int32), ((1,), torch.int16)]
)
@pytest.mark.parametrize(
    ("actor", "dims", "indices"),
    [("layers", 1, None), ("single", 0, None), ("bag", 1, None), ("by_index", 1, True), ("one_hot", 1, True),
     ("function", 1, True), ("layers", 1, True)],
)  # fmt: skip
def test_integers_are_looked_up_as_they_are(
    actor: str, dims: int, indices: bool | None, batch: tuple[int, ...], dtype: torch.dtype
) -> None:
    net = Tables().double()
    data = TensorDict({"observation": torch.randint(6, (*batch, *(3,) * dims)).to(dtype)}, batch)
    rows = data["observation"].long().reshape(-1, *(3,) * dims)
    expected = getattr(net, actor)(rows).reshape(*batch, 3)
    for kind, key in (("categorical", "logits"), ("deterministic", "action"), ("values", "action_value")):
        found = from_module(net, actor, kind=kind, observation_dims=dims, indices=indices)(data.clone())
        assert torch.equal(found[key], expected), kind
    value = from_module(net, value=actor, part="value", observation_dims=dims, indices=indices)
    assert torch.equal(value(data.clone())["state_value"], expected)
    if dims and batch:
        policy = from_module(net, actor, observation_dims=dims, indices=indices)
        with Occlusion(inputs=["observation"], when="step").prepare(policy) as hooked, torch.no_grad():
            seen = hooked(data.clone())
            again = hooked.annotate(seen.exclude("attr", "computed"))
            torch.testing.assert_close(again["attr", "observation"], seen["attr", "observation"])
            assert seen["attr", "observation"].shape == data["observation"].shape


def test_integers_are_numbers_where_nothing_looks_them_up() -> None:
    net = Tables()
    data = TensorDict({"observation": torch.randint(6, (4, 3))}, [4])
    expected = net.dense(data["observation"].float())
    assert torch.equal(from_module(net, "dense")(data.clone())["logits"], expected)
    with pytest.raises(RuntimeError, match="indices"):
        from_module(net, "layers", indices=False)(data.clone())
    half = from_module(nn.Sequential(nn.Linear(3, 3), nn.Embedding(6, 4)), "0", divide=2.0)  # divided: fractions
    assert torch.equal(half(data.clone())["logits"], half[0].module[1](data["observation"] / 2.0))


class Several(nn.Module):
    """CleanRL's agent for several choices at once."""

    def __init__(self) -> None:
        super().__init__()
        self.nvec = torch.tensor(SIZES)
        self.network = nn.Sequential(nn.Linear(5, 8), nn.Tanh())
        self.actor, self.critic = nn.Linear(8, sum(SIZES)), nn.Linear(8, 1)

    def get_action_and_value(self, x: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.network(x)
        choices = [Categorical(logits=one) for one in self.actor(hidden).split(self.nvec.tolist(), 1)]
        scores = torch.stack([one.log_prob(taken) for taken, one in zip(action.T, choices, strict=True)])
        return scores.sum(0), self.critic(hidden)


@pytest.mark.parametrize("part", ["actor", "actor_value"])
@pytest.mark.parametrize("batch", [(6,), (3, 2), (1,)])
def test_several_choices_at_once(batch: tuple[int, ...], part: Any) -> None:
    net = Several().double()
    policy = from_module(net, "actor", trunk="network", value="critic", part=part, sizes=net.nvec.tolist())
    data = TensorDict({"observation": torch.randn(*batch, 5, dtype=torch.float64)}, batch)
    with Saliency(when="step").prepare(policy) as hooked, set_exploration_type(ExplorationType.RANDOM), torch.no_grad():
        torch.manual_seed(0)
        plain = policy(data.clone())
        torch.manual_seed(0)
        stepped = hooked(data.clone())
        assert torch.equal(plain["action"], stepped["action"])
        assert stepped["action"].shape == (*batch, 3)
        found = hooked.annotate(plain)
    leaf = data["observation"].reshape(-1, 5).clone().requires_grad_()
    score, value = net.get_action_and_value(leaf, plain["action"].reshape(-1, 3))
    torch.testing.assert_close(plain["action_log_prob"].flatten(), score)
    [expected] = torch.autograd.grad(score.sum(), leaf)
    for one in (found, stepped):
        torch.testing.assert_close(one["attr", "observation"].reshape(-1, 5), expected)
    if part == "actor_value":
        torch.testing.assert_close(plain["state_value"].reshape(-1, 1), value)


@pytest.mark.parametrize("reads_action", [False, True])
@pytest.mark.parametrize("named", ["actor", "value", "actor value"])
def test_what_is_named_is_there(named: str, reads_action: bool) -> None:
    """A value that is named was left out, unless ``part=`` said it once more."""
    net = nn.ModuleDict({"actor": nn.Linear(5, 3), "value": nn.Linear(5, 1), "q": QOfBoth()})
    paths: dict[str, Any] = {"actor": "actor", "value": "q" if reads_action else "value"}
    given = {name: paths[name] for name in named.split()} | {"kind": "deterministic"}
    given |= {"reads_action": True} if reads_action and "value" in named else {}
    policy = from_module(net, **given)
    data = policy(TensorDict({"observation": torch.randn(6, 5), "action": torch.randn(6, 3)}, [6]))
    wrote = {key for key in data.keys() if "value" in key}
    expected = {"state_action_value" if reads_action else "state_value"} if "value" in named else set()
    assert wrote == expected
    assert ("action" in policy.out_keys) == ("actor" in named)


class QOfBoth(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        return self.net(torch.cat([observation, action], -1))


class Sharing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.relu, self.maps = nn.Linear(5, 4), nn.ReLU(), nn.Unflatten(1, (2, 2))
        self.actor = nn.Sequential(self.body, self.relu, nn.Linear(4, 3))
        self.critic = nn.Sequential(self.body, self.relu, nn.Linear(4, 1))
        self.apart = nn.Sequential(nn.Linear(5, 4), self.relu, nn.Linear(4, 1))


def test_weights_that_run_twice_are_said() -> None:
    net = Sharing()
    data = TensorDict({"observation": torch.randn(6, 5)}, [6])
    with pytest.warns(UserWarning, match="share weights .*name it by trunk="):
        twice = from_module(net, "actor", value="critic", part="actor_value")(data.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        options = {"trunk": "body", "actor": "actor.2", "value": "critic.2", "part": "actor_value"}
        from_module(net, **options)
        from_module(net, "actor", value="apart", part="actor_value")
        from_module(net, "actor", value="critic", part="actor")
    assert torch.equal(twice["state_value"], net.critic(data["observation"]))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: from_module(Several(), "actor", trunk="network", sizes=(2, 4)), "2, 4 have 6 logits.*got .*9"),
        (lambda: from_module(Several(), "actor", trunk="network", sizes=()), "at least 1; got"),
        (lambda: from_module(Several(), "actor", trunk="network", sizes=(9, 0)), "at least 1; got"),
        (lambda: from_module(Several(), "actor", kind="values", sizes=SIZES), "of kind='categorical', and here"),
        (lambda: from_module(Several(), value="critic", part="value", sizes=SIZES), "part='value'"),
        (lambda: from_module(Several(), "actor", indices=True, divide=2.0), "divide=2.0 makes fractions"),
        (lambda: from_module(Sharing(), "relu", value="relu", trunk="maps", part="actor_value"), "let it end in"),
    ],
)
def test_what_does_not_fit_is_refused(make: Callable[[], Any], said: str) -> None:
    width = 4 if "let it" in said else 5
    with pytest.raises(InputError, match=said):
        make()(TensorDict({"observation": torch.randn(6, width)}, [6]))
