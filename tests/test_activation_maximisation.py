"""Activation maximisation against a linear identity, steps by hand, and what it may not touch."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from tdhook_rl import targets
from tdhook_rl.attribution.activation_maximisation import ActivationMaximisation
from tests.policies import FEATURES, categorical, mlp

F64 = torch.float64


def test_activation_maximisation_of_a_linear_net_moves_along_the_weights() -> None:
    net = nn.Sequential(nn.Linear(FEATURES, 2)).double()
    for batch in ((), (6,), (2, 3)):
        x = torch.randn(*batch, FEATURES, dtype=F64)
        with ActivationMaximisation("0", alpha=0.3, n_steps=4).prepare(net) as hooked:
            found = hooked(TensorDict({"input": x}, batch_size=batch))["attr", "input"]
        torch.testing.assert_close(found, x + 0.3 * 4 * net[0].weight.sum(0).detach())
        assert not found.requires_grad


def test_activation_maximisation_ascends_within_bounds_and_touches_nothing() -> None:
    actor = categorical().double().requires_grad_(True)
    before = copy.deepcopy(actor.state_dict())
    with torch.no_grad():
        data = actor(TensorDict({"observation": torch.randn(7, FEATURES, dtype=F64)}, batch_size=7))
    observation = data["observation"].clone()
    net = actor.module[0].module
    reached = [net[:2](observation).sum(-1)]
    for steps in (1, 2, 5, 20):
        method = ActivationMaximisation(
            modules_to_maximise=["module.0.module.1"], alpha=0.05, n_steps=steps, min_value=-0.5, max_value=0.5
        )
        with method.prepare(actor) as hooked:
            found = hooked.annotate(data)["attr", "observation"]
        assert float(found.abs().max()) <= 0.5
        reached.append(net[:2](found).sum(-1))
    for earlier, later in pairwise(reached[1:]):
        assert bool((later >= earlier - 1e-9).all())
    assert bool((reached[-1] > net[:2](observation.clamp(-0.5, 0.5)).sum(-1)).all())
    assert torch.equal(data["observation"], observation)
    for key, value in actor.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(parameter.grad is None and parameter.requires_grad for parameter in actor.parameters())
    assert not any(child._forward_hooks for child in actor.modules())


def test_activation_maximisation_of_a_target_or_by_a_callback() -> None:
    net = mlp().double()
    data = TensorDict({"input": torch.randn(4, FEATURES, dtype=F64)}, batch_size=4)
    methods = [
        ActivationMaximisation(target=targets.Target("unit", lambda run: run.outputs["output"][..., 1])),
        ActivationMaximisation(
            ["4"],
            init_attr_targets=lambda outputs, _: TensorDict(u=outputs["4"][..., 1], batch_size=outputs.batch_size),
        ),
    ]
    found = []
    for method in methods:
        with method.prepare(net) as hooked:
            found.append(hooked(data.clone())["attr", "input"])
    torch.testing.assert_close(found[0], found[1])
    assert bool((net(found[0])[:, 1] > net(data["input"])[:, 1]).all())


class Twice(nn.Module):
    """One activation that runs twice, and an output without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(3, 4), nn.Linear(4, 2), nn.Tanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.two(self.act(self.one(x))))


@pytest.mark.parametrize("run", [0, 1])
def test_one_run_of_a_module_is_maximised(run: int) -> None:
    net, x = Twice().double(), torch.randn(5, 3, dtype=F64)
    with ActivationMaximisation(f"act@{run}", n_steps=3, alpha=0.2).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=5))["attr", "input"]
    expected = x.clone()
    for _ in range(3):
        expected.requires_grad_()
        first = net.act(net.one(expected))
        value = first if run == 0 else net.act(net.two(first))
        expected = (expected + 0.2 * torch.autograd.grad(value.sum(), expected)[0]).detach()
    torch.testing.assert_close(found, expected)
