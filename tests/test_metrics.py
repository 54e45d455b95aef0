"""Metrics of attributions against numpy, closed forms and the known truth of CueCorners."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from tensordict import TensorDict
from torch import nn

from tdhook_rl import Compose, IntegratedGradients, Saliency, SteeringVectors, targets
from tdhook_rl.attribution import LRP
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InactiveError, InputError, MissingKeyError, PreparationError, SiteError, TargetError
from tdhook_rl.examples.agent import make_trained_actor
from tdhook_rl.latent import ActivationCaching
from tdhook_rl.metrics import (
    InfidelityMetric,
    ScoreDirection,
    SensitivityMetric,
    cascading_randomisation,
    completeness_gap,
    deletion_insertion,
    pointing_game,
    relevance_mass,
)
from tdhook_rl.metrics.randomisation import spearman
from tests.policies import ACTIONS, CASES, FEATURES, categorical, mlp

F64 = torch.float64


def rows(*batch: int) -> TensorDict:
    return TensorDict({"input": torch.randn(*batch, FEATURES, dtype=F64)}, batch_size=batch)


def output(index: int) -> targets.Target:
    return targets.Target(f"output {index}", lambda run: run.outputs["output"][..., index])


class Quadratic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.square().sum(-1, keepdim=True)


LINEAR = {
    "saliency": Saliency(target=output(1)),
    "gradient_x_input": Saliency(target=output(1), multiply_by_inputs=True),
    "ig": IntegratedGradients(target=output(1), baseline=0.5),
    "ig_average": IntegratedGradients(target=output(1), baseline=0.5, multiply_by_inputs=False),
    "lrp": LRP(target=output(1)),
    "ig_between": IntegratedGradients(target=output(1)),
}


@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("batch", [(), (5,), (3, 4)])
def test_a_linear_net_has_no_infidelity_for_the_explained_output(name: str, batch: tuple[int, ...]) -> None:
    net = nn.Linear(FEATURES, ACTIONS, bias=name != "lrp").double()
    data = rows(*batch)
    data["baseline", "input"] = torch.randn_like(data["input"])
    with LINEAR[name].prepare(net) as hooked:
        found = hooked(data)
        score = InfidelityMetric(noise_scale=1.0)(hooked, found)
        assert score.shape == batch
        assert float(score.max()) < (1e-6 if name == "lrp" else 1e-12)  # LRP stabilises with an epsilon
        wrong = found.clone()
        wrong["attr", "input"] = wrong["attr", "input"].flip(-1)
        assert bool((InfidelityMetric(noise_scale=1.0)(hooked, wrong) > 1e-3).all())


@pytest.mark.parametrize("batch", [(), (5,), (3, 4)])
def test_infidelity_of_a_quadratic_against_its_closed_form(batch: tuple[int, ...]) -> None:
    # The gradient is 2x: I.2x - (|x|^2 - |x - I|^2) = |I|^2, so the score is E|I|^4 = d (d + 2) noise^4.
    with Saliency().prepare(Quadratic()) as hooked:
        data = hooked(rows(*batch))
        score = InfidelityMetric(noise_scale=0.1, n_perturb_samples=1000)(hooked, data)
    expected = FEATURES * (FEATURES + 2) * 0.1**4
    np.testing.assert_allclose(score.numpy(), expected, rtol=0.2)


def test_infidelity_of_a_product_on_a_quadratic() -> None:
    # IG from zero gives x^2; with I = s x: s.x^2 - (|x|^2 - |(1 - s) x|^2) = sum of (s^2 - s) x^2.
    x = torch.tensor([[1.0, 0.0, 2.0]], dtype=F64)
    with IntegratedGradients(baseline=0.0).prepare(Quadratic()) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=1))
        found = InfidelityMetric(noise_scale=0.3, n_perturb_samples=3000)(hooked, data)
    moments = 0.3**2 + 3 * 0.3**4, 0.3**2
    mean_product = moments[1] ** 2  # E[s^2 - s] squared, for two features
    squares = x[0].numpy() ** 2
    expected = moments[0] * (squares**2).sum() + mean_product * (squares.sum() ** 2 - (squares**2).sum())
    assert float(found) == pytest.approx(expected, rel=0.2)


def test_the_form_is_taken_from_the_method_and_can_be_given() -> None:
    net = nn.Linear(FEATURES, 1).double()
    with IntegratedGradients(baseline=0.0).prepare(net) as hooked:
        data = hooked(rows(5))
        auto, product, gradient = (InfidelityMetric(form=f)(hooked, data) for f in ("auto", "product", "gradient"))
    assert torch.equal(auto, product)
    assert float(auto.max()) < 1e-12 < float(gradient.min())
    with pytest.raises(InputError, match="nearest: 'product'"):
        InfidelityMetric(form="products")


def test_max_sensitivity_of_linear_and_quadratic() -> None:
    with Saliency().prepare(nn.Linear(FEATURES, ACTIONS).double()) as hooked:
        assert torch.equal(SensitivityMetric()(hooked, hooked(rows(4, 2))), torch.zeros(4, 2, dtype=F64))
    x = torch.tensor([[1.0], [-4.0], [0.0]], dtype=F64)
    with Saliency().prepare(Quadratic()) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=3))
        few = SensitivityMetric(perturb_radius=0.1, n_perturb_samples=1)(hooked, data)
        found = SensitivityMetric(perturb_radius=0.1, n_perturb_samples=400)(hooked, data)
    largest = torch.tensor([0.1, 0.025], dtype=F64)  # |2 d| / |2 x|
    assert bool((found[:2] <= largest).all())
    torch.testing.assert_close(found[:2], largest, rtol=0.03, atol=0)
    assert bool((few[:2] < found[:2]).all())
    assert bool(found[2].isinf())


def test_sensitivity_of_integrated_gradients_with_a_stored_baseline() -> None:
    x, b = torch.tensor([[3.0]], dtype=F64), torch.tensor([[1.0]], dtype=F64)
    with IntegratedGradients(n_steps=4).prepare(Quadratic()) as hooked:  # (x + b)(x - b) = x^2 - b^2 = 8
        data = hooked(TensorDict({"input": x, ("baseline", "input"): b}, batch_size=1))
        found = SensitivityMetric(perturb_radius=0.1, n_perturb_samples=400)(hooked, data)
    assert float(found) == pytest.approx((3.1**2 - 3**2) / 8, rel=0.02)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)])
def test_completeness(batch: tuple[int, ...]) -> None:
    net = mlp().double()
    data = rows(*batch)
    data["baseline", "input"] = torch.randn_like(data["input"])
    both = Compose(IntegratedGradients(target=output(2)), Saliency(target=output(2), attribution_key="grad"))
    with both.prepare(net) as hooked:
        found = hooked(data.clone())
        complete = completeness_gap(hooked, found, attribution_key="attr")
        gradient = completeness_gap(hooked, found, attribution_key="grad")
        from_zero = completeness_gap(hooked, found, attribution_key="grad", baseline=0.0)
    assert complete.shape == gradient.shape == batch
    assert float(complete.abs().max()) < 1e-7 < float(gradient.abs().min())
    with torch.no_grad():
        total = found["grad", "input"].sum(-1)
        by_hand = total - (net(data["input"]) - net(data["baseline", "input"]))[..., 2]
        zero = total - (net(data["input"]) - net(torch.zeros_like(data["input"])))[..., 2]
    torch.testing.assert_close(gradient, by_hand)
    torch.testing.assert_close(from_zero, zero)


def test_the_policy_is_scored_as_steered_and_for_its_stored_action() -> None:
    actor = categorical().double()
    vector = 3 * torch.randn(16, dtype=F64)
    data = actor(TensorDict({"observation": torch.randn(6, FEATURES, dtype=F64)}, batch_size=6)).detach()
    method = Compose(SteeringVectors({"module.0.module.1": vector}), IntegratedGradients(baseline=0.0, n_steps=64))
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data, on_mismatch="ignore")
        assert float(completeness_gap(hooked, found).abs().max()) < 1e-8
        other = found.clone()
        other["action"] = (other["action"] + 1) % ACTIONS
        assert float(completeness_gap(hooked, other).abs().min()) > 1e-6


@pytest.mark.parametrize("name", CASES)
def test_every_policy_gets_batch_shaped_scores_and_nothing_else_changes(name: str) -> None:
    policy = CASES[name].build()
    data = policy(CASES[name].data(2, 3)).detach()
    state = copy.deepcopy(policy.state_dict())
    with Saliency(when="batch").prepare(policy) as hooked:
        found = hooked.annotate(data)
        kept = found.clone()
        generator = torch.get_rng_state()
        for score in (
            InfidelityMetric(n_perturb_samples=2)(hooked, found),
            SensitivityMetric(n_perturb_samples=2)(hooked, found),
            completeness_gap(hooked, found),
            deletion_insertion(hooked, found, n_steps=3, n_random=1).deletion,
            cascading_randomisation(Saliency(), policy, data)["original"],
        ):
            assert score.shape == (2, 3)
            assert bool(score.isfinite().all())
        assert torch.equal(torch.get_rng_state(), generator)
        assert bool((found == kept).all())
        again = InfidelityMetric(n_perturb_samples=2)
        assert torch.equal(again(hooked, found), again(hooked, found))
        with torch.inference_mode():
            assert torch.equal(again(hooked, found), again(hooked, found.clone()))
    assert all(torch.equal(value, state[key]) for key, value in policy.state_dict().items())


def area(values: list[float], shares: list[float]) -> float:
    return sum((b - a) * (u + v) / 2 for a, b, u, v in zip(shares, shares[1:], values, values[1:], strict=False))


@pytest.mark.parametrize("steps", [3, 20])
def test_deletion_and_insertion_on_a_linear_net_equal_numpy(steps: int) -> None:
    net = nn.Linear(FEATURES, 1).double()
    x = torch.randn(5, FEATURES, dtype=F64)
    with IntegratedGradients(baseline=0.5).prepare(net) as hooked:
        data = hooked(TensorDict({"input": x}, batch_size=5))
        found = deletion_insertion(hooked, data, n_steps=steps, n_random=40)
    weight, bias = net.weight[0].detach().numpy(), float(net.bias.detach())
    counts = [0, 2, 4, 6] if steps == 3 else list(range(FEATURES + 1))
    shares = [count / FEATURES for count in counts]
    for row, values in enumerate(x.numpy()):
        order = np.argsort(-(weight * (values - 0.5)))
        gone, come = [], []
        for count in counts:
            deleted, inserted = values.copy(), np.full(FEATURES, 0.5)
            deleted[order[:count]] = 0.5
            inserted[order[:count]] = values[order[:count]]
            gone.append(weight @ deleted + bias)
            come.append(weight @ inserted + bias)
        np.testing.assert_allclose(found.deletion_curve[row], gone)
        np.testing.assert_allclose(found.insertion_curve[row], come)
        assert float(found.deletion[row]) == pytest.approx(area(gone, shares))
        assert float(found.insertion[row]) == pytest.approx(area(come, shares))
        # A random order removes the difference evenly.
        middle = (gone[0] + gone[-1]) / 2
        assert float(found.deletion[row]) < float(found.random[row]) < float(found.insertion[row])
        spread = float(np.abs(weight * (values - 0.5)).sum())
        assert float(found.random[row]) == pytest.approx(middle, abs=0.25 * spread)
    assert found.shares.tolist() == pytest.approx(shares)


def test_features_of_several_inputs_are_ranked_together() -> None:
    net = nn.Bilinear(1, 2, 1, bias=False).double()
    nn.init.constant_(net.weight, 1.0)
    data = TensorDict({"a": torch.tensor([[2.0]]).double(), "b": torch.tensor([[1.0, 5.0]]).double()}, batch_size=1)
    with Saliency(multiply_by_inputs=True).prepare(net, in_keys=["a", "b"]) as hooked:
        found = deletion_insertion(hooked, hooked(data))  # a: 12, b: 2 and 10
    assert found.deletion_curve.tolist() == [[12.0, 0.0, 0.0, 0.0]]
    assert found.insertion_curve.tolist() == [[0.0, 0.0, 10.0, 12.0]]


def test_masks_by_hand() -> None:
    attribution = torch.tensor([[[3.0, -1.0], [0.0, 0.0]], [[1.0, 0.0], [-4.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True], [False, False]])
    torch.testing.assert_close(relevance_mass(attribution, mask), torch.tensor([1.0, 0.2, torch.nan]), equal_nan=True)
    positive = relevance_mass(attribution, mask, sign="positive")
    torch.testing.assert_close(positive, torch.tensor([1.0, 1.0, torch.nan]), equal_nan=True)
    assert pointing_game(attribution, mask).tolist() == [True, False, False]
    assert pointing_game(attribution, mask, sign="positive").tolist() == [True, True, False]
    each = torch.stack([mask, ~mask, mask])
    assert pointing_game(attribution, each, feature_dims=2).tolist() == [True, True, False]
    torch.testing.assert_close(relevance_mass(attribution, each, feature_dims=2)[1], torch.tensor(0.8))
    assert relevance_mass(attribution[0], mask).shape == ()
    assert relevance_mass(attribution.expand(4, 3, 2, 2), mask).shape == (4, 3)
    assert pointing_game(torch.full((2, 2), torch.nan), mask).isnan()
    for bad, message in (
        (mask.float(), "boolean"),
        (mask[:1], r"shape \(1, 2\).*\(2, 2\)"),
        (torch.zeros_like(mask), "no feature"),
        (torch.tensor(True), "feature dimensions"),
    ):
        for score in (relevance_mass, pointing_game):
            with pytest.raises(InputError, match=message):
                score(attribution, bad)
    with pytest.raises(InputError, match="sign="):
        pointing_game(attribution, mask, sign="abs")
    with pytest.raises(InputError, match="nothing to score"):
        relevance_mass(attribution[:0], mask)


def test_rank_correlation_equals_scipy_with_ties() -> None:
    first, second = torch.randint(0, 6, (7, 20)).double(), torch.randint(0, 6, (7, 20)).double()
    expected = [spearmanr(a, b).statistic for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    np.testing.assert_allclose(spearman(first, second).numpy(), expected, atol=1e-12)
    assert bool(spearman(torch.ones(4), torch.arange(4.0)).isnan())


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return make_trained_actor(frames=20480)


def test_cascading_randomisation_forgets_what_was_learnt(trained: nn.Module) -> None:
    data = trained(CueCorners().all_states()).detach()
    before = {key: value.clone() for key, value in trained.state_dict().items()}
    generator = torch.get_rng_state()
    method = Saliency(target=targets.chosen_logit())
    found = cascading_randomisation(method, trained, data)
    assert torch.equal(torch.get_rng_state(), generator)
    assert list(found) == ["original", *(f"module.0.module.{layer}" for layer in (6, 4, 2, 0))]
    curve = [float(value.mean()) for value in found.values()]
    assert curve[0] == pytest.approx(1.0, abs=1e-6)
    assert curve[1] < 0.8
    assert abs(curve[-1]) < 0.1
    assert all(torch.equal(value, before[key]) for key, value in trained.state_dict().items())
    assert not any(child._forward_hooks for child in trained.modules())
    assert all(value.shape == (368,) for value in found.values())
    # The first step by hand: only the head is new.
    named = cascading_randomisation(method, trained, data, layers=["module.0.module.6"], initialise=zero)
    assert bool(named["module.0.module.6"].isnan().all())
    other = cascading_randomisation(method, trained, data, seed=1)
    assert not torch.equal(other["module.0.module.6"], found["module.0.module.6"])


def zero(layer: nn.Module) -> None:
    nn.init.zeros_(layer.weight)


def test_saliency_of_a_trained_agent_is_on_the_lights_that_matter(trained: nn.Module) -> None:
    data = trained(CueCorners().all_states()).detach()
    with Saliency().prepare(trained) as hooked:
        found = hooked.annotate(data)
        curves = deletion_insertion(hooked, found[:40], absolute=True)
    lights = found["attr", "observation"][:, CueCorners.light_features()]
    mask = torch.tensor([True, True, False, False])
    assert float(relevance_mass(lights, mask).mean()) > 0.8
    assert float(pointing_game(lights, mask).float().mean()) > 0.8
    assert curves.deletion.shape == (40,)


def test_several_targets_are_scored_one_by_one() -> None:
    net = nn.Linear(FEATURES, ACTIONS).double()
    with Saliency(target={"first": output(0), "last": output(3)}).prepare(net) as hooked:
        data = hooked(rows(3))
        for name in ("first", "last"):
            assert float(InfidelityMetric(target=name)(hooked, data).max()) < 1e-12
        with pytest.raises(TargetError, match=r"2 targets.*'first', 'last'"):
            InfidelityMetric()(hooked, data)
        with pytest.raises(TargetError, match="nearest: 'last'"):
            completeness_gap(hooked, data, target="lats")
    method = Saliency(target={"first": output(0), "last": output(3)})
    assert set(cascading_randomisation(method, net, rows(3), target="last")) == {"original", "(root)"}


def test_what_cannot_be_scored_is_refused() -> None:
    net = mlp().double()
    data = rows(3)
    metric = InfidelityMetric()
    with pytest.raises(PreparationError, match="takes a hooked policy, got a plain Sequential"):
        metric(net, data)
    with ActivationCaching("1").prepare(net) as hooked, pytest.raises(InputError, match="hooked without one"):
        metric(hooked, data)
    with Compose(Saliency(), Saliency(attribution_key="other")).prepare(net) as hooked:
        found = hooked(data.clone())
        with pytest.raises(InputError, match=r"2 attributions, under \['attr', 'other'\]"):
            metric(hooked, found)
        with pytest.raises(InputError, match="nearest: 'other'"):
            InfidelityMetric(attribution_key="othe")(hooked, found)
        with pytest.raises(MissingKeyError, match=r"\('attr', 'input'\), which the data lacks"):
            InfidelityMetric(attribution_key="attr")(hooked, data)
        with pytest.raises(InputError, match=r"nothing to score.*\(0,\)"):
            InfidelityMetric(attribution_key="attr")(hooked, found[:0])
        wrong = found.copy().set(("attr", "input"), torch.ones(3, 2, dtype=F64))
        with pytest.raises(InputError, match=r"shape \(3, 2\).*\(3, 6\)"):
            SensitivityMetric(attribution_key="attr")(hooked, wrong)
        with pytest.raises(TargetError, match="unnamed target"):
            completeness_gap(hooked, found, attribution_key="attr", target="x")
    with pytest.raises(InactiveError):
        InfidelityMetric(attribution_key="attr")(hooked, found)
    with Saliency(input_modules=["1"]).prepare(net) as hooked:
        with pytest.raises(InputError, match="inner activations only"):
            metric(hooked, hooked(data.clone()))
    for build in (lambda: InfidelityMetric(n_perturb_samples=0), lambda: SensitivityMetric(n_perturb_samples=1.5)):
        with pytest.raises(InputError, match="positive integer"):
            build()
    for build in (lambda: InfidelityMetric(noise_scale=0), lambda: SensitivityMetric(perturb_radius=-1.0)):
        with pytest.raises(InputError, match="positive number"):
            build()
    with pytest.raises(InputError, match="nothing to randomise"):
        cascading_randomisation(Saliency(), Quadratic(), data)
    with pytest.raises(InputError, match="nothing to score"):
        cascading_randomisation(Saliency(), net, data[:0])
    with pytest.raises(SiteError):
        cascading_randomisation(Saliency(), net, data, layers=["nowhere"])
    own = nn.Sequential(nn.Linear(FEATURES, 2).double(), Own())
    with pytest.raises(InputError, match=r"no reset_parameters.*initialise="):
        cascading_randomisation(Saliency(), own, data, layers=["1"])
    assert InfidelityMetric.score_direction is SensitivityMetric.score_direction is ScoreDirection.LOWER


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def test_integer_inputs_are_scored_as_floats() -> None:
    class Bytes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x.float() / 255).square().sum(-1, keepdim=True)

    pixels = torch.randint(1, 255, (4, 5), dtype=torch.uint8)
    data = TensorDict({"input": pixels, ("baseline", "input"): torch.zeros_like(pixels)}, batch_size=4)
    with IntegratedGradients(n_steps=4).prepare(Bytes()) as hooked:
        found = hooked(data)
        assert float(completeness_gap(hooked, found).abs().max()) < 1e-5
        assert bool((SensitivityMetric()(hooked, found) < 0.05).all())
        assert InfidelityMetric()(hooked, found).shape == (4,)
    assert data["input"].dtype == torch.uint8
