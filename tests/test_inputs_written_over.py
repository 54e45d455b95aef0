"""Policies that write over what they read (the state of a filter, a latent one): stored batches hold the step after."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import Tensor, nn
from torchrl.modules import (
    DreamerV3DiscreteActor,
    OneHotCategorical,
    ProbabilisticActor,
    RSSMPosteriorV3,
    RSSMPriorV3,
    RSSMStateEstimatorV3,
)

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.errors import InputError
from tdhook_rl.latent import SteeringVector, principal_directions
from tdhook_rl.replay import analyze
from tdhook_rl.rollout import NetworkDiagnostics, cka_matrix
from tdhook_rl.sweeps import ablate_units, attribution_patching, find_circuit, patch_paths, patch_sites

FEATURES, MEMORY = 3, 4


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.Linear(FEATURES + MEMORY, MEMORY), nn.Linear(MEMORY, 3)

    def forward(self, seen: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.read(torch.cat([seen, memory], -1)).tanh()
        return self.head(memory), memory


def mapped() -> tuple[nn.Module, str, str]:
    net = TensorDictModule(Filter(), ["observation", "memory"], ["action", "memory"])
    return net, "module.read", "module.head"


def drawn() -> tuple[nn.Module, str, str]:
    net = TensorDictModule(Filter(), ["observation", "memory"], ["logits", "memory"])
    actor = ProbabilisticActor(net, ["logits"], distribution_class=OneHotCategorical, return_log_prob=True)
    return actor, "module.0.module.read", "module.0.module.head"


def latent() -> tuple[nn.Module, str, str]:
    """As an agent of DreamerV3 acts: a belief, and a latent state that is drawn."""
    sizes = {"num_categoricals": 2, "num_classes": 2, "rnn_hidden_dim": MEMORY}
    prior = RSSMPriorV3(action_shape=(2,), action_dim=2, hidden_dim=5, **sizes)
    posterior = RSSMPosteriorV3(5, obs_embed_dim=FEATURES, **sizes)
    given = ["memory", "belief", "previous_action", "observation", "is_init"]
    state = RSSMStateEstimatorV3(prior, posterior, in_keys=given, out_keys=["memory", "belief"])
    actor = DreamerV3DiscreteActor(4 + MEMORY, 3, depth=1, num_cells=5, in_keys=["memory", "belief"])
    return TensorDictSequential(state, actor), "module.0.prior.rnn", "module.1.module.0.module.logits_head"


POLICIES: dict[str, Callable[[], tuple[nn.Module, str, str]]] = {"map": mapped, "drawn": drawn, "latent": latent}


def states(*batch: int) -> TensorDict:
    sizes = {"observation": FEATURES, "memory": 4, "belief": MEMORY, "previous_action": 2}
    data = TensorDict({key: torch.randn(*batch, size) for key, size in sizes.items()}, batch)
    return data.set("is_init", torch.zeros(*batch, 1, dtype=torch.bool))


def entropy(outputs: TensorDictBase) -> Tensor:
    key = "logits" if "logits" in outputs.keys() else "action"
    return outputs[key].softmax(-1).square().sum(-1)


def analysed(policy: nn.Module, data: TensorDictBase) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return analyze(Saliency().prepare(policy, return_context=False), data.reshape(-1), folder)


Reader = Callable[[nn.Module, str, str, TensorDictBase, TensorDictBase], Any]
#: What runs the policy on states, which somebody may have made for that.
OF_STATES: dict[str, Reader] = {
    "patching": lambda policy, site, last, one, two: patch_sites(policy, one, two, [site, last], metric=entropy),
    "units": lambda policy, site, last, one, two: attribution_patching(policy, one, two, site, metric=entropy),
    "circuit": lambda policy, site, last, one, two: find_circuit(policy, one, two, site, metric=entropy, controls=1),
    "paths": lambda policy, site, last, one, two: patch_paths(policy, one, two, site, last, metric=entropy),
    "ablation": lambda policy, site, last, one, two: ablate_units(policy, one, site),
    "layers": lambda policy, site, last, one, two: cka_matrix(policy, [policy], site, one),
    "diagnostics": lambda policy, site, last, one, two: NetworkDiagnostics(policy, sites=[site]).update(one),
}
#: What reads batches that the policy has put out.
OF_BATCHES: dict[str, Reader] = {
    "annotate": lambda policy, site, last, one, two: Saliency().prepare(policy, return_context=False).annotate(one),
    "caching": lambda policy, site, last, one, two: (
        ActivationCaching(site).prepare(policy, return_context=False).annotate(one)
    ),
    "analysis": lambda policy, site, last, one, two: analysed(policy, one),
    "directions": lambda policy, site, last, one, two: principal_directions(policy, site, one, two),
    "direction": lambda policy, site, last, one, two: SteeringVector.from_contrast(
        policy, site, one, where=lambda rows: torch.arange(len(rows)) % 2 == 0
    ),
}


@pytest.mark.parametrize("call", [*OF_STATES, *OF_BATCHES])
@pytest.mark.parametrize("name", POLICIES)
def test_a_batch_that_holds_the_step_after_is_refused(name: str, call: str) -> None:
    policy, site, last = POLICIES[name]()
    one, two = (policy(states(6)).detach() for _ in range(2))
    with pytest.raises(InputError, match="writes over its own inputs 'memory'"):
        (OF_STATES | OF_BATCHES)[call](policy, site, last, one, two)


@pytest.mark.parametrize("call", OF_STATES)
@pytest.mark.parametrize("name", POLICIES)
def test_states_that_are_made_for_it_are_taken(name: str, call: str) -> None:
    policy, site, last = POLICIES[name]()
    found = OF_STATES[call](policy, site, last, states(6), states(6))
    if call == "patching":  # all that the metric reads goes through the last layer
        assert found[last].mean.estimate == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("name", POLICIES)
def test_they_are_explained_while_they_act(name: str) -> None:
    policy, site, last = POLICIES[name]()
    data = states(6)
    explained = Saliency(target=lambda run: entropy(run.outputs), when="step")
    with Compose(explained, ActivationCaching([site, last])).prepare(policy) as hooked:
        torch.manual_seed(0)
        found = hooked(data.clone())
    seen: dict[str, Tensor] = {}
    for path in (site, last):
        policy.get_submodule(path).register_forward_hook(lambda _, args, output, path=path: seen.update({path: output}))
    leaf = data["memory"].requires_grad_()
    torch.manual_seed(0)
    expected = policy(data.clone())
    assert (found.select(*policy.out_keys) == expected.select(*policy.out_keys)).all()
    torch.testing.assert_close(found["attr", "memory"], torch.autograd.grad(entropy(expected).sum(), leaf)[0])
    for path, value in seen.items():
        assert torch.equal(found["cache", path], value)
