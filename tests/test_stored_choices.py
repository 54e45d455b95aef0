"""A stored action that is none of the policy's choices is refused, and not explained as if nothing was chosen."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    InteractionType,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import OneHotCategorical, ProbabilisticActor, QValueActor

from tdhook_rl import LRP, IntegratedGradients, Saliency, targets
from tdhook_rl.attribution import SARFA, Occlusion
from tdhook_rl.errors import InputError, TargetError

CHOICES, ROWS = 3, 4


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, CHOICES)).double()


def drawing(distribution: Any) -> ProbabilisticActor:
    return ProbabilisticActor(
        TensorDictModule(net(), ["observation"], ["logits"]), in_keys=["logits"], distribution_class=distribution
    )


POLICIES = {
    "index": lambda: drawing(D.Categorical),
    "one-hot": lambda: drawing(OneHotCategorical),
    "index of a Q-network": lambda: QValueActor(net(), in_keys=["observation"], action_space="categorical"),
    "one-hot of a Q-network": lambda: QValueActor(net(), in_keys=["observation"], action_space="one-hot"),
}


def methods(policy: str) -> dict[str, Any]:
    is_q = policy.endswith("Q-network")
    chosen = targets.chosen_q() if is_q else targets.chosen_logit()
    margin = targets.margin("action_value" if is_q else "logits")
    return {
        "default": Saliency(),
        "chosen": Saliency(target=chosen),
        "margin": Saliency(target=margin),
        "integrated": IntegratedGradients(target=chosen, baseline=0.0, n_steps=4),
        "LRP": LRP(),
        "Occlusion": Occlusion(),
        "SARFA": SARFA(),
    }


cases = pytest.mark.parametrize(
    ("policy", "method"), [(policy, method) for policy in POLICIES for method in methods(policy)]
)


def rows(policy: Any) -> TensorDict:
    return policy(TensorDict({"observation": torch.randn(ROWS, 5, dtype=torch.float64)}, batch_size=ROWS)).detach()


def without_a_choice(data: TensorDict, outside: int) -> TensorDict:
    action = data["action"].clone()
    action[1] = outside if action.ndim == 1 else 0
    return data.copy().set("action", action)


@cases
@pytest.mark.parametrize("outside", [-1, CHOICES])
def test_it_is_refused(policy: str, method: str, outside: int) -> None:
    actor = POLICIES[policy]()
    data = without_a_choice(rows(actor), outside)
    said = f"action {outside} names no entry" if data["action"].ndim == 1 else "sets none of the 3 entries"
    with methods(policy)[method].prepare(actor) as hooked, pytest.raises(TargetError, match=said):
        hooked.annotate(data, on_mismatch="ignore")


@cases
def test_padding_chooses_nothing_and_is_left_out(policy: str, method: str) -> None:
    actor = POLICIES[policy]()
    data = rows(actor)
    real = torch.tensor([True, False, True, True])
    padded = data.clone()
    padded[1] = torch.zeros_like(data[1])
    padded.set(("collector", "mask"), real)
    with methods(policy)[method].prepare(actor) as hooked:
        expected = hooked.annotate(data)["attr", "observation"]
        found = hooked.annotate(padded)
    torch.testing.assert_close(found["attr", "observation"][real], expected[real])
    assert torch.equal(found["computed", "attr"], real)


class ArgMax(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.argmax(-1)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("method", [Saliency, IntegratedGradients, LRP])
def test_a_module_that_puts_out_integers_cannot_be_explained(mode: Any, method: Any) -> None:
    policy = nn.Sequential(nn.Linear(5, 4), ArgMax(), nn.Embedding(4, 2))
    x = torch.randn(ROWS, 5)
    data = TensorDict({"input": x, ("baseline", "input"): torch.zeros_like(x)}, batch_size=ROWS)
    if method is LRP and mode is torch.inference_mode:
        pytest.skip("LRP does not run there")
    with method(input_modules="1", when="step").prepare(policy) as hooked, mode():
        with pytest.raises(InputError, match=r"'1' is of torch.int64"):
            hooked(data)


@pytest.mark.parametrize("rule", ["epsilon", dict, 0.1])
def test_a_rule_of_lrp_is_a_rule(rule: Any) -> None:
    with pytest.raises(InputError, match=r"rule_mapper= gave .* for '0' \(Linear\)"):
        LRP(rule_mapper=lambda name, module: rule if name else None).prepare(nn.Sequential(nn.Linear(5, 4))).__enter__()


# ---------------------------------------------------------------------- parts of a composite distribution

#: Under which keys the parts of a distribution are written, whose parameters are under "push" and "move".
WRITTEN: dict[str, dict[str, Any]] = {
    "as they are": {"push": "push", "move": "move"},
    "by other names": {"push": "force", "move": "action"},
    "in a group": {"push": ("act", "force"), "move": ("act", "direction")},
    "crosswise": {"push": "move", "move": "push"},
}


@pytest.mark.parametrize("partly", [False, True], ids=["arguments", "a partial class"])
@pytest.mark.parametrize("name", WRITTEN)
def test_the_choice_among_several_parts_is_found_wherever_it_is_written(name: str, partly: bool) -> None:
    written = WRITTEN[name]
    given = {"distribution_map": {"push": D.Normal, "move": D.Categorical}, "name_map": written}
    if name == "as they are":
        del given["name_map"]
    kind: Any = functools.partial(CompositeDistribution, **given) if partly else CompositeDistribution
    keys = [("params", "push", "loc"), ("params", "push", "scale"), ("params", "move", "logits")]
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)).double()

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            loc, scale, logits = self.net(x).split([1, 1, 3], -1)
            return loc, scale.exp(), logits

    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(Split(), ["observation"], keys),
        ProbabilisticTensorDictModule(
            in_keys=["params"],
            out_keys=list(written.values()),
            distribution_class=kind,
            distribution_kwargs={} if partly else given,
            default_interaction_type=InteractionType.RANDOM,
        ),
    )
    data = policy(TensorDict({"observation": torch.randn(7, 4, dtype=torch.float64)}, [7])).detach()
    x = data["observation"].clone().requires_grad_()
    logits, move = net(x)[:, 2:], data[written["move"]]
    chosen = logits.gather(-1, move[:, None])
    others = logits.masked_fill(torch.arange(3) == move[:, None], -torch.inf).amax(-1, keepdim=True)
    for target, value in ((targets.chosen_logit(), chosen), (targets.margin(), chosen - others)):
        with Saliency(target=target).prepare(policy) as hooked:
            found = hooked.annotate(data)["attr", "observation"]
        expected = torch.autograd.grad(value.sum(), x, retain_graph=True)[0]
        torch.testing.assert_close(found, expected)
