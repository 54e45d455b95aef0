"""What is explained by default, and targets that find their outputs and actions under other names."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    InteractionType,
    NormalParamExtractor,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
    TensorDictSequential,
    set_interaction_type,
)
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Categorical as CategoricalSpec
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.modules import (
    AdditiveGaussianModule,
    Delta,
    DistributionalQValueActor,
    EGreedyModule,
    IndependentNormal,
    ProbabilisticActor,
)

from tdhook_rl import Saliency, targets
from tdhook_rl.attribution import Occlusion
from tdhook_rl.calls.provenance import stamp_key
from tdhook_rl.errors import TargetError
from tests.policies import ACTIONS, FEATURES, categorical, mlp
from tests.zoo import ZOO
from tests.zoo_agents import SEPARATE, agents_q
from tests.zoo_entry import AGENTS, CONTINUOUS, CONTROLS, OBSERVED
from tests.zoo_policies import ou_noise


def gradient(function, x: torch.Tensor) -> torch.Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def test_a_deterministic_action_is_explained_before_its_noise() -> None:
    net, x = mlp(CONTROLS), torch.randn(5, FEATURES)
    actor = TensorDictModule(net, in_keys=["observation"], out_keys=["action"])
    noise = AdditiveGaussianModule(spec=CONTINUOUS["action"], sigma_init=2.0, sigma_end=2.0)
    with Saliency(when="step").prepare(TensorDictSequential(actor, noise)) as hooked:
        found = hooked(TensorDict({"observation": x}, batch_size=5))
        assert not torch.equal(found["action"], net(x))
        batch = hooked.annotate(found.exclude("attr", "computed"))
    torch.testing.assert_close(found["attr", "observation"], gradient(net, x))
    torch.testing.assert_close(batch["attr", "observation"], gradient(net, x))
    # A difference does not see the noise either.
    with Occlusion(when="step").prepare(TensorDictSequential(actor, noise)) as hooked:
        found = hooked(TensorDict({"observation": x}, batch_size=5))
    without = x.clone()
    without[:, 2] = 0
    torch.testing.assert_close(found["attr", "observation"][:, 2], (net(x) - net(without)).sum(-1).detach())


def test_noise_with_a_memory_is_left_alone() -> None:
    policy = ou_noise()
    data = TensorDict({"observation": torch.randn(3, FEATURES), "is_init": torch.ones(3, 1, dtype=torch.bool)}, [3])
    torch.manual_seed(1)
    expected = policy(policy(data.clone()))
    with Saliency(when="step").prepare(policy) as hooked:
        torch.manual_seed(1)
        found = hooked(hooked(data.clone()))
    for key in expected.keys():
        assert torch.equal(found[key], expected[key]), key


def test_a_point_distribution_explains_its_point() -> None:
    net = TensorDictModule(mlp(CONTROLS), in_keys=["observation"], out_keys=["param"])
    actor = ProbabilisticActor(net, in_keys=["param"], distribution_class=Delta)
    x = torch.randn(4, FEATURES)
    with Saliency(when="step").prepare(actor) as hooked:
        found = hooked(TensorDict({"observation": x}, batch_size=4))
    torch.testing.assert_close(found["attr", "observation"], gradient(net.module, x))


HEADS = {
    "clipped": lambda z: z.clamp(-0.3, 0.3),
    "decoded": nn.Sequential(nn.Linear(CONTROLS, 5), nn.Tanh(), nn.Linear(5, CONTROLS)).double(),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("when", ["step", "batch"])
@pytest.mark.parametrize("mode", [InteractionType.DETERMINISTIC, InteractionType.RANDOM])
def test_an_action_made_of_a_latent_is_explained_without_the_latent(
    head: str, when: str, mode: InteractionType
) -> None:
    net = nn.Sequential(mlp(2 * CONTROLS), NormalParamExtractor()).double()
    policy = ProbabilisticTensorDictSequential(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        ProbabilisticTensorDictModule(["loc", "scale"], ["latent"], distribution_class=IndependentNormal),
        TensorDictModule(HEADS[head], in_keys=["latent"], out_keys=["action"]),
    )
    x = torch.randn(4, FEATURES, dtype=torch.float64)
    with Saliency(when=when).prepare(policy) as hooked, set_interaction_type(mode):  # type: ignore[arg-type]
        found = hooked.annotate(hooked(TensorDict({"observation": x}, batch_size=4)))
    loc, scale = net(x)
    noise = ((found["latent"] - loc) / scale).detach()

    def action(x: torch.Tensor) -> torch.Tensor:
        loc, scale = net(x)
        return HEADS[head](loc + scale * noise)

    torch.testing.assert_close(found["action"], action(x))
    torch.testing.assert_close(found["attr", "observation"], gradient(action, x))


@pytest.mark.parametrize("atoms", [ACTIONS, 7])  # as many atoms as actions: nothing in the shapes tells them apart
@pytest.mark.parametrize("greedy", [True, False])
def test_a_distributional_value_is_the_expectation_over_its_atoms(atoms: int, greedy: bool) -> None:
    net = nn.Sequential(mlp(atoms * ACTIONS), nn.Unflatten(-1, (atoms, ACTIONS)))
    support, spec = torch.linspace(-2, 3, atoms), CategoricalSpec(ACTIONS)
    policy = DistributionalQValueActor(net, in_keys=["observation"], support=support, spec=spec)
    if not greedy:
        policy = TensorDictSequential(policy, EGreedyModule(spec=spec, eps_init=1.0, eps_end=1.0))
    x = torch.randn(6, FEATURES)
    method = Saliency(
        when="step",
        target={
            "chosen": targets.chosen_q(),
            "margin": targets.margin("action_value"),
            "first": targets.logit(0, "action_value"),
        },
    )
    with method.prepare(policy) as hooked:
        found = hooked(TensorDict({"observation": x}, batch_size=6))
    with Saliency().prepare(policy) as hooked:
        default = hooked.annotate(found.exclude("attr", "computed"))["attr", "observation"]
    action = found["action"].unsqueeze(-1)

    def values(x: torch.Tensor) -> torch.Tensor:
        return (net(x).softmax(-2) * support[:, None]).sum(-2)

    def margin(x: torch.Tensor) -> torch.Tensor:
        found = values(x)
        return found.gather(-1, action).squeeze(-1) - found.scatter(-1, action, -torch.inf).amax(-1)

    chosen = gradient(lambda x: values(x).gather(-1, action), x)
    torch.testing.assert_close(found["attr", "chosen", "observation"], chosen)
    torch.testing.assert_close(found["attr", "margin", "observation"], gradient(margin, x))
    torch.testing.assert_close(found["attr", "first", "observation"], gradient(lambda x: values(x)[:, 0], x))
    torch.testing.assert_close(default, chosen)


def test_names_find_the_only_nested_output() -> None:
    policy = agents_q()
    data = TensorDict({OBSERVED: torch.randn(3, AGENTS, FEATURES)}, batch_size=3)
    with Saliency(when="step", target=targets.chosen_q()).prepare(policy) as hooked:
        found = hooked(data.clone())["attr", *OBSERVED]
    with Saliency(when="step", target=targets.chosen_q(("agents", "action_value"))).prepare(policy) as hooked:
        torch.testing.assert_close(found, hooked(data.clone())["attr", *OBSERVED])
    with Saliency(when="step", target=targets.chosen_logit()).prepare(SEPARATE.build()) as hooked:
        assert hooked(data.clone())["attr", *OBSERVED].abs().max() > 0
    with Saliency(when="step", target=targets.state_value()).prepare(policy) as hooked:
        with pytest.raises(TargetError, match="'state_value', which the policy does not output"):
            hooked(data.clone())


def test_a_stored_action_that_would_be_broadcast_is_refused() -> None:
    policy = categorical()
    data = policy(TensorDict({"observation": torch.randn(4, FEATURES)}, batch_size=4)).detach()
    data["action"] = data["action"].unsqueeze(-1)
    with Saliency().prepare(policy) as hooked, pytest.raises(TargetError, match="broadcast"):
        hooked.annotate(data)


@pytest.mark.parametrize("policy", ["masked", "lstm", "pixels_uint8", "nested", "agents_separate"])
@pytest.mark.parametrize("options", [{}, {"use_buffers": False}, {"replay_buffer": True}])
def test_what_is_declared_by_default_is_collected(policy: str, options: dict) -> None:
    # Masks and start flags are inputs that are not explained; this is known after the first call only.
    entry = ZOO[policy]
    plain = entry.build()
    buffer = ReplayBuffer(storage=LazyTensorStorage(64))
    options = options | ({"replay_buffer": buffer} if options.get("replay_buffer") else {})
    with Saliency(when="step").prepare(plain) as hooked:
        collector = Collector(entry.env(plain, 2), hooked, frames_per_batch=8, total_frames=16, **options)
        batches = list(collector)
        collector.shutdown()
        data = buffer[:] if "replay_buffer" in options else torch.cat(batches, -1)
        for key in hooked.result_keys:
            assert data[key].numel()
        assert bool(data["computed", "attr"].all())
        again = hooked.annotate(data.exclude("attr", "computed"))
    for key in hooked.result_keys:
        # A stamp is a sum over all pixels by random numbers, which may come out near zero.
        atol = 1e-2 if key == stamp_key("attr") else 1e-6
        torch.testing.assert_close(data[key], again[key], rtol=1e-4, atol=atol)
