"""Networks that hold parameters without data, which others stand in for (ensembles as torch.func shows them), or what
does not copy."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, TensorDictModule
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torchrl.modules import ProbabilisticActor

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors
from tdhook_rl.attribution import Occlusion
from tdhook_rl.envs import KnownValue
from tdhook_rl.errors import PreparationError
from tdhook_rl.latent import SteeringVector
from tdhook_rl.metrics import (
    cascading_randomisation,
    random_target_loss,
    spectral_norms,
    untrained_copy,
    weight_norms,
)
from tdhook_rl.replay import analyze
from tdhook_rl.rollout import NetworkDiagnostics, check, cka_matrix
from tdhook_rl.sweeps import SweepResult, ablate_units, patch_sites, steering_sweep

SITE, MEMBERS = "module.0.module.base.1", 3


class Ensemble(nn.Module):
    """The mean of networks whose weights are stacked; the one that is called has none."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        members = [nn.Sequential(nn.Linear(features, 4), nn.Tanh(), nn.Linear(4, outputs)) for _ in range(MEMBERS)]
        self.base = copy.deepcopy(members[0]).to("meta")
        stacked, _ = stack_module_state(members)
        self.stacked = nn.ParameterDict({name.replace(".", "_"): one for name, one in stacked.items()})

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: self.stacked[name.replace(".", "_")] for name, _ in self.base.named_parameters()}
        return torch.vmap(lambda own: functional_call(self.base, own, (x,)))(weights).mean(0)


def actor() -> ProbabilisticActor:
    torch.manual_seed(0)
    net = TensorDictModule(Ensemble(16, 2), ["observation"], ["logits"])
    return ProbabilisticActor(net, ["logits"], distribution_class=torch.distributions.Categorical)


def states(rows: int = 12) -> TensorDict:
    return TensorDict({"observation": torch.randn(rows, 16)}, [rows])


def analysed(policy: nn.Module, folder: Path) -> None:
    data = policy(states()).detach()
    hooked = Saliency().prepare(policy, return_context=False)
    first = analyze(hooked, data, folder / "analysis").clone()
    assert torch.equal(analyze(hooked, data, folder / "analysis")["attr", "observation"], first["attr", "observation"])


def played(policy: nn.Module, folder: Path) -> None:
    vector = SteeringVector(vector=torch.ones(4), path=SITE)
    options: dict[str, Any] = {"alphas": [1.0], "controls": 1, "episodes": 2, "max_steps": 3}
    found = steering_sweep(policy, KnownValue(batch_size=[2]), vector, folder=folder / "sweep", **options)
    assert SweepResult.load(folder / "sweep").records() == found.records()


def measured(policy: nn.Module, folder: Path) -> None:
    found = weight_norms(policy)[""] ** 2
    own = [one.detach() for one in policy.parameters() if not one.is_meta]
    assert found == pytest.approx(sum(float(one.square().sum()) for one in own))
    assert spectral_norms(policy)


def checked(policy: nn.Module, folder: Path) -> None:
    with Saliency().prepare(policy) as hooked:
        check(hooked, KnownValue(batch_size=[2])).raise_if_failed()


USES: dict[str, Callable[[nn.Module, Path], Any]] = {
    "analysis": analysed,
    "sweep": played,
    "norms": measured,
    "check": checked,
    "diagnostics": lambda policy, folder: NetworkDiagnostics(policy, sites=[SITE]).update(states()),
    "layers": lambda policy, folder: cka_matrix(policy, [policy], SITE, states()),
    "patching": lambda policy, folder: patch_sites(policy, states(), states(), SITE),
    "ablation": lambda policy, folder: ablate_units(policy, states(), SITE),
    "direction": lambda policy, folder: SteeringVector.from_pairs(policy, SITE, states(), states()).check(policy),
}


@pytest.mark.filterwarnings("ignore:.*did not end")
@pytest.mark.parametrize("use", USES)
def test_parameters_without_data_are_passed_over(use: str, tmp_path: Path) -> None:
    USES[use](actor(), tmp_path)


def test_members_are_shown_and_steered_by_themselves() -> None:
    policy, data, vector = actor(), states(), torch.randn(4)
    net: Any = policy.module[0].module
    with Compose(SteeringVectors({SITE: vector}), ActivationCaching(SITE), Saliency()).prepare(policy) as hooked:
        found = hooked.annotate(hooked(data.clone()))
    leaf = data["observation"].clone().requires_grad_()
    weights = net.stacked
    hidden = (torch.einsum("bi,moi->bmo", leaf, weights["0_weight"]) + weights["0_bias"]).tanh() + vector
    logits = (torch.einsum("bmi,moi->bmo", hidden, weights["2_weight"]) + weights["2_bias"]).mean(1)
    chosen = logits.log_softmax(-1).gather(-1, found["action"][:, None])
    torch.testing.assert_close(found["logits"], logits)
    torch.testing.assert_close(found["attr", "observation"], torch.autograd.grad(chosen.sum(), leaf)[0])
    torch.testing.assert_close(found["cache", SITE], hidden.detach())


class Locked(nn.Linear):
    """A layer that does not deep-copy."""

    def __init__(self) -> None:
        super().__init__(16, 2)
        self.lock = threading.Lock()


COPIED: dict[str, Callable[[TensorDictModule], Any]] = {
    "layers": lambda net: cka_matrix(net, [net], "module.0", states()),
    "untrained": untrained_copy,
    "randomised": lambda net: cascading_randomisation(Saliency(), net, states()),
    "fitted": lambda net: random_target_loss(net, states()),
}


@pytest.mark.parametrize("use", COPIED)
def test_what_needs_a_copy_says_what_cannot_be_copied(use: str) -> None:
    net = TensorDictModule(nn.Sequential(nn.Linear(16, 16), Locked()), ["observation"], ["action"])
    with pytest.raises(PreparationError, match=r"a copy of TensorDictModule.*at 'module.1.lock'.*locks"):
        COPIED[use](net)


MEMBER = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
OF_INPUTS: dict[str, Any] = {
    "saliency": lambda when: Saliency(when=when),
    "integrated gradients": lambda when: IntegratedGradients(baseline=0.0, n_steps=64, when=when),
    "occlusion": lambda when: Occlusion(when=when),
}


@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
@pytest.mark.parametrize("when", ["batch", "step"])
@pytest.mark.parametrize("name", OF_INPUTS)
def test_copies_that_stand_before_the_rows_are_explained_together(name: str, when: str, shape: tuple[int, ...]) -> None:
    """TorchRL's `EnsembleModule` puts out a batch of as many copies."""
    critics = EnsembleModule(TensorDictModule(MEMBER, ["x"], ["state_value"]), num_copies=MEMBERS)
    x = torch.randn(*shape, 4)

    def value(x: Tensor) -> Tensor:
        return critics(TensorDict({"x": x}, x.shape[:-1]))["state_value"].squeeze(-1).sum(0)

    with OF_INPUTS[name](when).prepare(critics) as hooked:
        data = TensorDict({"x": x}, shape)
        found = hooked(data) if when == "step" else hooked.annotate(data)
    shown = found["attr", "x"]
    if when == "step":
        assert found.shape == (MEMBERS, *shape)
        shown = shown[0]
    if name == "saliency":
        leaf = x.clone().requires_grad_()
        torch.testing.assert_close(shown, torch.autograd.grad(value(leaf).sum(), leaf)[0])
    elif name == "occlusion":
        zeroed = [value(x) - value(x.index_fill(-1, torch.tensor([i]), 0.0)) for i in range(4)]
        torch.testing.assert_close(shown, torch.stack(zeroed, -1).detach(), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(shown.sum(-1), (value(x) - value(0 * x)).detach(), rtol=1e-3, atol=1e-3)
