"""Integrated gradients: quadrature, completeness, linear identities, inner activations, bounded passes."""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.modules import ProbabilisticActor

from tdhook_rl import Compose, SteeringVectors, targets
from tdhook_rl.attribution import IntegratedGradients, Saliency
from tdhook_rl.attribution.integrated_gradients import quadrature, repeat_rows
from tdhook_rl.errors import InputError, KeyCollisionError, MissingKeyError, SiteError, TargetError
from tests.oracles import row_gradients
from tests.policies import ACTIONS, FEATURES, categorical, mlp

F64 = torch.float64
RULES = ["gausslegendre", "riemann_middle", "riemann_left", "riemann_right", "riemann_trapezoid"]


def pair(rows: int = 5, *batch: int) -> TensorDict:
    x = torch.randn(rows, FEATURES, dtype=F64)
    data = TensorDict({"input": x, ("baseline", "input"): torch.randn_like(x)}, batch_size=rows)
    return data.reshape(batch) if batch else data


def output(index: int) -> targets.Target:
    return targets.Target(f"output {index}", lambda run: run.outputs["output"][..., index])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_weights_add_up_to_one(rule: str, steps: int) -> None:
    points, weights = quadrature(rule, steps)
    assert len(points) == len(weights) == steps
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    assert all(0 <= point <= 1 for point in points)


def test_gauss_legendre_is_exact_for_polynomials() -> None:
    points, weights = map(np.array, quadrature("gausslegendre", 5))
    for degree in range(10):
        assert weights @ points**degree == pytest.approx(1 / (degree + 1), abs=1e-14)
    assert abs(weights @ points**10 - 1 / 11) > 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_a_linear_net_is_attributed_exactly_by_every_rule(rule: str) -> None:
    net = nn.Linear(FEATURES, 1).double()
    data = pair()
    with IntegratedGradients(method=rule, n_steps=3).prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    torch.testing.assert_close(found, net.weight * (data["input"] - data["baseline", "input"]), atol=1e-13, rtol=1e-13)


def by_hand(net: nn.Module, x: torch.Tensor, b: torch.Tensor, index: int, steps: int = 400) -> torch.Tensor:
    """A fine midpoint rule over Jacobians, one point at a time."""
    total = torch.zeros_like(x)
    for step in range(steps):
        total += row_gradients(lambda v: net(v)[index], b + (step + 0.5) / steps * (x - b))
    return total / steps * (x - b)


@pytest.fixture(scope="module")
def fine() -> tuple[nn.Module, TensorDict, torch.Tensor]:
    """A net, rows with their baselines, and what the fine rule gives for them."""
    net, rows = mlp().double(), pair()
    return net, rows, by_hand(net, rows["input"], rows["baseline", "input"], 2)


@pytest.mark.parametrize("batch", [(), (5,), (5, 1)])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_equals_a_fine_midpoint_rule_and_is_complete(
    fine: tuple[nn.Module, TensorDict, torch.Tensor], batch: tuple[int, ...], chunk_size: int | None
) -> None:
    net, rows, expected = fine
    data = rows.reshape(batch) if batch else rows[0]
    method = IntegratedGradients(target=output(2), n_steps=32, chunk_size=chunk_size, compute_convergence_delta=True)
    with method.prepare(net) as hooked:
        found = hooked(data.clone())
    expected = expected.reshape(*batch, FEATURES) if batch else expected[0]
    torch.testing.assert_close(found["attr", "input"], expected, rtol=1e-4, atol=1e-6)
    change = net(data["input"])[..., 2] - net(data["baseline", "input"])[..., 2]
    torch.testing.assert_close(found["attr", "input"].sum(-1), change, rtol=0, atol=1e-8)
    assert found["convergence_delta"].shape == batch
    assert float(found["convergence_delta"].detach().abs().max()) < 1e-8
    assert torch.equal(found["output"], net(data["input"]))


def test_the_delta_of_the_default_target() -> None:
    net = mlp().double()
    data = pair()
    with IntegratedGradients(n_steps=32).prepare(net) as hooked:
        assert "convergence_delta" not in hooked.result_keys
    with IntegratedGradients(compute_convergence_delta=True, n_steps=32).prepare(net) as hooked:
        found = hooked(data.clone())
        with torch.inference_mode():
            again = hooked(data.clone())
    assert float(found["convergence_delta"].abs().max()) < 1e-8
    torch.testing.assert_close(again["convergence_delta"], found["convergence_delta"], rtol=0, atol=1e-12)


def test_a_batch_that_brings_its_delta_is_annotated_all_the_same() -> None:
    """A result that is a tensor at the top is told from the user's own entry of that name."""
    method = IntegratedGradients(compute_convergence_delta=True, n_steps=4, baseline=0.0)
    with method.prepare(mlp().double()) as hooked:
        data = TensorDict({"input": torch.randn(5, FEATURES, dtype=torch.float64)}, batch_size=5)
        inline = hooked(data.clone())
        kept = hooked.annotate(inline)
        assert torch.equal(kept["convergence_delta"], inline["convergence_delta"])
        moved = inline.set("input", inline["input"] + 1)  # its results are stale now
        anew = hooked.annotate(TensorDict({"input": moved["input"]}, batch_size=5))
        again = hooked.annotate(moved, on_mismatch="ignore")
        torch.testing.assert_close(again["convergence_delta"], anew["convergence_delta"])
        with pytest.raises(KeyCollisionError, match="'convergence_delta'"):
            hooked.annotate(data.clone().set("convergence_delta", torch.zeros(5)))


def test_the_snippet_of_the_seed_without_a_batch_size() -> None:
    net, class_idx = mlp(), 1
    x, baseline = torch.randn(3, FEATURES), torch.zeros(3, FEATURES)

    def init_attr_targets(targets, _):
        return TensorDict(out=targets["output"][..., class_idx], batch_size=targets.batch_size)

    with IntegratedGradients(init_attr_targets=init_attr_targets).prepare(net) as hooked:
        td = hooked(TensorDict({"input": x, ("baseline", "input"): baseline}))
        attr = td.get(("attr", "input"))
    change = net(x)[:, class_idx] - net(baseline)[:, class_idx]
    torch.testing.assert_close(attr.sum(-1), change, rtol=1e-4, atol=1e-5)


def test_average_gradients_without_the_product() -> None:
    net = mlp().double()
    data = pair()
    with IntegratedGradients(multiply_by_inputs=False, target=output(0)).prepare(net) as hooked:
        average = hooked(data.clone())["attr", "input"]
    with IntegratedGradients(target=output(0)).prepare(net) as hooked:
        product = hooked(data.clone())["attr", "input"]
    torch.testing.assert_close(average * (data["input"] - data["baseline", "input"]), product)


def test_several_targets_each_by_itself() -> None:
    net = mlp().double()
    data = pair()
    wanted = {f"logit {index}": output(index) for index in range(ACTIONS)}
    with Compose(IntegratedGradients(target=wanted), Saliency(target=wanted, attribution_key="grad")).prepare(
        net
    ) as hooked:
        found = hooked(data.clone())
    for index, name in enumerate(wanted):
        with IntegratedGradients(target=wanted[name]).prepare(net) as hooked:
            alone = hooked(data.clone())["attr", "input"]
        torch.testing.assert_close(found["attr", name, "input"], alone)
        expected = row_gradients(lambda v, index=index: net(v)[index], data["input"])
        torch.testing.assert_close(found["grad", name, "input"], expected)


def test_inner_activations_are_complete_and_independent_of_the_inputs() -> None:
    net = mlp().double()
    data = pair()
    method = IntegratedGradients(target=output(1), inputs=["input"], input_modules=["1", "3"])
    with method.prepare(net) as hooked:
        found = hooked(data.clone())
    change = (net(data["input"]) - net(data["baseline", "input"]))[:, 1]
    torch.testing.assert_close(found["attr", "input"].sum(-1), change, atol=1e-8, rtol=0)
    for site in ("1", "3"):  # an earlier activation is not cut off by a later one
        torch.testing.assert_close(found["attr", site].sum(-1), change, atol=1e-8, rtol=0)
    head = net[4]  # after the last hidden layer the net is linear
    hidden = net[:4](data["input"]) - net[:4](data["baseline", "input"])
    torch.testing.assert_close(found["attr", "3"], head.weight[1] * hidden)


class Gate(nn.Module):
    """What `inner` computes multiplies what went past it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(self.inner.weight.dtype) / 255
        return (self.inner(x) * x.square()).sum(-1, keepdim=True)


@pytest.mark.parametrize("dtype", [F64, torch.uint8])
def test_inputs_that_go_past_an_explained_module_stay_as_they_are(dtype: torch.dtype) -> None:
    net = Gate().double()
    x, low = torch.randint(0, 255, (2, 5, 6)).to(dtype)
    past = (x.double() / 255).square()
    for stored, number in ((low, None), (torch.zeros_like(low), 0.0)):
        data = TensorDict({"input": x, ("baseline", "input"): stored}, batch_size=5)
        method = IntegratedGradients(input_modules=["inner"], baseline=number, compute_convergence_delta=True)
        with method.prepare(net) as hooked:
            found = hooked(data)
        expected = (net.inner(x.double() / 255) - net.inner(stored.double() / 255)) * past
        torch.testing.assert_close(found["attr", "inner"], expected.detach())
        # The delta says how much of the change is not theirs.
        missing = expected.sum(-1, keepdim=True) - (net(x) - net(stored))
        torch.testing.assert_close(found["convergence_delta"], missing.squeeze(-1).detach())


def test_the_taken_action_of_a_policy_in_annotate_with_steering() -> None:
    actor = categorical().double()
    vector = torch.randn(16, dtype=F64)
    data = actor(TensorDict({"observation": torch.randn(6, FEATURES, dtype=F64)}, batch_size=6)).detach()
    method = Compose(
        SteeringVectors({"module.0.module.1": vector}),
        IntegratedGradients(baseline=0.0, target=targets.chosen_logit(), n_steps=64),
    )
    with method.prepare(actor) as hooked:
        found = hooked.annotate(data, on_mismatch="ignore")["attr", "observation"].sum(-1)
    net = actor.module[0].module

    def steered(x: torch.Tensor) -> torch.Tensor:
        return net[2:](net[:2](x) + vector).gather(-1, data["action"][:, None]).squeeze(-1)

    change = steered(data["observation"]) - steered(torch.zeros_like(data["observation"]))
    torch.testing.assert_close(found, change, atol=1e-8, rtol=0)


def test_the_functional_engine_gives_the_same_numbers() -> None:
    net = mlp().double()
    data = pair()
    for make in (partial(IntegratedGradients, n_steps=8), Saliency):
        with make(target=output(1), inputs=["input"], input_modules=["1"]).prepare(net) as hooked:
            expected = hooked(data.clone())["attr"]
            with torch.inference_mode():
                found = hooked(data.clone())["attr"]
        torch.testing.assert_close(found["input"], expected["input"])
        torch.testing.assert_close(found["1"], expected["1"])


def test_callbacks_select_inputs_weight_targets_and_read_other_keys() -> None:
    net = nn.Bilinear(3, 2, 2).double()
    data = TensorDict(
        {"a": torch.randn(4, 3, dtype=F64), "b": torch.randn(4, 2, dtype=F64), "w": torch.rand(4, dtype=F64)},
        batch_size=4,
    )
    method = Saliency(
        init_attr_inputs=lambda inputs, _: inputs.select("a"),
        init_attr_targets=lambda outputs, _: TensorDict(
            {"x": outputs["output"][..., 0], "y": outputs["output"][..., 1]}, batch_size=outputs.batch_size
        ),
        init_attr_grads=lambda t, extra: TensorDict({"x": extra["w"], "y": -extra["w"]}, batch_size=t.batch_size),
        additional_init_keys=["w"],
    )
    with method.prepare(net, in_keys=["a", "b"], out_keys=["output"]) as hooked:
        found = hooked(data.clone())
    assert list(found["attr"].keys()) == ["a"]
    for row in range(4):
        jacobian = torch.func.jacfwd(lambda a, row=row: net(a[None], data["b"][row][None])[0])(data["a"][row])
        torch.testing.assert_close(found["attr", "a"][row], data["w"][row] * (jacobian[0] - jacobian[1]))
    with method.prepare(net, in_keys=["a", "b"], out_keys=["output"]) as hooked:
        with pytest.raises(MissingKeyError, match="additional_init_keys names 'w'"):
            hooked(data.exclude("w"))


def test_target_modules_are_given_to_the_callback() -> None:
    net = mlp().double()
    data = TensorDict({"input": torch.randn(4, FEATURES, dtype=F64)}, batch_size=4)
    method = Saliency(
        target_modules=["1"],
        init_attr_targets=lambda outputs, _: TensorDict(unit=outputs["1"][..., 3], batch_size=outputs.batch_size),
    )
    with method.prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    torch.testing.assert_close(found, row_gradients(lambda v: net[:2](v)[3], data["input"]))


def test_bad_baselines_and_settings_are_refused() -> None:
    net = mlp()
    x = torch.randn(3, FEATURES)
    with IntegratedGradients().prepare(net) as hooked:
        for extra, error, message in (
            ({}, MissingKeyError, r"\('baseline', 'input'\), which the data lacks.*baseline=0.0"),
            ({("baseline", "input"): torch.zeros(3, 2)}, InputError, r"shape \(3, 2\).*must match 'input'"),
            ({("baseline", "input"): torch.zeros(3, FEATURES, dtype=F64)}, InputError, "is torch.float64"),
        ):
            with pytest.raises(error, match=message):
                hooked(TensorDict({"input": x, **extra}, batch_size=3))
    for options, message in (
        ({"n_steps": 0}, "positive integer"),
        ({"n_steps": 2.5}, "positive integer"),
        ({"method": "gauss"}, "nearest: 'gausslegendre'"),
        ({"chunk_size": 0}, "chunk_size"),
    ):
        with pytest.raises(InputError, match=message):
            IntegratedGradients(**options)
    with pytest.raises(TargetError, match="belong to init_attr_targets"):
        Saliency(init_attr_grads=lambda t, _: t)
    with pytest.raises(TargetError, match=r"targets\.entropy"):
        Saliency(target="entropy")


class Watching(nn.Module):
    """A linear net that keeps how many rows each pass that records a graph had."""

    seen: ClassVar[list[int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.requires_grad:
            self.seen.append(len(x))
        return x.sum(-1, keepdim=True)


@pytest.mark.parametrize(("rows", "chunk_size"), [(10, 40), (10, 7), (100, 30)])
def test_the_rows_of_a_pass_are_bounded(rows: int, chunk_size: int) -> None:
    net = Watching()
    data = TensorDict({"input": torch.randn(rows, FEATURES)}, batch_size=rows)
    with IntegratedGradients(baseline=0.0, n_steps=50, chunk_size=chunk_size, when="batch").prepare(net) as hooked:
        hooked.annotate(data)
        seen = list(Watching.seen)
        Watching.seen.clear()
    assert max(seen) <= chunk_size
    assert sum(seen) == 51 * rows  # the end of each path too


@pytest.mark.parametrize("when", ["step", "batch"])
def test_blocks_of_rows_give_what_one_pass_gives(when: str) -> None:
    net = mlp().double()
    data = pair(12)
    data["w"] = torch.rand(12, dtype=F64)
    shaped = data.reshape(3, 4)
    options = {
        "init_attr_targets": lambda outputs, extra: TensorDict(
            out=outputs["output"][..., 1] * extra["w"], batch_size=outputs.batch_size
        ),
        "additional_init_keys": ["w"],
        "inputs": ["input"],
        "input_modules": ["1"],
        "compute_convergence_delta": True,
        "n_steps": 16,
        "when": when,
    }
    found = []
    for chunk_size, batch in ((None, data), (5, data), (5, shaped)):
        with IntegratedGradients(chunk_size=chunk_size, **options).prepare(net) as hooked:
            found.append(hooked(batch.clone()) if when == "step" else hooked.annotate(batch))
    whole, blocks, of_any_shape = found
    for key in (("attr", "input"), ("attr", "1"), "convergence_delta"):
        torch.testing.assert_close(blocks[key], whole[key])
        torch.testing.assert_close(of_any_shape[key].flatten(0, 1), whole[key])
    change = (net(data["input"]) - net(data["baseline", "input"]))[:, 1] * data["w"]
    torch.testing.assert_close(whole["attr", "input"].sum(-1), change, rtol=0, atol=1e-5)


def test_embeddings_of_tokens_are_explained_between_those_of_the_baseline_and_the_input() -> None:
    net = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    tokens = torch.randint(0, 10, (5, 3))
    data = TensorDict({"input": tokens, ("baseline", "input"): torch.zeros_like(tokens)}, batch_size=5)
    with IntegratedGradients(input_modules=["0"]).prepare(net) as hooked:
        found = hooked(data.clone())["attr", "0"]
    change = (net(tokens) - net(torch.zeros_like(tokens)))[:, 0]
    torch.testing.assert_close(found.sum((1, 2)), change, atol=1e-8, rtol=0)


def test_inner_activations_of_a_net_that_flattens_the_batch() -> None:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.head = nn.Linear(2 * 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.conv(x.flatten(0, -4)).tanh().flatten(1)).reshape(*x.shape[:-3], 1)

    net = Frames().double()
    x = torch.randn(2, 3, 1, 4, 4, dtype=F64)
    with IntegratedGradients(baseline=0.0, input_modules=["conv"]).prepare(net) as hooked:
        found = hooked(TensorDict({"input": x}, batch_size=(2, 3)))["attr", "conv"]
    assert found.shape == (2, 3, 2, 2, 2)
    change = (net(x) - net(torch.zeros_like(x)))[..., 0]
    torch.testing.assert_close(found.flatten(2).sum(-1), change, atol=1e-8, rtol=0)


def test_a_first_call_in_inference_mode_leaves_nothing_behind() -> None:
    net = mlp().double()
    data = pair()
    with IntegratedGradients(target=output(1)).prepare(net) as hooked, torch.inference_mode():
        hooked(data.clone())
        with torch.inference_mode(False):
            found = hooked(data.clone())["attr", "input"]
    change = (net(data["input"]) - net(data["baseline", "input"]))[:, 1]
    torch.testing.assert_close(found.sum(-1), change, atol=1e-3, rtol=0)


class Sometimes(nn.Module):
    """An expert that runs on rows that are not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.expert = nn.Linear(FEATURES, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.expert(x) if bool(x.any()) else x[..., :2]


@pytest.mark.parametrize("missing", ["raise", "nan"])
def test_a_module_that_does_not_run_at_the_baseline(missing: str) -> None:
    """Said as it is; that NaN cannot be had for it is said to those who ask for NaN."""
    method = IntegratedGradients(baseline=0.0, input_modules="expert", missing=missing)
    with method.prepare(Sometimes()) as hooked, pytest.raises(SiteError, match="expert") as error:
        hooked(TensorDict({"input": torch.ones(3, FEATURES)}, batch_size=3))
    assert ("missing='nan' cannot be had" in str(error.value)) == (missing == "nan")


@pytest.mark.parametrize("own", [True, False], ids=["a target of ours", "a function"])
def test_what_no_pass_reads_is_not_repeated(own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines and results of an earlier call, which may be large; and outputs, but for what a function may read."""
    left_out: list[set] = []

    def repeated(data: TensorDict, points: int, keys: frozenset) -> TensorDict:
        left_out.append(set(keys))
        return repeat_rows(data, points, keys)

    monkeypatch.setattr("tdhook_rl.attribution.integrated_gradients.repeat_rows", repeated)
    actor = categorical()
    data = actor(TensorDict({"observation": torch.randn(5, FEATURES)}, batch_size=5)).detach()
    data["baseline", "observation"] = torch.zeros(5, FEATURES)
    target = None if own else (lambda run: run.outputs["logits"][..., 0] * run.stored["logits"][..., 0])
    with IntegratedGradients(n_steps=4, target=target).prepare(actor) as hooked:
        hooked.annotate(hooked.annotate(data))
    assert left_out
    for one in left_out:
        assert "baseline" in one
        assert "action" not in one
        assert {"attr", "logits"} <= one if own else "logits" not in one


def test_a_callback_may_read_the_baseline() -> None:
    net = nn.Linear(FEATURES, 1).double()
    data = pair()
    method = IntegratedGradients(
        init_attr_targets=lambda outputs, extra: TensorDict(
            out=outputs["output"][..., 0] * extra["baseline", "input"][..., 0], batch_size=outputs.batch_size
        ),
        additional_init_keys=[("baseline", "input")],
    )
    with method.prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    difference = data["input"] - data["baseline", "input"]
    torch.testing.assert_close(found, net.weight * difference * data["baseline", "input"][:, :1])


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_repeated_rows(batch: tuple[int, ...]) -> None:
    agents = TensorDict({"x": torch.randn(*batch, 4, 2)}, batch_size=(*batch, 4))
    data = TensorDict({"a": torch.randn(*batch, 2), "agents": agents, "left out": torch.zeros(batch)}, batch_size=batch)
    found = repeat_rows(data, 5, ["left out"])
    rows = data.batch_size.numel()
    assert found.batch_size == (5 * rows,)
    assert found["agents"].batch_size == (5 * rows, 4)
    assert set(found.keys()) == {"a", "agents"}
    assert torch.equal(found["a"], data["a"].reshape(rows, 2).repeat(5, 1))
    assert torch.equal(found["agents", "x"], agents["x"].reshape(rows, 4, 2).repeat(5, 1, 1))


def test_a_target_of_the_users_may_look_at_the_stored_inputs() -> None:
    net = nn.Sequential(nn.Linear(4, 3)).double()
    data = TensorDict({"input": torch.randn(5, 4, dtype=torch.float64), "other": torch.randn(5)}, batch_size=5)
    scaled = targets.Target("scaled", lambda run: run.outputs["output"][..., 0] * run.stored["input"][..., 1])
    with IntegratedGradients(target=scaled, baseline=0.0).prepare(net) as hooked:
        found = hooked(data.clone())["attr", "input"]
    expected = net[0].weight[0] * data["input"] * data["input"][:, 1:2]
    torch.testing.assert_close(found, expected)


def test_the_stored_action_is_read_although_results_share_its_root() -> None:
    net = TensorDictModule(nn.Linear(4, 3), ["observation"], [("agents", "logits")])
    actor = ProbabilisticActor(
        net, in_keys={"logits": ("agents", "logits")}, out_keys=[("agents", "action")], distribution_class=Categorical,
        return_log_prob=True,
    )  # fmt: skip
    data = actor(TensorDict({"observation": torch.randn(5, 4)}, batch_size=5)).detach()
    with IntegratedGradients(attribution_key="agents", baseline=0.0).prepare(actor) as hooked:
        found = hooked.annotate(data)["agents", "observation"]
    chosen = data["agents", "action"]

    def score(x: torch.Tensor) -> torch.Tensor:
        return net.module(x).log_softmax(-1)[torch.arange(5), chosen]

    change = score(data["observation"]) - score(torch.zeros(5, 4))
    torch.testing.assert_close(found.sum(-1), change.detach(), rtol=1e-3, atol=1e-3)


def test_a_target_of_the_users_may_look_at_earlier_results() -> None:
    net = nn.Linear(4, 1)
    data = TensorDict({"input": torch.randn(5, 4), "attr": {"input": torch.randn(5, 4)}}, batch_size=5)
    weight = data["attr", "input"].sum(-1)
    scaled = targets.Target("scaled", lambda run: run.outputs["output"][..., 0] * run.stored["attr", "input"].sum(-1))
    with IntegratedGradients(target=scaled, baseline=0.0).prepare(net) as hooked:
        found = hooked(data)["attr", "input"]
    torch.testing.assert_close(found, (net.weight * data["input"] * weight[:, None]).detach())
