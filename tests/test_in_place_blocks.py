"""Blocks whose layers work in place on what the block is given, which others read too: hooks there change nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationCaching, IntegratedGradients, Saliency, SteeringVectors
from tdhook_rl.attribution import LRP, DimsConfig, GradCAM
from tdhook_rl.latent import ActivationPatching, DirectionalAblation, StateSubtraction, UnitValues
from tdhook_rl.method import Method
from tdhook_rl.sweeps import patch_sites, patch_units
from tdhook_rl.weights import Adapters


class Own(nn.Module):
    """A block of one's own, with a statement in place."""

    def __init__(self) -> None:
        super().__init__()
        self.act, self.last = nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        self.act(x)
        return self.last(x)


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "activation first": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "two in a row": lambda: nn.Sequential(nn.Hardtanh(-0.5, 0.5, inplace=True), nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "inside of another": lambda: nn.Sequential(nn.Sequential(nn.ReLU(inplace=True)), nn.Linear(4, 4), nn.Tanh()),
    "a view": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Unflatten(-1, (2, 2)), nn.Flatten(-2)),
    "all of it": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Identity()),
    "later on": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "a dropout": lambda: nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, 4)),
    "of one's own": Own,
}


class Residual(nn.Module):
    """Adds what a block gives to what it was given, which is read before or afterwards."""

    def __init__(self, block: nn.Module, before: bool) -> None:
        super().__init__()
        self.first, self.block, self.last, self.before = nn.Linear(3, 4), block, nn.Linear(4, 2), before

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        if self.before:
            return self.last(hidden.tanh() + self.block(hidden))
        return self.last(self.block(hidden) + hidden)


#: Nothing is changed by these at the block.
IDLE: dict[str, Callable[[], Method]] = {
    "steering": lambda: SteeringVectors({"block": torch.ones(4)}, alpha=0.0),
    "steering elsewhere": lambda: SteeringVectors(
        {"block": torch.ones(4)}, when=lambda rows: rows["input"][..., 0] > 99
    ),
    "units": lambda: UnitValues({"block": [0]}, when=lambda rows: rows["input"][..., 0] > 99),
    "subtraction": lambda: StateSubtraction("block", lambda rows: rows),
    "adapter": lambda: Adapters({"same": (lambda value: value, "block", "block")}),
    "saliency": lambda: Saliency(input_modules="block", when="step"),
    "integrated gradients": lambda: IntegratedGradients(input_modules="block", baseline=0.0, when="step"),
    "lrp": lambda: LRP(input_modules="block", when="step"),
    "grad-cam": lambda: GradCAM({"block": DimsConfig(None, None)}, when="step"),
    "patching": lambda: ActivationPatching("block"),
    "caching": lambda: ActivationCaching("block"),
}


def states(seed: int = 0) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(seed))


def policy_of(name: str, before: bool) -> Residual:
    torch.manual_seed(0)
    return Residual(BLOCKS[name](), before).eval()


@pytest.mark.parametrize("before", [True, False], ids=["read before", "read afterwards"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", BLOCKS)
def test_a_policy_that_is_hooked_at_a_block_puts_out_what_it_did(name: str, mode: Any, before: bool) -> None:
    policy = policy_of(name, before)
    for kind, make in IDLE.items():
        if kind == "lrp" and (mode is torch.inference_mode or before or name == "of one's own"):
            continue  # which it refuses, or has no rule for
        with make().prepare(policy) as hooked, mode():
            expected = policy(states())
            found = hooked(TensorDict({"input": states(), ("patched", "input"): states()}, 6))
            assert torch.equal(found["output"], expected), kind
            if kind == "patching":
                assert torch.equal(found["patched", "output"], expected)


def by_hook(policy: Residual, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    own = copy.deepcopy(policy)
    own.block.register_forward_hook(lambda module, args, output: change(output.clone()))
    return own(x)


@pytest.mark.parametrize("before", [True, False], ids=["read before", "read afterwards"])
@pytest.mark.parametrize("name", [name for name in BLOCKS if name != "all of it"])
def test_what_is_put_in_is_put_in_as_by_hooks_of_torch(name: str, before: bool) -> None:
    """But for a block that hands on what it has written over: there what is put in is what flows on."""
    policy = policy_of(name, before)
    there: list[Tensor] = []
    by_hook(policy, states(1), lambda output: there.append(output.detach()) or output)
    vector = torch.tensor([1.0, -2.0, 0.5, 3.0])
    unit = vector / vector.norm()
    for method, change in (
        (SteeringVectors({"block": vector}, alpha=0.7), lambda value: value + 0.7 * vector),
        (DirectionalAblation({"block": vector}), lambda value: value - (value @ unit)[:, None] * unit),
        (StateSubtraction("block", lambda rows: rows.set("input", states(1))), lambda value: there[0]),
    ):
        x = states().requires_grad_()
        with method.prepare(policy) as hooked:
            found = hooked(TensorDict({"input": x}, 6))["output"]
        expected = by_hook(policy, y := states().requires_grad_(), change)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.sum(), one)[0] for out, one in ((found, x), (expected, y)))
        )
    with torch.no_grad():
        base, source = policy(states())[:, 0], policy(states(1))[:, 0]
        reached = by_hook(policy, states(), lambda value: there[0])[:, 0]
    pair = [TensorDict({"input": one}, 6) for one in (states(1), states())]
    metric = {"metric": lambda out: out["output"][:, 0]}
    shares = patch_sites(policy, *pair, "block", **metric)[0].shares
    torch.testing.assert_close(shares.float(), (reached - base) / (source - base), rtol=1e-3, atol=1e-4)
    for unit_number in range(4):
        mask = torch.arange(4) == unit_number
        with torch.no_grad():
            one = by_hook(policy, states(), lambda value, mask=mask: torch.where(mask, there[0], value))[:, 0] - base
        changes = patch_units(policy, *pair, "block", **metric).changes[unit_number]
        torch.testing.assert_close(changes.float(), one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_inside_of_a_vmap_too(name: str) -> None:
    policy = policy_of(name, before=False)
    with SteeringVectors({"block": torch.ones(4)}, alpha=0.5).prepare(policy) as hooked:
        both = torch.stack([states(), states(1)])
        expected = torch.stack([hooked(TensorDict({"input": one}, 6))["output"] for one in both])
        found = torch.vmap(lambda one: hooked(TensorDict({"input": one}, [6]))["output"])(both)
    torch.testing.assert_close(found, expected)
