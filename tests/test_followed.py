"""What the user changes on his policy while it is hooked: attributes are followed, other modules are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from tdhook_rl import ActivationCaching, Saliency, targets
from tdhook_rl.errors import TieError

X = torch.randn(5, 4)


class Policy(nn.Module):
    """Reads settings of several kinds, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 3)
        self.inner = nn.Sequential(nn.LeakyReLU(0.1))
        self.temperature = 1.0
        self.scales = {"adapter": 1.0}
        self.merged: list[str] = []
        self.config = SimpleNamespace(gain=1.0, deep=SimpleNamespace(offset=0.0))
        self.offset = torch.zeros(3)
        self.act: Any = torch.tanh
        self.calls = 0
        self.seen: list[int] = []
        self.last_output: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        h = self.act(self.drop(self.inner(self.first(x)))) * self.scales["adapter"] * self.config.gain
        y = self.last(h) / self.temperature + self.offset + self.config.deep.offset + len(self.merged) + self.calls
        self.last_output = y
        return y


def anneal(policy: Policy) -> None:
    policy.temperature = 0.5


def slope(policy: Policy) -> None:
    policy.inner[0].negative_slope = 0.7


def drop_all(policy: Policy) -> None:
    policy.drop.p = 1.0


def rescale(policy: Policy) -> None:
    policy.scales["adapter"] = 2.0


def merge(policy: Policy) -> None:
    policy.merged.append("adapter")


def gain(policy: Policy) -> None:
    policy.config.gain = 3.0


def deep(policy: Policy) -> None:
    policy.config.deep.offset = 3.0


def other_tensor(policy: Policy) -> None:
    policy.offset = torch.ones(3)


def same_tensor(policy: Policy) -> None:
    policy.offset += 1


def function(policy: Policy) -> None:
    policy.act = torch.sigmoid


CHANGES = (anneal, slope, drop_all, rescale, merge, gain, deep, other_tensor, same_tensor, function)


@pytest.mark.parametrize("calls", [0, 1, 3])
@pytest.mark.parametrize("change", CHANGES)
def test_attributes_are_followed(change: Callable[[Policy], None], calls: int) -> None:
    policy = Policy()
    twin = copy.deepcopy(policy)
    method = Saliency(target=targets.logit(0), when="step")
    with method.prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        for _ in range(calls):
            torch.testing.assert_close(hooked(TensorDict({"observation": X}, [5]))["logits"], twin(X))
        for _ in range(2):
            for one in (policy, twin):
                change(one)
            found = hooked(TensorDict({"observation": X}, [5]))
            leaf = X.clone().requires_grad_()
            plain = twin(leaf)
            torch.testing.assert_close(found["logits"], plain)
            if plain[:, 0].sum().requires_grad:
                (right,) = torch.autograd.grad(plain[:, 0].sum(), leaf, allow_unused=True)
                torch.testing.assert_close(found["attr", "observation"], right)


@pytest.mark.parametrize("first", [True, False])
def test_what_a_forward_writes_and_the_mode_are_not_followed(first: bool) -> None:
    policy = Policy()
    twin = copy.deepcopy(policy)
    with ActivationCaching("first").prepare(policy, in_keys=["observation"], out_keys=["logits"]) as hooked:
        if first:
            torch.testing.assert_close(hooked(TensorDict({"observation": X}, [5]))["logits"], twin(X))
        for _ in range(3):
            policy(X)  # a loss of the user's
        policy.drop.eval()
        torch.testing.assert_close(hooked(TensorDict({"observation": X}, [5]))["logits"], twin(X))
        assert hooked.hooked_root.drop.training
        assert not policy.drop.training
    assert policy.calls == 3


def replace(net: nn.Sequential) -> None:
    net[1][0] = nn.Linear(8, 8)


def add(net: nn.Sequential) -> None:
    net.append(nn.Tanh())


def remove(net: nn.Sequential) -> None:
    del net[2]


def parametrise(net: nn.Sequential) -> None:
    parametrizations.weight_norm(net[0])


def mask(net: nn.Sequential) -> None:
    prune.random_unstructured(net[0], "weight", 0.5)


REPLACED = [(replace, "1.0"), (add, "3"), (remove, "2"), (parametrise, "0"), (mask, "0")]


@pytest.mark.parametrize(("change", "path"), REPLACED)
def test_another_structure_is_refused_by_name(change: Callable[[nn.Sequential], None], path: str) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))
    with Saliency(target=targets.logit(0), when="batch").prepare(
        net, in_keys=["observation"], out_keys=["logits"]
    ) as hooked:
        data = hooked(TensorDict({"observation": X}, [5]))
        change(net)
        with pytest.raises(TieError, match=f"{path}"):
            hooked(data.clone())
        with pytest.raises(TieError, match=f"{path}"):
            hooked.annotate(data)
