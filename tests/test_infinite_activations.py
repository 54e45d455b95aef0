"""Sites with infinite entries, such as the logits of closed actions, and states whose activations are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from tdhook_rl import ActivationAddition, DirectionalAblation, IntegratedGradients, Saliency, SteeringVectors
from tdhook_rl.errors import InputError
from tdhook_rl.latent import DirectionClamping, StateSubtraction
from tdhook_rl.sweeps import (
    Circuit,
    ablate_units,
    attribution_patching,
    faithfulness,
    find_circuit,
    patch_paths,
    patch_sites,
    patch_units,
)

F64 = torch.float64
ROWS, CLOSED, SITE = 8, 1, "close"


class Net(nn.Module):
    """Logits of five choices, of which one is closed in every state, or others in other states; and what follows."""

    def __init__(self, low: float, by_state: bool = False) -> None:
        super().__init__()
        self.low, self.by_state = low, by_state
        self.first, self.logits, self.close, self.last = (
            nn.Linear(3, 4),
            nn.Linear(4, 5),
            nn.Identity(),
            nn.Linear(5, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        closed = torch.arange(5) == ((x[..., :1] > 0) * 2 + 1 if self.by_state else CLOSED)
        logits = self.logits(self.first(x).tanh())
        return self.last(self.close(logits.masked_fill(closed, self.low)).softmax(-1))


def nets(by_state: bool = False) -> list[nn.Module]:
    """The same twice: what is closed is minus infinity, or so low that its probability is zero to the bit."""
    torch.manual_seed(0)
    found = [Net(low, by_state).double() for low in (-math.inf, -1e4)]
    found[1].load_state_dict(found[0].state_dict())
    return found


def states(seed: int) -> TensorDict:
    value = torch.randn(ROWS, 3, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return TensorDict({"input": value}, ROWS)


OPEN = torch.tensor([1.0, 0.0, -0.5, 2.0, 0.3], dtype=F64)  # a direction without the closed choice
BOTH: dict[str, Any] = {"sites": SITE, "metric": "output"}


def annotated(method: Any, net: nn.Module) -> Tensor:
    with method.prepare(net) as hooked:
        data = hooked.annotate(states(1))
    assert bool(data["computed", "attr"].all())
    return data["attr", SITE]


def acting(method: Any, net: nn.Module) -> Tensor:
    with method.prepare(net) as hooked:
        return hooked(states(1))["output"].detach()


def other_input(rows: TensorDict) -> TensorDict:
    return rows.set("input", states(2)["input"])


#: What is closed in all states takes no part: each number is that of the network where it is merely improbable.
FOUND: dict[str, Callable[[nn.Module], Tensor]] = {
    "whole": lambda net: patch_sites(net, states(1), states(2), **BOTH)[0].shares,
    "direction": lambda net: patch_sites(net, states(1), states(2), **BOTH, direction=OPEN, controls=0)[0].shares,
    "rank": lambda net: patch_sites(net, states(1), states(2), **BOTH, rank=2, controls=4)[0].shares,
    "random rank": lambda net: patch_sites(net, states(1), states(2), **BOTH, rank=2, controls=4)[0].at_random,
    "units": lambda net: patch_units(net, states(1), states(2), **BOTH).changes,
    "estimates": lambda net: attribution_patching(net, states(1), states(2), **BOTH, compare="all").estimates,
    "agreement": lambda net: torch.tensor(
        attribution_patching(net, states(1), states(2), **BOTH, compare="all").agreement.largest
    ),
    "estimated shares": lambda net: torch.tensor(
        [attribution_patching(net, states(1), states(2), **BOTH)[SITE, unit].estimated.estimate for unit in range(5)]
    ),
    "importance": lambda net: find_circuit(net, states(1), states(2), **BOTH).importance[SITE],
    "mean ablation": lambda net: ablate_units(net, states(1), **BOTH, by="mean").changes["metric"],
    "resampled": lambda net: ablate_units(net, states(1), **BOTH, by="resample").changes["metric"],
    "path": lambda net: patch_paths(net, states(1), states(2), "logits", SITE, metric="output")[0].shares,
    "integrated gradients": lambda net: annotated(IntegratedGradients(input_modules=SITE, baseline=0.0), net),
    "gradient times input": lambda net: annotated(Saliency(input_modules=SITE, multiply_by_inputs=True), net),
    "subtraction": lambda net: acting(StateSubtraction(SITE, other_input, alpha=0.3), net),
    "negative subtraction": lambda net: acting(StateSubtraction(SITE, other_input, alpha=-2.0), net),
    "ablation": lambda net: acting(DirectionalAblation({SITE: OPEN}), net),
    "clamping": lambda net: acting(DirectionClamping({SITE: OPEN}, value=1.5), net),
}  # fmt: skip


#: By control what it belongs to.
TRAINED: dict[str, Any] = {
    "subtraction.alpha": StateSubtraction(SITE, other_input, alpha=0.3),
    "steering.alpha": SteeringVectors({SITE: OPEN}, alpha=0.3),
    "clamping.value": DirectionClamping({SITE: OPEN}, value=1.5),
    f"ablation.{SITE}": DirectionalAblation({SITE: OPEN}),
}


@pytest.mark.parametrize("by_state", [False, True], ids=["one choice", "another in each state"])
@pytest.mark.parametrize("name", TRAINED)
def test_what_is_closed_has_no_slope(name: str, by_state: bool) -> None:
    """A control that is trained has the gradient that it has where the choice is merely improbable."""
    found = []
    for net in nets(by_state):
        with TRAINED[name].prepare(net) as hooked:
            control = hooked.controls[name].requires_grad_()
            (hooked(states(1))["output"] ** 2).sum().backward()
            found.append(control.grad)
    assert bool(found[0].isfinite().all())
    # A direction is measured on how improbable the choice is, unless it leaves that out.
    if name not in ("clamping.value" if by_state else "", f"ablation.{SITE}"):
        torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", FOUND)
def test_what_is_closed_everywhere_takes_no_part(name: str) -> None:
    infinite, low = (FOUND[name](net) for net in nets())
    assert bool(infinite.isfinite().all())
    torch.testing.assert_close(infinite, low, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("alpha", [1.0, 0.4, -1.5, "alpha"])
def test_what_is_closed_in_some_states_is_moved_as_far_as_it_can_be(alpha: float | str) -> None:
    """With alpha 1 all is that of the other input; what is infinite in the state stays with any other strength."""
    net = nets(by_state=True)[0]
    numbers = torch.linspace(-1, 1, ROWS, dtype=F64)
    sides = []
    for one in (states(1), states(2)):
        net.close.register_forward_hook(lambda module, args, output: sides.append(output.detach()))
        net(one["input"])
        net.close._forward_hooks.clear()
    here, there = sides
    strength = numbers[:, None] if alpha == "alpha" else torch.full((ROWS, 1), alpha, dtype=F64)
    expected = here + strength * (there - here)
    expected = torch.where(here.isinf(), here, expected)
    expected = torch.where(strength == 1, there, torch.where(strength == 0, here, expected))
    moved = [None]
    method = StateSubtraction(SITE, other_input, alpha=alpha)
    with method.prepare(net) as hooked:
        hooked.hooked_root.last.register_forward_pre_hook(lambda module, args: moved.append(args[0].detach()))
        hooked(states(1).set("alpha", numbers))
    torch.testing.assert_close(moved[-1], expected.softmax(-1), equal_nan=True)
    if alpha == 1.0:
        assert torch.equal(acting(method, net), net(states(2)["input"]).detach())


def test_a_mean_of_activations_that_are_no_numbers_is_refused() -> None:
    with (
        ActivationAddition(SITE).prepare(nets()[0]) as hooked,
        pytest.raises(InputError, match=r"'close' are not finite in 8 of 8 rows of the positive inputs"),
    ):
        hooked(TensorDict({"positive": states(1), "negative": states(2)}, ROWS))


# ---------------------------------------------------------------------- states whose activations are no numbers


class Log(nn.Module):
    """A logarithm, which some states do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.log, self.last = nn.Linear(3, 4), nn.Identity(), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.log((self.first(x) + 3).log()))


def logs() -> tuple[nn.Module, TensorDict, TensorDict]:
    torch.manual_seed(0)
    clean = states(1)
    clean["input"][2] *= 50
    return Log().double(), clean, states(2)


def test_a_state_without_a_number_leaves_the_others_as_they_are() -> None:
    net, clean, corrupt = logs()
    others = torch.arange(ROWS) != 2
    some = clean[others], corrupt[others]
    options: dict[str, Any] = {"sites": "log", "metric": "output"}
    whole, part = (patch_sites(net, *pair, **options, rank=1, controls=3)[0] for pair in ((clean, corrupt), some))
    assert whole.left_out == 1
    assert "1 of 8 differences are not finite" in whole.words
    torch.testing.assert_close(whole.shares[others], part.shares)
    torch.testing.assert_close(whole.at_random[:, others], part.at_random)
    table = ablate_units(net, clean, **options)
    with torch.no_grad():
        there = (net.first(clean["input"]) + 3).log()
        for unit in range(4):
            usable = there[:, unit].isfinite()
            moved = there.clone()
            moved[:, unit] = there[usable, unit].mean()
            by_hand = (net.last(moved) - net.last(there)).squeeze(-1)
            torch.testing.assert_close(table.changes["metric"][unit], by_hand, equal_nan=True)
    assert "the mean at 'log' is of the states in which it is finite" in table.words
    assert "not finite in 1 states" in table.words
    none = clean.clone().apply(lambda one: one * 50 - 1e3)
    assert "no difference is finite" in patch_sites(net, none, none, **options, rank=1)[0].words


class Root(nn.Module):
    """A square root of a difference, which clean and corrupt units together need not have."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.same(x)
        return (x[..., :1] - x[..., 1:2]).sqrt() + x[..., 2:]


def test_sets_of_components_without_a_number_are_said(tmp_path: Path) -> None:
    clean = torch.rand(ROWS, 3, generator=torch.Generator().manual_seed(0), dtype=F64)
    clean[:, 0] += 1
    corrupt = clean.flip(0) + torch.tensor([4.0, 4.0, 2.0], dtype=F64)
    data = [TensorDict({"input": one}, ROWS) for one in (clean, corrupt)]
    told = faithfulness(Root(), *data, {"same": [0]}, metric="output")
    assert math.isnan(told.estimate)
    assert "not finite in 8 of 8 states" in told.words
    found = find_circuit(Root(), *data, "same", metric="output", keep=0.5, controls=6)
    assert found.units["same"] == [2]
    assert math.isfinite(found.faithfulness.estimate)
    assert found.random is not None
    assert "random sets" in found.random.words
    again = Circuit.load(found.save(tmp_path / "circuit"))
    assert str(again) == str(found)


def test_a_metric_that_is_finite_nowhere_is_not_said_to_be_the_same() -> None:
    data = [states(1), states(2)]
    with pytest.raises(
        InputError, match=r"in no state is the metric finite .* 8 with a metric that is not finite.*metric="
    ):
        find_circuit(nets()[0], *data, SITE, metric=lambda out: out["output"][:, 0] / 0)
    with pytest.raises(InputError, match=r"nothing differs .* 8 with no difference"):
        find_circuit(nets()[0], data[0], data[0], **BOTH)
