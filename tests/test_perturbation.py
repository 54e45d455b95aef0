"""Occlusion, perturbation saliency and SARFA against slow loops and linear identities."""

from __future__ import annotations

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import EnsembleModule, InteractionType, TensorDictModule, set_interaction_type
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import OneHotCategorical, ProbabilisticActor

from tdhook_rl import Compose, SteeringVectors, targets
from tdhook_rl.attribution.activation_maximisation import ActivationMaximisation
from tdhook_rl.attribution.groups import Disjoint, Overlapping, group_features
from tdhook_rl.attribution.perturbation import SARFA, Occlusion, PerturbationSaliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError, SiteError, TargetError
from tdhook_rl.examples.agent import make_trained_actor
from tests.policies import ACTIONS, CASES, FEATURES, categorical, mlp, one_hot, pixels, q_value

F64 = torch.float64
BATCHES = [(), (6,), (2, 3)]
GROUPS = [[0, 3], [1], [2, 5]]  # feature 4 is in none


def collected(actor: nn.Module, *batch: int, key: str = "observation", shape: tuple[int, ...] = (FEATURES,)):
    data = TensorDict({key: torch.randn(*batch, *shape, dtype=F64)}, batch_size=batch)
    with torch.no_grad():
        return actor(data)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("from_data", [False, True])
def test_occlusion_of_a_linear_net_is_exact(batch: tuple[int, ...], from_data: bool) -> None:
    net = nn.Linear(FEATURES, 1).double()
    x, b = torch.randn(2, *batch, FEATURES, dtype=F64)
    data = TensorDict({"input": x}, batch_size=batch)
    if from_data:
        data["baseline", "input"] = b
    else:
        b = torch.full_like(x, 0.7)
    baseline = None if from_data else 0.7
    products = (net.weight[0] * (x - b)).detach()
    with Occlusion(baseline=baseline).prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    torch.testing.assert_close(found, products, atol=1e-13, rtol=1e-13)
    expected = torch.zeros_like(products)
    for group in GROUPS:
        expected[..., group] = products[..., group].sum(-1, keepdim=True)
    with Occlusion(baseline=baseline, groups={"input": GROUPS}).prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-13)
    assert not found.requires_grad
    assert torch.equal(found[..., 4], torch.zeros(batch, dtype=F64))


def test_the_target_and_the_interventions_are_those_of_the_policy() -> None:
    actor = categorical().double()
    data = collected(actor, 5)
    vector = torch.randn(16, dtype=F64)
    method = Compose(
        SteeringVectors({"module.0.module.1": vector}),
        Occlusion(),
        Occlusion(target=targets.entropy(), attribution_key="h"),
    )
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data, on_mismatch="ignore")  # the plain policy collected it
    net = actor.module[0].module

    def log_probs(x: torch.Tensor) -> torch.Tensor:
        return net[2:](net[:2](x) + vector).log_softmax(-1).detach()

    for row in range(5):
        for feature in range(FEATURES):
            x = data["observation"][row]
            without = x.clone()
            without[feature] = 0
            before, after = log_probs(x), log_probs(without)
            action = data["action"][row]
            assert float(found["attr", "observation"][row, feature]) == pytest.approx(
                float(before[action] - after[action]), abs=1e-12
            )
            change = (after.exp() * after).sum() - (before.exp() * before).sum()
            assert float(found["h", "observation"][row, feature]) == pytest.approx(float(change), abs=1e-12)


def test_several_inputs_named_targets_and_images_as_features() -> None:
    net = nn.Bilinear(3, 2, 2).double()
    data = TensorDict({"a": torch.randn(4, 3, dtype=F64), "b": torch.randn(4, 2, dtype=F64)}, batch_size=4)
    wanted = {
        "x": targets.Target("x", lambda run: run.outputs["output"][..., 0]),
        "sum": targets.output_sum(),
    }
    with Occlusion(target=wanted, groups={"b": [[0, 1]]}).prepare(net, in_keys=["a", "b"]) as hooked:
        found = hooked(data.clone())["attr"]
    for name, outputs in (("x", [0]), ("sum", [0, 1])):
        weight = net.weight[outputs].sum(0).detach()
        by_a = data["a"] * (data["b"] @ weight.T)
        torch.testing.assert_close(found[name, "a"], by_a)
        torch.testing.assert_close(found[name, "b"], by_a.sum(-1, keepdim=True).expand(4, 2))
    image = nn.Sequential(nn.Flatten(-3), nn.Linear(12, 1)).double()
    x = torch.randn(3, 3, 2, 2, dtype=F64)
    with Occlusion().prepare(image) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=3))["attr", "input"]
    torch.testing.assert_close(found, (x * image[1].weight.reshape(3, 2, 2)).detach())


def test_callbacks_choose_the_target() -> None:
    net = mlp().double()
    data = TensorDict({"input": torch.randn(4, FEATURES, dtype=F64), "w": torch.rand(4, dtype=F64)}, batch_size=4)
    method = Occlusion(
        init_attr_targets=lambda outputs, extra: TensorDict(
            t=outputs["output"][..., 1] * extra["w"], batch_size=outputs.batch_size
        ),
        additional_init_keys=["w"],
        chunk_size=9,
    )
    with method.prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    for feature in range(FEATURES):
        without = data["input"].clone()
        without[:, feature] = 0
        expected = (net(data["input"]) - net(without))[:, 1] * data["w"]
        torch.testing.assert_close(found[:, feature], expected.detach())


@pytest.mark.parametrize("method", [Occlusion, SARFA])
def test_chunks_change_nothing_and_bound_the_rows(method) -> None:
    seen = []

    class Watching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(len(x))
            return torch.stack([x.sin().sum(-1), x[..., 0], -x[..., 1]], -1)

    data = TensorDict({"input": torch.randn(5, FEATURES, dtype=F64), "action": torch.tensor([0, 1, 2, 0, 1])}, [5])
    results = []
    for chunk_size in (None, 11, 1):
        with method(chunk_size=chunk_size).prepare(Watching(), out_keys=["logits"]) as hooked:
            hooked(data.clone())  # in which it is found out that rows do not meet
            seen.clear()
            results.append(hooked(data.clone())["attr", "input"])
        assert seen[:2] == [5, 5]  # the call itself, and the replay that others are compared with
        assert max(seen[2:]) <= (chunk_size or 30) or set(seen[2:]) == {5}
        assert sum(seen[2:]) == 5 * FEATURES
    torch.testing.assert_close(results[1], results[0])
    torch.testing.assert_close(results[2], results[0])


def slow_sarfa(values, row: np.ndarray, action: int, groups: list[list[int]]) -> np.ndarray:
    def softmax(v: np.ndarray) -> np.ndarray:
        e = np.exp(v - v.max())
        return e / e.sum()

    before = values(row)
    found = np.zeros_like(row)
    for group in groups:
        changed = row.copy()
        changed[group] = 0
        after = values(changed)
        drop = softmax(before)[action] - softmax(after)[action]
        p, q = softmax(np.delete(before, action)), softmax(np.delete(after, action))
        k = 1 / (1 + sum(p[i] * math.log(p[i] / q[i]) for i in range(len(p))))
        found[group] = 2 * k * drop / (k + drop) if drop > 0 else 0.0
    return found


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("build", [categorical, one_hot, q_value])
@pytest.mark.parametrize("groups", [None, GROUPS])
def test_sarfa_equals_a_loop_in_numpy(build, batch: tuple[int, ...], groups) -> None:
    actor = build().double()
    data = collected(actor, *batch)
    module = actor.module[0] if build is q_value else actor.module
    net = next(child for child in module.modules() if isinstance(child, nn.Sequential))
    with SARFA(groups=groups).prepare(actor) as hooked:
        found = hooked.annotate(data)["attr", "observation"]

    def values(row: np.ndarray) -> np.ndarray:
        return net(torch.from_numpy(row)).detach().numpy()

    actions = data["action"].long()
    actions = actions.argmax(-1) if actions.shape != batch else actions
    rows = data["observation"].reshape(-1, FEATURES).numpy()
    expected = [
        slow_sarfa(values, row, int(action), groups or [[i] for i in range(FEATURES)])
        for row, action in zip(rows, actions.reshape(-1), strict=True)
    ]
    np.testing.assert_allclose(found.reshape(-1, FEATURES).numpy(), np.array(expected), atol=1e-12)
    assert bool((found > 0).any())
    assert bool((found == 0).any())


@pytest.mark.parametrize("key", [None, "probs"])
@pytest.mark.parametrize("kind", [Categorical, OneHotCategorical])
def test_sarfa_takes_probabilities_as_they_are(key: str | None, kind: type) -> None:
    net = mlp().double()
    actors = []
    for name, layers in {"logits": [net], "probs": [net, nn.Softmax(-1)]}.items():
        module = TensorDictModule(nn.Sequential(*layers), ["observation"], [name])
        actors.append(ProbabilisticActor(module, in_keys=[name], distribution_class=kind))
    data = collected(actors[0], 7).exclude("logits")
    with SARFA().prepare(actors[0]) as hooked:
        expected = hooked.annotate(data.clone())["attr", "observation"]
    with SARFA(key=key).prepare(actors[1]) as hooked:
        found = hooked.annotate(data.clone())["attr", "observation"]
    assert (expected > 0).any()
    torch.testing.assert_close(found, expected)


def test_sarfa_ignores_what_is_irrelevant_and_accepts_masked_actions() -> None:
    class Policy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            masked = torch.full_like(x[..., 0], -torch.inf)
            # Feature 1 moves all actions alike; feature 2 only the others; feature 3 nothing.
            return torch.stack([x[..., 0] + x[..., 1], x[..., 1] + x[..., 2], x[..., 1] - x[..., 2], masked], -1)

    data = TensorDict({"input": torch.ones(1, 4, dtype=F64), "action": torch.tensor([0])}, batch_size=1)
    with SARFA().prepare(Policy(), out_keys=["logits"]) as hooked:
        found = hooked(data)["attr", "input"][0]
    assert float(found[0]) > 0.1
    assert found[1:].abs().max() < 1e-12  # feature 2 makes the others likelier: nothing for the action


def slow_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    rows, columns = image.shape
    out = np.zeros_like(image)
    for y in range(rows):
        for x in range(columns):
            weights = np.array(
                [
                    [math.exp(-((y - i) ** 2 + (x - j) ** 2) / (2 * sigma**2)) for j in range(columns)]
                    for i in range(rows)
                ]
            )
            out[y, x] = (weights * image).sum() / weights.sum()
    return out


def slow_saliency(score, image: np.ndarray, grid: tuple[int, int], sigma: float, blur_sigma: float) -> np.ndarray:
    rows, columns = image.shape[1:]
    blurred = np.stack([slow_blur(channel, blur_sigma) for channel in image])
    found = np.zeros(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            y, x = (i + 0.5) * rows / grid[0] - 0.5, (j + 0.5) * columns / grid[1] - 0.5
            mask = np.array(
                [
                    [math.exp(-((y - r) ** 2 + (x - c) ** 2) / (2 * sigma**2)) for c in range(columns)]
                    for r in range(rows)
                ]
            )
            found[i, j] = score(image * (1 - mask) + blurred * mask)
    return found


@pytest.mark.parametrize("batch", [(), (2,), (1, 2)])
@pytest.mark.parametrize("mode", ["target", "policy"])
@pytest.mark.parametrize(("stride", "grid"), [(1, (8, 8)), (3, (3, 3))])
def test_perturbation_saliency_equals_a_loop(batch: tuple[int, ...], mode: str, stride: int, grid) -> None:
    actor = pixels().double()
    data = collected(actor, *batch, key="pixels", shape=(3, 8, 8))
    method = PerturbationSaliency(mode=mode, stride=stride, sigma=1.5, blur_sigma=2.0, chunk_size=7)
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data)["attr", "pixels"]
    assert found.shape == (*batch, 8, 8)
    net = actor.module[0].module
    images = data["pixels"].reshape(-1, 3, 8, 8).numpy()
    for index, (image, action) in enumerate(zip(images, data["action"].reshape(-1), strict=True)):

        def logits(value: np.ndarray) -> torch.Tensor:
            return net(torch.from_numpy(value)[None])[0].detach()

        def score(value: np.ndarray, image=image, action=action) -> float:
            before, after = logits(image), logits(value)
            if mode == "policy":
                return float(0.5 * (before - after).square().sum())
            return float(before.log_softmax(-1)[action] - after.log_softmax(-1)[action])

        scores = torch.from_numpy(slow_saliency(score, image, grid, 1.5, 2.0))
        expected = nn.functional.interpolate(scores[None, None], size=(8, 8), mode="bilinear")[0, 0]
        torch.testing.assert_close(found.reshape(-1, 8, 8)[index], expected, atol=1e-12, rtol=1e-9)
        if stride == 1:
            torch.testing.assert_close(expected, scores)


def test_perturbation_saliency_of_the_value_and_of_what_is_not_seen() -> None:
    class Value(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x[..., 0, :2, :2].sum((-1, -2))[..., None]

    data = TensorDict({"pixels": torch.rand(2, 1, 12, 9, dtype=F64)}, batch_size=2)
    module = TensorDictModule(Value(), in_keys=["pixels"], out_keys=["state_value"])
    maps = {}
    for mode in ("value", "target"):
        with PerturbationSaliency(mode=mode, stride=1, sigma=0.5).prepare(module) as hooked:
            maps[mode] = hooked(data.clone())["attr", "pixels"]
    torch.testing.assert_close(maps["value"], 0.5 * maps["target"].square())
    assert bool((maps["value"][:, :2, :2] > 1e-8).all())
    assert float(maps["value"][:, 6:, :].max()) < 1e-12


@pytest.mark.parametrize("name", ["categorical", "q_value", "tanh_normal", "value", "pixels"])
def test_inline_equals_annotate(name: str) -> None:
    case = CASES[name]
    policy = case.build().double()
    data = TensorDict({case.key: torch.randn(3, *case.shape, dtype=F64)}, batch_size=3)
    methods = [Occlusion, ActivationMaximisation]
    methods += [SARFA] if name in ("categorical", "q_value") else []
    methods += [PerturbationSaliency] if name == "pixels" else []
    for method in methods:
        options = {"modules_to_maximise": case.site} if method is ActivationMaximisation else {}
        with method(when="step", **options).prepare(policy) as hooked:
            inline = hooked(data.clone()).detach()
        with method(when="batch", **options).prepare(policy) as hooked:
            later = hooked.annotate(inline.exclude("attr", "computed").reshape(3, 1))
        torch.testing.assert_close(later["attr", case.key][:, 0], inline["attr", case.key])
        assert bool(later["computed", "attr"].all())


@pytest.mark.parametrize(
    "method", [Occlusion(groups=GROUPS), SARFA(), ActivationMaximisation("module.0.module.1"), Occlusion(baseline=None)]
)
def test_configurations_and_hooked_policies_pickle(method) -> None:
    actor = categorical().double()
    data = collected(actor, 4)
    data["baseline", "observation"] = torch.zeros_like(data["observation"])
    with method.prepare(actor) as hooked:
        expected = hooked.annotate(data)["attr", "observation"]
        found = pickle.loads(pickle.dumps(hooked)).annotate(data)["attr", "observation"]
    torch.testing.assert_close(found, expected)
    with pickle.loads(pickle.dumps(method)).prepare(actor) as hooked:
        torch.testing.assert_close(hooked.annotate(data)["attr", "observation"], expected)


@pytest.mark.parametrize("seed", range(40))
def test_groups_lie_apart_where_no_feature_is_in_two(seed: int) -> None:
    """Whatever their number, one of which everything is in or none."""
    draw = torch.Generator().manual_seed(seed)
    features = int(torch.randint(1, 6, (), generator=draw))
    sizes = torch.randint(1, features + 1, (int(torch.randint(1, 4, (), generator=draw)),), generator=draw).tolist()
    groups = [torch.randperm(features, generator=draw)[:size].tolist() for size in sizes]
    found = group_features(groups, torch.Size([features]), "x")
    apart = sum(sizes) == len({one for group in groups for one in group})
    assert isinstance(found, Disjoint if apart else Overlapping)


def test_settings_that_cannot_be_met_are_refused() -> None:
    for make, error, message in (
        (lambda: Occlusion(chunk_size=0), InputError, "positive number of rows"),
        (lambda: Occlusion(input_modules=["0"]), InputError, "perturbs inputs"),
        (lambda: SARFA(target=targets.entropy()), TargetError, "leave out target="),
        (lambda: PerturbationSaliency(mode="polici"), InputError, "nearest: 'policy'"),
        (lambda: PerturbationSaliency(mode="value", target=targets.entropy()), TargetError, "leave out target="),
        (lambda: PerturbationSaliency(key="logits"), InputError, "belongs to the modes"),
        (lambda: PerturbationSaliency(stride=0), InputError, "stride"),
        (lambda: PerturbationSaliency(sigma=0.0), InputError, "sigma is a positive"),
        (lambda: ActivationMaximisation(), TargetError, "needs one of"),
        (lambda: ActivationMaximisation("0", target=targets.entropy()), TargetError, "needs one of"),
        (lambda: ActivationMaximisation("0", n_steps=0), InputError, "n_steps= is a positive integer"),
        (lambda: ActivationMaximisation("0", min_value=1.0, max_value=0.0), InputError, "larger than max_value"),
        (lambda: ActivationMaximisation("0", input_modules=["0"]), InputError, "moves inputs"),
        (lambda: Occlusion(groups={"inpt": [[0]]}).prepare(mlp()).__enter__(), InputError, "nearest: 'input'"),
        (lambda: ActivationMaximisation("9").prepare(mlp()).__enter__(), SiteError, "'9'"),
    ):
        with pytest.raises(error, match=message):
            make()


def test_data_that_does_not_fit_is_refused() -> None:
    actor = categorical()
    data = TensorDict({"observation": torch.randn(3, FEATURES)}, batch_size=3)
    data = actor(data).detach()
    wrong = data.clone().set(("baseline", "observation"), torch.zeros(3, 2))
    value = CASES["value"].build()
    for policy, method, given, error, message in (
        (actor, Occlusion(groups=[[0, 6]]), data, InputError, "index 6.*0 to 5"),
        (actor, Occlusion(groups=[[-1]]), data, InputError, "index -1"),
        (actor, Occlusion(groups=[[0, 0.5]]), data, InputError, "list of indices or a boolean mask"),
        (actor, Occlusion(groups=[torch.ones(3, dtype=torch.bool)]), data, InputError, r"mask of shape \(3,\)"),
        (actor, Occlusion(groups="segments"), data, MissingKeyError, "'segments', which the data lacks"),
        (actor, Occlusion(baseline=torch.zeros(3, 6)), data, InputError, r"has shape \(3, 6\)"),
        (actor, Occlusion(groups=[]), data, InputError, "is empty"),
        (actor, Occlusion(groups=[[]]), data, InputError, "is empty"),
        (actor, Occlusion(baseline=None), data, MissingKeyError, r"'baseline', 'observation'.*lacks.*baseline=0.0"),
        (actor, Occlusion(baseline=None), wrong, InputError, r"shape \(3, 2\)"),
        (actor, Occlusion(), data.exclude("action"), TargetError, "lacks"),
        (actor, SARFA(), data.exclude("action"), TargetError, "lacks"),
        (actor, SARFA(key="logit"), data, TargetError, "SARFA reads 'logit'.*nearest: 'logits'"),
        (value, SARFA(), data, TargetError, "'logits' or 'action_value' or 'probs', which the policy does not output"),
        (value, SARFA(key="state_value"), data, TargetError, "two or more discrete actions"),
        (actor, PerturbationSaliency(), data, InputError, r"images of \(channels, rows, columns\).*\(6,\)"),
    ):
        with method.prepare(policy) as hooked, pytest.raises(error, match=message):
            hooked.annotate(given)
    with PerturbationSaliency(mode="value").prepare(pixels()) as hooked:
        frame = TensorDict({"pixels": torch.rand(2, 3, 8, 8)}, batch_size=2)
        with pytest.raises(TargetError, match="reads 'state_value'"):
            hooked.annotate(frame)
    two = TensorDict({"a": torch.randn(4, 3), "b": torch.randn(4, 2)}, batch_size=4)
    with Occlusion(groups=[[0]]).prepare(nn.Bilinear(3, 2, ACTIONS), in_keys=["a", "b"]) as hooked:
        with pytest.raises(InputError, match="several inputs are explained"):
            hooked(two)


def test_a_trained_agent_looks_at_the_lights_that_matter() -> None:
    actor = make_trained_actor(frames=20_480)
    with torch.no_grad(), set_interaction_type(InteractionType.DETERMINISTIC):
        states = actor(CueCorners().all_states())
    lights = CueCorners.light_features()
    with Compose(Occlusion(), SARFA(attribution_key="sarfa")).prepare(actor) as hooked:
        found = hooked.annotate(states)
    for root in ("attr", "sarfa"):
        means = found[root, "observation"][:, lights].abs().mean(0)
        assert float(means[:2].min()) > float(means[2:].max()), (root, means)


@pytest.mark.parametrize("batch", BATCHES)
def test_outputs_without_a_gradient_are_compared_all_the_same(batch: tuple[int, ...]) -> None:
    """Only differences count: nothing is asked of a gradient, where none is on and where there is none to be had."""
    net = nn.Linear(FEATURES, 2).double()
    cut = TensorDictModule(lambda x: (net(x).detach().sum(-1), net(x).detach()), ["input"], ["sum", "both"])
    x = torch.randn(*batch, FEATURES, dtype=F64)
    with Occlusion(baseline=0.0).prepare(cut) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=batch))["attr", "input"]
    torch.testing.assert_close(found, (2 * net.weight.sum(0) * x).detach())


def masks(shape: tuple[int, ...]) -> list[torch.Tensor]:
    first = torch.zeros(shape, dtype=torch.bool)
    first[0], second = True, torch.zeros(shape, dtype=torch.bool)
    second[1, 1:] = True
    return [first, second]


def test_masks_are_the_numbers_of_what_they_are_true_of() -> None:
    x = torch.randn(4, 2, 3, dtype=F64)
    net = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    shaped = masks((2, 3))
    results = []
    for groups in (shaped, [one.reshape(-1) for one in shaped], [[0, 1, 2], [4, 5]], [one.tolist() for one in shaped]):
        with Occlusion(baseline=0.0, groups=groups).prepare(net) as hooked:
            results.append(hooked(TensorDict({"input": x}, batch_size=4))["attr", "input"])
    assert all(torch.equal(one, results[0]) for one in results)
    assert bool((results[0][:, 1, 0] == 0).all())
    assert bool((results[0][:, 0] != 0).all())


@pytest.mark.parametrize("copies", [3, 4, 8, 18])  # as many as features, rows, places or all of these together
@pytest.mark.parametrize("method", [Occlusion, PerturbationSaliency])
@pytest.mark.parametrize("key", ["state_value", "logits"])
def test_what_changes_in_an_ensemble_is_the_sum_over_its_copies(copies: int, method: type, key: str) -> None:
    net = nn.Sequential(nn.Flatten(-3), nn.Linear(36, 4 if key == "logits" else 1)).double()
    modes = ["target"] if method is Occlusion else ["target", "value" if key == "state_value" else "policy"]
    x = torch.randn(2, 1, 6, 6, dtype=F64)
    for mode in modes:
        options = {} if method is Occlusion else {"mode": mode, "stride": 3}
        policy = EnsembleModule(TensorDictModule(net, ["pixels"], [key]), copies)
        members = []
        for params in policy.params_td.unbind(0):
            member = TensorDictModule(copy.deepcopy(net), ["pixels"], [key])
            params.data.to_module(member)
            with method(**options).prepare(member) as hooked:
                members.append(hooked.annotate(TensorDict({"pixels": x}, 2))["attr", "pixels"])
        with method(**options).prepare(policy) as hooked:
            found = hooked.annotate(TensorDict({"pixels": x}, 2))["attr", "pixels"]
        torch.testing.assert_close(found, torch.stack(members).sum(0))
