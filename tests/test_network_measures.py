"""Norms, divergences, drift and plasticity as functions: against definitions, sampling and networks made to lose it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    TensorDictModule,
)
from torch import Tensor, nn
from torch.distributions import Beta, Categorical, Distribution, Independent, Normal
from torchrl.modules import (
    Delta,
    DistributionalQValueActor,
    IndependentNormal,
    MaskedCategorical,
    MaskedOneHotCategorical,
    MultiAgentMLP,
    NormalParamExtractor,
    OneHotCategorical,
    TanhNormal,
    TruncatedNormal,
    ValueOperator,
)

from tdhook_rl.arguments.seeds import stream_of
from tdhook_rl.errors import InputError, MissingKeyError
from tdhook_rl.metrics import (
    dormant_overlap,
    gradient_norms,
    policy_divergence,
    random_target_loss,
    spectral_norms,
    stable_rank,
    untrained_copy,
    value_drift,
    weight_norms,
)
from tdhook_rl.rollout import NetworkDiagnostics, Plasticity, cka_matrix
from tdhook_rl.rollout.decision_drift import ratio_by_state
from tdhook_rl.statistics import grouped_mean

STATES = 6


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(STATES, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.double)


def normal(made: type, seed: int) -> Distribution:
    return made(numbers(2, seed=seed), numbers(2, seed=seed + 1).abs() + 0.5)


def truncated(seed: int) -> Distribution:
    return TruncatedNormal(0.3 * numbers(2, seed=seed), numbers(2, seed=seed + 1).abs() + 0.5)


def composite(seed: int) -> Distribution:
    logits, loc = numbers(3, seed=seed), numbers(2, seed=seed)
    return CompositeDistribution(
        TensorDict({"move": {"logits": logits}, "push": {"loc": loc, "scale": torch.ones_like(loc)}}, [STATES]),
        distribution_map={"move": Categorical, "push": IndependentNormal},
    )


MASK = torch.tensor([True, True, False, True]).expand(STATES, 4)
#: By name a distribution for each seed, and whether torch has a closed form.
DISTRIBUTIONS = {
    "categorical": (lambda seed: Categorical(logits=numbers(4, seed=seed)), True),
    "one-hot": (lambda seed: OneHotCategorical(logits=numbers(4, seed=seed)), True),
    "masked": (lambda seed: MaskedCategorical(logits=numbers(4, seed=seed), mask=MASK), True),
    "masked, one-hot": (lambda seed: MaskedOneHotCategorical(logits=numbers(4, seed=seed), mask=MASK), True),
    "agents": (lambda seed: Categorical(logits=numbers(3, 4, seed=seed)), True),
    "normal, each dimension": (lambda seed: normal(Normal, seed), True),
    "independent normal": (lambda seed: normal(IndependentNormal, seed), True),
    "tanh normal": (lambda seed: normal(TanhNormal, seed), True),
    "beta": (lambda seed: Independent(Beta(numbers(2, seed=seed).exp(), numbers(2, seed=seed + 1).exp()), 1), True),
    "truncated normal": (truncated, False),
    "composite": (composite, True),
}


def log_prob(distribution: Distribution, actions: Tensor | TensorDict) -> Tensor:
    """Of all that is independent, ``(samples, states)``."""
    if isinstance(distribution, CompositeDistribution):
        return sum(log_prob(one, actions[key]) for key, one in distribution.dists.items())
    if isinstance(distribution, MaskedCategorical):  # whose own takes no dimension of samples
        actions = actions.argmax(-1) if isinstance(distribution, MaskedOneHotCategorical) else actions
        distribution = Categorical(logits=distribution.logits)
    return distribution.log_prob(actions).reshape(*actions.shape[:2], -1).sum(-1)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_divergence_against_many_samples(name: str) -> None:
    """Two numbers that share nothing: the closed form or the estimate, and the mean of log p - log q."""
    make, closed = DISTRIBUTIONS[name]
    before, after = make(3), make(11)
    state = torch.get_rng_state()
    found = policy_divergence(before, after, samples=4000)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.samples == (0 if closed else 4000)
    assert found.values.shape == (STATES,)
    torch.manual_seed(0)
    actions = before.sample((20_000,))
    ratios = log_prob(before, actions) - log_prob(after, actions)
    error = ratios.std(0) / 20_000**0.5
    assert bool(((found.values - ratios.mean(0)).abs() < 6 * error + 2e-2 * found.values).all())
    assert policy_divergence(before, make(3)).values.abs().max() < 1e-12


def test_small_divergences_are_not_lost_among_samples() -> None:
    """At a hundredth of a standard deviation, where log p - log q of so few samples has errors of twice the figure."""
    loc = torch.zeros(512, 1, dtype=torch.double)
    one, two = (TruncatedNormal(loc + shift, torch.full_like(loc, 0.2)) for shift in (0.0, 0.002))
    found = policy_divergence(one, two).values
    assert found.min() >= 0
    assert float(found.mean()) == pytest.approx(0.5 * 0.01**2, rel=0.05)  # bounds are five deviations away


def test_distributions_that_cannot_be_compared() -> None:
    even = Categorical(logits=torch.zeros(3, 2))
    with pytest.raises(InputError, match="same states"):
        policy_divergence(even, Categorical(logits=torch.zeros(4, 2)))
    with pytest.raises(InputError, match="no density"):
        policy_divergence(Delta(torch.zeros(3, 2)), Delta(torch.zeros(3, 2)))
    with pytest.raises(InputError, match="samples="):
        policy_divergence(even, even, samples=0)
    never = policy_divergence(even, Categorical(logits=torch.tensor([0.0, -torch.inf]).expand(3, 2)))
    assert bool(torch.isinf(never.values).all())


def continuous(sampled: bool) -> ProbabilisticTensorDictSequential:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), NormalParamExtractor())
    return ProbabilisticTensorDictSequential(
        TensorDictModule(net, ["observation"], ["loc", "scale"]),
        ProbabilisticTensorDictModule(
            ["loc", "scale"], ["action"], distribution_class=TruncatedNormal if sampled else TanhNormal,
            distribution_kwargs={"low": -2.0, "high": 2.0},
        ),
    )  # fmt: skip


@pytest.mark.parametrize("sampled", [False, True])
def test_continuous_policies_in_training(sampled: bool) -> None:
    torch.manual_seed(0)
    policy = continuous(sampled)
    states = TensorDict({"observation": torch.randn(40, 4), "level": torch.arange(40) // 8}, [40])
    diagnostics = NetworkDiagnostics(policy, sites=["module.0.module.1"], states=states, groups="level")
    assert np.isnan(diagnostics.update()["kl_churn"])
    assert diagnostics.update()["kl_churn"] == pytest.approx(0, abs=1e-12)
    before = copy.deepcopy(policy)
    with torch.no_grad():
        policy[0].module[2].weight.add_(0.1 * torch.randn(4, 8))
    found = diagnostics.update()
    old, new = (one.get_dist(states.clone()) for one in (before, policy))
    torch.manual_seed(1)
    actions = old.sample((20_000,)).detach()
    expected = (old.log_prob(actions) - new.log_prob(actions)).double().reshape(20_000, 40, -1).sum(-1).mean().detach()
    assert found["kl_churn"] == pytest.approx(float(expected), rel=0.1)
    assert diagnostics.kl_samples == (64 if sampled else 0)
    interval = diagnostics.intervals["kl_churn"]
    assert (interval.groups, interval.rows) == (5, 40)
    assert interval.low < found["kl_churn"] < interval.high


def test_values_and_distributional_values() -> None:
    torch.manual_seed(0)
    critic = ValueOperator(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    states = TensorDict({"observation": torch.randn(30, 4)}, [30])
    diagnostics = NetworkDiagnostics(critic, sites=["module.1"], states=states)
    diagnostics.update()
    first = critic(states.clone())["state_value"]
    with torch.no_grad():
        critic.module[2].bias.add_(0.5)
    found = diagnostics.update()
    assert found["value_drift"] == pytest.approx(0.5, rel=1e-5)
    assert found["value_drift_relative"] == pytest.approx(0.5 / first.abs().mean().item(), rel=1e-5)
    drift = value_drift(first, critic(states.clone())["state_value"])
    assert drift == pytest.approx((found["value_drift"], found["value_drift_relative"]), rel=1e-5)
    assert np.isnan(value_drift(torch.zeros(2), torch.ones(2)).relative)
    with pytest.raises(InputError, match="same states"):
        value_drift(torch.zeros(2), torch.ones(3))
    support = torch.linspace(-3, 3, 7)
    net = nn.Sequential(nn.Linear(4, 14), nn.Unflatten(-1, (7, 2)), nn.LogSoftmax(-2))
    actor = DistributionalQValueActor(net, support=support, action_space="categorical", spec=None)
    followed = NetworkDiagnostics(actor, sites=["module.0.module.0"], states=states)
    followed.update()
    before = (actor(states.clone())["action_value"].exp() * support[:, None]).sum(-2)
    with torch.no_grad():
        net[0].weight.mul_(2)
    after = (actor(states.clone())["action_value"].exp() * support[:, None]).sum(-2)
    assert followed.update()["value_drift"] == pytest.approx((after - before).abs().mean().item(), rel=1e-4)


# ------------------------------------------------------------------ norms


def test_norms_against_numpy() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv1d(2, 3, 2), nn.ConvTranspose1d(3, 2, 2), nn.Flatten(), nn.Linear(8, 5), nn.GRU(5, 4), nn.LayerNorm(4)
    )
    matrices = {
        "0": [net[0].weight.detach().numpy().reshape(3, -1)],
        "1": [net[1].weight.detach().numpy().swapaxes(0, 1).reshape(2, -1)],
        "3": [net[3].weight.detach().numpy()],
        "4": [net[4].weight_ih_l0.detach().numpy(), net[4].weight_hh_l0.detach().numpy()],
    }
    found = spectral_norms(net)
    assert found.keys() == matrices.keys()
    for path, known in matrices.items():
        assert found[path] == pytest.approx(max(np.linalg.norm(one, 2) for one in known), rel=1e-6)
    flat = {name: one.detach().double().numpy().ravel() for name, one in net.named_parameters()}
    norms = weight_norms(net)
    assert norms[""] == pytest.approx(np.linalg.norm(np.concatenate([*flat.values()])))
    for path in ("0", "1", "3", "4", "5"):
        own = np.concatenate([value for name, value in flat.items() if name.startswith(f"{path}.")])
        assert norms[path] == pytest.approx(np.linalg.norm(own))
    assert spectral_norms(nn.Linear(600, 600)) == {}
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    assert weight_norms(tied).keys() == {"0", ""}


def test_gradients_of_training_and_beside_it() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    x = torch.randn(10, 3)
    assert gradient_norms(net) == {}
    net(x).square().mean().backward()
    kept = [one.grad.clone() for one in net.parameters()]
    found = gradient_norms(net)
    assert found[""] == pytest.approx(float(torch.cat([one.flatten() for one in kept]).double().norm()), rel=1e-6)
    assert found["3"] == pytest.approx(float(torch.cat([one.flatten() for one in kept[-2:]]).double().norm()), rel=1e-6)
    statistics, state = copy.deepcopy(net[1].state_dict()), torch.get_rng_state()
    torch.manual_seed(7)
    copied = copy.deepcopy(net).zero_grad() or copy.deepcopy(net)
    copied.zero_grad()
    copied(x).sum().backward()
    torch.manual_seed(7)
    beside = gradient_norms(net, lambda: net(x).sum())
    assert beside == pytest.approx(gradient_norms(copied))
    torch.set_rng_state(state)
    gradient_norms(net, lambda: net(x).sum())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one.grad, then) for one, then in zip(net.parameters(), kept, strict=True))
    assert all(torch.equal(value, statistics[name]) for name, value in net[1].state_dict().items())
    for loss, message in (
        (lambda: net(x), "scalar"),
        (lambda: 3.0, "scalar"),
        (lambda: torch.ones((), requires_grad=True) * 2, "no parameter"),
    ):
        with pytest.raises(InputError, match=message):
            gradient_norms(net, loss)


# ------------------------------------------------------------------ dormancy and ranks


def test_overlap_and_stable_rank() -> None:
    then, now = torch.rand(50) < 0.4, torch.rand(50) < 0.4
    expected = sum(bool(a and b) for a, b in zip(then, now, strict=True)) / int(then.sum())
    assert dormant_overlap(then, now) == pytest.approx(expected)
    assert np.isnan(dormant_overlap(torch.zeros(3, dtype=torch.bool), torch.ones(3, dtype=torch.bool)))
    for bad in (torch.zeros(3), torch.zeros(4, dtype=torch.bool)):
        with pytest.raises(InputError, match="same units"):
            dormant_overlap(torch.zeros(3, dtype=torch.bool), bad)
    x = torch.randn(30, 8)
    assert stable_rank(x) == pytest.approx(float(x.norm() ** 2 / torch.linalg.matrix_norm(x, 2) ** 2), rel=1e-5)
    assert stable_rank(torch.zeros(3, 2)) == 0


# ------------------------------------------------------------------ plasticity


def net_of(width: int = 32) -> TensorDictModule:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
    return TensorDictModule(net, ["observation"], ["value"])


def test_plasticity_against_a_loop_by_hand() -> None:
    policy, states = net_of(), TensorDict({"observation": torch.randn(20, 4)}, [20])
    found = random_target_loss(policy, states, steps=5, lr=1e-2, seed=3)
    net = copy.deepcopy(policy.module)
    start = net(states["observation"]).detach()
    targets = start.mean(0) + torch.randn(
        20, 1, generator=torch.Generator().manual_seed(stream_of(3, "random targets"))
    )
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-2)
    for _ in range(5):
        optimiser.zero_grad()
        nn.functional.mse_loss(net(states["observation"]), targets).backward()
        optimiser.step()
    assert torch.allclose(found.float(), (net(states["observation"]) - targets).square()[:, 0], rtol=1e-4)
    with torch.no_grad():
        policy.module[4].bias.add_(30.0)  # the size of what it puts out is not what it has to learn
    assert random_target_loss(policy, states, steps=5, lr=1e-2, seed=3) == pytest.approx(found, abs=1e-2)


def test_a_network_that_can_learn_no_more() -> None:
    """Its units are asleep: only the bias of the output moves, and targets about its mean are left as they are."""
    policy, states = net_of(), TensorDict({"observation": torch.randn(64, 4)}, [64])
    with torch.no_grad():
        policy.module[2].bias.fill_(-100.0)
    fresh = random_target_loss(untrained_copy(policy), states, steps=200, lr=1e-2).mean()
    stuck = random_target_loss(policy, states, steps=200, lr=1e-2).mean()
    assert stuck > 0.7
    assert fresh < 0.5 * stuck
    with pytest.raises(MissingKeyError, match="does not output; nearest: 'value'"):
        random_target_loss(policy, states, out_key="values")
    with pytest.raises(InputError, match="steps="):
        random_target_loss(policy, states, steps=-1)
    with pytest.raises(InputError, match="TensorDict module"):
        random_target_loss(policy.module, states)


def test_new_networks_of_agents_and_frozen_or_plain_networks() -> None:
    for shared in (True, False):
        net = MultiAgentMLP(
            n_agent_inputs=4, n_agent_outputs=2, n_agents=3, centralized=False, share_params=shared, depth=1,
            num_cells=8,
        )  # fmt: skip
        policy = TensorDictModule(net, [("agents", "observation")], [("agents", "x")])
        kept, state = [one.clone() for one in policy.parameters()], torch.get_rng_state()
        new = untrained_copy(policy)
        assert torch.equal(torch.get_rng_state(), state)
        for one, other, then in zip(policy.parameters(), new.parameters(), kept, strict=True):
            assert torch.equal(one, then)
            assert not torch.equal(one, other)
        again = untrained_copy(policy)
        assert all(torch.equal(one, two) for one, two in zip(new.parameters(), again.parameters(), strict=True))
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).requires_grad_(False)
    with torch.inference_mode():
        states = TensorDict({"input": torch.randn(16, 4)}, [16])
        diagnostics = NetworkDiagnostics(plain, sites=["1"], plasticity=Plasticity(every=1, steps=2))
        found = diagnostics.update(states)
    assert found["plasticity_loss"] > 0
    assert "gradient_norm" not in found
    assert not any(one.requires_grad for one in plain.parameters())


def test_the_interval_of_a_ratio_covers_it_by_group() -> None:
    """Twelve episodes of five alike states each: the true ratio of the means is 0.4."""
    draws = torch.Generator().manual_seed(0)
    groups, covered = torch.arange(60) // 5, 0
    for _ in range(300):
        size = (1 + torch.rand(12, generator=draws)).repeat_interleave(5)
        change = size * 0.8 * torch.rand(12, generator=draws).repeat_interleave(5)
        values = ratio_by_state(change, size)
        assert float(values.mean()) == pytest.approx(float(change.mean() / size.mean()), rel=1e-5)
        covered += 0.4 in grouped_mean(values, groups)
    assert covered / 300 > 0.9
    assert ratio_by_state(torch.ones(3), torch.zeros(3)) is None


# ------------------------------------------------------------------ checkpoints and sites


def test_matrices_between_sites_and_what_cannot_be_compared() -> None:
    policy, states = net_of(), TensorDict({"observation": torch.randn(50, 4)}, [50])
    sites = ["module.1", "module.3"]
    found = cka_matrix(policy, [policy, untrained_copy(policy)], sites, states)
    whole = found.values.reshape(4, 4)
    assert torch.allclose(whole, whole.T)
    assert whole.diag().tolist() == pytest.approx([1.0] * 4)
    assert torch.equal(found.at("module.1", "module.3"), found.values[:, 0, :, 1])
    assert torch.equal(found.within("0", "1"), found.values[0, :, 1])
    broken = policy.state_dict() | {"module.2.weight": torch.full((32, 32), torch.nan)}
    silent = policy.state_dict() | {"module.2.bias": torch.full((32,), -1e3)}
    odd = cka_matrix(policy, {"broken": broken, "silent": silent, "whole": policy}, sites, states)
    assert torch.isnan(odd.at("module.3")[:2]).all()
    assert odd.at("module.3")[2, 2] == pytest.approx(1)
    assert odd.at("module.1").min() == pytest.approx(1)
    with pytest.raises(InputError, match="'two' has not the weights"):
        cka_matrix(policy, {"one": policy, "two": {}}, sites, states)
    with pytest.raises(InputError, match="there is none"):
        cka_matrix(policy, [], sites, states)
    with pytest.raises(InputError, match="needs 4 different states"):
        cka_matrix(policy, [policy], sites, states[:3])
    with pytest.raises(InputError, match=r"nearest: 'module\.1'"):
        found.at("module.11")
