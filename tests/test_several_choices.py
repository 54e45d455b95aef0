"""Several choices at once, and bits: what compares choices looks at each, or says that it is of one alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torch import distributions as D
from torchrl.modules import ProbabilisticActor, QValueModule

from tdhook_rl import LRP, Saliency, targets
from tdhook_rl.adapters.distributions import Bits, MultiCategorical
from tdhook_rl.attribution import SARFA, Occlusion
from tdhook_rl.errors import TargetError

SIZES = (2, 3)


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, sum(SIZES))).double()


def drawing(kind: Any, **given: Any) -> ProbabilisticActor:
    return ProbabilisticActor(
        TensorDictModule(net(), ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=kind,
        distribution_kwargs=given or None,
        default_interaction_type=InteractionType.RANDOM,
    )


POLICIES: dict[str, Any] = {
    "numbers": lambda: drawing(MultiCategorical, sizes=SIZES),
    "bits": lambda: drawing(Bits),
    "bits of torch": lambda: drawing(D.Bernoulli),
    "values": lambda: TensorDictSequential(
        TensorDictModule(net(), ["observation"], ["action_value"]),
        QValueModule(action_space="multi_one_hot", var_nums=list(SIZES), spec=None),
    ),
}


def by_hand(policy: str, values: Tensor, action: Tensor) -> dict[str, Tensor]:
    """The chosen logits and the margins, choice by choice."""
    if policy.startswith("bits"):
        return {"chosen": (values * action).sum(-1), "margin": (values * (2 * action - 1)).sum(-1)}
    chosen, margin = 0.0, 0.0
    for place, part in enumerate(values.split(SIZES, -1)):
        one_hot = action.split(SIZES, -1)[place].bool() if policy == "values" else None
        index = one_hot.long().argmax(-1) if one_hot is not None else action[..., place]
        own = part.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        others = part.masked_fill(torch.arange(part.shape[-1]) == index.unsqueeze(-1), -torch.inf).amax(-1)
        chosen, margin = chosen + own, margin + own - others
    return {"chosen": chosen, "margin": margin}


def rows(policy: Any, *batch: int) -> TensorDict:
    torch.manual_seed(0)
    return policy(TensorDict({"observation": torch.randn(*batch, 4, dtype=torch.float64)}, batch)).detach()


@pytest.mark.parametrize("batch", [(), (9,), (2, 3)])
@pytest.mark.parametrize("target", ["chosen", "margin"])
@pytest.mark.parametrize("kind", POLICIES)
def test_they_are_explained_choice_by_choice(kind: str, target: str, batch: tuple[int, ...]) -> None:
    policy = POLICIES[kind]()
    data, key = rows(policy, *batch), "action_value" if kind == "values" else "logits"
    given = {"chosen": targets.chosen_logit(key), "margin": targets.margin(key)}
    with Saliency(target=given[target]).prepare(policy) as hooked:
        found = hooked.annotate(data.clone())
    x = data["observation"].clone().requires_grad_()
    first: Any = policy.module[0].module
    value = by_hand(kind, first(x), data["action"])[target]
    torch.testing.assert_close(found["attr", "observation"], torch.autograd.grad(value.sum(), x)[0])
    with Occlusion(target=given[target], baseline=0.0).prepare(policy) as hooked:
        occluded = hooked.annotate(data.clone())["attr", "observation"]
    without = data["observation"].clone()
    without[..., 0] = 0
    torch.testing.assert_close(occluded[..., 0], value.detach() - by_hand(kind, first(without), data["action"])[target])


@pytest.mark.parametrize("kind", POLICIES)
def test_relevance_is_of_all_that_was_chosen(kind: str) -> None:
    policy = POLICIES[kind]()
    data = rows(policy, 9)
    with LRP().prepare(policy) as hooked:
        found = hooked.annotate(data.clone())
    assert found["computed", "attr"].all()
    assert found["attr", "observation"].any()


@pytest.mark.parametrize("kind", POLICIES)
def test_what_is_of_one_choice_says_so(kind: str) -> None:
    policy = POLICIES[kind]()
    data = rows(policy, 9)
    if kind.startswith("bits"):
        data["action"][:] = 1
    said = r"5 bits, at once" if kind.startswith("bits") else r"2 choices, among \(2, 3\), at once"
    with SARFA().prepare(policy) as hooked, pytest.raises(TargetError, match=rf"SARFA is of one choice.*{said}"):
        hooked.annotate(data, on_mismatch="ignore")


@pytest.mark.parametrize("target", [targets.chosen_logit(), targets.margin()])
@pytest.mark.parametrize(("kind", "wrong"), [("numbers", 3), ("numbers", -1), ("bits", 2.0), ("bits of torch", 0.5)])
def test_a_stored_action_that_is_none_of_them_is_refused(kind: str, wrong: float, target: Any) -> None:
    policy = POLICIES[kind]()
    data = rows(policy, 9)
    data["action"][1, -1] = wrong
    with Saliency(target=target).prepare(policy) as hooked, pytest.raises(TargetError, match="stored"):
        hooked.annotate(data, on_mismatch="ignore")
