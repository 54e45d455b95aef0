"""What must hold exactly, without training: methods against environments whose answers are known.

Random or hand-set weights, milliseconds. If one of these fails, no experiment on a trained agent means anything.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor, ValueOperator

from tdhook_rl import ActivationCaching, Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.envs import Cheese, CueCorners, KnownValue
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import ActivationPatching
from tdhook_rl.latent.representation_similarity import CkaEstimator
from tdhook_rl.metrics import completeness_gap

PRE1 = "module.0.module.0"  # the first linear layer, before its activation
SITES = [PRE1, "module.0.module.1", FC2, "module.0.module.5"]


def true_critic(env: KnownValue) -> ValueOperator:
    """A ReLU network that computes the optimal value: each feature and its opposite, and |x9| from x9's."""
    net = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 1))
    drift = 0.5 / (1 - 0.8 * env.gamma)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
        for unit, feature in enumerate((2, 5, 9)):
            net[0].weight[2 * unit, feature], net[0].weight[2 * unit + 1, feature] = 1.0, -1.0
        net[2].weight[:] = torch.tensor([[drift, -drift, 1.0, -1.0, 1.0, 1.0]])
        net[2].bias[:] = env.value(env.state(features=torch.zeros(16)))
    return ValueOperator(net, in_keys=["observation"])


def test_the_attribution_of_a_linear_value_is_its_weights() -> None:
    linear = nn.Linear(16, 1)
    states = KnownValue().sample_states(50)
    baseline = torch.linspace(-1, 1, 16).expand(50, 16)
    states["baseline", "observation"] = baseline.contiguous()
    method = Compose(
        Saliency(target=targets.state_value(), attribution_key="gradient"),
        IntegratedGradients(target=targets.state_value(), attribution_key="path"),
    )
    with method.prepare(ValueOperator(linear, in_keys=["observation"])) as hooked:
        found = hooked.annotate(states)
    torch.testing.assert_close(found["gradient", "observation"], linear.weight.expand(50, 16))
    expected = linear.weight.detach() * (states["observation"] - baseline)
    assert float((found["path", "observation"] - expected).abs().max()) <= 1e-6


def test_the_attribution_of_the_true_value_is_the_closed_form() -> None:
    env = KnownValue()
    states = env.sample_states(200)
    critic = true_critic(env)
    torch.testing.assert_close(critic(states.clone())["state_value"].squeeze(-1), env.value(states))
    method = Compose(
        Saliency(target=targets.state_value(), attribution_key="gradient"),
        IntegratedGradients(target=targets.state_value(), baseline=0.0, attribution_key="path"),
    )
    with method.prepare(critic) as hooked:
        found = hooked.annotate(states)
    torch.testing.assert_close(found["gradient", "observation"], env.gradient(states))
    torch.testing.assert_close(found["path", "observation"], env.attribution(states))
    assert not bool(found["path", "observation"][:, ~env.relevance("value")].any())


def test_the_completeness_gap_of_any_network_is_small() -> None:
    net = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    states = KnownValue().sample_states(100)
    method = IntegratedGradients(target=targets.state_value(), baseline=0.0, method="riemann_middle", n_steps=32)
    with method.prepare(ValueOperator(net, in_keys=["observation"])) as hooked:
        gap = completeness_gap(hooked, hooked.annotate(states))
    assert float(gap.abs().max()) <= 5e-4
    assert float(gap.abs().max()) > 0


def test_observing_and_steering_at_alpha_0_leave_every_bit() -> None:
    actor, rollouts, states = make_actor(), [], []
    observing = Compose(
        ActivationCaching(FC2),
        Saliency(when="step"),
        SteeringVectors({FC2: torch.full((64,), torch.finfo().max)}, alpha=0.0),
    )
    with observing.prepare(actor) as hooked:
        for policy in (actor, hooked):
            torch.manual_seed(3)
            rollouts.append(CueCorners(batch_size=[16], seed=0).rollout(40, policy, break_when_any_done=False))
            states.append(torch.get_rng_state())
    plain, seen = rollouts
    assert torch.equal(*states)
    for key in plain.keys(True, True):
        assert torch.equal(plain[key], seen[key]), key


@pytest.mark.parametrize("light", range(4))
@torch.no_grad()
def test_steering_the_first_pre_activation_is_the_flip_of_the_input(light: int) -> None:
    actor = make_actor()
    off, on = CueCorners().paired_states(light)
    column = actor.module[0].module[0].weight[:, CueCorners.light_features()[light]].detach()
    for start, end, alpha in ((off, on, 1.0), (on, off, -1.0)):
        with SteeringVectors({PRE1: column}, alpha=alpha).prepare(actor) as hooked:
            steered = hooked(start.clone())["logits"]
        flipped = actor(end.clone())["logits"]
        assert float((steered - flipped).abs().max()) <= 1e-5
        assert float((steered - actor(start.clone())["logits"]).abs().max()) > 1e-3


@pytest.mark.parametrize("site", SITES)
@torch.no_grad()
def test_a_full_patch_is_the_corrupted_run(site: str) -> None:
    """Patching the activations of the corrupted run into the clean one reproduces it to the last bit."""
    actor = make_actor()
    clean, corrupted = CueCorners().paired_states(0)
    # The first run is the one whose activations are kept; the second is the one they are put into.
    data = corrupted.clone().set(("patched", "observation"), clean["observation"])
    with ActivationPatching([site]).prepare(actor) as hooked:
        found = hooked(data)
    expected = actor(corrupted.clone())["logits"]
    assert torch.equal(found["patched", "logits"], expected)
    assert not torch.equal(expected, actor(clean.clone())["logits"])


@torch.no_grad()
def test_patching_all_but_the_direction_changes_no_action() -> None:
    """The complement: at the first pre-activation the flip is one direction, so that the rest carries nothing."""
    actor = make_actor()
    clean, corrupted = CueCorners().paired_states(0)
    column = actor.module[0].module[0].weight[:, CueCorners.light_features()[0]].detach()
    direction = column / column.norm()

    def all_but(path: str, here: Tensor, first: Tensor) -> Tensor:
        change = first - here
        return here + change - (change @ direction)[..., None] * direction

    def only(path: str, here: Tensor, first: Tensor) -> Tensor:
        return here + ((first - here) @ direction)[..., None] * direction

    data = corrupted.clone().set(("patched", "observation"), clean["observation"])
    before, after = (actor(states.clone())["logits"] for states in (clean, corrupted))
    for function, expected in ((all_but, before), (only, after)):
        with ActivationPatching([PRE1], patch_fn=function).prepare(actor) as hooked:
            patched = hooked(data.clone())["patched", "logits"]
        assert float((patched - expected).abs().max()) <= 1e-5
        assert torch.equal(patched.argmax(-1), expected.argmax(-1))


# ---------------------------------------------------------------------- the cheese, subtracted


def cheese_actor() -> ProbabilisticActor:
    """Two convolutions and two linear layers, as in the experiment on Cheese."""
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 49, 64), nn.ReLU(), nn.Linear(64, 4),
    )  # fmt: skip
    module = TensorDictModule(net, in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(module, in_keys=["logits"], distribution_class=Categorical, return_log_prob=True)


class Subtraction(TensorDictModuleBase):
    """Writes, for each row, what the module computes without the cheese minus what it computes with it."""

    in_keys = ("observation",)
    out_keys = ("difference",)

    def __init__(self, env: Cheese, seeing: TensorDictModuleBase, site: str) -> None:
        super().__init__()
        self.env = env
        self.__dict__["seeing"] = seeing  # not a child: it is hooked, and shares its weights with the policy
        self.site = site

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        hidden = self.env.change(tensordict, "visible")
        with_cheese, without = (
            self.seeing.annotate(TensorDict({"observation": data["observation"]}, data.batch_size))["cache", self.site]
            for data in (tensordict, hidden)
        )
        return tensordict.set("difference", without - with_cheese)


@pytest.mark.parametrize("site", [f"module.0.module.{layer}" for layer in (0, 1, 2, 3, 5, 6, 7)])
def test_subtracting_the_cheese_state_by_state_is_the_rollout_without_it(site: str) -> None:
    actor = cheese_actor()
    seen, hidden = (Cheese(region="anywhere", visible=shown, batch_size=[24], seed=0) for shown in (True, False))
    with (
        torch.no_grad(),
        ActivationCaching(site).prepare(actor) as seeing,
        SteeringVectors({site: "difference"}, alpha=1.0).prepare(actor) as steered,
    ):
        policy = TensorDictSequential(Subtraction(seen, seeing, site), steered)
        rollouts = []
        for env, acting in ((hidden, actor), (seen, policy), (seen, actor)):
            torch.manual_seed(0)
            env.set_seed(0)
            rollouts.append(env.rollout(30, acting, break_when_any_done=False))
    expected, found, untouched = rollouts
    assert torch.equal(found["action"], expected["action"])
    assert torch.equal(found["next", "reward"], expected["next", "reward"])
    torch.testing.assert_close(found["logits"], expected["logits"], rtol=0, atol=1e-5)
    assert float((untouched["logits"] - expected["logits"]).abs().max()) > 1e-3


def test_cka_of_a_rotated_representation_is_1() -> None:
    states = CueCorners().all_states()
    with ActivationCaching(FC2).prepare(make_actor()) as hooked:
        activations = hooked.annotate(states)["cache", FC2]
    rotation = torch.linalg.qr(torch.randn(64, 64)).Q
    similarity = CkaEstimator()
    for other, expected in ((activations @ rotation, 1.0), (3 * activations + 1, 1.0)):
        assert float(similarity(TensorDict({"data_a": activations, "data_b": other}))["cka"]) == pytest.approx(expected)
    unrelated = TensorDict({"data_a": activations, "data_b": torch.randn(368, 2)})
    assert float(similarity(unrelated)["cka"]) < 0.1
