"""tensordict's decorators are left out of hooked policies only where they have nothing to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
    set_skip_existing,
)
from tensordict.nn import ProbabilisticTensorDictSequential as Sequence
from torch import nn
from torch.distributions import Categorical
from torchrl.data import Categorical as Categories
from torchrl.modules import ProbabilisticActor, QValueActor

from tdhook_rl import Saliency, SteeringVectors, targets

ROWS = 5


def layer(key: str, out: str, size: int = 4) -> TensorDictModule:
    return TensorDictModule(nn.Sequential(nn.Linear(4, size), nn.Tanh()), in_keys=[key], out_keys=[out])


def draw() -> ProbabilisticTensorDictModule:
    return ProbabilisticTensorDictModule(
        in_keys=["logits"], out_keys=["action"], distribution_class=Categorical, return_log_prob=True
    )


POLICIES: dict[str, Callable[[], TensorDictModuleBase]] = {
    "module": lambda: layer("observation", "logits"),
    "sequential": lambda: TensorDictSequential(layer("observation", "hidden"), layer("hidden", "logits", 3)),
    "nested": lambda: TensorDictSequential(
        TensorDictSequential(layer("observation", "a"), layer("a", "hidden")), layer("hidden", "logits", 3)
    ),
    "actor": lambda: Sequence(layer("observation", "hidden"), layer("hidden", "logits", 3), draw()),
    "TorchRL's actor": lambda: ProbabilisticActor(
        TensorDictSequential(layer("observation", "hidden"), layer("hidden", "logits", 3)),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
    ),
    "TorchRL's actor, that draws": lambda: ProbabilisticActor(
        layer("observation", "logits", 3),
        in_keys=["logits"],
        distribution_class=Categorical,
        return_log_prob=True,
        default_interaction_type=InteractionType.RANDOM,
    ),
    "TorchRL's actor without log-probabilities": lambda: ProbabilisticActor(
        layer("observation", "logits", 3), in_keys=["logits"], distribution_class=Categorical
    ),
    "Q-policy": lambda: QValueActor(layer("observation", "action_value", 3), spec=Categories(3)),
    "actor over a sequence": lambda: Sequence(
        TensorDictSequential(layer("observation", "hidden"), layer("hidden", "logits", 3)), draw()
    ),
}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("present", [(), ("hidden",), ("logits",), ("hidden", "logits", "action", "action_log_prob")])
@pytest.mark.parametrize("name", POLICIES)
def test_existing_entries_are_skipped_as_by_the_policy_itself(name: str, present: tuple[str, ...], skip: bool) -> None:
    torch.manual_seed(0)
    policy = POLICIES[name]()
    data = TensorDict({"observation": torch.randn(ROWS, 4)}, batch_size=ROWS)
    found = policy(data.clone())
    for key in present:
        if key in found.keys():
            data[key] = found[key].roll(1, 0)  # what the policy would not have computed
    # Of a batch, so that it asks for nothing where a module is skipped.
    hooked = Saliency(target=targets.logit(0), when="batch").prepare(policy, return_context=False)
    with set_skip_existing(skip), torch.no_grad():
        torch.manual_seed(1)
        expected = policy(data.clone())
        torch.manual_seed(1)
        seen = hooked(data.clone())
    assert set(seen.keys()) == set(expected.keys())
    for key in expected.keys():
        assert torch.equal(seen[key], expected[key]), key


@pytest.mark.parametrize("name", POLICIES)
def test_loose_tensors_are_dispatched_as_by_the_policy_itself(name: str) -> None:
    torch.manual_seed(0)
    policy = POLICIES[name]()
    observation = torch.randn(ROWS, 4)
    path, linear = next((path, one) for path, one in policy.named_modules() if isinstance(one, nn.Linear))
    with SteeringVectors({path: torch.zeros(linear.out_features)}, alpha=0.0).prepare(policy) as hooked:
        for call in (lambda one: one(observation), lambda one: one(observation=observation)):
            torch.manual_seed(1)
            expected = call(policy)
            torch.manual_seed(1)
            seen = call(hooked)
            pairs = zip(seen, expected, strict=True) if isinstance(expected, tuple) else [(seen, expected)]
            assert all(torch.equal(one, other) for one, other in pairs)
