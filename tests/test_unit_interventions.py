"""Units and squares of maps that are set, and activations of other inputs put in, against hooks by hand."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.collectors import MultiSyncCollector

from tdhook_rl import ActivationCaching, Compose, Saliency
from tdhook_rl.envs import CueCorners
from tdhook_rl.errors import InputError, MissingKeyError, SiteError
from tdhook_rl.examples.agent import FC2, make_actor
from tdhook_rl.latent import MapPatch, StateSubtraction, UnitValues
from tests.policies import CASES, POLICIES, Case, actor, mlp
from tests.steered_by_hand import acting, by_case, by_hand, positive, require_equal, some_batch
from tests.test_invariants import assert_at_rest

MAPS = {name: POLICIES[name] for name in ("pixels", "bytes")}


@by_case
def test_units_are_set_as_by_hand(case: Case, batch: tuple[int, ...]) -> None:
    some_batch(case, batch)
    policy, data = case.build(), case.data(*batch)
    channels_first = len(case.features) == 3
    mean = torch.randn(case.features[0] if channels_first else case.features[-1])
    rows = positive(case, data)

    def change(numbers: dict[int, float], gated: bool) -> object:
        def changed(value: Tensor, spread) -> Tensor:
            new = value.clone()
            for unit, number in numbers.items():
                place = (..., unit, slice(None), slice(None)) if channels_first else (..., unit)
                new[place] = number
            return torch.where(spread(rows), new, value) if gated else new

        return changed

    for method, numbers, gated in (
        (UnitValues({case.site: [0, 3]}), {0: 0.0, 3: 0.0}, False),
        (UnitValues({case.site: {1: 2.5, 0: -1.0}}), {1: 2.5, 0: -1.0}, False),
        (UnitValues({case.site: [2]}, value={case.site: mean}), {2: float(mean[2])}, False),
        (UnitValues({case.site: [1]}, value=0.5, when=lambda rows: positive(case, rows)), {1: 0.5}, True),
    ):
        with method.prepare(policy) as hooked:
            found = acting(hooked, data)
            expected = acting(by_hand(policy, case, change(numbers, gated), batch), data)
        require_equal(found, expected, policy.out_keys)


@pytest.mark.parametrize("batch", [(), (5,), (3, 2)], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_squares_of_maps_are_set_as_by_hand(name: str, batch: tuple[int, ...]) -> None:
    case = MAPS[name]
    some_batch(case, batch)
    policy, data = case.build(), case.data(*batch)
    squares = torch.randint(6, (*batch, 2))
    data["goal"] = squares
    rows = positive(case, data)

    def patched(maps: Tensor, squares: Tensor, channels: list[int], value: float | str, acts: Tensor) -> Tensor:
        new, lead = maps.clone(), maps.reshape(-1, *maps.shape[-3:])
        flat = new.view(-1, *maps.shape[-3:])
        for one, (row, column) in enumerate(squares.reshape(-1, 2).expand(len(flat), 2).tolist()):
            for channel in channels:
                if acts.reshape(-1).expand(len(flat))[one]:
                    plane = lead[one, channel]
                    numbers = {"mean": plane.mean(), "max": plane.max()}
                    flat[one, channel, row, column] = numbers.get(value, value)
        return new

    always = torch.ones(1, dtype=torch.bool)
    for method, square, channels, value, acts in (
        (MapPatch(case.site, square=(1, 4), value=5.5), torch.tensor([1, 4]), range(4), 5.5, always),
        (MapPatch(case.site, square="goal", value="max", channels=[0, 2]), squares, [0, 2], "max", always),
        (
            MapPatch(case.site, square="goal", value="mean", channels=[3], when=lambda rows: positive(case, rows)),
            squares, [3], "mean", rows,
        ),
    ):  # fmt: skip
        with method.prepare(policy) as hooked:
            found = acting(hooked, data)
        plain = by_hand(
            policy,
            case,
            lambda maps, spread, given=(square, channels, value, acts): patched(maps, given[0], *given[1:]),
            batch,
        )
        require_equal(found, acting(plain, data), policy.out_keys)


def test_values_and_squares_are_live() -> None:
    case = CASES["pixels"]
    method = Compose(MapPatch(case.site, square=(0, 0), value=1.0, channels=[1]), ActivationCaching(case.site))
    with method.prepare(case.build()) as hooked:
        hooked.controls.update_({"map_patch.square": torch.tensor([2, 3]), "map_patch.value": 4.0})
        maps = hooked(case.data(2))["cache", case.site]
        assert maps[:, 1, 2, 3].tolist() == [4.0, 4.0]
    with Compose(UnitValues({"1": [4]}), ActivationCaching("1")).prepare(mlp()) as hooked:
        hooked.controls["units.1"] = torch.tensor([0.75])
        assert hooked(TensorDict({"input": torch.randn(2, 6)}, 2))["cache", "1"][:, 4].tolist() == [0.75, 0.75]


def test_bad_units_and_squares_are_refused() -> None:
    for make, said in (
        (lambda: UnitValues({}), "there are none"),
        (lambda: UnitValues({"1": []}), "each once"),
        (lambda: UnitValues({"1": [3, 3]}), "each once"),
        (lambda: UnitValues({"1": [-1]}), "from 0"),
        (lambda: UnitValues({"1": {0: float("inf")}}), "not finite"),
        (lambda: UnitValues({"1": [5]}, value={"1": torch.zeros(3)}), "at least 6"),
        (lambda: UnitValues({"1": [5]}, value={"2": torch.zeros(9)}), "no activation for '1'"),
        (lambda: MapPatch("0", square=(0, -1), value=1.0), "counted from 0"),
        (lambda: MapPatch("0", square=(0, 1), value=1.0, channels=[]), "channels= are numbers"),
        (lambda: MapPatch("0", square=(0, 1), value="median"), "median"),
    ):
        with pytest.raises(InputError, match=said):
            make()
    case = CASES["pixels"]
    data = case.data(3).set("goal", torch.tensor([[0, 0], [1, 6], [2, 2]])).set("floats", torch.zeros(3, 2))
    for method, error, said in (
        (UnitValues({case.site: [4]}), InputError, "unit 4 of .* has 4 units"),
        (MapPatch(case.site, square=(6, 0), value=1.0), InputError, "a square that .* 6 rows and 6 columns"),
        (MapPatch(case.site, square="goal", value=1.0), InputError, "per-row square 'goal' names a square"),
        (MapPatch(case.site, square="floats", value=1.0), InputError, "as integers"),
        (MapPatch(case.site, square="nowhere", value=1.0), MissingKeyError, "'nowhere'"),
        (MapPatch(case.site, square=(0, 0), value=1.0, channels=[9]), InputError, "channel 9"),
        (MapPatch("module.0.module.1", square=(0, 0), value=1.0), InputError, "no maps of rows and columns"),
    ):
        with pytest.raises(error, match=said), method.prepare(case.build()) as hooked:
            hooked(data.clone())
    with UnitValues({"0": [0]}).prepare(nn.Sequential(nn.Linear(4, 2))) as hooked:
        assert hooked(input=torch.randn(3, 4))[:, 0].tolist() == [0.0] * 3  # with tensors too


# ---------------------------------------------------------------------- activations of other inputs


def negated(case: Case, rows: TensorDict) -> TensorDict:
    """The counterfactual of the tests."""
    value = rows[case.key]
    return rows.set(case.key, 255 - value if value.dtype == torch.uint8 else -value)


@by_case
def test_activations_of_the_counterfactual_are_put_in_as_by_hand(case: Case, batch: tuple[int, ...]) -> None:
    some_batch(case, batch)
    if case is POLICIES["batch_norm"]:
        pytest.skip("by hand, the statistics would be updated twice")
    policy, data = case.build(), case.data(*batch)
    kept: list[Tensor] = []
    keeping = by_hand(policy, case, lambda value, spread: kept.append(value.detach().clone()) or value, batch)
    acting(keeping, negated(case, data.clone()))
    rows = positive(case, data)
    for method, change in (
        ({}, lambda value, spread: kept[0].clone()),
        ({"alpha": 1.5}, lambda value, spread: value + 1.5 * (kept[0] - value)),
        (
            {"alpha": lambda rows: -0.5 * positive(case, rows), "when": lambda rows: positive(case, rows)},
            lambda value, spread: torch.where(spread(rows), value - 0.5 * (kept[0] - value), value),
        ),
    ):
        subtraction = StateSubtraction(case.site, lambda rows: negated(case, rows), **method)
        with subtraction.prepare(policy) as hooked:
            found, expected = acting(hooked, data), acting(by_hand(policy, case, change, batch), data)
            require_equal(found, expected, policy.out_keys)
            assert torch.equal(found[case.key], data[case.key])
            if callable(getattr(policy, "log_prob", None)) and case is not POLICIES["actor_value"]:
                log_prob = by_hand(policy, case, change, batch).log_prob(found.clone())
                torch.testing.assert_close(hooked.log_prob(found.clone()), log_prob)
            if method:
                assert torch.equal(hooked(data.clone()).get(("steered", "subtraction"), rows), rows)
            assert_at_rest(hooked)


def test_gradients_pass_through_both_runs_and_annotate_says_the_same() -> None:
    net = mlp().double()
    x = torch.randn(5, 6).double()
    data = TensorDict({"input": x, "shift": torch.randn(5, 6).double()}, batch_size=5)
    method = Compose(
        ActivationCaching("3"),
        StateSubtraction("1", lambda rows: rows.set("input", rows["input"].cos() + rows["shift"]), alpha=0.5),
        Saliency(when="step", attribution_key="live"),
        Saliency(),
        Saliency(input_modules=["1"], attribution_key="inner"),
    )
    with method.prepare(net) as hooked:
        found = hooked.annotate(hooked(data.clone()))
        with pytest.raises(MissingKeyError, match="shift"):
            hooked(data.select("input"))
    point = x.clone().requires_grad_()
    hidden = torch.lerp(net[:2](point), net[:2](point.cos() + data["shift"]), 0.5)
    hidden.retain_grad()
    net[2:](hidden).sum().backward()
    torch.testing.assert_close(found["cache", "3"], net[2:4](hidden))
    for root in ("live", "attr"):
        torch.testing.assert_close(found[root, "input"], point.grad)
    torch.testing.assert_close(found["inner", "1"], hidden.grad)


def test_the_second_run_draws_nothing_and_leaves_the_state() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x

    policy = actor(Counts(), nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    case = Case(lambda: policy, "module.0.module.1", (8,))
    with StateSubtraction(case.site, lambda rows: negated(case, rows), alpha="alpha").prepare(policy) as hooked:
        for step in range(4):
            data = case.data(3).set("alpha", torch.zeros(3))
            twin = copy.deepcopy(policy)
            torch.manual_seed(step)
            expected, state = twin(data.clone()), torch.get_rng_state()
            torch.manual_seed(step)
            found = hooked(data.clone())
            assert torch.equal(found["logits"], expected["logits"])
            assert torch.equal(found["action"], expected["action"])
            assert torch.equal(torch.get_rng_state(), state)
            assert float(policy.get_submodule("module.0.module.0").calls) == step + 1


def test_copies_compiled_and_functional_calls_subtract_too() -> None:
    case = CASES["categorical"]
    policy, data = case.build(), case.data(4)
    with StateSubtraction(case.site, lambda rows: negated(case, rows), alpha=0.7).prepare(policy) as hooked:
        expected = hooked(data.clone())["logits"]
        for twin in (copy.deepcopy(hooked), pickle.loads(pickle.dumps(hooked))):
            torch.testing.assert_close(twin(data.clone())["logits"], expected)
        params = TensorDict.from_module(policy).data.expand(2).clone()

        def call(params: TensorDict) -> Tensor:
            with params.to_module(hooked):
                return hooked.get_dist(data.clone()).logits

        stacked = torch.vmap(call)(params)
        torch.testing.assert_close(stacked[1], expected.log_softmax(-1))
        with torch.no_grad():
            compiled = torch.compile(hooked.get_dist, fullgraph=True, backend="eager")(data.clone())
        torch.testing.assert_close(compiled.logits, expected.log_softmax(-1))


def test_at_strength_zero_the_policy_runs_once() -> None:
    runs: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            runs.append(len(x))
            return super().forward(x)

    net, data = nn.Sequential(Counted(4, 3), nn.Tanh()), TensorDict({"input": torch.randn(5, 4)}, [5])
    expected, opposite = net(data["input"]), net(-data["input"])

    def negative(rows: TensorDict) -> TensorDict:
        # Set by another process between the two runs: the call under way goes on as it began.
        hooked.controls["subtraction.alpha"] = 1.0 - hooked.controls["subtraction.alpha"]
        return rows.set("input", -rows["input"])

    with StateSubtraction("1", negative, alpha=0.0, when=lambda rows: rows["input"][:, 0] < 9).prepare(net) as hooked:
        runs.clear()
        found = hooked(data.clone())
        assert len(runs) == 1
        assert torch.equal(found["output"], expected)
        assert not found["steered", "subtraction"].any()
        hooked.controls["subtraction.alpha"] = 1.0
        runs.clear()
        assert torch.equal(hooked(data.clone())["output"], expected)  # it was set to 0 before it acted
        assert len(runs) == 2
    with StateSubtraction("1", lambda rows: rows.set("input", -rows["input"]), alpha=0.0).prepare(net) as hooked:
        hooked(data.clone())
        hooked.controls["subtraction.alpha"] = 1.0
        assert torch.equal(hooked(data.clone())["output"], opposite)


def test_two_subtractions_do_not_act_in_each_others_runs() -> None:
    net, data = mlp(), TensorDict({"input": torch.randn(4, 6)}, batch_size=4)
    x = data["input"]
    method = Compose(
        StateSubtraction("1", lambda rows: rows.set("input", -rows["input"]), name="one"),
        StateSubtraction("3", lambda rows: rows.set("input", 2 * rows["input"]), alpha=0.5, name="two"),
    )
    with method.prepare(net) as hooked:
        found = hooked(data)["output"]
    hidden = torch.lerp(net[2:4](net[:2](-x)), net[:4](2 * x), 0.5)
    torch.testing.assert_close(found, net[4](hidden))


def test_bad_counterfactuals_are_refused() -> None:
    net, data = mlp(), TensorDict({"input": torch.randn(4, 6)}, batch_size=4)
    for function, said in (
        (lambda rows: rows["input"], "it returned one of Tensor"),
        (lambda rows: rows[:2], r"one of batch \(2,\)"),
        (lambda rows: rows.exclude("input"), "reads 'input'"),
    ):
        error = MissingKeyError if "reads" in said else InputError
        with StateSubtraction("1", function).prepare(net) as hooked, pytest.raises(error, match=said):
            hooked(data.clone())
    with pytest.raises(InputError, match="takes a function of"):
        StateSubtraction("1", lambda: data).prepare(net).__enter__()
    with StateSubtraction("1", lambda rows: rows).prepare(net) as hooked, pytest.raises(SiteError, match="TensorDict"):
        hooked(input=data["input"])


def test_subtraction_travels_to_workers() -> None:
    actor, env = make_actor(), partial(CueCorners, batch_size=[2], max_steps=4)
    with StateSubtraction(FC2, lambda rows: rows.set("observation", 1 - rows["observation"])).prepare(actor) as hooked:
        collector = MultiSyncCollector([env], hooked, frames_per_batch=32, total_frames=64)
        for data in collector:
            expected = actor.get_dist(data.select("observation").set("observation", 1 - data["observation"])).logits
            torch.testing.assert_close(data["logits"].log_softmax(-1), expected, rtol=1e-4, atol=1e-4)
            with torch.no_grad():
                for parameter in actor.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            collector.update_policy_weights_()
        collector.shutdown()
